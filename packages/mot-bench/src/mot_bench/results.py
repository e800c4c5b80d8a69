"""What a run of `mot-bench kernels` found, as data: written to JSON, read by reports and plots.

Only what was measured is stored. Rates, percentages and ratios are computed here, in one place,
by whoever shows them. No torch here: reports are written where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mot_bench.files import file_stem, write_json

SCHEMA = 1
KIND = "kernels"


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_us, p20_us, p80_us: median, 20th and 80th percentile of the rounds, microseconds.
        samples: rounds; each is the mean of one call per input set.
        method: "graph" (CUDA graph and events), "stream" (events around launches from Python,
            whose overhead is in the time) or "clock" (the host's clock; CPU only).
        note: why the method is not the usual one, or empty.
    """

    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    method: str
    note: str = ""


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this very run, to judge the other times by.

    Attributes:
        dtype: of the matmul.
        matmul_tflops: of one large square matmul, 1e12 operations per second.
        copy_gbps: of one large copy, bytes read plus bytes written, 1e9 per second.
        matmul_size: rows and columns of the matmul.
        copy_bytes: bytes read plus bytes written.
    """

    dtype: str
    matmul_tflops: float
    copy_gbps: float
    matmul_size: int
    copy_bytes: int

    def floor_us(self, flops: float, bytes_moved: float) -> float:
        """The time that work takes at the ceilings: the longer of computing and moving."""
        return max(flops / self.matmul_tflops / 1e6, bytes_moved / self.copy_gbps / 1e3)


@dataclass(frozen=True)
class Environment:
    """Where and when something was measured; "unknown" where it cannot be found out.

    Attributes:
        device: the GPU's name, or "CPU" and the processor.
        driver: of the GPU.
        cuda: the CUDA (or ROCm) release torch was built for.
        python, torch, triton, mot_kernels, mot_bench: versions.
        commit: of the repository this code runs from, with "-dirty" if files were changed.
        date: UTC, to the second.
        clocks: power limit and clocks, as one phrase.
    """

    device: str
    driver: str
    cuda: str
    python: str
    torch: str
    triton: str
    mot_kernels: str
    mot_bench: str
    commit: str
    date: str
    clocks: str


def run_file(kind: str, environment: Environment) -> str:
    """A file name that no other run has: kind, device, time and process are in it."""
    device = file_stem(environment.device)
    stamp = environment.date.translate(str.maketrans("", "", "-:"))
    return f"{kind}-{device}-{stamp}-{os.getpid()}.json"


@dataclass(frozen=True)
class ProviderResult:
    """One provider on one case.

    Attributes:
        name: the provider, unique within its operation.
        label: what it is, in a few words.
        baseline: whether others are compared to it.
        status: "timed", "failed" (wrong, or it raised) or "unavailable" (cannot run here).
        why: for the last two the reason; otherwise a remark, or empty.
        timing: None unless timed.
    """

    name: str
    label: str
    baseline: bool
    status: str
    why: str
    timing: Timing | None


@dataclass(frozen=True)
class CaseResult:
    """All providers on one case.

    Attributes:
        id: unique within a run.
        op: the operation.
        shape, routing: for tables.
        counts: rows per expert.
        flops, bytes_moved: the work, see `mot_bench.cases`.
        sets: input sets rotated over.
        cold: whether they exceed L2 often enough, see `mot_bench.protocol.Rotation`.
        providers: in the order of the operation's registry.
    """

    id: str
    op: str
    shape: str
    routing: str
    counts: tuple[int, ...]
    dtype: str
    flops: float
    bytes_moved: int
    sets: int
    cold: bool
    providers: tuple[ProviderResult, ...]

    @property
    def baseline(self) -> ProviderResult | None:
        """The provider others are compared to, if it has a time."""
        return next((p for p in self.providers if p.baseline and p.timing is not None), None)


@dataclass(frozen=True)
class Results:
    """A whole run.

    Attributes:
        schema, kind: of the file.
        command: what to type to repeat it.
        environment: where it ran.
        protocol: how it was timed, in a sentence.
        ceilings: what the device reached in this run.
        complete: False while cases are missing (written after each, in case the run is cut off).
        cases: in the order they ran.
    """

    schema: int
    kind: str
    command: str
    environment: Environment
    protocol: str
    ceilings: Ceilings
    complete: bool
    cases: tuple[CaseResult, ...]

    @property
    def failures(self) -> list[tuple[CaseResult, ProviderResult]]:
        """Every provider that failed, with its case."""
        return [(c, p) for c in self.cases for p in c.providers if p.status == "failed"]

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote.

        Raises:
            ValueError: not such a file; the message names the file and the key.
            OSError: it cannot be read.
        """
        results: Results = read_json(cls, path, KIND, SCHEMA)
        return results


