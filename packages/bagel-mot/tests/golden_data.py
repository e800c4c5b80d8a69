"""The recorded data in `tests/golden`, and how results are compared with it.

`golden/README.md` says what was recorded; the bounds come from `golden/tolerances.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One recorded request: `json` as in NAME.json, `tensors` as in NAME.safetensors."""

    name: str
    json: dict[str, Any]
    tensors: dict[str, Tensor]

    def segments(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """Tensor prefix (`seg0`) and description of the blocks of a kind: text, vae or vit."""
        return [
            (f"seg{index}", segment)
            for index, segment in enumerate(self.json["segments"])
            if segment["kind"] == kind
        ]


class Golden:
    """Loader of the recorded data; files are read once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"
        self._load = cache(self._read_case)

    def case(self, name: str) -> GoldenCase:
        """A case by its name or by the short one before the first underscore (`b1`)."""
        matches = [full for full in self.names if name in (full, full.split("_", 1)[0])]
        if len(matches) != 1:
            raise KeyError(f"no case {name!r}; there are {', '.join(self.names)}")
        return self._load(matches[0])

    @cached_property
    def names(self) -> list[str]:
        """Names of all cases, in order."""
        return sorted(file.stem for file in (self.folder / "cases").glob("*.json"))

    def json(self, name: str) -> Any:
        """Content of a JSON file, by its path in the data set."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def weights(self, prefix: str, file: str = "ema.safetensors") -> dict[str, Tensor]:
        """Checkpoint tensors below a prefix, without it, as float32."""
        with safe_open(self.checkpoint / file, framework="pt") as tensors:
            found = {
                name.removeprefix(prefix): tensors.get_tensor(name).float()
                for name in tensors.keys()  # noqa: SIM118 (no mapping: it cannot be iterated)
                if name.startswith(prefix)
            }
        if not found:
            raise KeyError(f"{file} has no tensor that starts with {prefix!r}")
        return found

    @cached_property
    def fp32_bound(self) -> float:
        """The largest relative error allowed in float32."""
        bound: float = self.json("tolerances.json")["fp32"]["bound"]
        return bound

    def _read_case(self, name: str) -> GoldenCase:
        path = self.folder / "cases" / name
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return GoldenCase(name, content, load_file(path.with_suffix(".safetensors")))


GOLDEN = Golden()


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, L2 norms in float64; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got.double() - want.double()).norm()
    error = float(difference / want.double().norm()) if difference else 0.0
    return error if error == error else float("inf")


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    """Fail if a result is farther from what it should be than float32 may be."""
    error = relative_error(got, want)
    assert error <= GOLDEN.fp32_bound, f"{name}: error {error:.2e} > {GOLDEN.fp32_bound:.0e}"


def assert_recorded(name: str, got: Tensor, want: Tensor) -> None:
    """Fail if a float32 result is farther from the recording than the data set allows."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, recorded {tuple(want.shape)}"
    assert got.dtype == torch.float32, f"{name}: {got.dtype}, expected float32"
    assert_close(name, got, want)


@dataclass
class Judge:
    """The bounds of section 5 of `golden/README.md`, for an implementation in `dtype`."""

    dtype: torch.dtype
    checked: set[str] = field(default_factory=set)

    def bound(self, case: str, key: str) -> float:
        """Largest relative error (for "image": mean absolute levels) allowed for a tensor."""
        if self.dtype is torch.float32:
            return GOLDEN.fp32_bound
        bounds = GOLDEN.json("tolerances.json")
        least = 0.25 if key == "image" else bounds["bf16_floor"]
        return max(bounds["bf16_factor"] * bounds["bf16"][case][key], least)

    def check(self, case: GoldenCase, key: str, got: Tensor) -> None:
        """Fail if `got` is too far from a recorded tensor; unrecorded keys are passed over."""
        self.check_first(case, key, got, rows=None)

    def check_first(self, case: GoldenCase, key: str, got: Tensor, rows: int | None) -> None:
        """The same for the first `rows` rows."""
        if key not in case.tensors:
            return
        self.checked.add(key)
        want, got = case.tensors[key], got.cpu()
        if rows is not None:
            want, got = want[:rows], got[:rows]
        error, bound = relative_error(got, want), self.bound(case.name, key)
        assert error <= bound, f"{case.name} {key}: error {error:.2e} > {bound:.1e}"

    def assert_nothing_missed(self, case: GoldenCase, *prefixes: str) -> None:
        """Fail if a recorded tensor whose name starts so was not checked."""
        missed = {key for key in case.tensors if key.startswith(prefixes)} - self.checked
        assert not missed, f"{case.name}: not compared: {', '.join(sorted(missed))}"

    def check_pixels(self, case: GoldenCase, difference: np.ndarray) -> None:
        """Fail if decoded levels differ: by more than 1 in float32, on average in bfloat16."""
        if self.dtype is torch.float32:
            assert np.abs(difference).max() <= 1
            return
        assert np.abs(difference).mean() <= self.bound(case.name, "image")
        assert abs(difference.mean()) < 0.25

    def equal_tokens(self, got: list[int], want: list[int], margins: list[float]) -> int:
        """How many tokens agree; all must, up to a step too close to call.

        `margins[i]` decides the token fed after step i.
        """
        least = 0.002 if self.dtype is torch.float32 else 0.15
        same = 0
        while same < min(len(got), len(want)) and got[same] == want[same]:
            same += 1
        close = any(margin < least for margin in margins[:same])
        assert (got == want) or close, f"tokens differ at {same}: {got} instead of {want}"
        return same
