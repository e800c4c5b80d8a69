"""Rounding to e4m3fn and int8, and e4m3fn back, with the same bits on every GPU.

To the nearest, ties to even, saturating at 448 or 127, as `reference_formats.quantize_rows` does
in PyTorch. Numbers are multiplied by the inverse of their scale, rounded once to fp32: a division
for each would cost more than reading it.

Only GPUs with FP8 units have instructions for e4m3fn (UNITS); elsewhere, and in the interpreter,
its bits are worked out in integers, and tensors of it are passed as uint8.
"""

from __future__ import annotations

import triton
import triton.language as tl

_KEEP = tl.constexpr(0)
_E4M3 = tl.constexpr(1)
_INT8 = tl.constexpr(2)

_INFINITY_BITS = tl.constexpr(0x7F800000)
_MOST_E4M3_BITS = tl.constexpr(0x43E00000)  # 448.0
_LEAST_NORMAL_E4M3_BITS = tl.constexpr(0x3C800000)  # 2^-6
_LEAST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def _magnitude_bits(y):
    """Magnitudes as integers: in the same order, and NaN, which a maximum of floats would drop,
    is the largest."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _row_scale(bits, KIND: tl.constexpr):
    """The scale of a row, fp32: its largest magnitude over 448 or 127, never 0.

    Of (groups, columns), those of the groups.
    """
    amax = tl.max(bits, axis=len(bits.shape) - 1).to(tl.float32, bitcast=True)
    if KIND == _E4M3:
        scale = tl.div_rn(amax, 448.0)
    else:
        scale = tl.div_rn(amax, 127.0)
    return tl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)


@triton.jit
def _inverse(scale):
    return tl.div_rn(1.0, scale)


@triton.jit
def _round(y, inverse, KIND: tl.constexpr, UNITS: tl.constexpr):
    """y * inverse in the format KIND, both fp32. E4M3 without UNITS: its bits as uint8."""
    scaled = y * inverse
    if KIND == _INT8:
        clamped = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        # fp32 numbers about 1.5 * 2^23 are integers apart: the addition rounds.
        return ((clamped + 12582912.0) - 12582912.0).to(tl.int8)
    elif UNITS:  # the conversion saturates by itself, and keeps NaN
        return scaled.to(tl.float8e4nv)
    else:
        return _e4m3_bits(scaled)


@triton.jit
def _e4m3_bits(y):
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    kept = tl.minimum(magnitude, _MOST_E4M3_BITS)
    # Normal numbers: round to 3 bits of mantissa, and the exponent's bias is 7, not 127. A carry
    # goes to the exponent, as it should.
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 a step is 2^-9, which is that of fp32 at 2^14: the addition rounds.
    shifted = kept.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) & 0xF
    code = tl.where(kept < _LEAST_NORMAL_E4M3_BITS, subnormal, normal)
    code = tl.where(magnitude > _INFINITY_BITS, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _fp16_of_e4m3_bits(code):
    """The numbers that e4m3fn bits (uint8) stand for, in fp16, which holds them all."""
    wide = code.to(tl.uint16)
    # Sign, exponent and mantissa in their places; the bias is then 15, not 7: times 2^8.
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    y = bits.to(tl.float16, bitcast=True) * tl.full((1, 1), 256.0, tl.float16)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), y)


@triton.jit
def _store_quantized_row(
    data_ptr,  # row of the output
    scales_ptr,  # scale of the row, output
    static_ptr,  # the row's static scale, or unused
    y,  # (BLOCK,) fp32, zeros beyond the row
    offs,
    mask,
    KIND: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Round one row held in registers and store it with its scale."""
    if HAS_STATIC:
        scale = tl.load(static_ptr)
    else:
        scale = _row_scale(_magnitude_bits(y), KIND)
    tl.store(scales_ptr, scale)
    tl.store(data_ptr + offs, _round(y, _inverse(scale), KIND, UNITS), mask=mask)


@triton.jit
def _quantize_rows_kernel(
    data_ptr,  # (M, K) output, rows contiguous
    scales_ptr,  # (M,) fp32 output, contiguous
    x_ptr,  # (M, K)
    static_ptr,  # (E,) fp32, or unused
    expert_ids_ptr,  # (M,) int32, or unused
    K,
    stride_data_m,
    stride_x_m,
    stride_x_k,
    stride_static_e,
    KIND: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_PLAN: tl.constexpr,
    UNITS: tl.constexpr,
    FITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (M,); one row each, read once if it fits BLOCK_K, else twice: then from the cache."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_STATIC and HAS_PLAN:
        static_ptr += tl.load(expert_ids_ptr + row).to(tl.int64) * stride_static_e
    offs = tl.arange(0, BLOCK_K)
    stride_x_k = tl.cast(stride_x_k, tl.int64)  # a k times its stride can be past int32
    x_ptrs = x_ptr + row * stride_x_m + offs * stride_x_k
    data_ptr += row * stride_data_m
    if FITS:
        mask = offs < K
        y = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        _store_quantized_row(
            data_ptr,
            scales_ptr + row,
            static_ptr,
            y,
            offs,
            mask,
            KIND,
            HAS_STATIC,
            UNITS,
        )
    else:
        if HAS_STATIC:
            scale = tl.load(static_ptr)
        else:
            bits = tl.zeros((BLOCK_K,), tl.int32)
            for k in range(0, K, BLOCK_K):
                y = tl.load(x_ptrs + k * stride_x_k, mask=offs < K - k, other=0.0)
                bits = tl.maximum(bits, _magnitude_bits(y.to(tl.float32)))
            scale = _row_scale(bits, KIND)
        tl.store(scales_ptr + row, scale)
        inverse = _inverse(scale)
        for k in range(0, K, BLOCK_K):
            mask = offs < K - k
            y = tl.load(x_ptrs + k * stride_x_k, mask=mask, other=0.0).to(tl.float32)
            tl.store(data_ptr + k + offs, _round(y, inverse, KIND, UNITS), mask=mask)


@triton.jit
def _quantize_groups_kernel(
    data_ptr,  # (M, K) e4m3fn output (or its bits), rows contiguous
    scales_ptr,  # (M, cdiv(K, GROUP)) fp32 output
    x_ptr,  # (M, K)
    K,
    stride_data_m,
    stride_scales_m,
    stride_scales_k,
    stride_x_m,
    stride_x_k,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid: (M, cdiv(K, GROUPS * GROUP)); GROUPS times GROUP columns of a row, a scale for each."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    k = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = k < K
    x_ptrs = x_ptr + row * stride_x_m + k * tl.cast(stride_x_k, tl.int64)
    y = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    scale = _row_scale(_magnitude_bits(y), _E4M3)
    scales_ptr += row * stride_scales_m
    at = groups.to(tl.int64) * stride_scales_k
    tl.store(scales_ptr + at, scale, mask=groups * GROUP < K)
    rounded = _round(y, _inverse(scale)[:, None], _E4M3, UNITS)
    tl.store(data_ptr + row * stride_data_m + k, rounded, mask=mask)
