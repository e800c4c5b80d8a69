"""Which `TileConfig` a problem gets.

In order: the caller's `config=`; a file in `$MOT_TUNED_CONFIG_DIR`; one in
`$VLLM_TUNED_CONFIG_FOLDER` (vLLM's users set it already); the file packaged for this GPU; a
computed default, which is logged once together with the command that would tune it.

A file is `mot_linear/<GPU name>.json` below the folder: a header (schema, op, device, torch,
triton, commit, date) and `entries`, each {n, k, dtype, epilogue, rows: rows per expert, config},
format for weights that have one, and what was measured: us, default_us, and found, of the header's
keys, where it was not as the header says. Among entries for the same (n, k, dtype, epilogue,
format) the one whose largest expert is nearest in log(rows) is used, if it is within a factor of
REACH, and if both or neither of the two have FEW_ROWS at most.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mot_kernels.dispatch import warn_once
from mot_kernels.formats import FORMATS
from mot_kernels.tuning.config import (
    FEW_ROWS,
    HOPPER_SHARED_MEMORY,
    TileConfig,
    is_legal,
    why_illegal,
)
from mot_kernels.tuning.format_tiles import default_format_config, why_illegal_format

SCHEMA = 1
OP = "mot_linear"
PACKAGED = Path(__file__).parent / "configs"
_FOLDER_VARIABLES = ("MOT_TUNED_CONFIG_DIR", "VLLM_TUNED_CONFIG_FOLDER")
_ENTRY_KEYS = {"n", "k", "dtype", "epilogue", "rows", "config"}
_MORE_ENTRY_KEYS = {"format", "us", "default_us", "found"}

# Shared memory a block may have where no device can be asked (interpreter): that of sm_86/89.
_LEAST_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Problem:
    """What tile sizes depend on.

    Attributes:
        n: rows of each expert's weight (for "silu_mul" gate and up together).
        k: columns of the weight.
        dtype: of x and the weight; with a format, of x (before it was rounded).
        epilogue: "none", "silu_mul" or "add_residual".
        counts: rows per expert.
        format: the name of the weight's format; None for a plain weight.
    """

    n: int
    k: int
    dtype: torch.dtype
    epilogue: str
    counts: tuple[int, ...]
    format: str | None = None

    @property
    def dtype_name(self) -> str:
        """The dtype without "torch."."""
        return str(self.dtype).removeprefix("torch.")


REACH = 4
"""Tiles tuned for so many times more or fewer rows are not taken: a default fits better."""

# By GPU and problem without its rows: the rows of the first one for which nothing was found. They
# are those that the warning names, so that it is the same, and given once, for all rows.
_first_misses: dict[tuple[str, Problem], tuple[int, ...]] = {}


@functools.lru_cache(maxsize=4096)
def find_config(problem: Problem, device: torch.device, hopper: bool = False) -> TileConfig:
    """The config for a problem on a device, following the order in the module docstring.

    Args:
        hopper: the schedule "hopper" is possible: for this GPU and for these tensors.

    Raises:
        ValueError: a tuned file is broken, or has tiles that do not fit this GPU; the message
            names the file and the key.
    """
    if device.type != "cuda":
        return default_config(problem, shared_memory_of(device))
    name = torch.cuda.get_device_name(device)
    shared_memory = shared_memory_of(device)
    for path in config_files(name):
        best = _nearest(load_entries(path), problem, hopper)
        if best is None:
            continue
        if (why := _why_illegal(problem, best, shared_memory)) is not None:
            raise ValueError(
                f"tuned config {path}: K={problem.k}, N={problem.n}, {problem.dtype_name}, "
                f"epilogue {problem.epilogue}: {why} on {name}; tune it there, with mot-bench tune"
            )
        return best
    counts = _first_misses.setdefault((name, replace(problem, counts=())), problem.counts)
    rows = ",".join(map(str, counts))
    has_format = "" if problem.format is None else f", format {problem.format}"
    with_format = "" if problem.format is None else f"--format {problem.format} "
    warn_once(
        f"no tuned tiles for {OP} with K={problem.k}, N={problem.n}, {problem.dtype_name}, "
        f"epilogue {problem.epilogue}{has_format} on {name}: using a computed default. To tune, "
        f"run: mot-bench tune --shape {problem.k},{problem.n} --dtype {problem.dtype_name} "
        f"--epilogue {problem.epilogue} {with_format}--rows {rows} --output DIR   and then "
        f"export {_FOLDER_VARIABLES[0]}=DIR"
    )
    return default_config(problem, shared_memory, hopper)


def shared_memory_of(device: torch.device) -> int:
    """Bytes that a block of threads may use, at most."""
    if device.type != "cuda":
        return _LEAST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    # Torch's ROCm builds know no other than the plain limit.
    optin = getattr(properties, "shared_memory_per_block_optin", None)
    return int(optin or properties.shared_memory_per_block)


def config_files(device_name: str) -> list[Path]:
    """Existing tuned files for a GPU, the most specific folder first."""
    folders = [Path(os.environ[v]) for v in _FOLDER_VARIABLES if os.environ.get(v)]
    wanted = _device_key(device_name)
    return [
        path
        for folder in [*folders, PACKAGED]
        for path in sorted((folder / OP).glob("*.json"))
        if _device_key(path.stem) == wanted
    ]


def _device_key(name: str) -> str:
    """One spelling for "NVIDIA H200", "NVIDIA_H200" and "H200"."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("amd")


