"""Integer weights written out in 16 bits, for products of many rows by schedule "hopper".

Reading 8 or 4 bits and writing 16 takes as long as some 250 rows' products do, whatever the format;
with thousands of rows that is little, and the product runs at the speed of 16-bit weights.

int8 is turned into integers, which bf16 and fp16 hold; their scales go to the sums (as in
`linear_16bit.py`). With groups along K scales cannot: w = s * (u - z) is rounded to 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dequantize_kernel(
    out_ptr,  # (E, N, K) 16 bits, contiguous
    w_ptr,  # (E, N, K) int8 or (E, N, K / 2) uint8, rows contiguous
    scales_ptr,  # (E, N, K / GROUP), or unused
    zeros_ptr,  # (E, N, K / GROUP) uint8, or unused: 8
    first_expert,
    N,
    K,
    stride_w_e,
    stride_w_n,
    stride_scales_e,
    stride_scales_n,
    stride_scales_k,
    stride_zeros_e,
    stride_zeros_n,
    stride_zeros_k,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K), experts); GROUP is 0 for int8."""
    expert = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (n < N)[:, None] & (k < K)[None, :]
    out_ptrs = out_ptr + (expert * N + n[:, None]) * K + k[None, :]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    w_expert = expert + first_expert
    w_ptrs = w_ptr + w_expert * stride_w_e + n.to(tl.int64)[:, None] * stride_w_n
    if GROUP == 0:
        q = tl.load(w_ptrs + k[None, :], mask=mask, other=0)
        tl.store(out_ptrs, q.to(DTYPE), mask=mask)
    else:
        bytes_k = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        byte_mask = (n < N)[:, None] & (bytes_k * 2 < K)[None, :]
        packed = tl.load(w_ptrs + bytes_k[None, :], mask=byte_mask, other=0)
        group = bytes_k * 2 // GROUP
        at = w_expert * stride_scales_e + n.to(tl.int64)[:, None] * stride_scales_n
        at += group[None, :] * stride_scales_k
        scales = tl.load(scales_ptr + at, mask=byte_mask, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            at = w_expert * stride_zeros_e + n.to(tl.int64)[:, None] * stride_zeros_n
            at += group[None, :] * stride_zeros_k
            zeros = tl.load(zeros_ptr + at, mask=byte_mask, other=0).to(tl.float32)
        else:
            zeros = 8.0
        low = ((packed & 15).to(tl.float32) - zeros) * scales
        high = ((packed >> 4).to(tl.float32) - zeros) * scales
        w = tl.interleave(low.to(DTYPE), high.to(DTYPE))
        tl.store(out_ptrs, w, mask=mask)