def tflops(case: CaseResult, timing: Timing) -> float:
    """1e12 operations per second."""
    return case.flops / timing.median_us / 1e6


def gbps(case: CaseResult, timing: Timing) -> float:
    """1e9 bytes per second, counting each byte that must move once."""
    return case.bytes_moved / timing.median_us / 1e3


def rate(value: float) -> str:
    """A rate with three digits or more, whatever its size: of a CPU or of many GPUs."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def percent_of_ceiling(case: CaseResult, timing: Timing, ceilings: Ceilings) -> float:
    """How much of the time would remain at the ceilings of computing and moving, in percent."""
    return 100 * ceilings.floor_us(case.flops, case.bytes_moved) / timing.median_us


def times_baseline(case: CaseResult, timing: Timing) -> float | None:
    """The time relative to the baseline's (less is faster), or None without a baseline."""
    baseline = case.baseline
    if baseline is None or baseline.timing is None:
        return None
    return timing.median_us / baseline.timing.median_us


def percentile(samples: Sequence[float], percent: float) -> float:
    """The percentile of samples, linear between neighbours (as numpy's default)."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def geometric_mean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclass(frozen=True)
class Mean:
    """Geometric means of one provider of one operation over its cases.

    Attributes:
        cases: how many it was timed on, of the `of` cases in all.
        compared: how many of these have a baseline.
        times_baseline: time relative to the baseline's.
        percent_of_ceiling: see `percent_of_ceiling`.
    """

    op: str
    name: str
    label: str
    cases: int
    of: int
    compared: int
    times_baseline: float | None
    percent_of_ceiling: float | None


def means(results: Results) -> list[Mean]:
    """Per operation and provider, in the order they first appear.

    A provider that some cases lack is averaged over the others; `cases` shows it.
    """
    found: dict[tuple[str, str], list[tuple[CaseResult, ProviderResult]]] = {}
    for case in results.cases:
        for provider in case.providers:
            found.setdefault((case.op, provider.name), []).append((case, provider))
    summary = []
    for (op, name), pairs in found.items():
        timed = [(case, p.timing) for case, p in pairs if p.timing is not None]
        ratios = [r for c, timing in timed if (r := times_baseline(c, timing)) is not None]
        percents = [percent_of_ceiling(c, timing, results.ceilings) for c, timing in timed]
        label, counts = pairs[0][1].label, (len(timed), len(pairs), len(ratios))
        summary.append(
            Mean(op, name, label, *counts, geometric_mean(ratios), geometric_mean(percents))
        )
    return summary


def read_json(
    cls: Any, path: Path, kind: str, schema: int, *, derived: Collection[str] = ()
) -> Any:
    """Read a dataclass `cls`, which has fields `kind` and `schema`, from a JSON file.

    Args:
        derived: keys that were written for other readers and are no fields.

    Raises:
        ValueError: not such a file; the message names the file and the key.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
    for key, expected in (("schema", schema), ("kind", kind)):
        if content.get(key) != expected:
            raise ValueError(f"{path}: key {key!r} is {content.get(key)!r}; expected {expected!r}")
    fields = {key: value for key, value in content.items() if key not in derived}
    try:
        return parse(cls, fields, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`: a dataclass, tuple[X, ...], optional or plain type."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"key {where!r} must be an object")
        types_by_name = typing.get_type_hints(kind)
        hints = {field.name: types_by_name[field.name] for field in dataclasses.fields(kind)}
        if unknown := sorted(set(value) - set(hints)):
            raise ValueError(f"unknown key {_join(where, unknown[0])!r}")
        needed = {
            field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
        }
        if missing := sorted(needed - set(value)):
            raise ValueError(f"key {_join(where, missing[0])!r} is missing")
        fields = {key: parse(hints[key], value[key], _join(where, key)) for key in value}
        return typing.cast(Any, kind)(**fields)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"key {where!r} must be a list")
        item = typing.get_args(kind)[0]
        return tuple(parse(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return parse(typing.get_args(kind)[0], value, where)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"key {where!r} is too large a number") from None
    if type(value) is not kind:
        raise ValueError(f"key {where!r} is {value!r}; expected {kind.__name__}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
