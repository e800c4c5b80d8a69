"""Launch the kernels of the number formats, and choose between them. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mot_kernels import dispatch
from mot_kernels._triton.dequantize import _dequantize_kernel
from mot_kernels._triton.launch import kernel_view, out_kind
from mot_kernels._triton.launch_few_rows import launch_linear_few_rows
from mot_kernels._triton.launch_hopper import launch_linear_hopper
from mot_kernels._triton.launcher import EPILOGUES, FORMAT_PLACES, launch, on_device, strides
from mot_kernels._triton.linear_8bit import _mot_linear_8bit_kernel
from mot_kernels._triton.linear_16bit import _mot_linear_16bit_kernel
from mot_kernels._triton.rounding import _quantize_rows_kernel
from mot_kernels.checks import check_reach
from mot_kernels.dispatch import why_not_hopper_format
from mot_kernels.formats import ExpertWeight, Int4W4A16, QuantizedRows
from mot_kernels.plan import expert_tiles, tile_range
from mot_kernels.replay import Keep
from mot_kernels.tuning.config import FEW_ROWS, HOPPER_SHARED_MEMORY, TileConfig
from mot_kernels.tuning.format_tiles import check_format_config, default_format_config
from mot_kernels.tuning.lookup import Problem, find_config

# Elements of a row that is rounded in one go: of a wider one few programs would fit side by side.
_WIDEST_ROW = 4096

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_linear_format(
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    x: torch.Tensor | QuantizedRows,
    weight: ExpertWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation_scale: torch.Tensor | None,
    row_ids: torch.Tensor | None,
    tiles: torch.Tensor | None,
    flags: torch.Tensor | None,
    counts: tuple[int, ...],
    tile_offsets: Sequence[int],
    silu_mul: bool,
    config: TileConfig | None,
) -> Keep | None:
    """One product for all experts; see `ops` for the arguments and `mot_linear` for shapes.

    Returns how to do it again with other tensors: the operator's arguments before `row_ids`.

    Raises:
        ValueError: `config` does not fit the format.
    """
    rows, k = x.shape
    if rows == 0:
        return None
    n = weight.shape[1]
    epilogue = "silu_mul" if silu_mul else "none" if residual is None else "add_residual"
    no_hopper = why_not_hopper_format(out, x, weight, bias, residual, has_plan=tiles is not None)
    if config is None:
        problem = Problem(n, k, x.dtype, epilogue, counts, str(weight.format))
        config = find_config(problem, x.device, hopper=no_hopper is None)
    else:
        check_format_config(config, weight.format)
    if config.schedule == "hopper":
        if no_hopper is not None:
            raise ValueError(f"config has schedule 'hopper', but {no_hopper}")
        assert row_ids is not None and tiles is not None and flags is not None
        rest = (bias, residual, row_ids, tiles, flags)
        with on_device(x.device):
            if isinstance(x, QuantizedRows):
                return launch_linear_hopper(
                    out,
                    x.data,
                    weight.data,
                    *rest,
                    tile_range(tile_offsets, config.block_m, len(counts)),
                    EPILOGUES[epilogue],
                    config,
                    FORMAT_PLACES,
                    x_scales=x.scales,
                    w_scales=weight.scales,
                )
            _launch_written_out(out, x, weight, rest, counts, tile_offsets, epilogue, config)
            return None  # the weight is to be written out each time
    table = None if tiles is None else tile_range(tile_offsets, config.block_m, len(counts))
    if config.schedule == "few_rows":
        assert isinstance(x, torch.Tensor)  # formats that round rows have no such config
        with on_device(x.device):
            return launch_linear_few_rows(
                out,
                x,
                weight,
                bias,
                residual,
                row_ids,
                tiles,
                flags,
                table,
                EPILOGUES[epilogue],
                config,
                FORMAT_PLACES,
            )
    if isinstance(x, torch.Tensor):
        check_reach("x", x, 1)
    check_reach("out", out, 1)
    check_reach("residual", residual, 1)
    if tiles is None or table is None:
        num_tiles = triton.cdiv(rows, config.block_m)
    else:
        tiles = tiles[table.start : table.end]
        num_tiles = len(tiles)
    common = {
        "bias_ptr": bias,
        "residual_ptr": residual,
        "row_ids_ptr": row_ids,
        "tiles_ptr": tiles,
        "num_tiles": num_tiles,
        "num_rows": rows,
        "w_rows": n,
        "N_OUT": out.shape[1],
        "K": k,
        **strides("out", out, "mn"),
        **strides("w", weight.data, "en"),
        **strides("bias", bias, "en"),
        **strides("residual", residual, "mn"),
        "HAS_PLAN": row_ids is not None,
        "HAS_BIAS": bias is not None,
        "EPILOGUE": EPILOGUES[epilogue],
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid = (num_tiles * triton.cdiv(out.shape[1], config.block_n),)
    with on_device(x.device):
        if isinstance(x, QuantizedRows):
            return _launch_8bit(grid, common, out, out_scales, x, weight, activation_scale)
        return _launch_16bit(grid, common, out, x, weight)


def _launch_written_out(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: ExpertWeight,
    rest: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor],
    counts: tuple[int, ...],
    tile_offsets: Sequence[int],
    epilogue: str,
    config: TileConfig,
) -> None:
    """Experts of many rows: weights are written out in 16 bits, then schedule "hopper".

    Those of few rows have them read as they are, by launches of their own: writing out would cost
    more than the product.

    Args:
        rest: bias, residual, row_ids, tiles, flags.
    """
    chosen = EPILOGUES[epilogue]
    _, n, k = weight.shape
    small = default_format_config(weight.format, x.dtype, epilogue, FEW_ROWS, HOPPER_SHARED_MEMORY)
    scales = None if isinstance(weight.format, Int4W4A16) else weight.scales
    wide: torch.Tensor | None = None  # one expert's, then the next one's
    for expert, count in enumerate(counts):
        is_small = count <= FEW_ROWS
        if count and not is_small:
            wide = x.new_empty(1, n, k) if wide is None else wide
            _write_out(wide[0], weight, expert)
        block_m = small.block_m if is_small else config.block_m
        for at in expert_tiles(tile_offsets, block_m, expert, len(counts)):
            if is_small:
                launch_linear_few_rows(out, x, weight, *rest, at, chosen, small, FORMAT_PLACES)
                continue
            assert wide is not None
            launch_linear_hopper(
                out,
                x,
                wide,
                *rest,
                at,
                chosen,
                config,
                FORMAT_PLACES,
                w_scales=scales,
                first_expert=expert,
            )


def _write_out(wide: torch.Tensor, weight: ExpertWeight, expert: int) -> None:
    """One expert's weight into wide (N, K), 16 bits, contiguous; int8 without its scales."""
    scales = weight.scales[expert]
    zeros = None if weight.zero_points is None else weight.zero_points[expert]
    group = weight.format.group_size if isinstance(weight.format, Int4W4A16) else 0
    n, k = wide.shape
    block_n, block_k = 16, 512
    _dequantize_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        out_ptr=wide,
        w_ptr=weight.data[expert],
        scales_ptr=scales if group else None,
        zeros_ptr=zeros,
        N=n,
        K=k,
        stride_w_n=weight.data.stride(1),
        **strides("scales", scales, "nk"),
        **strides("zeros", zeros, "nk"),
        GROUP=group,
        HAS_ZEROS=zeros is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )


