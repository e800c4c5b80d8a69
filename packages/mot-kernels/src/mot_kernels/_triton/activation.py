"""SiLU(gate) * up of a finished product: for where a library computed it and no epilogue could."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu_mul_kernel(
    out_ptr,  # (M, F) output
    x_ptr,  # (M, 2 * F): gate, up; last dimension contiguous
    F,
    stride_out_m,
    stride_out_n,
    stride_x_m,
    BLOCK: tl.constexpr,
):
    """Grid: (M, cdiv(F, BLOCK)). In fp32, one rounding."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < F
    x_ptrs = x_ptr + row * stride_x_m + offs
    gate = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    y = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out_m + offs * stride_out_n, y, mask=mask)
