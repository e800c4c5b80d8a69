"""Portable routed GEMM: y[r] = epilogue(x[r] @ W[e(r)]^T + b[e(r)]) for every packed row r.

One launch for all experts; a program owns one tile of rows and BLOCK_N output columns (tile.py).
Accumulates in fp32, applies bias and epilogue in fp32, rounds once. Addresses are int64: M x N and
E x N x K may pass 2^31 elements. Not here: TMA, persistence, number formats other than
fp16/bf16/fp32 (linear_8bit.py, linear_16bit.py).
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
def _mot_linear_kernel(
    out_ptr,  # (M, N_OUT) output
    x_ptr,  # (M, K)
    w_ptr,  # (E, N, K); N = N_OUT, or 2 * N_OUT (gate rows, then up rows) for SiLU*mul
    bias_ptr,  # (E, N) or unused
    residual_ptr,  # (M, N_OUT) or unused
    row_ids_ptr,  # (M,) int32
    tiles_ptr,  # (T, 4) int32
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
    stride_w_k,
    stride_bias_e,
    stride_bias_n,
    stride_residual_m,
    stride_residual_n,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (num_tiles * cdiv(N_OUT, BLOCK_N),); one row tile x BLOCK_N columns each."""
    expert, rows, cols, mask_m, mask_n = _find_tile(
        row_ids_ptr, tiles_ptr, num_tiles, num_rows, N_OUT, True, BLOCK_M, BLOCK_N, GROUP_M
    )
    offs_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :] * stride_x_k
    w_base = w_ptr + expert * stride_w_e
    w_ptrs = w_base + cols[None, :] * stride_w_n + offs_k[:, None] * stride_w_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = acc
    if EPILOGUE == _EPILOGUE_SILU_MUL:
        # tl.cast, not .to: an N_OUT of 1 is specialised to a constant, which has no methods.
        up_ptrs = w_ptrs + tl.cast(N_OUT, tl.int64) * stride_w_n
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if EPILOGUE == _EPILOGUE_SILU_MUL:
            if EVEN_K:
                up = tl.load(up_ptrs)
            else:
                up = tl.load(up_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
            acc_up = tl.dot(x, up, acc_up, input_precision=PRECISION)
            up_ptrs += BLOCK_K * stride_w_k
        x_ptrs += BLOCK_K * stride_x_k
        w_ptrs += BLOCK_K * stride_w_k

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
