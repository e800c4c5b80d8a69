"""What a forward pass works on: packed rows, where they attend, where their K and V go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from mot_kernels import Format, QuantizedRows, RoutePlan

if TYPE_CHECKING:
    from bagel_mot.model.attention import Backend, RoundedQ
    from bagel_mot.model.sequence_parallel import Exchange

UND, GEN = 0, 1

# Rows from which a picture is large: from which attention in 8 bits pays (see `attention_fp8`).
LARGE_PICTURE = 3072


@dataclass(frozen=True)
class Segment:
    """Consecutive packed rows that attend to one context and to their own block.

    Attributes:
        rows: number of packed rows.
        kv_start: first row of its context in the KV cache.
        prefix: cached rows of the context; the block's own K and V follow them directly.
        causal: row i sees own rows 0..i (text); otherwise the whole block (pictures).
        first: place of the first row in its block; not 0 where other ranks have other rows.
        block_rows: rows of the whole block, on all ranks; 0 means `rows`.
        room: cache rows that are set aside for the prefix: another may come in its place, so long
            as it is not longer; 0 means `prefix`.
    """

    rows: int
    kv_start: int
    prefix: int
    causal: bool
    first: int = 0
    block_rows: int = 0
    room: int = 0

    @property
    def is_large(self) -> bool:
        """Whether it is of a large picture, however few of its rows are here."""
        return not self.causal and (self.block_rows or self.rows) >= LARGE_PICTURE

    @property
    def own_rows(self) -> slice:
        """Cache rows of the block's own K and V."""
        start = self.kv_start + self.prefix
        return slice(start, start + (self.block_rows or self.rows))

    @property
    def kv_rows(self) -> slice:
        """Cache rows the segment attends to: context and own block."""
        return slice(self.kv_start, self.own_rows.stop)

    @property
    def region(self) -> slice:
        """Cache rows that are the segment's, whatever prefix it gets."""
        extra = max(self.room - self.prefix, 0)
        return slice(self.kv_start, self.own_rows.stop + extra)


@dataclass(frozen=True)
class Span:
    """Consecutive segments that one call of a variable-length kernel can attend for.

    They are all causal or all not, all large or none, so that how a picture is attended to does
    not depend on others, and lie in the cache in their own order. Example: two segments
    of 4 rows, one behind 3 rows at cache row 0, the other behind 2 rows at cache row 10::

        row_bounds   [0, 4, 4, 8]
        kv_bounds    [0, 7, 10, 16]

    Entries 2i and 2i + 1 of `kv_bounds` are where segment i's keys begin and end; what lies
    between two segments looks to a kernel like a sequence of keys without queries.

    Attributes:
        segments: at least one, all with rows.
        first_row: place of the first row among all packed rows.
        row_bounds: (2n,) int32 on the device, counted from `first_row`.
        kv_bounds: (2n,) int32 on the device.
    """

    segments: tuple[Segment, ...]
    first_row: int
    row_bounds: torch.Tensor
    kv_bounds: torch.Tensor

    @property
    def causal(self) -> bool:
        """Whether its segments are causal."""
        return self.segments[0].causal

    @property
    def is_large(self) -> bool:
        """Whether its segments are."""
        return self.segments[0].is_large

    @property
    def packed_rows(self) -> slice:
        """Its packed rows."""
        return slice(self.first_row, self.first_row + sum(s.rows for s in self.segments))

    @property
    def most_rows(self) -> int:
        """Rows of the largest segment."""
        return max(segment.rows for segment in self.segments)

    @property
    def most_keys(self) -> int:
        """Keys a segment has at most, whatever prefix it gets."""
        return max(s.region.stop - s.region.start for s in self.segments)