@functools.cache
def load_entries(path: Path) -> tuple[tuple[Problem, TileConfig], ...]:
    """Read and validate one tuned file. Its GPU need not be here.

    Raises:
        ValueError: it is not JSON, of another schema, or an entry has a bad key or value, or tiles
            that fit no GPU.
    """
    try:
        content: Any = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"tuned config {path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"tuned config {path}: key 'schema' is {found!r}; expected {SCHEMA}")
    if content.get("op") != OP:
        raise ValueError(f"tuned config {path}: key 'op' is {content.get('op')!r}; expected {OP!r}")
    if not isinstance(content.get("entries"), list):
        raise ValueError(f"tuned config {path}: key 'entries' must be a list")
    entries = []
    for i, entry in enumerate(content["entries"]):
        try:
            entries.append(_parse_entry(entry))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"tuned config {path}: entries[{i}]: {error}") from error
    return tuple(entries)


def _parse_entry(entry: Any) -> tuple[Problem, TileConfig]:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {entry!r}")
    if missing := sorted(_ENTRY_KEYS - set(entry)):
        raise ValueError(f"key {missing[0]!r} is missing")
    known = _ENTRY_KEYS | _MORE_ENTRY_KEYS
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"unknown key {unknown[0]!r}; known are {sorted(known)}")
    for key in ("n", "k"):
        if type(entry[key]) is not int:  # a bool is an int, too
            raise ValueError(f"key {key!r} is {entry[key]!r}; expected an integer")
    rows = entry["rows"]
    if not isinstance(rows, list) or not rows or any(type(r) is not int or r < 0 for r in rows):
        raise ValueError(f"key 'rows' is {rows!r}; expected a list of row counts, one per expert")
    if not isinstance(entry["config"], dict):
        raise ValueError(f"key 'config' is {entry['config']!r}; expected an object")
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"key 'dtype' is {entry['dtype']!r}; expected for example 'bfloat16'")
    if entry["epilogue"] not in ("none", "silu_mul", "add_residual"):
        raise ValueError(f"key 'epilogue' is {entry['epilogue']!r}")
    config = TileConfig.from_dict(entry["config"])
    format = entry.get("format")
    if format is not None and not (isinstance(format, str) and format in FORMATS):
        raise ValueError(f"key 'format' is {format!r}; expected one of {sorted(FORMATS)}")
    problem = Problem(entry["n"], entry["k"], dtype, entry["epilogue"], tuple(rows), format)
    # No GPU has more; whether it fits the one at hand is asked when it is chosen.
    if (why := _why_illegal(problem, config, HOPPER_SHARED_MEMORY)) is not None:
        raise ValueError(why)
    return problem, config


