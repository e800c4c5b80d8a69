"""Tiles of `mot_linear` with an `ExpertWeight`: what a format demands, and computed defaults."""

from __future__ import annotations

import torch

from mot_kernels.dispatch import HOPPER_ROW_BYTES
from mot_kernels.formats import (
    BLOCK,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    WeightScales,
    quantizes_activations,
)
from mot_kernels.tuning.config import FEW_ROWS, TileConfig, why_other_dtype, why_too_large

# 8-bit matrix instructions take 32 at a time.
_LEAST_BLOCK_K = 32

# From so many rows of the largest expert on, weights are written out in 16 bits.
_ROWS_TO_WRITE_OUT = 256


def most_block_k(format: Format) -> int:
    """The deepest step: one scale along K holds for all of it, and FP8 units add up no more."""
    if isinstance(format, Int4W4A16):
        return format.group_size
    return BLOCK if isinstance(format, Fp8W8A8) else 256


def hopper_block_k(format: Format) -> int:
    """The step of schedule "hopper": of 8-bit numbers, or of weights written out in 16 bits."""
    return HOPPER_ROW_BYTES if quantizes_activations(format) else HOPPER_ROW_BYTES // 2


def check_format_config(config: TileConfig, format: Format) -> None:
    """Raise a ValueError that says why a config does not fit a format."""
    if config.schedule == "hopper":
        if format == Fp8W8A8(WeightScales.BLOCK) and config.block_n != 2 * BLOCK:
            raise ValueError(
                f"config has block_n={config.block_n}; schedule 'hopper' has {2 * BLOCK} with "
                f"format {format}"
            )
        if config.block_k != hopper_block_k(format):
            raise ValueError(
                f"config has block_k={config.block_k}; schedule 'hopper' has "
                f"{hopper_block_k(format)} with format {format}"
            )
        return
    if config.schedule == "few_rows" and quantizes_activations(format):
        raise ValueError(f"config has schedule 'few_rows', which format {format} has no kernel for")
    most = most_block_k(format)
    if not _LEAST_BLOCK_K <= config.block_k <= most:
        raise ValueError(
            f"config has block_k={config.block_k}; with format {format} it can be "
            f"{_LEAST_BLOCK_K}..{most}"
        )


def is_legal_format(
    config: TileConfig, format: Format, dtype: torch.dtype, epilogue: str, shared_memory: int
) -> bool:
    """`tuning.config.is_legal` for a weight in a format."""
    return why_illegal_format(config, format, dtype, epilogue, shared_memory) is None


def why_illegal_format(
    config: TileConfig, format: Format, dtype: torch.dtype, epilogue: str, shared_memory: int
) -> str | None:
    """`tuning.config.why_illegal` for a weight in a format."""
    try:
        check_format_config(config, format)
    except ValueError as error:
        return str(error)
    if (why := why_other_dtype(config, dtype)) is not None:
        return why
    needed = shared_memory_bytes(config, format, dtype, epilogue)
    silu_mul = epilogue == "silu_mul"
    return why_too_large(config, needed, silu_mul=silu_mul, shared_memory=shared_memory)


def shared_memory_bytes(
    config: TileConfig, format: Format, dtype: torch.dtype, epilogue: str
) -> int:
    """Shared memory the tiles take, in bytes: the pipeline's, and the weight in x's dtype.

    The latter once, beside the stages, where the matrix unit reads its operands from there.
    """
    if config.schedule == "hopper":
        rows = config.block_m + config.block_n
        return rows * HOPPER_ROW_BYTES * config.num_stages
    narrow = quantizes_activations(format)
    x_bytes = 1 if narrow else dtype.itemsize
    halves = 2 if epilogue == "silu_mul" and config.schedule == "portable" else 1
    weights = config.block_n * config.block_k * halves
    stored = weights // 2 if isinstance(format, Int4W4A16) else weights
    stages = (config.block_m * config.block_k * x_bytes + stored) * config.num_stages
    # e4m3fn without FP8 units becomes fp16, both operands.
    if isinstance(format, Fp8W8A8) or config.schedule == "few_rows":
        return stages
    return stages if narrow else stages + config.block_n * config.block_k * dtype.itemsize


def default_format_config(
    format: Format,
    dtype: torch.dtype,
    epilogue: str,
    rows: int,
    shared_memory: int,
    hopper: bool = False,
) -> TileConfig:
    """A config computed from the shape, as `tuning.lookup.default_config` does for plain weights.

    With `hopper` it may have that schedule: 8 bits where the largest expert fills a tile of it,
    weights that are first written out in 16 bits where there are rows enough to pay for that.

    Few rows: reading the weights is all the work, so narrow tiles, to have more programs than
    multiprocessors, and deep steps and many stages, to have many bytes under way. Many rows: as
    large as registers allow, by ptxas' count of spilled ones for BAGEL's shapes. INT8 adds up where
    it multiplies; FP8 and groups have the sums of a step beside the accumulators.
    """
    if hopper and rows >= (128 if quantizes_activations(format) else _ROWS_TO_WRITE_OUT):
        return TileConfig(128, 256, hopper_block_k(format), 8, 4, 4, schedule="hopper")
    most = most_block_k(format)
    halves = 2 if epilogue == "silu_mul" else 1
    narrow = quantizes_activations(format)
    # From sm_90 on matrix units read operands from shared memory, of which there is more; before,
    # operands take registers, all the more where e4m3fn is turned into fp16.
    roomy = shared_memory > 200 * 1024
    int8 = isinstance(format, Int8W8A8)
    if dtype is torch.float32 and not int8:  # no tensor cores in full precision: small tiles
        height = 64 if rows > 32 else 16
        candidates = [TileConfig(height, 64, 32, 8, 4, stages) for stages in (3, 2, 1)]
    elif rows <= FEW_ROWS and not narrow:
        # 16 KB of int8, or 4 KB of INT4, a stage: measured, see docs/log.md, 2026-11-25.
        candidates = [
            TileConfig(16, 64, min(depth, most), 1, 4, stages, "few_rows")
            for depth, stages in ((256, 4), (128, 4), (128, 3))
        ]
    elif rows <= 64:
        height = 16 if rows <= 16 else 32 if rows <= 32 else 64
        width = 32 if rows <= 16 else 64 // halves
        candidates = [
            TileConfig(height, width, depth, 1, 4, stages)
            for depth, stages in ((256, 5), (256, 3), (128, 8), (128, 5), (128, 3), (64, 8))
            if depth <= most
        ]
        candidates += [TileConfig(height, width, 32, 1, 4, stages) for stages in (8, 5, 3)]
    else:
        depth = min(128 if int8 or (narrow and roomy) else 64, most)
        candidates = [
            TileConfig(128, width // halves, depth, 8, 8, stages)
            for width in ((256, 128) if int8 and roomy else (128,))
            for stages in (4, 3, 2)
        ]
        candidates += [TileConfig(64, 64 // halves, 32, 8, 4, stages) for stages in (3, 2, 1)]
    for config in candidates:
        if shared_memory_bytes(config, format, dtype, epilogue) <= shared_memory:
            return config
    raise ValueError(f"no tile fits {shared_memory} bytes of shared memory for format {format}")
