"""Q, K and V of a span rounded to e4m3fn: see `bagel_mot.model.attention_fp8`.

Three launches: what is sampled of each sequence and KV head, the largest magnitudes of K and V, the
rounding. What attention makes of them: `shift_rows`. Bounds are read on the device, so that all can
be replayed over prefixes of other lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from mot_kernels.formats import LEAST_POWER

from bagel_mot._triton import OPTIONS
from bagel_mot.model.attention import RoundedQ
from bagel_mot.model.attention_fp8 import HEADROOM, SAMPLES, SAMPLES_OF_Q

# Rows of a program.
_BLOCK = 32

_SAMPLES = tl.constexpr(SAMPLES)
_SAMPLES_OF_Q = tl.constexpr(SAMPLES_OF_Q)
_HEADROOM = tl.constexpr(HEADROOM)
_LEAST_EXPONENT = tl.constexpr(127 + LEAST_POWER)
_INFINITY_BITS = tl.constexpr(0x7F800000)
# Takes magnitudes above 1.75 * 2^n, and no others, to the next exponent: 448 is 1.75 * 2^8.
_PAST_MOST = tl.constexpr(0x1FFFFF)


def launch_round_heads(
    rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scales: torch.Tensor,
    shifts: torch.Tensor,
    tensors: tuple[torch.Tensor | RoundedQ, torch.Tensor, torch.Tensor],
    row_bounds: torch.Tensor,
    kv_bounds: torch.Tensor,
) -> None:
    """Write what `bagel_mot.model.attention_fp8.round_heads` returns.

    Args:
        rounded: q, k and v, contiguous, in e4m3fn; or in float32, what would be rounded.
        scales: (3, 2n - 1, Hkv) float32, contiguous.
        shifts: (2, 2n - 1, Hkv, D) float32, contiguous.
        tensors: q (M, H, D), or a rounded one, of which the scale alone is to be written; k and v
            (S, Hkv, D) of the same strides, the last dimension contiguous, D a power of two.
        row_bounds, kv_bounds: (2n,) int32, see `Span`.

    Raises:
        ValueError: the strides of k and v differ.
    """
    q, k, v = tensors
    if k.stride() != v.stride():
        raise ValueError(f"k and v have strides {k.stride()} and {v.stride()}; expected the same")
    kv_heads, dim = k.shape[1:]
    sequences = scales.shape[1]
    magnitudes = torch.empty(scales.shape, dtype=torch.int32, device=k.device)
    heads = rounded[0].shape[1]
    if isinstance(q, RoundedQ):  # nobody looks at them here
        queries, q_scale, rows = k, q.scale, 0
    else:
        queries, q_scale, rows = q, None, len(q)
    shared = {
        "magnitudes_ptr": magnitudes,
        "shifts_ptr": shifts,
        "k_ptr": k,
        "v_ptr": v,
        "kv_bounds_ptr": kv_bounds,
        "stride_kv_s": k.stride(0),
        "stride_kv_h": k.stride(1),
        "KV_HEADS": kv_heads,
        "D": dim,
        **OPTIONS,
    }
    of_q = {
        "q_ptr": queries,
        "row_bounds_ptr": row_bounds,
        "stride_q_m": queries.stride(0),
        "stride_q_h": queries.stride(1),
        "GROUP": heads // kv_heads,
        "HAS_Q": q_scale is None,
    }
    blocks = {
        "keys": len(k),
        "sequences": sequences,
        "BOUNDS": triton.next_power_of_2(len(row_bounds)),
        "BLOCK": _BLOCK,
    }
    with torch.cuda.device_of(k):
        which = 3 if q_scale is None else 2
        _samples_kernel[(kv_heads, sequences, which)](**shared, **of_q, num_warps=8)
        _magnitudes_kernel[(triton.cdiv(len(k), _BLOCK), kv_heads, 2)](**shared, **blocks)
        # Rows first: with heads first it takes 8 % longer (12,294 rows on an H200).
        programs = triton.cdiv(rows, _BLOCK) * heads
        programs += triton.cdiv(len(k), _BLOCK) * 2 * kv_heads
        _round_kernel[(programs,)](
            q_out_ptr=rounded[0],
            k_out_ptr=rounded[1],
            v_out_ptr=rounded[2],
            scales_ptr=scales,
            q_scale_ptr=q_scale,
            rows=rows,
            **shared,
            **of_q,
            **blocks,
        )


@triton.jit
def _samples_kernel(
    magnitudes_ptr,  # (3, sequences, KV_HEADS) int32 output: of q; zeros for k and v
    shifts_ptr,  # (2, sequences, KV_HEADS, D) fp32 output, of k and v
    q_ptr,  # (M, KV_HEADS * GROUP, D)
    k_ptr,  # (S, KV_HEADS, D)
    v_ptr,
    row_bounds_ptr,  # (sequences + 1,) int32
    kv_bounds_ptr,
    stride_q_m,
    stride_q_h,
    stride_kv_s,
    stride_kv_h,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HAS_Q: tl.constexpr,
):
    """Grid: (KV_HEADS, sequences, 3); rows at equal distances of q, of k or of v. Without q 2."""
    kv_head, sequence, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if not HAS_Q:
        which += 1
    place = sequence * KV_HEADS + kv_head
    others = tl.num_programs(1) * KV_HEADS
    if which == 0:
        most = _largest_of_q(
            q_ptr + kv_head * GROUP * stride_q_h,
            row_bounds_ptr + sequence,
            stride_q_m,
            stride_q_h,
            GROUP,
            D,
        )
        tl.store(magnitudes_ptr + place, most)
    else:
        x_ptr = k_ptr
        if which == 2:
            x_ptr = v_ptr
        x_ptr += kv_head * stride_kv_h
        shift = _shift(x_ptr, kv_bounds_ptr + sequence, stride_kv_s, D)
        tl.store(shifts_ptr + ((which - 1) * others + place) * D + tl.arange(0, D), shift)
        tl.store(magnitudes_ptr + which * others + place, 0)


@triton.jit
def _largest_of_q(q_ptr, bounds_ptr, stride_q_m, stride_q_h, GROUP: tl.constexpr, D: tl.constexpr):
    """The largest magnitude of sampled rows in the heads of a group."""
    # Where nothing lies between two segments, these are the next one's first row.
    rows = _sampled_rows(bounds_ptr, _SAMPLES_OF_Q)
    q_ptrs = q_ptr + rows[:, None] * stride_q_m + tl.arange(0, D)[None, :]
    bits = tl.zeros((_SAMPLES_OF_Q, D), tl.int32)
    for head in range(GROUP):
        q = tl.load(q_ptrs + head * stride_q_h).to(tl.float32)
        bits = tl.maximum(bits, _finite_magnitudes(q))
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _shift(x_ptr, bounds_ptr, stride_x, D: tl.constexpr):
    """Near the mean of a head's sampled rows, (D,)."""
    rows = _sampled_rows(bounds_ptr, _SAMPLES)
    x = tl.load(x_ptr + rows[:, None] * stride_x + tl.arange(0, D)[None, :]).to(tl.float32)
    bits = _finite_magnitudes(x)
    mean = tl.sum(tl.where(bits == _magnitudes(x), x, 0.0), axis=0) / _SAMPLES
    # The spacing of bfloat16 at the largest, and its inverse; adding 1.5 * 2^23 rounds.
    exponent = tl.maximum((tl.max(bits, axis=0) >> 23) - 7, 1)
    spacing = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return ((mean * inverse + 12582912.0) - 12582912.0) * spacing


