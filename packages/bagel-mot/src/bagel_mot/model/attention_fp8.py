"""FlashAttention-3 over Q, K and V in 8 bits, for large pictures, where it is asked for.

What is rounded, each number once, to 3 bits of mantissa: Q, K minus a shift, V minus a shift. Each
KV head of each sequence has shifts and scales of its own: no request depends on its neighbours.

Shifts are near the means over the keys; any are right. K's falls out of the softmax (SageAttention,
Zhang et al., arXiv:2410.02367). V's is added to the result, since probabilities add up to 1. Matrix
units drop the low bits of 8-bit products at every addition, towards zero: without a shift, what all
rows of V share becomes 3 to 7 % smaller over 4,000 keys (docs/log.md). Shifts are multiples of the
spacing of bfloat16 numbers as large as the largest: otherwise all rows would lie off the points
between which rounding decides by the same bit, and more would be rounded up, or down.

Scales are powers of two, which round nothing. Those of K and V are exact. Q is written by a norm,
whose weights bound it: where all rows are a large picture's, it rounds Q itself, by one scale
(`mot_qk_norm_rope`). Otherwise Q's scale comes from some rows, which are of about one length, with
room for 16 times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mot_kernels import Format, Fp8W8A8, QuantizedRows, quantize_rows
from mot_kernels.dispatch import warn_once
from mot_kernels.formats import LEAST_POWER
from mot_kernels.quantize import least_power, round_to

from bagel_mot.model.attention import FlashAttention3, RoundedQ
from bagel_mot.model.layout import Span

# Rows that a shift is the mean of, and rows of Q that are looked at.
SAMPLES = 256
SAMPLES_OF_Q = 64
# Exponent of what scales of Q are larger by: nothing is lost above 2^-9 of the largest number.
HEADROOM = 4


class Fp8Heads(NamedTuple):
    """Q, K and V in float8_e4m3fn; "sequences" are what a span's bounds describe.

    Attributes:
        q: (M, H, D).
        k, v: (S, Hkv, D); zeros in rows that no segment reads.
        scales: (3, 2n - 1, Hkv) float32, of q, k and v by sequence. The scale of q is that of all
            query heads that read a KV head.
        shifts: (2, 2n - 1, Hkv, D) float32, what k and v are less than they were. Like the scales
            undefined for sequences without queries.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor
    shifts: torch.Tensor


