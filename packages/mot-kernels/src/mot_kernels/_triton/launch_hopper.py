"""Launch the Hopper kernel: how its work is dealt out, descriptors, grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from mot_kernels._triton.linear import _EPILOGUE_SILU_MUL
from mot_kernels.plan import MOST_PROGRAMS, TILE_ROWS
from mot_kernels.tuning.config import TileConfig

_LOADING_WARPS = 4

# What adding up one more part of a unit costs, in k steps. Measured on an H200, K=3584: 7 us for a
# second program, 32 us for a fourth and fifth, beside 0.72 us a step; see docs/log.md, 2026-11-24.
_ADDING_STEPS = 11


def deal(units: int, steps: int, programs: int) -> tuple[int, int]:
    """How `units` of `steps` k steps each are dealt to `programs` that run side by side.

    Returns:
        The units done whole, in full waves (or all of them), and the number of programs that
        share the others, cut along K into equally many parts each.
    """
    rest = units % programs
    if rest == 0:
        return units, 1
    # steps / parts + _ADDING_STEPS * (parts - 1) is least at this number of parts.
    parts = min(programs // rest, math.isqrt(steps // _ADDING_STEPS))
    return (units - rest, rest * parts) if parts > 1 else (units, 1)


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
) -> None:
    """One launch for all experts; see `mot_kernels.mot_linear` for shapes."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from mot_kernels._triton.hopper import _mot_linear_hopper_kernel

    experts, n, k = weight.shape
    table = 3 * TILE_ROWS.index(config.block_m)
    start, gathered, end = tile_offsets[table : table + 3]
    is_silu_mul = epilogue == _EPILOGUE_SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    num_tiles = end - start
    units = num_tiles * -(-out.shape[1] // block_out)
    programs = min(_multiprocessors(x.device), MOST_PROGRAMS)
    num_whole, num_parts = deal(units, k // config.block_k, programs)
    partials = torch.empty(
        (num_parts if num_whole < units else 0, config.block_m, config.block_n),
        dtype=torch.float32,
        device=x.device,
    )
    swizzled = NVMMASharedLayout(2 * config.block_k, 16, 2)
    w_rows = experts * n
    x_desc = TensorDescriptor(
        x, list(x.shape), list(x.stride()), [config.block_m, config.block_k], swizzled
    )
    w_desc = TensorDescriptor(
        weight, [w_rows, k], [weight.stride(1), 1], [block_out, config.block_k], swizzled
    )
    _mot_linear_hopper_kernel[(programs,)](
        out_ptr=out,
        x_desc=x_desc,
        x_ptr=x,
        w_desc=w_desc,
        bias_ptr=bias,
        residual_ptr=residual,
        partials_ptr=partials,
        flags_ptr=flags,
        row_ids_ptr=row_ids,
        tiles_ptr=tiles[start:end],
        num_tiles=num_tiles,
        num_whole=num_whole,
        num_parts=num_parts,
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
        GROUP_M=config.group_m,
        STAGES=config.num_stages,
        LOADING_WARPS=_LOADING_WARPS,
        num_warps=config.num_warps,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
