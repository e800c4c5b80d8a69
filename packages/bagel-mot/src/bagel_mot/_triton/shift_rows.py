"""V's shifts added to what attention makes of the rest: see `bagel_mot.model.attention_fp8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bagel_mot._triton import OPTIONS
from bagel_mot._triton.round_heads import (
    _BLOCK,
    _magnitudes,
    _rows,
    _sequences,
    _shifts,
    _store_rows,
)

_LEAST_SCALE = tl.constexpr(2.0**-126)


def launch_add_shifts(y: torch.Tensor, shifts: torch.Tensor, row_bounds: torch.Tensor) -> None:
    """Add to y (M, H, D), contiguous, the shifts (2n - 1, Hkv, D) of its sequences and KV heads."""
    sequences, kv_heads, dim = shifts.shape
    with torch.cuda.device_of(y):
        _add_shifts_kernel[(triton.cdiv(len(y), _BLOCK), y.shape[1])](
            y_ptr=y,
            shifts_ptr=shifts,
            row_bounds_ptr=row_bounds,
            rows=len(y),
            sequences=sequences,
            KV_HEADS=kv_heads,
            GROUP=y.shape[1] // kv_heads,
            D=dim,
            BOUNDS=triton.next_power_of_2(len(row_bounds)),
            BLOCK=_BLOCK,
            **OPTIONS,
        )


def launch_shift_and_round(
    rounded: torch.Tensor,
    scales: torch.Tensor,
    y: torch.Tensor,
    shifts: torch.Tensor,
    row_bounds: torch.Tensor,
) -> None:
    """As `launch_add_shifts`, rounded on by a scale of each row: what `quantize_rows` gives.

    Args:
        rounded: (M, H * D) output, contiguous, in e4m3fn; or in float32, what would be rounded.
        scales: (M,) float32 output.
        y: (M, H, D), contiguous.
    """
    sequences, kv_heads, dim = shifts.shape
    rows, heads = y.shape[:2]
    with torch.cuda.device_of(y):
        _shift_and_round_kernel[(rows,)](
            out_ptr=rounded,
            scales_ptr=scales,
            y_ptr=y,
            shifts_ptr=shifts,
            row_bounds_ptr=row_bounds,
            rows=rows,
            sequences=sequences,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            D=dim,
            BOUNDS=triton.next_power_of_2(len(row_bounds)),
            HEADS=triton.next_power_of_2(heads),
            num_warps=8,
            **OPTIONS,
        )


@triton.jit
def _add_shifts_kernel(
    y_ptr,  # (M, KV_HEADS * GROUP, D) input and output
    shifts_ptr,  # (sequences, KV_HEADS, D) fp32
    row_bounds_ptr,  # (sequences + 1,) int32
    rows,  # M
    sequences,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of M, heads of y)."""
    head = tl.program_id(1)
    y_ptr += head * D
    stride = KV_HEADS * GROUP * D
    y, row, sequence = _rows(
        y_ptr, tl.program_id(0), row_bounds_ptr, rows, sequences, stride, D, BOUNDS, BLOCK
    )
    y += _shifts(shifts_ptr + head // GROUP * D, sequence, KV_HEADS * D, D)
    _store_rows(y_ptr, y, row, rows, stride, D)


@triton.jit
def _shift_and_round_kernel(
    out_ptr,  # (M, KV_HEADS * GROUP * D) output
    scales_ptr,  # (M,) fp32 output
    y_ptr,  # (M, KV_HEADS * GROUP, D)
    shifts_ptr,  # (sequences, KV_HEADS, D) fp32
    row_bounds_ptr,  # (sequences + 1,) int32
    rows,  # M
    sequences,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (M,); HEADS is the power of two from the heads of y on."""
    row = tl.program_id(0) + tl.zeros((1,), tl.int32)
    head = tl.arange(0, HEADS)
    offs = head[:, None] * D + tl.arange(0, D)[None, :]
    is_head = (head < KV_HEADS * GROUP)[:, None]
    offset = tl.program_id(0).to(tl.int64) * (KV_HEADS * GROUP * D)
    y = tl.load(y_ptr + offset + offs, mask=is_head, other=0.0)
    sequence = _sequences(row, row_bounds_ptr, rows, sequences, BOUNDS)
    places = (sequence * KV_HEADS + head // GROUP)[:, None] * D + tl.arange(0, D)[None, :]
    shift = tl.load(shifts_ptr + places, mask=is_head & (sequence >= 0)[:, None], other=0.0)
    # Rounded as it would be in memory, and then as `mot_kernels.quantize_rows` rounds that.
    y = (y.to(tl.float32) + shift).to(y.dtype).to(tl.float32)
    most = tl.max(tl.max(_magnitudes(y), axis=1), axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(most, 448.0)
    scale = tl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
    tl.store(scales_ptr + tl.program_id(0), scale)
    y *= tl.div_rn(1.0, scale)
    tl.store(out_ptr + offset + offs, y.to(out_ptr.dtype.element_ty), mask=is_head)
