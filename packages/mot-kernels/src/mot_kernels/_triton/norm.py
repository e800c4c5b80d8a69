"""Routed RMSNorm and the fused per-head norm + RoPE, each one pass over its input.

RMSNorm: y[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * gamma[e(r)], with `expert_ids` (M,) int32.
QK-norm + RoPE: every head of q and k is normalised with its expert's weight and rotated by the
row's position, v is passed on; K and V go to row `kv_rows[r]` of the caller's tensors. All
arithmetic is fp32 with one rounding at the store. Rows must be contiguous in the last dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mot_rms_norm_kernel(
    out_ptr,  # (M, D) output
    residual_out_ptr,  # (M, D) output, or unused
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D) or unused
    weight_ptr,  # (E, D)
    expert_ids_ptr,  # (M,) int32, or unused
    D,
    stride_out_m,
    stride_residual_out_m,
    stride_x_m,
    stride_residual_m,
    stride_weight_e,
    eps,
    HAS_PLAN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (M,); one row each."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    x = tl.load(x_ptr + row * stride_x_m + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_residual_m + offs
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        residual_out_ptrs = residual_out_ptr + row * stride_residual_out_m + offs
        tl.store(residual_out_ptrs, x.to(residual_out_ptr.dtype.element_ty), mask=mask)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    if HAS_PLAN:
        weight_ptr += tl.load(expert_ids_ptr + row).to(tl.int64) * stride_weight_e
    gamma = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * stride_out_m + offs,
        (x * scale * gamma).to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _mot_qk_norm_rope_kernel(
    q_ptr,  # (M, HEADS, D) output
    k_ptr,  # (S, KV_HEADS, D) output
    v_ptr,  # (S, KV_HEADS, D) output
    qkv_ptr,  # (M, (HEADS + 2 * KV_HEADS) * D)
    q_weight_ptr,  # (E, D) contiguous
    k_weight_ptr,  # (E, D) contiguous
    rope_ptr,  # (P, D) fp32 contiguous: cos | sin
    positions_ptr,  # (M,) integer
    kv_rows_ptr,  # (M,) integer destination rows, or unused
    expert_ids_ptr,  # (M,) int32, or unused
    num_rows,
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
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Grid: (cdiv(M * (HEADS + 2 * KV_HEADS), BLOCK_H),); BLOCK_H heads each, over row ends."""
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = D // 2
    unit = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = unit // ALL_HEADS
    head = unit % ALL_HEADS
    live = row < num_rows
    row = tl.where(live, row, 0)
    is_q = live & (head < HEADS)
    is_k = live & (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = live & (head >= HEADS + KV_HEADS)

    offs = tl.arange(0, BLOCK_HALF)
    in_half = (offs < HALF)[None, :]
    src = qkv_ptr + (row * stride_qkv_m + head * D)[:, None] + offs[None, :]
    mask = live[:, None] & in_half
    raw_a = tl.load(src, mask=mask, other=0.0)
    raw_b = tl.load(src + HALF, mask=mask, other=0.0)
    a = raw_a.to(tl.float32)
    b = raw_b.to(tl.float32)

    scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)
    if HAS_PLAN:
        expert = tl.load(expert_ids_ptr + row).to(tl.int64)
    else:
        expert = tl.zeros_like(row)
    gamma = (expert * D)[:, None] + offs[None, :]
    mask_q = is_q[:, None] & in_half
    mask_k = is_k[:, None] & in_half
    gamma_a = tl.where(
        is_q[:, None],
        tl.load(q_weight_ptr + gamma, mask=mask_q, other=0.0).to(tl.float32),
        tl.load(k_weight_ptr + gamma, mask=mask_k, other=0.0).to(tl.float32),
    )
    gamma_b = tl.where(
        is_q[:, None],
        tl.load(q_weight_ptr + gamma + HALF, mask=mask_q, other=0.0).to(tl.float32),
        tl.load(k_weight_ptr + gamma + HALF, mask=mask_k, other=0.0).to(tl.float32),
    )
    a = a * scale[:, None] * gamma_a
    b = b * scale[:, None] * gamma_b

    table = rope_ptr + (tl.load(positions_ptr + row).to(tl.int64) * D)[:, None] + offs[None, :]
    mask_qk = (is_q | is_k)[:, None] & in_half
    cos = tl.load(table, mask=mask_qk, other=0.0)
    sin = tl.load(table + HALF, mask=mask_qk, other=0.0)
    rotated_a = (a * cos - b * sin).to(q_ptr.dtype.element_ty)
    rotated_b = (b * cos + a * sin).to(q_ptr.dtype.element_ty)

    q_dst = q_ptr + (row * stride_q_m + head * stride_q_h)[:, None] + offs[None, :]
    tl.store(q_dst, rotated_a, mask=mask_q)
    tl.store(q_dst + HALF, rotated_b, mask=mask_q)
    if HAS_KV_ROWS:
        kv_row = tl.load(kv_rows_ptr + row).to(tl.int64)
    else:
        kv_row = row
    k_head = head - HEADS
    k_dst = k_ptr + (kv_row * stride_k_s + k_head * stride_k_h)[:, None] + offs[None, :]
    tl.store(k_dst, rotated_a, mask=mask_k)
    tl.store(k_dst + HALF, rotated_b, mask=mask_k)
    v_head = head - HEADS - KV_HEADS
    mask_v = is_v[:, None] & in_half
    v_dst = v_ptr + (kv_row * stride_v_s + v_head * stride_v_h)[:, None] + offs[None, :]
    tl.store(v_dst, raw_a, mask=mask_v)
    tl.store(v_dst + HALF, raw_b, mask=mask_v)
