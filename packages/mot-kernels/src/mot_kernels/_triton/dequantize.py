"""Integer weights written out in 16 bits, for products of many rows by schedule "hopper".

Reading 8 or 4 bits and writing 16 takes as long as some 250 rows' products do, whatever the format;
with thousands of rows that is little, and the product runs at the speed of 16-bit weights.

int8 is turned into integers, which bf16 and fp16 hold; their scales go to the sums (as in
`linear_16bit.py`). With groups along K scales cannot: w = s * (u - z) is rounded to 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTEGERS_FROM = tl.constexpr(8388608.0)  # 2^23: the next fp32 number is 1 away
_INTEGERS_FROM_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _dequantize_kernel(
    out_ptr,  # (N, K) 16 bits, contiguous
    w_ptr,  # (N, K) int8 or (N, K / 2) uint8, rows contiguous
    scales_ptr,  # (N, K / GROUP), or unused
    zeros_ptr,  # (N, K / GROUP) uint8, or unused: 8
    N,
    K,
    stride_w_n,
    stride_scales_n,
    stride_scales_k,
    stride_zeros_n,
    stride_zeros_k,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (cdiv(N, BLOCK_N), cdiv(K, BLOCK_K)); GROUP, which divides BLOCK_K, is 0 for int8."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    mask_n = (n < N)[:, None]
    mask = mask_n & (k < K)[None, :]
    if GROUP == 0:
        q = tl.load(w_ptr + n[:, None] * stride_w_n + k[None, :], mask=mask, other=0)
        w = q.to(DTYPE)
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        at = first_k // 2 + tl.arange(0, HALF)
        bytes_mask = mask_n & (at < K // 2)[None, :]
        packed = tl.load(w_ptr + n[:, None] * stride_w_n + at[None, :], mask=bytes_mask, other=0)
        packed = tl.reshape(packed, (BLOCK_N, GROUPS, GROUP // 2)).to(tl.int32)
        group = first_k // GROUP + tl.arange(0, GROUPS)[None, :]
        mask_g = mask_n & (group < K // GROUP)
        scale_ptrs = scales_ptr + n[:, None] * stride_scales_n + group * stride_scales_k
        scales = tl.load(scale_ptrs, mask=mask_g, other=0.0).to(tl.float32)[:, :, None]
        if HAS_ZEROS:
            zero_ptrs = zeros_ptr + n[:, None] * stride_zeros_n + group * stride_zeros_k
            zeros = tl.load(zero_ptrs, mask=mask_g, other=0).to(tl.float32)[:, :, None]
        else:
            zeros = tl.full((1, 1, 1), 8.0, tl.float32)
        low = (_float(packed & 15) - (_INTEGERS_FROM + zeros)) * scales
        high = (_float(packed >> 4) - (_INTEGERS_FROM + zeros)) * scales
        w = tl.reshape(tl.interleave(low.to(DTYPE), high.to(DTYPE)), (BLOCK_N, BLOCK_K))
    tl.store(out_ptr + n[:, None] * K + k[None, :], w, mask=mask)


@triton.jit
def _float(levels):
    """levels + 2^23 in fp32, of levels in 0..15: an OR, a quarter of what a conversion takes."""
    return (levels | _INTEGERS_FROM_BITS).to(tl.float32, bitcast=True)
