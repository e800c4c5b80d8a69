"""Attention over packed rows, behind one interface; `attention_choice` chooses who computes it.

Notation: q (M, H, D) in packed row order; k, v (S, Hkv, D) one layer of a `KVCache`, the last
dimension contiguous; query head j reads KV head j // (H / Hkv); the scale is D^-0.5. Where rows
attend is described by `Span`s, made once a layout.

| name | what runs | one call for all segments | lengths read on the device |
|---|---|---|---|
| fa3 | FlashAttention-3 (`fa3-fwd`, or its source build) | yes | yes |
| fa3-fp8 | the same in 8 bits for pictures, see `attention_fp8` | yes | yes |
| fa2 | FlashAttention-2 (`flash-attn`) | yes | yes |
| cudnn | cuDNN through `scaled_dot_product_attention` | no | no |
| sdpa | `scaled_dot_product_attention`, torch's choice | no | no |
| math | scores written out in float32: the reference | no | yes |

A backend that reads lengths on the device can replay a CUDA graph over prefixes of any length.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from mot_kernels import Format, QuantizedRows
from torch.nn.attention import SDPBackend, sdpa_kernel

from bagel_mot.model.layout import Segment, Span

# Rows from which cuDNN pays: for each new shape it builds a plan on the host first, which a text
# growing token by token would pay at every step.
CUDNN_ROWS = 256
# SDPA decodes over spans of keys rounded up to this: one CUDA graph serves as many lengths.
_DECODE_STEP = 256
# FlashAttention-3: rows of a tile, and what a tile costs if rows of several heads are put in it.
_FA3_ROWS = 128
_FA3_PACKING = 1.08


class RoundedQ(NamedTuple):
    """Queries in e4m3fn, (M, H, D), and what they are to be multiplied by, (1,) float32."""

    data: torch.Tensor
    scale: torch.Tensor


class Backend(ABC):
    """One way to attend.

    Attributes:
        name: what `choose_attention` calls it.
        device_lengths: whether `attend` reads the lengths of prefixes from the device, so that
            they may change between replays of a CUDA graph.
        needs_finite_rows: whether rows behind a segment's must be finite in the cache. Kernels
            that load whole tiles of K and V multiply those rows by 0, and 0 * NaN is NaN.
        capabilities: of GPUs that it has kernels for, from the first to before the second.
        dtypes, head_dims: that it has kernels for.
    """

    name: ClassVar[str]
    device_lengths: ClassVar[bool]
    needs_finite_rows: ClassVar[bool] = False
    capabilities: ClassVar[tuple[tuple[int, int], tuple[int, int]]] = ((8, 0), (99, 0))
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)
    head_dims: ClassVar[Sequence[int]] = range(8, 257, 8)

    @abstractmethod
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span]
    ) -> torch.Tensor:
        """Attention of all packed rows, (M, H, D)."""

    def rounds_q(self, spans: Sequence[Span]) -> bool:
        """Whether the queries of these spans may come rounded, for `attend_to_rounded`."""
        return False

    def attend_to_rounded(
        self,
        q: RoundedQ,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: Sequence[Span],
        format: Format | None,
    ) -> torch.Tensor | QuantizedRows:
        """`attend` of spans that `rounds_q` is true for, (M, H * D).

        Args:
            format: what the result is rounded to by a scale of each row (`quantize_rows`), if it
                is.

        Raises:
            TypeError: this backend takes no rounded queries.
        """
        raise TypeError(f"attention {self.name} takes queries as they are, not rounded")

    def attend_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Full attention of q (m, H, D) to k, v (n, Hkv, D), n > 0, ready to be merged.

        Returns:
            Output (m, H, D) and log-sum-exp of the scores (m, H), both float32.
        """
        return _attend_written_out(q, k, v, None)

    @abstractmethod
    def attend_rows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        reach: int,
    ) -> torch.Tensor:
        """One query row of each of B sequences, as when text is decoded.

        Args:
            q: (B, H, D).
            k, v: (B, C, Hkv, D), room for C rows a sequence.
            lengths: (B,) int32 on the device, rows each sequence has, the query's own included.
            reach: no length is above it; see `reach`.

        Returns:
            (B, H, D).
        """

    def reach(self, length: int, room: int) -> int:
        """Rows `attend_rows` is to look at where the longest of the sequences has `length`.

        A CUDA graph is made for a reach. Backends that stop at the lengths take all the room.
        """
        return room


