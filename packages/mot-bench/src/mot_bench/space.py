"""Which tiles the tuner tries: few enough for minutes, wide enough to hold the best ones.

Two steps. First the tile's shape, warps and stages, with the computed default's `group_m`; then
other values of `group_m` for the best of them, as it only changes the order of the tiles.
Legality is `mot_kernels.tuning.config.is_legal`, the rule that loader and default follow too; for
weights in a format `tuning.format_tiles.is_legal_format`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch
from mot_kernels.dispatch import HOPPER_ROW_BYTES
from mot_kernels.formats import FORMATS
from mot_kernels.plan import TILE_ROWS
from mot_kernels.tuning.config import TileConfig, is_legal
from mot_kernels.tuning.format_tiles import hopper_block_k, is_legal_format
from mot_kernels.tuning.lookup import Problem, default_config

# Up to this many rows of the largest expert a problem is bound by reading the weights.
_SHORT_ROWS = 64

# (block_k, stages): about the same bytes in flight.
_SHORT_DEPTHS = ((64, 4), (64, 6), (128, 3), (128, 5), (256, 2), (256, 3))
_LONG_DEPTHS = ((32, 4), (64, 3), (64, 4), (64, 5), (128, 2), (128, 3))
# Weights of half the bytes and less: deeper.
_SHORT_FORMAT_DEPTHS = ((32, 8), (64, 8), (128, 3), (128, 5), (256, 3), (256, 5))
_LONG_FORMAT_DEPTHS = ((32, 4), (64, 3), (64, 4), (128, 2), (128, 3), (128, 4))
# fp32 has no tensor cores at full precision and twice the bytes.
_FP32_DEPTHS = ((16, 2), (16, 3), (32, 2), (32, 3))

_GROUPS = (1, 4, 8, 16, 32)

# From this many rows of the largest expert on, schedule "hopper" is tried alone.
_HOPPER_ALONE = 512

# Fewer accumulators per thread than this leave a tall tile's warps without work.
_LEAST_REGISTERS = 32


def first_candidates(
    problem: Problem, shared_memory: int, *, hopper: bool = False
) -> list[TileConfig]:
    """The configs of the first step, the computed default first.

    Args:
        problem: shape, dtype, epilogue and rows.
        shared_memory: bytes a block may have on the device.
        hopper: schedule "hopper" is possible.
    """
    default = default_config(problem, shared_memory, hopper)
    candidates = []
    if not hopper or max(problem.counts) < _HOPPER_ALONE:
        candidates += [replace(config, group_m=default.group_m) for config in _shapes(problem)]
    if hopper:
        format = problem.format
        depth = HOPPER_ROW_BYTES // 2 if format is None else hopper_block_k(FORMATS[format])
        candidates += [
            TileConfig(128, n, depth, default.group_m, 4, stages, "hopper")
            for n, stages in ((256, 4), (256, 3), (128, 4), (128, 6))
        ]
    if default.schedule == "few_rows":
        candidates += [
            TileConfig(16, width, depth, 1, 4, stages, "few_rows")
            for width, depth, stages in product((32, 64, 128), (64, 128, 256), (3, 4, 6))
        ]
    return _legal([default, *candidates], problem, shared_memory)


def regrouped(
    configs: Iterable[TileConfig], problem: Problem, shared_memory: int
) -> list[TileConfig]:
    """The configs of the second step: these with every other `group_m`."""
    seen = set(configs)
    varied = [
        replace(config, group_m=group)
        for config in configs
        if config.schedule != "few_rows"  # whose tiles are not ordered by it
        for group in _GROUPS
    ]
    fresh = [config for config in varied if config not in seen]
    return _legal(fresh, problem, shared_memory)


def _legal(configs: Iterable[TileConfig], problem: Problem, shared_memory: int) -> list[TileConfig]:
    dtype, epilogue = problem.dtype, problem.epilogue

    def legal(config: TileConfig) -> bool:
        if problem.format is not None:
            format = FORMATS[problem.format]
            return is_legal_format(config, format, dtype, epilogue, shared_memory)
        silu_mul = epilogue == "silu_mul"
        return is_legal(config, dtype, silu_mul=silu_mul, shared_memory=shared_memory)

    return [config for config in dict.fromkeys(configs) if legal(config)]


def _shapes(problem: Problem) -> Iterator[TileConfig]:
    rows = max(problem.counts)
    silu_mul = problem.epilogue == "silu_mul"
    columns = problem.n // 2 if silu_mul else problem.n
    short = rows <= _SHORT_ROWS
    # The three tallest tiles that do not overshoot the rows by a factor of two or more.
    heights = [height for height in TILE_ROWS if height < 2 * max(rows, 9)][-3:]
    widths = [w for w in ((32, 64, 128) if short else (64, 128, 256)) if w < 2 * max(columns, 17)]
    depths: Sequence[tuple[int, int]] = _SHORT_DEPTHS if short else _LONG_DEPTHS
    if problem.format is not None:
        depths = _SHORT_FORMAT_DEPTHS if short else _LONG_FORMAT_DEPTHS
    elif problem.dtype is torch.float32:
        depths, widths = _FP32_DEPTHS, [min(width, 128) for width in widths]
    depths = [pair for pair in depths if pair[0] < 2 * max(problem.k, 17)] or depths[:1]
    for height, width, (depth, stages), warps in product(heights, widths or [32], depths, (4, 8)):
        config = TileConfig(height, width, depth, num_warps=warps, num_stages=stages)
        registers = config.accumulator_registers(silu_mul=silu_mul)
        if short or registers >= _LEAST_REGISTERS or warps == 4:
            yield config
