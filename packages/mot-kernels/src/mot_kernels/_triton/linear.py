"""Portable routed GEMM: y[r] = epilogue(x[r] @ W[e(r)]^T + b[e(r)]) for every packed row r.

One launch for all experts. `tiles` (T, 4) int32 lists (expert, offset into row_ids, live rows,
first row or -1); a program owns one tile of rows and BLOCK_N output columns. Rows are always
addressed through `row_ids`, so scattered and contiguous routing take the same path. Accumulates
in fp32, applies bias and epilogue in fp32, rounds once. Addresses are int64: M x N and E x N x K
may pass 2^31 elements. Not here: TMA, persistence, number formats other than fp16/bf16/fp32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_EPILOGUE_NONE = tl.constexpr(0)
_EPILOGUE_SILU_MUL = tl.constexpr(1)
_EPILOGUE_ADD_RESIDUAL = tl.constexpr(2)


def _launch_metadata(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Name and flops for profilers (Triton's Proton reads them)."""
    rows, n, k = args["num_rows"], args["w_rows"], args["K"]
    tile = f"{args['BLOCK_M']}x{args['BLOCK_N']}x{args['BLOCK_K']}"
    flops_key = f"flops{8 * args['x_ptr'].element_size()}"
    return {"name": f"{kernel.name}_M{rows}_N{n}_K{k}_{tile}", flops_key: 2.0 * rows * n * k}


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
    # Programs that run together share GROUP_M row tiles and walk the columns: the weights they
    # read are then hit in L2.
    pid = tl.program_id(0)
    num_n = tl.cdiv(N_OUT, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    first_tile = group * GROUP_M
    group_rows = min(num_tiles - first_tile, GROUP_M)
    tile = first_tile + (pid % (GROUP_M * num_n)) % group_rows
    block_n = (pid % (GROUP_M * num_n)) // group_rows

    expert = tl.load(tiles_ptr + tile * 4).to(tl.int64)
    offset = tl.load(tiles_ptr + tile * 4 + 1)
    live = tl.load(tiles_ptr + tile * 4 + 2)

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < live
    # Dead lanes repeat the tile's first row: a valid address, never stored.
    rows = tl.load(row_ids_ptr + offset + tl.where(mask_m, offs_m, 0)).to(tl.int64)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N_OUT
    cols = tl.where(mask_n, offs_n, 0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + rows[:, None] * stride_x_m + offs_k[None, :] * stride_x_k
    w_base = w_ptr + expert * stride_w_e
    w_ptrs = w_base + cols[None, :] * stride_w_n + offs_k[:, None] * stride_w_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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

    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_bias_e + cols
        acc += tl.load(bias_ptrs).to(tl.float32)[None, :]
        if EPILOGUE == _EPILOGUE_SILU_MUL:
            acc_up += tl.load(bias_ptrs + N_OUT).to(tl.float32)[None, :]
    if EPILOGUE == _EPILOGUE_SILU_MUL:
        if PRECISION is None:
            acc = acc * tl.sigmoid(acc) * acc_up
        else:  # Triton's own division is off by up to two units in the last place
            acc = tl.div_rn(acc, 1.0 + tl.exp(-acc)) * acc_up

    mask = mask_m[:, None] & mask_n[None, :]
    if EPILOGUE == _EPILOGUE_ADD_RESIDUAL:
        residual_ptrs = (
            residual_ptr + rows[:, None] * stride_residual_m + cols[None, :] * stride_residual_n
        )
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows[:, None] * stride_out_m + cols[None, :] * stride_out_n
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
