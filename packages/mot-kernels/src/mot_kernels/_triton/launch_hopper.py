"""Launch the Hopper kernel: how its work is dealt out, descriptors, grid."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from mot_kernels._triton.launcher import (
    TRITON_DTYPES,
    count_multiprocessors,
    launch,
    strides,
    with_partials,
)
from mot_kernels._triton.tile import _EPILOGUE_SILU_MUL
from mot_kernels.dispatch import HOPPER_ROW_BYTES
from mot_kernels.plan import MOST_PROGRAMS, TileRange
from mot_kernels.replay import Keep
from mot_kernels.tuning.config import TileConfig

_LOADING_WARPS = 4

# What cutting units costs, in k steps: their programs trade sums. See docs/log.md, 2026-11-25.
_TRADING_STEPS = 6


def deal(units: int, steps: int, programs: int, most_parts: int) -> tuple[int, int]:
    """How `units` of `steps` k steps each are dealt to `programs` that run side by side.

    Returns:
        The units done whole, in full waves (or all of them), and the number of equal parts, at
        most `most_parts`, into which each of the others is cut along K. A program has at most
        one part.
    """
    rest = units % programs
    if rest == 0:
        return units, 1
    parts = min(programs // rest, most_parts, steps)
    if steps / parts + _TRADING_STEPS >= steps:
        return units, 1
    return units - rest, parts


def launch_linear_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor,
    tiles: torch.Tensor,
    flags: torch.Tensor,
    tile_range: TileRange,
    epilogue: int,
    config: TileConfig,
    places: Mapping[str, int],
    *,
    x_scales: torch.Tensor | None = None,
    w_scales: torch.Tensor | None = None,
    first_expert: int = 0,
    out_scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Keep | None:
    """One launch for the tiles of a range; see `mot_kernels.mot_linear` for shapes.

    x and weight are of 16 bits, or e4m3fn, or int8. Each sum is multiplied by its row's x_scales
    (M,), or for each 128 products by those of (M, K / 128), and by its channel's w_scales (E, N) or
    (E,), or its blocks' (E, N / 128, K / 128), all float32, if they are given. Of weight there may
    be the experts that the tiles are of only, from `first_expert` on. With `out_scales`
    (M, cdiv(N_OUT, 128)) SiLU*mul's result, first rounded to `dtype`, is rounded on to e4m3fn.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from mot_kernels._triton.hopper import _CHUNK, _mot_linear_hopper_kernel
    from mot_kernels._triton.hopper_sum import IN_UNIT

    experts, n, k = weight.shape
    has_groups = x_scales is not None and x_scales.dim() == 2
    has_blocks = w_scales is not None and w_scales.dim() == 3
    start, gathered, end = tile_range
    is_silu_mul = epilogue == _EPILOGUE_SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    num_tiles = end - start
    units = num_tiles * -(-out.shape[1] // block_out)
    programs = min(count_multiprocessors(x.device), MOST_PROGRAMS)
    num_whole, parts = deal(units, k // config.block_k, programs, block_out // _CHUNK.value)
    if config.block_k * x.element_size() != HOPPER_ROW_BYTES:
        raise ValueError(
            f"config has block_k={config.block_k}; schedule 'hopper' multiplies {x.dtype} in steps "
            f"of {HOPPER_ROW_BYTES // x.element_size()}"
        )
    num_partials = (units - num_whole) * parts * config.block_m * config.block_n
    sums = torch.int32 if x.dtype is torch.int8 else torch.float32
    partials = x.new_empty(num_partials, dtype=sums)
    swizzled = _swizzled(8 * x.element_size())
    w_rows = experts * n
    x_desc, residual_desc = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [config.block_m, columns], layout)
        if t is not None
        else None
        for t, columns, layout in (
            (x, config.block_k, swizzled),
            (residual, _CHUNK.value, _swizzled(16)),
        )
    )
    w_desc = TensorDescriptor(
        weight, [w_rows, k], [weight.stride(1), 1], [block_out, config.block_k], swizzled
    )
    keep = launch(
        _mot_linear_hopper_kernel,
        (programs,),
        places if num_partials else {k: v for k, v in places.items() if k != "partials_ptr"},
        out_ptr=out,
        out_scales_ptr=out_scales,
        x_desc=x_desc,
        x_ptr=x,
        x_scales_ptr=x_scales,
        w_desc=w_desc,
        w_scales_ptr=w_scales,
        bias_ptr=bias,
        residual_desc=residual_desc,
        residual_ptr=residual,
        partials_ptr=partials,
        flags_ptr=flags,
        row_ids_ptr=row_ids,
        tiles_ptr=tiles[start:end],
        num_tiles=num_tiles,
        num_whole=num_whole,
        parts=parts,
        group_m=config.group_m,
        w_rows=n,
        first_expert=first_expert,
        N_OUT=out.shape[1],
        K=k,
        stride_out_m=out.stride(0),
        **strides("out_scales", out_scales, "mk"),
        stride_x_m=x.stride(0),
        **strides("x_scales", x_scales, "mk"),
        **strides("w_scales", w_scales, "enk"),
        **strides("bias", bias, "e"),
        **strides("residual", residual, "m"),
        HAS_BIAS=bias is not None,
        HAS_X_SCALES=x_scales is not None and x_scales.dim() == 1,
        X_GROUPS=has_groups,
        HAS_W_SCALES=w_scales is not None and not has_blocks,
        W_BLOCKS=has_blocks,
        EPILOGUE=epilogue,
        HAS_GATHERED=gathered < end,
        LEAVES_UNIT=has_groups or has_blocks or (x.dtype is torch.float8_e4m3fn and k > IN_UNIT),
        OUT_GROUPS=out_scales is not None,
        DTYPE=TRITON_DTYPES[dtype or out.dtype],
        # Told apart only where it matters: each kind is compiled.
        EVEN_N=out_scales is None or out.shape[1] % block_out == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        LOADING_WARPS=_LOADING_WARPS,
        num_warps=config.num_warps,
    )
    return with_partials(keep, num_partials, sums) if num_partials else keep


@functools.cache
def _swizzled(bits: int) -> Any:
    """Shared memory's layout of tiles with elements of so many bits."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(HOPPER_ROW_BYTES, bits, 2)
