"""Launch the Hopper kernel: how its work is dealt out, descriptors, grid."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from mot_kernels._triton.launcher import launch
from mot_kernels._triton.tile import _EPILOGUE_SILU_MUL
from mot_kernels.dispatch import HOPPER_BLOCK_K
from mot_kernels.plan import MOST_PROGRAMS, TILE_ROWS
from mot_kernels.replay import Again, Keep
from mot_kernels.tuning.config import TileConfig

_LOADING_WARPS = 4

# Which of out, x, weight, bias, residual a parameter points to; partials, if any, come after them.
_PLACES = {
    "out_ptr": 0,
    "x_desc": 1,
    "x_ptr": 1,
    "w_desc": 2,
    "bias_ptr": 3,
    "residual_desc": 4,
    "residual_ptr": 4,
}

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
    tile_offsets: Sequence[int],
    epilogue: int,
    config: TileConfig,
) -> Keep | None:
    """One launch for all experts; see `mot_kernels.mot_linear` for shapes."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from mot_kernels._triton.hopper import _CHUNK, _mot_linear_hopper_kernel

    experts, n, k = weight.shape
    table = 3 * TILE_ROWS.index(config.block_m)
    start, gathered, end = tile_offsets[table : table + 3]
    is_silu_mul = epilogue == _EPILOGUE_SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    num_tiles = end - start
    units = num_tiles * -(-out.shape[1] // block_out)
    programs = min(_multiprocessors(x.device), MOST_PROGRAMS)
    num_whole, parts = deal(units, k // config.block_k, programs, block_out // _CHUNK.value)
    num_partials = (units - num_whole) * parts * config.block_m * config.block_n
    partials = x.new_empty(num_partials, dtype=torch.float32)
    swizzled = _swizzled()
    w_rows = experts * n
    x_desc, residual_desc = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), [config.block_m, columns], swizzled)
        if t is not None
        else None
        for t, columns in ((x, config.block_k), (residual, _CHUNK.value))
    )
    w_desc = TensorDescriptor(
        weight, [w_rows, k], [weight.stride(1), 1], [block_out, config.block_k], swizzled
    )
    keep = launch(
        _mot_linear_hopper_kernel,
        (programs,),
        _PLACES if num_partials == 0 else _PLACES | {"partials_ptr": 5},
        out_ptr=out,
        x_desc=x_desc,
        x_ptr=x,
        w_desc=w_desc,
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
        N_OUT=out.shape[1],
        K=k,
        stride_out_m=out.stride(0),
        stride_x_m=x.stride(0),
        stride_bias_e=0 if bias is None else bias.stride(0),
        stride_residual_m=0 if residual is None else residual.stride(0),
        HAS_BIAS=bias is not None,
        EPILOGUE=epilogue,
        HAS_GATHERED=gathered < end,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        LOADING_WARPS=_LOADING_WARPS,
        num_warps=config.num_warps,
    )
    return keep if num_partials == 0 else functools.partial(_with_partials, keep, num_partials)


def _with_partials(keep: Keep, number: int) -> Again | None:
    """Each launch has partials of its own: a CUDA graph takes their memory from its own pool."""
    again = keep()
    if again is None:
        return None
    return lambda out, *others: again(out, *others, out.new_empty(number, dtype=torch.float32))


@functools.cache
def _swizzled() -> Any:
    """Shared memory's layout of all tiles: rows of 128 bytes."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(2 * HOPPER_BLOCK_K, 16, 2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