def _launch_8bit(
    grid: tuple[int, ...],
    common: dict[str, Any],
    out: torch.Tensor,
    out_scales: torch.Tensor | None,
    x: QuantizedRows,
    weight: ExpertWeight,
    activation_scale: torch.Tensor | None,
) -> Keep:
    # float32 means float32: units for e4m3fn add up with fewer bits.
    units = dispatch.has_fp8_units(x.device) and x.dtype is not torch.float32
    scales = weight.scales
    return launch(
        _mot_linear_8bit_kernel,
        grid,
        FORMAT_PLACES,
        out_ptr=kernel_view(out, units),
        out_scales_ptr=out_scales,
        x_ptr=kernel_view(x.data, units),
        x_scales_ptr=x.scales,
        w_ptr=kernel_view(weight.data, units),
        w_scales_ptr=scales,
        static_ptr=activation_scale,
        stride_x_m=x.data.stride(0),
        **strides("w_scales", scales, "enk"),
        **strides("static", activation_scale, "e"),
        BLOCK_SCALES=scales.dim() == 3,
        UNITS=units,
        DTYPE=_DTYPES[x.dtype],
        OUT_KIND=out_kind(out),
        **common,
    )


def _launch_16bit(
    grid: tuple[int, ...],
    common: dict[str, Any],
    out: torch.Tensor,
    x: torch.Tensor,
    weight: ExpertWeight,
) -> Keep:
    scales, zeros = weight.scales, weight.zero_points
    return launch(
        _mot_linear_16bit_kernel,
        grid,
        FORMAT_PLACES,
        out_ptr=out,
        x_ptr=x,
        w_ptr=weight.data,
        w_scales_ptr=scales,
        w_zeros_ptr=zeros,
        stride_x_m=x.stride(0),
        stride_x_k=x.stride(1),
        **strides("w_scales", scales, "enk"),
        **strides("w_zeros", zeros, "enk"),
        HAS_ZEROS=zeros is not None,
        GROUP=weight.format.group_size if isinstance(weight.format, Int4W4A16) else 0,
        # float32 means float32: TF32 would lose 13 bits that the caller asked for.
        PRECISION="ieee" if x.dtype is torch.float32 else None,
        **common,
    )


def launch_quantize_rows(
    data: torch.Tensor,
    scales: torch.Tensor,
    x: torch.Tensor,
    activation_scale: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
) -> Keep | None:
    """One row per program; see `mot_kernels.quantize_rows` for shapes.

    Returns how to do it again with other tensors: the arguments before `expert_ids`.
    """
    rows, k = x.shape
    if rows == 0:
        return None
    block = min(triton.next_power_of_2(max(k, 1)), _WIDEST_ROW)
    units = dispatch.has_fp8_units(x.device)
    with on_device(x.device):
        return launch(
            _quantize_rows_kernel,
            (rows,),
            {"data_ptr": 0, "scales_ptr": 1, "x_ptr": 2, "static_ptr": 3},
            data_ptr=kernel_view(data, units),
            scales_ptr=scales,
            x_ptr=x,
            static_ptr=activation_scale,
            expert_ids_ptr=expert_ids,
            K=k,
            stride_data_m=data.stride(0),
            stride_x_m=x.stride(0),
            stride_x_k=x.stride(1),
            **strides("static", activation_scale, "e"),
            KIND=out_kind(data),
            HAS_STATIC=activation_scale is not None,
            HAS_PLAN=expert_ids is not None,
            UNITS=units,
            FITS=k <= block,
            BLOCK_K=block,
            # 16 bytes a thread of a 16-bit row: 8 elements, 256 a warp.
            num_warps=min(max(block // 512, 1), 16),
        )
