"""Routed RMSNorm and the fused per-head norm + RoPE, each one pass over its input.

RMSNorm: y[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * gamma[e(r)], with `expert_ids` (M,) int32. With
OUT_KIND the row, rounded to x's dtype, is rounded on to 8 bits: the bits of two passes in one.
QK-norm + RoPE: every head of q and k is normalised with its expert's weight and rotated by the
row's position, v is passed on; K and V go to row `kv_rows[r]` of the caller's tensors. q may be
rounded on to e4m3fn by a scale that its norm's weights tell. All
arithmetic is fp32 with one rounding at the store. Rows must be contiguous in the last dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mot_kernels._triton.rounding import _E4M3, _INFINITY_BITS, _KEEP, _round, _store_quantized_row
from mot_kernels.formats import LEAST_POWER


@triton.jit
def _mot_rms_norm_kernel(
    out_ptr,  # (M, D) output
    out_scales_ptr,  # (M,) fp32 contiguous output with OUT_KIND, or unused
    residual_out_ptr,  # (M, D) output, or unused
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D) or unused
    weight_ptr,  # (E, D)
    static_ptr,  # (E,) fp32 scales of the output with OUT_KIND, or unused
    expert_ids_ptr,  # (M,) int32, or unused
    D,
    stride_out_m,
    stride_residual_out_m,
    stride_x_m,
    stride_residual_m,
    stride_weight_e,
    stride_static_e,
    eps,
    HAS_PLAN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    OUT_KIND: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (M,); one row each. Everything is loaded before the sum of squares is waited for."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    x = tl.load(x_ptr + row * stride_x_m + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_PLAN:
        expert = tl.load(expert_ids_ptr + row).to(tl.int64)
        weight_ptr += expert * stride_weight_e
        if HAS_STATIC:
            static_ptr += expert * stride_static_e
    gamma = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_residual_m + offs
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        residual_out_ptrs = residual_out_ptr + row * stride_residual_out_m + offs
        tl.store(residual_out_ptrs, x.to(residual_out_ptr.dtype.element_ty), mask=mask)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    y = (x * scale * gamma).to(x_ptr.dtype.element_ty)
    out_ptr += row * stride_out_m
    if OUT_KIND == _KEEP:
        tl.store(out_ptr + offs, y, mask=mask)
    else:
        _store_quantized_row(
            out_ptr,
            out_scales_ptr + row,
            static_ptr,
            y.to(tl.float32),
            offs,
            mask,
            OUT_KIND,
            HAS_STATIC,
            UNITS,
        )


@triton.jit
def _mot_qk_norm_rope_kernel(
    q_ptr,  # (M, HEADS, D) output
    k_ptr,  # (S, KV_HEADS, D) output
    v_ptr,  # (S, KV_HEADS, D) output
    q_scale_ptr,  # (1,) fp32 output with Q_KIND, or unused
    qkv_ptr,  # (M, (HEADS + 2 * KV_HEADS) * D)
    q_weight_ptr,  # (E, D) contiguous
    k_weight_ptr,  # (E, D) contiguous
    rope_ptr,  # (P, D) fp32 contiguous: cos | sin
    positions_ptr,  # (M,) integer
    kv_rows_ptr,  # (M,) integer destination rows, or unused
    expert_ids_ptr,  # (M,) int32, or unused
    stride_q_m,
    stride_q_h,
    stride_k_s,
    stride_k_h,
    stride_v_s,
    stride_v_h,
    stride_qkv_m,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HAS_PLAN: tl.constexpr,
    HAS_KV_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_WEIGHT: tl.constexpr,
    Q_KIND: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Grid: (M,); one row each: its rotation and its weights are read once for all heads."""
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    expert = tl.cast(0, tl.int64)
    if HAS_PLAN:
        expert = tl.load(expert_ids_ptr + row).to(tl.int64)
    kv_row = row
    if HAS_KV_ROWS:
        kv_row = tl.load(kv_rows_ptr + row).to(tl.int64)
    offs = tl.arange(0, BLOCK_HALF)
    in_half = offs < HALF
    rope_ptrs = rope_ptr + tl.load(positions_ptr + row).to(tl.int64) * D + offs
    cos = tl.load(rope_ptrs, mask=in_half, other=0.0)[None, :]
    sin = tl.load(rope_ptrs + HALF, mask=in_half, other=0.0)[None, :]
    src_ptr = qkv_ptr + row * stride_qkv_m

    heads = tl.arange(0, BLOCK_HEADS)
    mask = (heads < HEADS)[:, None] & in_half[None, :]
    src = src_ptr + (heads * D)[:, None] + offs[None, :]
    dst = q_ptr + row * stride_q_m + (heads * stride_q_h)[:, None] + offs[None, :]
    weight = q_weight_ptr + expert * D + offs
    inverse = 1.0
    if Q_KIND != _KEEP:
        exponent = _q_scale_exponent(q_weight_ptr, EXPERTS * D, D, BLOCK_WEIGHT)
        if row == 0:
            tl.store(q_scale_ptr, (exponent << 23).to(tl.float32, bitcast=True))
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    _norm_and_rotate(dst, src, weight, cos, sin, eps, mask, in_half, inverse, D, Q_KIND, UNITS)

    kv_heads = tl.arange(0, BLOCK_KV_HEADS)
    mask = (kv_heads < KV_HEADS)[:, None] & in_half[None, :]
    src = src_ptr + ((HEADS + kv_heads) * D)[:, None] + offs[None, :]
    v_a = tl.load(src + KV_HEADS * D, mask=mask)
    v_b = tl.load(src + KV_HEADS * D + HALF, mask=mask)
    dst = k_ptr + kv_row * stride_k_s + (kv_heads * stride_k_h)[:, None] + offs[None, :]
    weight = k_weight_ptr + expert * D + offs
    _norm_and_rotate(dst, src, weight, cos, sin, eps, mask, in_half, 1.0, D, _KEEP, UNITS)

    dst = v_ptr + kv_row * stride_v_s + (kv_heads * stride_v_h)[:, None] + offs[None, :]
    tl.store(dst, v_a, mask=mask)
    tl.store(dst + HALF, v_b, mask=mask)


