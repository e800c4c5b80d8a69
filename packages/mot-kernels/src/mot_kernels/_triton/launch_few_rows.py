"""Launch the kernel for few rows: how K is cut, scratch, grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from mot_kernels import dispatch
from mot_kernels._triton.few_rows import _mot_linear_few_rows_kernel
from mot_kernels._triton.launcher import count_multiprocessors, launch, strides, with_partials
from mot_kernels._triton.tile import _EPILOGUE_SILU_MUL
from mot_kernels.formats import ExpertWeight, Int4W4A16
from mot_kernels.plan import TileRange
from mot_kernels.replay import Keep
from mot_kernels.tuning.config import TileConfig, why_other_dtype

# So many programs a multiprocessor are to run at once; tiles leave shared memory and registers for
# them. Of 4-bit weights, which take instructions, one more is worth its sums.
_RESIDENT, _RESIDENT_4_BITS = 2, 3
# A part has so many steps of K at least: what it reads is then more than the sums it leaves.
_LEAST_STEPS = 2
_MOST_PARTS = 16
# Where no device can be asked: the interpreter, whose tests are to have parts as well.
_MULTIPROCESSORS = 8


def cut(units: int, steps: int, programs: int, most_units: int) -> int:
    """Into how many parts K, `steps` steps, is cut for `units` to keep `programs` programs busy.

    1 if there are more than `most_units`, which counters are there for.
    """
    if units > most_units:
        return 1
    return max(min(programs // units, steps // _LEAST_STEPS, _MOST_PARTS), 1)


def launch_linear_few_rows(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | ExpertWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    tiles: torch.Tensor | None,
    flags: torch.Tensor | None,
    tile_range: TileRange | None,
    epilogue: int,
    config: TileConfig,
    places: Mapping[str, int],
) -> Keep:
    """One launch for the tiles of a range; see `mot_kernels.mot_linear` for shapes.

    Without a plan, so without its flags, K is not cut: launches on different streams may share
    nothing else that says how far each of them has come.

    Raises:
        ValueError: x is float32.
    """
    if (why := why_other_dtype(config, x.dtype)) is not None:
        raise ValueError(why)
    rows, k = x.shape
    if isinstance(weight, ExpertWeight):
        data, scales, zeros = weight.data, weight.scales, weight.zero_points
    else:
        data, scales, zeros = weight, None, None
    group = 0
    if k == 0:  # no product, and no group whose scale could be read
        scales = zeros = None
    elif isinstance(weight, ExpertWeight) and isinstance(weight.format, Int4W4A16):
        group = weight.format.group_size
    if tiles is None or tile_range is None:
        num_tiles = triton.cdiv(rows, config.block_m)
    else:
        tiles = tiles[tile_range.start : tile_range.end]
        num_tiles = len(tiles)
    is_silu_mul = epilogue == _EPILOGUE_SILU_MUL.value
    block_out = config.block_n // 2 if is_silu_mul else config.block_n
    units = num_tiles * triton.cdiv(out.shape[1], block_out)
    multiprocessors = count_multiprocessors(x.device) if x.is_cuda else _MULTIPROCESSORS
    most_units = 0 if flags is None else len(flags)
    steps = triton.cdiv(k, config.block_k)
    resident = _RESIDENT_4_BITS if group else _RESIDENT
    parts = cut(units, steps, resident * multiprocessors, most_units)
    partials = None
    if parts > 1:
        shape = units, parts, config.block_m, config.block_n
        partials = x.new_empty(shape, dtype=torch.float32)
    keep = launch(
        _mot_linear_few_rows_kernel,
        (units * parts,),
        places,
        out_ptr=out,
        partials_ptr=partials,
        counters_ptr=flags if parts > 1 else None,
        x_ptr=x,
        w_ptr=data,
        w_scales_ptr=scales,
        w_zeros_ptr=zeros,
        bias_ptr=bias,
        residual_ptr=residual,
        row_ids_ptr=row_ids,
        tiles_ptr=tiles,
        num_tiles=num_tiles,
        num_rows=rows,
        w_rows=data.shape[1],
        N_OUT=out.shape[1],
        K=k,
        **strides("out", out, "mn"),
        **strides("x", x, "mk"),
        **strides("w", data, "enk"),
        **strides("w_scales", scales, "enk"),
        **strides("w_zeros", zeros, "enk"),
        **strides("bias", bias, "en"),
        **strides("residual", residual, "mn"),
        HAS_PLAN=row_ids is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALES=scales is not None,
        HAS_ZEROS=zeros is not None,
        EPILOGUE=epilogue,
        GROUP=group,
        EVEN_K=k % config.block_k == 0,
        PTX=dispatch.is_nvidia(x.device),
        PARTS=parts,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return keep if partials is None else with_partials(keep, partials.numel(), partials.dtype)
