"""Routed GEMM of rows as they are and integer weights: `Int8W8A16` and `Int4W4A16`.

    y[r, n] = epilogue(sum_k x[r, k] * w[e, n, k] + b[e, n]),  e the expert of row r
    w[e, n, k] = s * q                int8; s the scale of channel n
    w[e, n, k] = s * (u - z)          4 bits; s and z of a group of GROUP k of channel n

Only q or u - z, small integers that fp16 and bf16 hold, are turned into x's dtype, and the products
add up in fp32. The scale is multiplied to sums in fp32: once after all of them, or, for groups,
after each BLOCK_K, which divides the group. So no weight is ever rounded to x's dtype (which would
cost about as much as rounding y does), and a group costs one multiplication an output, not one a
weight: with few rows, where nothing but reading the weights should take time, that is less.

4-bit weights come with the even k in the low nibble. A program loads bytes, and joins the low and
the high nibbles along K in registers. The other way, to split x in even and odd columns and
multiply twice, shuffles x through shared memory and takes twice the instructions on sm_80.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mot_kernels._triton.tile import (
    _EPILOGUE_SILU_MUL,
    _find_tile,
    _finish_tile,
    _launch_metadata,
)


@triton.jit(launch_metadata=_launch_metadata)
def _mot_linear_16bit_kernel(
    out_ptr,  # (M, N_OUT) output
    x_ptr,  # (M, K)
    w_ptr,  # (E, N, K) int8 or (E, N, K / 2) uint8, rows contiguous; N as in linear.py
    w_scales_ptr,  # (E, N) or (E, N, K / GROUP)
    w_zeros_ptr,  # (E, N, K / GROUP) uint8, or unused: 8
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    row_ids_ptr,  # (M,) int32, or unused
    tiles_ptr,  # (T, 4) int32, or unused
    num_tiles,
    num_rows,
    w_rows,
    N_OUT,
    K,
    stride_out_m,
    stride_out_n,
    stride_x_m,
    stride_x_k,
    stride_w_e,
    stride_w_n,
    stride_w_scales_e,
    stride_w_scales_n,
    stride_w_scales_k,
    stride_w_zeros_e,
    stride_w_zeros_n,
    stride_w_zeros_k,
    stride_bias_e,
    stride_bias_n,
    stride_residual_m,
    stride_residual_n,
    HAS_PLAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(N_OUT, BLOCK_N),); one row tile x BLOCK_N columns each.

    GROUP is 0 for int8.
    """
    tl.static_assert(GROUP == 0 or (EVEN_K and GROUP % BLOCK_K == 0))
    SILU_MUL: tl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    PACK: tl.constexpr = 2 if GROUP else 1
    expert, rows, cols, mask_m, mask_n = _find_tile(
        row_ids_ptr, tiles_ptr, num_tiles, num_rows, N_OUT, HAS_PLAN, BLOCK_M, BLOCK_N, GROUP_M
    )
    offs_k = tl.arange(0, BLOCK_K)
    offs_w = tl.arange(0, BLOCK_K // PACK)
    x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :] * stride_x_k
    # tl.cast, not .to: an N_OUT of 1 is specialised to a constant, which has no methods.
    up = cols + tl.cast(N_OUT, tl.int64)
    w_base = w_ptr + expert * stride_w_e
    w_ptrs = w_base + cols[:, None] * stride_w_n + offs_w[None, :]
    up_ptrs = w_base + up[:, None] * stride_w_n + offs_w[None, :]
    w_scales_ptr += expert * stride_w_scales_e
    if HAS_ZEROS:
        w_zeros_ptr += expert * stride_w_zeros_e

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N if SILU_MUL else 1), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k[None, :] < K - k
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=mask_k, other=0.0)
        if GROUP:
            group = k // GROUP
            scale_ptrs = w_scales_ptr + group * stride_w_scales_k + cols * stride_w_scales_n
            zero_ptrs = cols
            if HAS_ZEROS:
                zero_ptrs = w_zeros_ptr + group * stride_w_zeros_k + cols * stride_w_zeros_n
            acc = _add_group(acc, x, w_ptrs, scale_ptrs, zero_ptrs, HAS_ZEROS, PRECISION)
        else:
            acc = _add_int8(acc, x, w_ptrs, mask_k, EVEN_K, PRECISION)
        if SILU_MUL:
            if GROUP:
                scale_ptrs += tl.cast(N_OUT, tl.int64) * stride_w_scales_n
                if HAS_ZEROS:
                    zero_ptrs += tl.cast(N_OUT, tl.int64) * stride_w_zeros_n
                acc_up = _add_group(acc_up, x, up_ptrs, scale_ptrs, zero_ptrs, HAS_ZEROS, PRECISION)
            else:
                acc_up = _add_int8(acc_up, x, up_ptrs, mask_k, EVEN_K, PRECISION)
            up_ptrs += BLOCK_K // PACK
        x_ptrs += BLOCK_K * stride_x_k
        w_ptrs += BLOCK_K // PACK

    if not GROUP:
        acc *= tl.load(w_scales_ptr + cols * stride_w_scales_n)[None, :]
        if SILU_MUL:
            acc_up *= tl.load(w_scales_ptr + up * stride_w_scales_n)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y = _finish_tile(
        acc,
        acc_up,
        bias_ptr,
        residual_ptr,
        expert,
        rows,
        cols,
        mask,
        N_OUT,
        stride_bias_e,
        stride_bias_n,
        stride_residual_m,
        stride_residual_n,
        HAS_BIAS,
        EPILOGUE,
        PRECISION is not None,
    )
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + cols[None, :] * stride_out_n
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_int8(acc, x, w_ptrs, mask_k, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x @ q, over one BLOCK_K of an int8 weight."""
    w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=mask_k, other=0.0)
    return tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision=PRECISION)


@triton.jit
def _add_group(
    acc,
    x,
    w_ptrs,
    scale_ptrs,
    zero_ptrs,
    HAS_ZEROS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x @ (u - z) * s, over one BLOCK_K of a 4-bit weight."""
    packed = tl.load(w_ptrs)
    if HAS_ZEROS:
        zeros = tl.load(zero_ptrs)[:, None].to(tl.float32)
    else:
        zeros = tl.full((1, 1), 8.0, tl.float32)
    low = _minus_zeros(packed & 15, zeros, x.dtype)
    high = _minus_zeros(packed >> 4, zeros, x.dtype)
    w = tl.reshape(tl.join(low, high), (packed.shape[0], packed.shape[1] * 2))
    product = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    return acc + product * tl.load(scale_ptrs).to(tl.float32)[None, :]


@triton.jit
def _minus_zeros(levels, zeros, DTYPE: tl.constexpr):
    """levels - zeros, exactly, in DTYPE; levels uint8 in 0..15, zeros fp32 integers."""
    if tl.float32 == DTYPE:
        y = levels.to(tl.float32) - zeros
    else:
        # A level in the lowest mantissa bits of 2^7 (bf16) or 2^10 (fp16), whose next number is 1
        # away, adds itself: one OR in place of a conversion, half the instructions.
        BASE: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
        BITS: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        based = (levels.to(tl.uint16) | BITS).to(DTYPE, bitcast=True)
        y = based - (zeros + BASE).to(DTYPE)
    return y
