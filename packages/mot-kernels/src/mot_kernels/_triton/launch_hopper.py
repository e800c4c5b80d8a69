"""Launch the Hopper kernel: how its work is dealt out, descriptors, grid."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mot_kernels._triton.hopper_share import FEW_COLUMNS, all_as_tiles, deal, share_out
from mot_kernels._triton.launcher import (
    TRITON_DTYPES,
    count_multiprocessors,
    launch,
    strides,
    with_partials,
)
from mot_kernels._triton.tile import _EPILOGUE_SILU_MUL
from mot_kernels.dispatch import HOPPER_ROW_BYTES
from mot_kernels.plan import MOST_PROGRAMS, TileRange, tile_range
from mot_kernels.replay import Keep
from mot_kernels.tuning.config import TileConfig

# To gather rows takes more than to ask for tiles of them.
_GATHERING_WARPS = 4


def launch_linear_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor,
    tiles: torch.Tensor,
    flags: torch.Tensor,
    tiles_of: TileRange | tuple[Sequence[int], Sequence[int]],
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
    """One launch for some tiles; see `mot_kernels.mot_linear` for shapes.

    `tiles_of` is a range of them, or `RoutePlan.flat_offsets` and the rows of each expert: all.

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
    leaves_unit = has_groups or has_blocks or (x.dtype is torch.float8_e4m3fn and k > IN_UNIT)
    is_silu_mul = epilogue == _EPILOGUE_SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    blocks = -(-out.shape[1] // block_out)
    programs = min(count_multiprocessors(x.device), MOST_PROGRAMS)
    dealing = (k // config.block_k, programs, block_out // _CHUNK.value)
    if isinstance(tiles_of, TileRange):
        share = all_as_tiles(tiles_of)
    elif x.element_size() == 2 and k % FEW_COLUMNS == 0:
        offsets, counts = tiles_of
        share = share_out(offsets, config.block_m, counts, blocks, *dealing)
    else:
        offsets, counts = tiles_of
        share = all_as_tiles(tile_range(offsets, config.block_m, len(counts)))
    start, gathered, end = share.tiles
    num_tiles = end - start
    units = num_tiles * blocks
    dealt = deal(units, *dealing)
    if config.block_k * x.element_size() != HOPPER_ROW_BYTES:
        raise ValueError(
            f"config has block_k={config.block_k}; schedule 'hopper' multiplies {x.dtype} in steps "
            f"of {HOPPER_ROW_BYTES // x.element_size()}"
        )
    num_partials = (units - dealt.whole) * dealt.parts * config.block_m * config.block_n
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
        w_ptr=weight if share.few_rows else None,
        w_scales_ptr=w_scales,
        bias_ptr=bias,
        residual_desc=residual_desc,
        residual_ptr=residual,
        partials_ptr=partials,
        flags_ptr=flags,
        row_ids_ptr=row_ids,
        tiles_ptr=tiles[start:end],
        few_tiles_ptr=tiles[share.few.start : share.few.end] if share.few_rows else None,
        num_tiles=num_tiles,
        num_few=share.few.end - share.few.start,
        num_whole=dealt.whole,
        parts=dealt.parts,
        head=dealt.head,
        tails=dealt.tails,
        group_m=config.group_m,
        w_rows=n,
        first_expert=first_expert,
        N_OUT=out.shape[1],
        K=k,
        stride_out_m=out.stride(0),
        **strides("out_scales", out_scales, "mk"),
        stride_x_m=x.stride(0),
        **strides("x_scales", x_scales, "mk"),
        stride_w_n=weight.stride(1),
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
        FEW=share.few_rows,
        LEAVES_UNIT=leaves_unit,
        OUT_GROUPS=out_scales is not None,
        DTYPE=TRITON_DTYPES[dtype or out.dtype],
        # Told apart only where it matters: each kind is compiled.
        EVEN_N=out_scales is None or out.shape[1] % block_out == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        LOADING_WARPS=2 if share.few_rows else _GATHERING_WARPS,
        num_warps=config.num_warps,
    )
    return with_partials(keep, num_partials, sums) if num_partials else keep


@functools.cache
def _swizzled(bits: int) -> Any:
    """Shared memory's layout of tiles with elements of so many bits."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(HOPPER_ROW_BYTES, bits, 2)
