"""Launch the kernels of the number formats, and choose between them. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton

from mot_kernels import dispatch
from mot_kernels._triton.dequantize import _dequantize_kernel
from mot_kernels._triton.launch import kernel_view, out_kind
from mot_kernels._triton.launch_few_rows import launch_linear_few_rows
from mot_kernels._triton.launch_hopper import launch_linear_hopper
from mot_kernels._triton.launch_rows import launch_quantize_rows
from mot_kernels._triton.launcher import (
    EPILOGUES,
    FORMAT_PLACES,
    TRITON_DTYPES,
    launch,
    on_device,
    strides,
)
from mot_kernels._triton.linear_8bit import _mot_linear_8bit_kernel
from mot_kernels._triton.linear_16bit import _mot_linear_16bit_kernel
from mot_kernels.checks import check_reach
from mot_kernels.dispatch import warn_portable, why_not_hopper_format
from mot_kernels.formats import BLOCK, ExpertWeight, Int4W4A16, QuantizedRows
from mot_kernels.plan import expert_tiles, tile_range
from mot_kernels.replay import Again, Keep
from mot_kernels.tuning.config import FEW_ROWS, HOPPER_SHARED_MEMORY, TileConfig
from mot_kernels.tuning.format_tiles import check_format_config, default_format_config
from mot_kernels.tuning.lookup import Problem, find_config


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
    if rows == 0 or (out.numel() == 0 and out_scales is None):
        return None
    n = weight.shape[1]
    epilogue = "silu_mul" if silu_mul else "none" if residual is None else "add_residual"
    rounds_groups = out_scales is not None and out_scales.dim() == 2
    no_hopper = why_not_hopper_format(
        out,
        x,
        weight,
        bias,
        residual,
        has_plan=tiles is not None,
        rounds_groups=rounds_groups and silu_mul,
    )
    given = config
    if config is None:
        problem = Problem(n, k, x.dtype, epilogue, counts, str(weight.format))
        config = find_config(problem, x.device, hopper=no_hopper is None)
        # Sparing a pass over the result is worth more than the best width for the product alone.
        if rounds_groups and config.schedule == "hopper":
            config = replace(config, block_n=2 * BLOCK, num_stages=min(config.num_stages, 4))
        if no_hopper is not None and config.schedule == "portable" and not rounds_groups:
            warn_portable(str(weight.format), x, counts, no_hopper)
    else:
        check_format_config(config, weight.format)
    # A program has whole groups of SiLU*mul where it has gate and up of 128 columns.
    in_passing = silu_mul and config.schedule == "hopper" and config.block_n == 2 * BLOCK
    if rounds_groups and not (in_passing and no_hopper is None):
        assert out_scales is not None
        y = out.new_empty(out.shape, dtype=x.dtype)
        first = launch_linear_format(
            out=y,
            out_scales=None,
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
            activation_scale=None,
            row_ids=row_ids,
            tiles=tiles,
            flags=flags,
            counts=counts,
            tile_offsets=tile_offsets,
            silu_mul=silu_mul,
            config=given,
        )
        return _in_two(first, launch_quantize_rows(out, out_scales, y, None, None), x.dtype)
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
                    out_scales=out_scales,
                    dtype=x.dtype,
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


def _in_two(product: Keep | None, rounding: Keep | None, dtype: torch.dtype) -> Keep | None:
    """A product whose result, of `dtype`, is rounded by a launch of its own."""
    if product is None or rounding is None:
        return None

    def keep() -> Again | None:
        multiply, round_rows = product(), rounding()
        if multiply is None or round_rows is None:
            return None

        def again(
            out: torch.Tensor, out_scales: torch.Tensor, *others: torch.Tensor | None
        ) -> bool:
            # If only the second cannot, all is done anew: nobody else has seen y.
            y = out.new_empty(out.shape, dtype=dtype)
            return multiply(y, None, *others) and round_rows(out, out_scales, y, None)

        return again

    return keep


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
    launch(
        _dequantize_kernel,
        (triton.cdiv(n, block_n), triton.cdiv(k, block_k)),
        {},
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
        **strides("x_scales", x.scales, "mk"),
        **strides("w_scales", scales, "enk"),
        **strides("static", activation_scale, "e"),
        BLOCK_SCALES=scales.dim() == 3,
        X_GROUPS=x.scales.dim() == 2,
        UNITS=units,
        DTYPE=TRITON_DTYPES[x.dtype],
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