def _why_illegal(problem: Problem, config: TileConfig, shared_memory: int) -> str | None:
    """Why a config does not fit a GPU with `shared_memory` bytes a block; None if it does."""
    dtype, epilogue = problem.dtype, problem.epilogue
    if problem.format is not None:
        return why_illegal_format(config, FORMATS[problem.format], dtype, epilogue, shared_memory)
    silu_mul = epilogue == "silu_mul"
    return why_illegal(config, dtype, silu_mul=silu_mul, shared_memory=shared_memory)


def _nearest(
    entries: tuple[tuple[Problem, TileConfig], ...], problem: Problem, hopper: bool
) -> TileConfig | None:
    def shape(p: Problem) -> tuple[object, ...]:
        few = max(p.counts) <= FEW_ROWS
        return p.n, p.k, p.dtype, p.epilogue, p.format, len(p.counts), few

    def ratio(a: int, b: int) -> float:
        return abs(math.log((a + 1) / (b + 1)))

    def distance(other: Problem) -> tuple[float, float]:
        """By the largest expert, which most tiles belong to; then by all."""
        pairs = zip(other.counts, problem.counts, strict=True)
        largest = ratio(max(other.counts), max(problem.counts))
        return largest, sum(ratio(a, b) for a, b in pairs)

    candidates = [
        (distance(other), config)
        for other, config in entries
        if shape(other) == shape(problem) and (hopper or config.schedule != "hopper")
    ]
    near = [(d, config) for d, config in candidates if d[0] <= math.log(REACH)]
    return min(near, key=lambda pair: pair[0])[1] if near else None


def default_config(problem: Problem, shared_memory: int, hopper: bool = False) -> TileConfig:
    """A config computed from the shape, for GPUs with `shared_memory` bytes a block.

    With `hopper` it may have that schedule: where the largest expert fills a tile of it.

    Rows of the largest expert decide the tile's height; wide tiles where there are rows to fill
    them, deep steps where there are not (a short tile is bound by reading the weights).
    """
    rows = max(problem.counts)
    if problem.format is not None:
        format = FORMATS[problem.format]
        return default_format_config(
            format, problem.dtype, problem.epilogue, rows, shared_memory, hopper
        )
    silu_mul = problem.epilogue == "silu_mul"
    if hopper and rows >= 128:
        return TileConfig(128, 256, 64, 8, 4, 4, schedule="hopper")
    if problem.dtype is torch.float32:  # no tensor cores in full precision: small tiles
        candidates = [
            TileConfig(64 if rows > 32 else 16, 64, 32, 8, 4, stages) for stages in (3, 2, 1)
        ]
    elif rows <= FEW_ROWS:
        # 20 KB a stage; three programs of three full stages fit a multiprocessor of sm_90.
        candidates = [TileConfig(16, 64, 128, 1, 4, stages, "few_rows") for stages in (4, 3, 2)]
    elif rows <= 64:
        height = 32 if rows <= 32 else 64
        candidates = [TileConfig(height, 64, 128, 1, 4, stages) for stages in (5, 4, 3, 2)]
        candidates += [TileConfig(height, 64, 64, 1, 4, stages) for stages in (3, 2)]
    else:
        # Two accumulators halve the width that fits in registers.
        width = 128 if silu_mul else 256
        candidates = [TileConfig(128, width, 64, 8, 8, stages) for stages in (4, 3)]
        candidates += [TileConfig(128, 64 if silu_mul else 128, 64, 8, 4, s) for s in (4, 3, 2)]
        candidates += [TileConfig(64, 64, 32, 8, 4, stages) for stages in (3, 2, 1)]
    for config in candidates:
        if is_legal(config, problem.dtype, silu_mul=silu_mul, shared_memory=shared_memory):
            return config
    raise ValueError(f"no tile fits {shared_memory} bytes of shared memory for {problem}")