class Flash(Backend):
    """What the two FlashAttention packages have in common."""

    device_lengths = True
    needs_finite_rows = True
    modules: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._functions = importlib.import_module(self.module())

    @classmethod
    def module(cls) -> str:
        """The installed one of the modules that provide it.

        Raises:
            ImportError: none is installed.
        """
        for name in cls.modules:
            if importlib.util.find_spec(name) is not None:
                return name
        raise ImportError(f"none of the modules {', '.join(cls.modules)} is installed")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span]
    ) -> torch.Tensor:
        return _joined(q, [self._attend_span(q[s.packed_rows], k, v, s) for s in spans])

    def _attend_span(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span
    ) -> torch.Tensor:
        """Attention of the span's own rows, q (m, H, D)."""
        return self._call(q, k, v, span)

    def _call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, **more: torch.Tensor
    ) -> torch.Tensor:
        """What the package makes of a span, and of `more` arguments."""
        # Between two segments the bounds describe a segment without rows, over the keys that lie
        # between: so the kernels, which want one sequence after the other, need no copy of K.
        # Their causal mask is aligned to the last row and the last key, which is ours.
        y: torch.Tensor = self._functions.flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=span.row_bounds,
            cu_seqlens_k=span.kv_bounds,
            # For one row FlashAttention-2 takes a path that needs a row of every segment.
            max_seqlen_q=max(span.most_rows, 2),
            max_seqlen_k=span.most_keys,
            causal=span.causal,
            **self._options(span, q.shape[1] // k.shape[1]),
            **more,
        )
        return y

    def _options(self, span: Span, group: int) -> dict[str, object]:
        """More arguments of a call; `group` query heads share a KV head."""
        return {}

    def attend_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(q):
            return super().attend_with_lse(q, k, v)
        out, lse, *_ = self._functions.flash_attn_func(
            q[None], k[None], v[None], return_attn_probs=True
        )
        return out[0].float(), lse[0].transpose(0, 1)

    def attend_rows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        reach: int,
    ) -> torch.Tensor:
        y: torch.Tensor = self._functions.flash_attn_with_kvcache(
            q[:, None], k, v, cache_seqlens=lengths, num_splits=0
        )
        return y[:, 0]