class FlashAttention3Fp8(FlashAttention3):
    """`fa3`, with both products in 8 bits for large pictures (`LARGE_PICTURE`)."""

    name = "fa3-fp8"
    capabilities = ((9, 0), (10, 0))
    dtypes = (torch.bfloat16,)  # whatever is rounded, this is what it returns
    head_dims = (64, 128, 256)

    def _attend_span(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span
    ) -> torch.Tensor:
        if not span.is_large:
            return super()._attend_span(q, k, v, span)
        return add_shifts(*self._attend_shifted(q, k, v, span), span)

    def rounds_q(self, spans: Sequence[Span]) -> bool:
        return len(spans) == 1 and spans[0].is_large

    def attend_to_rounded(
        self,
        q: RoundedQ,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: Sequence[Span],
        format: Format | None,
    ) -> torch.Tensor | QuantizedRows:
        (span,) = spans
        y, shifts = self._attend_shifted(q, k, v, span)
        if isinstance(format, Fp8W8A8):
            return shift_and_round(y, shifts, span, format)
        y = add_shifts(y, shifts, span).flatten(1)
        return y if format is None else quantize_rows(y, format)

    def _attend_shifted(
        self, q: torch.Tensor | RoundedQ, k: torch.Tensor, v: torch.Tensor, span: Span
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of a large span's rows, less the shifts of V, and these."""
        # The cache may have room for more: it is kept, and as large as any step wanted it.
        end = span.segments[-1].region.stop
        own, k, v, scales, shifts = round_heads(q, k[:end], v[:end], span)
        of_q, of_k, of_v = scales
        y = self._call(own, k, v, span, q_descale=of_q, k_descale=of_k, v_descale=of_v)
        return y, shifts[1]

    def attend_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        warn_once("attention fa3-fp8 is fa3, in 16 bits, where ranks pass K and V around a ring")
        return super().attend_with_lse(q, k, v)


def round_heads(
    q: torch.Tensor | RoundedQ, k: torch.Tensor, v: torch.Tensor, span: Span
) -> Fp8Heads:
    """Round the rows of a span and all that they see, to the nearest; on GPUs without a sync.

    A scale is the least power of two that divides all finite numbers to 448 or less, for q those of
    `SAMPLES_OF_Q` rows; `HEADROOM` then makes it larger. NaN and infinities become NaN.

    Args:
        q: (M, H, D), the span's rows; rounded ones stay as they are.
        k, v: (S, Hkv, D), a layer's cache, at least up to the last segment's region.
        span: not causal.

    Raises:
        RuntimeError: gradients are wanted.
    """
    given = q.data if isinstance(q, RoundedQ) else q
    if torch.is_grad_enabled() and any(x.requires_grad for x in (given, k, v)):
        raise RuntimeError("attention fa3-fp8 has no backward pass; train with another, or none")
    if not k.is_cuda:
        return round_heads_reference(q, k, v, span)
    from bagel_mot._triton.round_heads import launch_round_heads

    keys, values = (
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in (k, v)
    )
    own = given
    if not isinstance(q, RoundedQ):
        own = torch.empty(given.shape, dtype=torch.float8_e4m3fn, device=k.device)
    sequences, (kv_heads, dim) = len(span.row_bounds) - 1, k.shape[1:]
    scales = k.new_empty(3, sequences, kv_heads, dtype=torch.float32)
    shifts = k.new_empty(2, sequences, kv_heads, dim, dtype=torch.float32)
    bounds = span.row_bounds, span.kv_bounds
    launch_round_heads((own, keys, values), scales, shifts, (q, k, v), *bounds)
    return Fp8Heads(own, keys, values, scales, shifts)


def add_shifts(y: torch.Tensor, shifts: torch.Tensor, span: Span) -> torch.Tensor:
    """y (M, H, D), overwritten, plus the shifts (2n - 1, Hkv, D) of its rows' sequences."""
    if y.is_cuda:
        from bagel_mot._triton.shift_rows import launch_add_shifts

        launch_add_shifts(y, shifts, span.row_bounds)
        return y
    edges = span.row_bounds.tolist()
    for i in range(0, len(edges), 2):
        rows = y[edges[i] : edges[i + 1]].unflatten(1, (shifts.shape[1], -1))
        rows += shifts[i][:, None]
    return y


def shift_and_round(
    y: torch.Tensor, shifts: torch.Tensor, span: Span, format: Format
) -> QuantizedRows:
    """`add_shifts`, then `quantize_rows` to a format of FP8, in one pass; (M, H * D)."""
    if not y.is_cuda:
        return quantize_rows(add_shifts(y, shifts, span).flatten(1), format)
    from bagel_mot._triton.shift_rows import launch_shift_and_round

    rounded = torch.empty(
        len(y), y.shape[1] * y.shape[2], dtype=torch.float8_e4m3fn, device=y.device
    )
    scales = torch.empty(len(y), dtype=torch.float32, device=y.device)
    launch_shift_and_round(rounded, scales, y, shifts, span.row_bounds)
    return QuantizedRows(rounded, scales, y.dtype)


def round_heads_reference(
    q: torch.Tensor | RoundedQ,
    k: torch.Tensor,
    v: torch.Tensor,
    span: Span,
    shifts: torch.Tensor | None = None,
) -> Fp8Heads:
    """`round_heads`, a segment at a time, by torch's operations; with the given shifts, or its own.

    Means are added up in another order than a kernel's, and numbers may then be rounded elsewhere.
    """
    own, keys = span.row_bounds.tolist(), span.kv_bounds.tolist()
    if shifts is None:
        shifts = torch.stack([_shifts(x, keys) for x in (k, v)])
    none = torch.zeros_like(shifts[0])
    if isinstance(q, RoundedQ):
        mine, of_q = q.data, q.scale.expand(shifts.shape[1:3])
    else:
        mine, of_q = _round_sequences(q, own, none, SAMPLES_OF_Q, HEADROOM)
    (k, of_k), (v, of_v) = (
        _round_sequences(k, keys, shifts[0]),
        _round_sequences(v, keys, shifts[1]),
    )
    return Fp8Heads(mine, k, v, torch.stack([of_q, of_k, of_v]), shifts)


def _shifts(x: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """Of x (S, Hkv, D), by sequence; (2n - 1, Hkv, D) float32."""
    shifts = torch.zeros(len(bounds) - 1, *x.shape[1:], device=x.device)
    for i in range(0, len(bounds), 2):
        rows = _sampled(x[bounds[i] : bounds[i + 1]], SAMPLES).float().nan_to_num(0, 0, 0)
        spacing = torch.exp2((torch.frexp(rows.abs().amax(0)).exponent - 8).clamp(-126).float())
        shifts[i] = (rows.mean(0) / spacing).round() * spacing
    return shifts


def _sampled(x: torch.Tensor, samples: int) -> torch.Tensor:
    """Rows at equal distances, from the first."""
    return x[torch.arange(samples, device=x.device) * len(x) // samples]


def _round_sequences(
    x: torch.Tensor,
    bounds: list[int],
    shifts: torch.Tensor,
    samples: int | None = None,
    headroom: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, heads, D) less the shifts, in e4m3fn, and the scales (2n - 1, Hkv) float32."""
    kv_heads = shifts.shape[1]
    rounded = torch.zeros(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    exponents = torch.full((len(bounds) - 1, kv_heads), LEAST_POWER + headroom, device=x.device)
    for i in range(0, len(bounds), 2):
        rows = slice(bounds[i], bounds[i + 1])
        heads = x[rows].float().unflatten(1, (kv_heads, -1))
        heads = heads.masked_fill(~heads.isfinite(), float("nan")) - shifts[i][:, None]
        seen = heads if samples is None else _sampled(heads, samples)
        exponents[i] = least_power(seen.nan_to_num().abs().amax((0, 2, 3))) + headroom
        scaled = heads / torch.exp2(exponents[i].float())[:, None, None]
        rounded[rows] = round_to(scaled.flatten(1, 2), rounded.dtype)
    return rounded, torch.exp2(exponents.float())
