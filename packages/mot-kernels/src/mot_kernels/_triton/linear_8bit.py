"""Routed GEMM of 8-bit rows and 8-bit weights: `Fp8W8A8` and `Int8W8A8`.

    y[r, n] = epilogue(s_x[r] * sum_k x[r, k] * w[e, n, k] * s_w + b[e, n]),  e the expert of row r

s_w is one scale of the expert or of the channel n, applied after the sum, or that of a 128x128
block, applied in fp32 to the sum over the block's 128 k; so is s_x where each 128 columns of a row
have their own. Bias, epilogue and the one rounding are as in linear.py.

int8 adds up in int32, exactly. FP8 products are exact, too, but Hopper's units add them up with
about 14 bits (DeepSeek-AI, arXiv:2412.19437, section 3.3.2). So on any FP8 unit the sum leaves it
after BLOCK_K products, at most 128, and goes on in fp32, as it does in torch._scaled_mm without
fast accumulation (the Hopper kernel lets short sums stay: `hopper_sum.IN_UNIT`). GPUs without units
for e4m3fn, and the interpreter, get both operands as uint8, turn them into fp16, which holds every
e4m3 number, and multiply those; or, where the rows were float32, on any GPU into fp32, whose sums
lose nothing more.

With OUT_KIND the result is not stored in 16 bits but rounded to 8, by the static scale of the row's
expert in the layer that takes it; it is rounded to DTYPE first, so that it has the same bits as
in two passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mot_kernels._triton.rounding import _KEEP, _fp16_of_e4m3_bits, _inverse, _round
from mot_kernels._triton.tile import (
    _EPILOGUE_SILU_MUL,
    _find_tile,
    _finish_tile,
    _launch_metadata,
)

_BLOCK = tl.constexpr(128)


@triton.jit(launch_metadata=_launch_metadata)
def _mot_linear_8bit_kernel(
    out_ptr,  # (M, N_OUT) output
    out_scales_ptr,  # (M,) fp32 contiguous output with OUT_KIND, or unused
    x_ptr,  # (M, K) e4m3fn (or its bits, uint8) or int8, rows contiguous
    x_scales_ptr,  # fp32: (M,), or (M, K / 128) if X_GROUPS
    w_ptr,  # (E, N, K) as x, rows contiguous; N = N_OUT, or 2 * N_OUT for SiLU*mul
    w_scales_ptr,  # fp32: (E,) or (E, N) by strides, or (E, N / 128, K / 128) if BLOCK_SCALES
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    static_ptr,  # (E,) fp32 scales of the output with OUT_KIND, or unused
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
    stride_x_scales_m,
    stride_x_scales_k,
    stride_w_e,
    stride_w_n,
    stride_w_scales_e,
    stride_w_scales_n,
    stride_w_scales_k,
    stride_bias_e,
    stride_bias_n,
    stride_residual_m,
    stride_residual_n,
    stride_static_e,
    HAS_PLAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    X_GROUPS: tl.constexpr,
    UNITS: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_KIND: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(N_OUT, BLOCK_N),); one row tile x BLOCK_N columns each."""
    tl.static_assert(x_ptr.dtype.element_ty == tl.int8 or _BLOCK % BLOCK_K == 0)
    SILU_MUL: tl.constexpr = EPILOGUE == _EPILOGUE_SILU_MUL
    expert, rows, cols, mask_m, mask_n = _find_tile(
        row_ids_ptr, tiles_ptr, num_tiles, num_rows, N_OUT, HAS_PLAN, BLOCK_M, BLOCK_N, GROUP_M
    )
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :]
    # tl.cast, not .to: an N_OUT of 1 is specialised to a constant, which has no methods.
    up = cols + tl.cast(N_OUT, tl.int64)
    w_base = w_ptr + expert * stride_w_e
    w_ptrs = w_base + cols[None, :] * stride_w_n + offs_k[:, None]
    up_ptrs = w_base + up[None, :] * stride_w_n + offs_k[:, None]
    w_scales_ptr += expert * stride_w_scales_e
    x_scale_ptrs = x_scales_ptr + rows.to(tl.int64) * stride_x_scales_m

    WIDE: tl.constexpr = tl.float32 if tl.float32 == DTYPE else tl.float16
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N if SILU_MUL else 1), dtype=SUM)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        if not UNITS and tl.float32 == SUM:
            x = _fp16_of_e4m3_bits(x).to(WIDE)
        group_ptrs = x_scale_ptrs + k // _BLOCK * tl.cast(stride_x_scales_k, tl.int64)
        block_ptr = w_scales_ptr + k // _BLOCK * stride_w_scales_k
        scale_ptrs = block_ptr + cols // _BLOCK * stride_w_scales_n
        acc = _add_product(
            acc, x, w_ptrs, group_ptrs, scale_ptrs, mask_k, X_GROUPS, BLOCK_SCALES, UNITS, EVEN_K,
            BLOCK_K,
        )  # fmt: skip
        if SILU_MUL:
            scale_ptrs = block_ptr + up // _BLOCK * stride_w_scales_n
            acc_up = _add_product(
                acc_up, x, up_ptrs, group_ptrs, scale_ptrs, mask_k, X_GROUPS, BLOCK_SCALES, UNITS,
                EVEN_K, BLOCK_K,
            )  # fmt: skip
            up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    acc = acc.to(tl.float32)
    acc_up = acc_up.to(tl.float32)
    if not BLOCK_SCALES:
        acc *= tl.load(w_scales_ptr + cols * stride_w_scales_n)[None, :]
        if SILU_MUL:
            acc_up *= tl.load(w_scales_ptr + up * stride_w_scales_n)[None, :]
    if not X_GROUPS:
        x_scales = tl.load(x_scale_ptrs)[:, None]
        acc *= x_scales
        acc_up *= x_scales
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
        tl.float32 == DTYPE,
    )
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + cols[None, :] * stride_out_n
    y = y.to(DTYPE)
    if OUT_KIND == _KEEP:
        tl.store(out_ptrs, y, mask=mask)
    else:
        scale = tl.load(static_ptr + expert * stride_static_e)
        rounded = _round(y.to(tl.float32), _inverse(scale), OUT_KIND, UNITS)
        tl.store(out_ptrs, rounded, mask=mask)
        # Every block of columns writes the same.
        tl.store(out_scales_ptr + rows, scale + tl.zeros((BLOCK_M,), tl.float32), mask=mask_m)


@triton.jit
def _add_product(
    acc,
    x,
    w_ptrs,
    group_ptrs,
    scale_ptrs,
    mask_k,
    X_GROUPS: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x @ w, over one BLOCK_K."""
    w = tl.load(w_ptrs) if EVEN_K else tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
    if acc.dtype == tl.int32:
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    else:
        if UNITS:
            # With the limit, Triton leaves the addition out of the matrix unit.
            product = tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
        else:
            product = tl.dot(x, _fp16_of_e4m3_bits(w).to(x.dtype), input_precision="ieee")
        if X_GROUPS:
            product *= tl.load(group_ptrs)[:, None]
        if BLOCK_SCALES:
            product *= tl.load(scale_ptrs)[None, :]
        acc += product
    return acc