@triton.jit
def _magnitudes_kernel(
    magnitudes_ptr,  # (3, sequences, KV_HEADS) int32: zeros for k and v, output
    shifts_ptr,  # (2, sequences, KV_HEADS, D) fp32
    k_ptr,  # (S, KV_HEADS, D)
    v_ptr,
    kv_bounds_ptr,  # (sequences + 1,) int32
    keys,  # S
    sequences,
    stride_kv_s,
    stride_kv_h,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of S, KV_HEADS, 2); the largest of k or of v, less its shifts."""
    kv_head, which = tl.program_id(1), tl.program_id(2)
    x_ptr = k_ptr
    if which == 1:
        x_ptr = v_ptr
    first = which * sequences * KV_HEADS + kv_head
    x, _row, sequence = _rows(
        x_ptr + kv_head * stride_kv_h,
        tl.program_id(0),
        kv_bounds_ptr,
        keys,
        sequences,
        stride_kv_s,
        D,
        BOUNDS,
        BLOCK,
    )
    x -= _shifts(shifts_ptr + first * D, sequence, KV_HEADS * D, D)
    of_rows = tl.max(_finite_magnitudes(x), axis=1)
    last = tl.max(sequence, axis=0)
    lowest = tl.min(tl.where(sequence < 0, last, sequence), axis=0)
    magnitudes_ptr += sequences * KV_HEADS + first
    for each in range(tl.maximum(lowest, 0), last + 1, 2):
        most = tl.max(tl.where(sequence == each, of_rows, 0), axis=0)
        tl.atomic_max(magnitudes_ptr + each * KV_HEADS, most, sem="relaxed")


@triton.jit
def _round_kernel(
    q_out_ptr,  # (M, KV_HEADS * GROUP, D) output
    k_out_ptr,  # (S, KV_HEADS, D) output
    v_out_ptr,  # the same
    scales_ptr,  # (3, sequences, KV_HEADS) fp32 output
    q_scale_ptr,  # (1,) fp32 of rounded queries, or unused
    magnitudes_ptr,  # (3, sequences, KV_HEADS) int32
    shifts_ptr,  # (2, sequences, KV_HEADS, D) fp32
    q_ptr,  # (M, KV_HEADS * GROUP, D)
    k_ptr,  # (S, KV_HEADS, D)
    v_ptr,
    row_bounds_ptr,  # (sequences + 1,) int32
    kv_bounds_ptr,
    rows,  # M
    keys,  # S
    sequences,
    stride_q_m,
    stride_q_h,
    stride_kv_s,
    stride_kv_h,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Q: tl.constexpr,
):
    """Grid: (blocks of M times heads of q, then blocks of S times heads of k and of v)."""
    program = tl.program_id(0)
    others = sequences * KV_HEADS
    if program == 0:
        for start in range(0, 3 * others, BLOCK):
            i = start + tl.arange(0, BLOCK)
            most = tl.load(magnitudes_ptr + i, mask=i < 3 * others, other=0)
            exponent = _scale_exponent(most) + tl.where(i < others, _HEADROOM, 0)
            scale = (exponent << 23).to(tl.float32, bitcast=True)
            if not HAS_Q:
                scale = tl.where(i < others, tl.load(q_scale_ptr), scale)
            tl.store(scales_ptr + i, scale, mask=i < 3 * others)
    blocks = tl.cdiv(rows, BLOCK)
    if program < blocks * KV_HEADS * GROUP:
        head = program // blocks
        x, row, sequence = _rows(
            q_ptr + head * stride_q_h,
            program % blocks,
            row_bounds_ptr,
            rows,
            sequences,
            stride_q_m,
            D,
            BOUNDS,
            BLOCK,
        )
        y = _scaled(x, magnitudes_ptr + head // GROUP, sequence, _HEADROOM, KV_HEADS)
        _store_rows(q_out_ptr + head * D, y, row, rows, KV_HEADS * GROUP * D, D)
    else:
        program -= blocks * KV_HEADS * GROUP
        blocks = tl.cdiv(keys, BLOCK)
        kv_head = program // blocks
        x_ptr, out_ptr, first = k_ptr, k_out_ptr, kv_head
        if kv_head >= KV_HEADS:
            kv_head -= KV_HEADS
            x_ptr, out_ptr, first = v_ptr, v_out_ptr, others + kv_head
        x, row, sequence = _rows(
            x_ptr + kv_head * stride_kv_h,
            program % blocks,
            kv_bounds_ptr,
            keys,
            sequences,
            stride_kv_s,
            D,
            BOUNDS,
            BLOCK,
        )
        x -= _shifts(shifts_ptr + first * D, sequence, KV_HEADS * D, D)
        y = _scaled(x, magnitudes_ptr + others + first, sequence, 0, KV_HEADS)
        _store_rows(out_ptr + kv_head * D, y, row, keys, KV_HEADS * D, D)


@triton.jit
def _sampled_rows(bounds_ptr, SAMPLES: tl.constexpr):
    """SAMPLES rows of a sequence at equal distances, from its first."""
    start = tl.load(bounds_ptr)
    length = tl.load(bounds_ptr + 1) - start
    return (start + tl.arange(0, SAMPLES) * length // SAMPLES).to(tl.int64)


@triton.jit
def _rows(
    x_ptr,
    block,
    bounds_ptr,
    rows,
    sequences,
    stride,
    D: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows of a head (BLOCK, D) in fp32, which they are, and the sequence of each: -1 for
    rows of none, or of what lies between two segments."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    # Whatever their sequence is: to load those of one alone would be to wait for the bounds first.
    x = tl.load(x_ptrs, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    return x, row, _sequences(row, bounds_ptr, rows, sequences, BOUNDS)


@triton.jit
def _sequences(row, bounds_ptr, rows, sequences, BOUNDS: tl.constexpr):
    """The sequence of each row, (BLOCK,); -1 as in `_rows`."""
    i = tl.arange(0, BOUNDS)
    bounds = tl.load(bounds_ptr + i, mask=i <= sequences, other=0x7FFFFFFF)
    sequence = tl.sum((bounds[None, :] <= row[:, None]).to(tl.int32), axis=1) - 1
    attends = (sequence < sequences) & (sequence % 2 == 0) & (row < rows)
    return tl.where(attends, sequence, -1)


@triton.jit
def _shifts(shifts_ptr, sequence, stride, D: tl.constexpr):
    """(BLOCK, D), those of each row's sequence."""
    places = sequence[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(shifts_ptr + places, mask=(sequence >= 0)[:, None], other=0.0)


@triton.jit
def _scaled(x, magnitudes_ptr, sequence, HEADROOM: tl.constexpr, KV_HEADS: tl.constexpr):
    """x by its scales, NaN if not finite, which the conversion would make the largest number.

    Rows of no sequence become zeros: FlashAttention loads whole tiles, and 0 * NaN is NaN.
    """
    attends = sequence >= 0
    most = tl.load(magnitudes_ptr + sequence * KV_HEADS, mask=attends, other=0)
    # The scale is 2^(e - 127), its inverse 2^(127 - e).
    inverse = (254 - _scale_exponent(most) - HEADROOM) << 23
    y = x * inverse.to(tl.float32, bitcast=True)[:, None]
    y = tl.where(_magnitudes(x) < _INFINITY_BITS, y, float("nan"))
    return tl.where(attends[:, None], y, 0.0)


@triton.jit
def _store_rows(out_ptr, y, row, rows, stride, D: tl.constexpr):
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def _magnitudes(x):
    """Of fp32 numbers, as integers, which are in the same order."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _finite_magnitudes(x):
    bits = _magnitudes(x)
    return tl.where(bits < _INFINITY_BITS, bits, 0)


@triton.jit
def _scale_exponent(bits):
    """Exponent bits of the least power of two that divides a magnitude to 448 or less."""
    return tl.maximum(((bits + _PAST_MOST) >> 23) - 8, _LEAST_EXPONENT)