# Takes magnitudes above 1.75 * 2^n, and no others, to the next exponent: 448 is 1.75 * 2^8.
_PAST_MOST = tl.constexpr(0x1FFFFF)
_LEAST_Q_EXPONENT = tl.constexpr(127 + LEAST_POWER)


@triton.jit
def _q_scale_exponent(weight_ptr, weights, D: tl.constexpr, BLOCK: tl.constexpr):
    """Exponent bits of the least power of two that takes every q to 448 or less.

    A normalised head is sqrt(D) long, before its weights; rotating keeps the length of pairs.
    """
    offs = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + offs, mask=offs < weights, other=0.0).to(tl.float32)
    bits = weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits < _INFINITY_BITS, bits, 0)
    most = tl.max(bits, axis=0).to(tl.float32, bitcast=True) * (D**0.5)
    exponent = ((most.to(tl.int32, bitcast=True) + _PAST_MOST) >> 23) - 8
    return tl.maximum(exponent, _LEAST_Q_EXPONENT)


@triton.jit
def _norm_and_rotate(
    dst,
    src,
    weight,
    cos,
    sin,
    eps,
    mask,
    in_half,
    inverse,
    D: tl.constexpr,
    KIND: tl.constexpr,
    UNITS: tl.constexpr,
):
    """RMSNorm and rotate-half RoPE of (heads, D): pointers are to the first half of each head."""
    HALF: tl.constexpr = D // 2
    gamma_a = tl.load(weight, mask=in_half, other=0.0).to(tl.float32)[None, :]
    gamma_b = tl.load(weight + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    a = tl.load(src, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(src + HALF, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
    a *= scale * gamma_a
    b *= scale * gamma_b
    first = (a * cos - b * sin).to(src.dtype.element_ty)
    second = (b * cos + a * sin).to(src.dtype.element_ty)
    if KIND == _KEEP:
        tl.store(dst, first, mask=mask)
        tl.store(dst + HALF, second, mask=mask)
    else:
        tl.store(dst, _round(first.to(tl.float32), inverse, _E4M3, UNITS), mask=mask)
        tl.store(dst + HALF, _round(second.to(tl.float32), inverse, _E4M3, UNITS), mask=mask)