class FlashAttention3(Flash):
    """FlashAttention-3, made for Hopper (Shah et al., arXiv:2407.08608)."""

    name = "fa3"
    # The package on PyPI, forward only and bfloat16 only, before a build of one's own.
    modules = ("fa3_fwd_interface", "flash_attn_interface")
    capabilities = ((8, 0), (10, 0))

    def _options(self, span: Span, group: int) -> dict[str, object]:
        # The kernel can put the rows of a KV head's query heads together in tiles of 128, so that
        # fewer are partly empty, which costs it 8 % (4,098 rows on an H200). Left to itself it
        # always does where lengths vary.
        tiles = sum(-(-segment.rows // _FA3_ROWS) for segment in span.segments)
        packed = sum(-(-segment.rows * group // _FA3_ROWS) for segment in span.segments)
        return {"pack_gqa": tiles * group > _FA3_PACKING * packed}


class FlashAttention2(Flash):
    """FlashAttention-2 (Dao, arXiv:2307.08691)."""

    name = "fa2"
    modules = ("flash_attn",)


class Sdpa(Backend):
    """`scaled_dot_product_attention`, one call a segment."""

    name = "sdpa"
    device_lengths = False

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span]
    ) -> torch.Tensor:
        segments = [segment for span in spans for segment in span.segments]
        queries = q.split([segment.rows for segment in segments])
        return _joined(
            q,
            [
                self._attend_segment(own, k, v, segment)
                for own, segment in zip(queries, segments, strict=True)
            ],
        )

    def _attend_segment(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        # A single causal row sees everything, and without a prefix torch's own causal mask
        # (aligned to the first key) is ours.
        own_mask = segment.causal and segment.rows > 1
        mask = _causal_mask(segment, q.device) if own_mask and segment.prefix else None
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k[segment.kv_rows].transpose(0, 1)[None],
            v[segment.kv_rows].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=own_mask and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return y[0].transpose(0, 1)

    def attend_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (q.is_cuda and q.dtype is not torch.float32 and len(q)):
            return super().attend_with_lse(q, k, v)
        groups = q.shape[1] // k.shape[1]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(
            q.transpose(0, 1)[None],
            k.repeat_interleave(groups, dim=1).transpose(0, 1)[None],
            v.repeat_interleave(groups, dim=1).transpose(0, 1)[None],
        )
        return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1)

    def attend_rows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        reach: int,
    ) -> torch.Tensor:
        seen = torch.arange(reach, device=q.device)[None] < lengths[:, None]
        y = F.scaled_dot_product_attention(
            q[:, :, None],
            k[:, :reach].transpose(1, 2),
            v[:, :reach].transpose(1, 2),
            attn_mask=seen[:, None, None],
            enable_gqa=q.shape[1] != k.shape[2],
        )
        return y[:, :, 0]

    def reach(self, length: int, room: int) -> int:
        return min(-(-length // _DECODE_STEP) * _DECODE_STEP, room)


class Cudnn(Sdpa):
    """cuDNN's kernels for pictures and long texts, torch's choice for the rest."""

    name = "cudnn"
    head_dims = range(8, 129, 8)

    def _attend_segment(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        if segment.causal or segment.rows < CUDNN_ROWS:
            return super()._attend_segment(q, k, v, segment)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super()._attend_segment(q, k, v, segment)


class Math(Backend):
    """Scores written out in at least float32: what the other backends are checked with."""

    name = "math"
    device_lengths = True

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span]
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for span in spans:
            start = span.first_row
            for i, segment in enumerate(span.segments):
                rows = slice(start, start + segment.rows)
                region = segment.region
                length = span.kv_bounds[2 * i + 1] - span.kv_bounds[2 * i]
                limits = length.expand(segment.rows)
                if segment.causal:
                    own = torch.arange(1 - segment.rows, 1, device=q.device)
                    limits = limits + own
                out[rows] = _attend_up_to(q[rows], k[region], v[region], limits).to(q.dtype)
                start = rows.stop
        return out

    def attend_rows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        reach: int,
    ) -> torch.Tensor:
        rows = [
            _attend_up_to(*each) for each in zip(q[:, None], k, v, lengths[:, None], strict=True)
        ]
        return torch.cat(rows).to(q.dtype)


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint sets of keys, each (output, lse), as one to their union."""
    lse = torch.logaddexp(one[1], other[1])
    out = one[0] * (one[1] - lse).exp()[..., None] + other[0] * (other[1] - lse).exp()[..., None]
    return out, lse


def _joined(q: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """What was attended for consecutive rows of q, in one; without a copy where it is one."""
    if not outputs:
        return torch.empty_like(q)
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))


def _causal_mask(segment: Segment, device: torch.device) -> torch.Tensor:
    """(rows, prefix + rows) bool: the whole prefix and own rows up to the query's."""
    shape = (segment.rows, segment.prefix + segment.rows)
    return torch.ones(shape, dtype=torch.bool, device=device).tril(segment.prefix)


def _attend_up_to(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: torch.Tensor
) -> torch.Tensor:
    """Row i of q (m, H, D) sees the first limits[i] rows of k, v (n, Hkv, D); at least float32."""
    seen = torch.arange(len(k), device=q.device) < limits[:, None]
    # Rows that nobody sees may hold anything, and 0 * NaN is NaN.
    unwritten = ~seen.any(0)[:, None, None]
    return _attend_written_out(q, k, v.masked_fill(unwritten, 0), seen)[0]


def _attend_written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(groups, dim=1)
    values = v.to(wide).repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse.transpose(0, 1)