@dataclass(frozen=True)
class Block:
    """A segment with what its rows are.

    Attributes:
        segment: where the rows attend.
        runs: the rows' experts as (expert, length) pairs in row order.
        position: RoPE position of the first row. A causal block counts upwards from it; in a
            picture every row has this one.
    """

    segment: Segment
    runs: tuple[tuple[int, int], ...]
    position: int

    @property
    def positions_end(self) -> int:
        """One more than the block's largest position."""
        return self.position + (self.segment.rows if self.segment.causal else 1)

    def part(self, rows: range) -> Block:
        """The rows of a (not causal) block that one of several ranks computes."""
        runs, start = [], 0
        for expert, length in self.runs:
            inside = range(max(start, rows.start), min(start + length, rows.stop))
            runs.append((expert, len(inside)))
            start += length
        segment = replace(
            self.segment, rows=len(rows), first=rows.start, block_rows=self.segment.rows
        )
        return Block(segment, tuple(runs), self.position)


@dataclass(frozen=True)
class Layout:
    """A packed sequence of M rows. Built on the host, without a device sync; reusable.

    Attributes:
        plan: which expert owns which row; may be None if all rows are und.
        positions: (M,) int32, RoPE position of each row.
        kv_rows: (M,) int32, cache row that each row's K and V are written to.
        spans: the attention segments, in row order.
        positions_end: one more than the largest position, on the host.
        packed: int32, holds `positions`, `kv_rows` and the spans' bounds one after the other.
        exchange: how ranks that hold other rows of these blocks attend together; None if all
            rows are here.
    """

    plan: RoutePlan | None
    positions: torch.Tensor
    kv_rows: torch.Tensor
    spans: tuple[Span, ...]
    positions_end: int
    packed: torch.Tensor
    exchange: Exchange | None = None

    def rounds_q(self, backend: Backend) -> bool:
        """Whether `attend` may get its queries rounded."""
        return self.exchange is None and backend.rounds_q(self.spans)

    def attend(
        self,
        q: torch.Tensor | RoundedQ,
        own: torch.Tensor,
        kv: torch.Tensor,
        backend: Backend,
        format: Format | None = None,
    ) -> torch.Tensor | QuantizedRows:
        """Attention of the rows in one layer.

        Args:
            q: (M, H, D); rounded where `rounds_q`.
            own: where K and V of these rows were written; `kv`, or what the exchange gave.
            kv: (S, 2, Hkv, D), the layer's cache.
            backend: what computes it.
            format: what the result will be rounded to by a scale of each row, if it will.

        Returns:
            (M, H * D); rounded to the format where q was rounded.
        """
        k, v = kv.unbind(1)
        if not isinstance(q, torch.Tensor):
            return backend.attend_to_rounded(q, k, v, self.spans, format)
        if self.exchange is not None:
            return self.exchange.attend(q, own, kv, backend).flatten(1)
        return backend.attend(q, k, v, self.spans).flatten(1)

    def load(self, blocks: Sequence[Block]) -> None:
        """Take over other blocks' positions and places in the cache.

        They must differ from these in no more than position and length of prefix, each prefix
        within the room of its segment here.
        """
        host = _pack(blocks, _split_into_spans([block.segment for block in blocks]))
        if len(host) != len(self.packed):
            raise ValueError(
                f"the blocks need {len(host)} table entries, this layout has {len(self.packed)}; "
                "only blocks of the same shape can take the place of others"
            )
        self.packed.copy_(to_device(host, self.packed.device))


@dataclass(frozen=True)
class DecodeLayout:
    """One row of each of B texts, which have equal room in the cache, one behind the other.

    Its tensors may change between passes; the rotary table must hold their positions.

    Attributes:
        positions: (B,) int32, RoPE position of each row.
        kv_rows: (B,) int32, cache row that each row's K and V are written to.
        lengths: (B,) int32, rows each text has, this one included.
        room: cache rows of each text.
        reach: no length is above it; see `Backend.reach`.
        plan: of B und rows. One expert needs no routing, but few rows are bound by reading the
            weights: routed linears do that fastest, and with their epilogues in fewer launches.
    """

    positions: torch.Tensor
    kv_rows: torch.Tensor
    lengths: torch.Tensor
    room: int
    reach: int
    plan: RoutePlan
    exchange: None = None
    positions_end: int = 1

    def rounds_q(self, backend: Backend) -> bool:
        """See `Layout.rounds_q`: never."""
        return False

    def attend(
        self,
        q: torch.Tensor | RoundedQ,
        own: torch.Tensor,
        kv: torch.Tensor,
        backend: Backend,
        format: Format | None = None,
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        assert isinstance(q, torch.Tensor)
        texts = len(self.lengths)
        k, v = kv[: texts * self.room].unflatten(0, (texts, self.room)).unbind(2)
        return backend.attend_rows(q, k, v, self.lengths, self.reach).flatten(1)


def build_layout(
    blocks: Sequence[Block],
    device: torch.device,
    exchange: Exchange | None = None,
    *,
    routes_und_rows: bool = False,
) -> Layout:
    """Lay out blocks (or this rank's parts of them) one after the other.

    Args:
        routes_und_rows: make a plan even if all rows are und.
    """
    runs = [run for block in blocks for run in block.runs]
    segments = [block.segment for block in blocks]
    spans = _split_into_spans(segments)
    packed = to_device(_pack(blocks, spans), device)
    rows = sum(segment.rows for segment in segments)
    plan = None
    if routes_und_rows or any(expert != UND and length for expert, length in runs):
        plan = RoutePlan.from_runs(runs, num_experts=2, device=device)
    return Layout(
        plan,
        packed[:rows],
        packed[rows : 2 * rows],
        _spans_over(spans, packed[2 * rows :]),
        max((block.positions_end for block in blocks), default=0),
        packed,
        exchange,
    )


def build_spans(segments: Sequence[Segment], device: torch.device) -> tuple[Span, ...]:
    """The spans of segments whose rows are packed one after the other."""
    spans = _split_into_spans(segments)
    return _spans_over(spans, to_device(_bounds(spans), device))


def _pack(blocks: Sequence[Block], spans: Sequence[Sequence[Segment]]) -> torch.Tensor:
    """`Layout.packed`, on the host."""
    positions = [torch.empty(0, dtype=torch.int32)]
    kv_rows = [torch.empty(0, dtype=torch.int32)]
    for block in blocks:
        segment = block.segment
        count = torch.arange(segment.rows, dtype=torch.int32)
        positions.append(block.position + (count if segment.causal else count * 0))
        kv_rows.append(segment.own_rows.start + segment.first + count)
    return torch.cat([*positions, *kv_rows, _bounds(spans)])


def _split_into_spans(segments: Sequence[Segment]) -> list[list[Segment]]:
    spans: list[list[Segment]] = []
    for segment in segments:
        if not segment.rows:
            continue
        before = spans[-1][-1] if spans else None
        if (
            before is None
            or before.causal != segment.causal
            or before.is_large != segment.is_large
            or segment.kv_start < before.region.stop
        ):
            spans.append([])
        spans[-1].append(segment)
    return spans


def _bounds(spans: Sequence[Sequence[Segment]]) -> torch.Tensor:
    """`row_bounds`, then `kv_bounds`, of one span after the other; int32."""
    bounds: list[int] = []
    for span in spans:
        row = 0
        for segment in span:
            bounds += [row, row + segment.rows]
            row += segment.rows
        for segment in span:
            bounds += [segment.kv_rows.start, segment.kv_rows.stop]
    return torch.tensor(bounds, dtype=torch.int32)


def _spans_over(split: Sequence[Sequence[Segment]], bounds: torch.Tensor) -> tuple[Span, ...]:
    """Spans whose bounds are views of `bounds`, which holds those of all."""
    spans: list[Span] = []
    first_row = 0
    tables = bounds.split([2 * len(own) for own in split for _ in range(2)])
    for i, own in enumerate(split):
        spans.append(Span(tuple(own), first_row, tables[2 * i], tables[2 * i + 1]))
        first_row += sum(segment.rows for segment in own)
    return tuple(spans)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor without making the host wait (from pinned memory to a GPU)."""
    if device.type == "cuda" and not host.is_cuda:
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
