"""Sequence parallelism: the rows of a picture's block over several ranks, in the attention only.

Everything but attention works row by row, so a rank that holds some rows of each block needs no
other rank for it. A block of n rows is cut into chunks of ceil(n / P) rows for P ranks, the last
ones shorter or empty: any n works with any P. The two ways to attend:

- All-gather KV: each rank's queries stay, all K and V of the block are gathered into its cache.
  K and V are small where few KV heads serve many query heads.
- Ulysses x ring (Jacobs et al., arXiv:2309.14509; Liu et al., arXiv:2310.01889): an all-to-all
  gives each of U ranks all rows for its share of the heads; with a ring, R such groups hold
  different rows, and their K and V go around while results are merged. Either may be 1.

The prefix is on every rank (of Ulysses: for the rank's heads), so it is never sent in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from bagel_mot.model.attention import Backend, merge
from bagel_mot.model.layout import Block, Segment, build_spans, to_device


def all_gather(out: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Concatenate the ranks' `own` tensors, of one shape, into `out`; `own` may be its part."""
    # torch 2.13 renames the function and warns about the old name, which is all 2.11 has.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(out, own, group=group)


def all_gather_each(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], group: dist.ProcessGroup
) -> None:
    """`all_gather` for several (out, own), in one launch where the backend can."""
    # What FSDP uses; there is no public name for it.
    with dist._coalescing_manager(group):
        for out, own in pairs:
            all_gather(out, own, group)


def chunk_rows(rows: int, parts: int) -> int:
    """Rows of each chunk but the last ones."""
    return -(-rows // parts)


def chunk(rows: int, parts: int, index: int) -> range:
    """The rows of chunk `index` when a block of `rows` is cut for `parts` ranks."""
    size = chunk_rows(rows, parts)
    return range(min(index * size, rows), min((index + 1) * size, rows))


class Exchange(Protocol):
    """How the ranks that share a layout's blocks attend together; see `SequenceParallel`."""

    def place(
        self, kv: torch.Tensor, kv_rows: torch.Tensor, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where a layer writes the K and V of this rank's rows.

        Args:
            kv: (S, 2, cached heads, D), the layer's cache.
            kv_rows: (M,) the rows' places in it.
            kv_heads: Hkv, the heads that are written.

        Returns:
            A tensor (S', 2, Hkv, D), and the rows to write in it (None: row i to row i).
        """
        ...

    def attend(
        self, q: torch.Tensor, own: torch.Tensor, kv: torch.Tensor, backend: Backend
    ) -> torch.Tensor:
        """Attention of this rank's rows, q (M, H, D), once `own` (from `place`) is written."""
        ...


@dataclass(frozen=True)
class SequenceParallel:
    """The ranks that hold rows of the same blocks, and the way they attend.

    Attributes:
        size, rank: P and this rank's chunk.
        group: all P ranks.
        ulysses_group, ring_group: the ranks of the same ring place, and of the same Ulysses place;
            rank = ring place * U + Ulysses place. None means: all-gather KV.
    """

    size: int
    rank: int
    group: dist.ProcessGroup
    ulysses_group: dist.ProcessGroup | None = None
    ring_group: dist.ProcessGroup | None = None

    @property
    def gathers(self) -> bool:
        """Whether this is all-gather KV."""
        return self.ulysses_group is None

    @property
    def ulysses(self) -> int:
        """U, 1 for all-gather KV."""
        return 1 if self.ulysses_group is None else dist.get_world_size(self.ulysses_group)

    def cached_heads(self, kv_heads: int) -> slice:
        """The KV heads whose cache this rank needs."""
        if self.ulysses == 1:
            return slice(0, kv_heads)
        count = max(kv_heads // self.ulysses, 1)
        place = self.rank % self.ulysses
        first = place * kv_heads // self.ulysses
        return slice(first, first + count)

    def cache_rows(self, rows: int) -> int:
        """Cache rows the K and V of a block need on each rank, padding of chunks included."""
        return chunk_rows(rows, self.size) * (self.size if self.gathers else self.ulysses)

    def local(self, blocks: Sequence[Block]) -> list[Block]:
        """This rank's parts of the blocks."""
        return [block.part(chunk(block.segment.rows, self.size, self.rank)) for block in blocks]

    def exchange(self, blocks: Sequence[Block], device: torch.device) -> Exchange:
        """How the rows of these (whole) blocks attend."""
        if self.gathers:
            return _AllGatherKV(self, [block.segment for block in self.local(blocks)], device)
        return _UlyssesRing(self, [block.segment for block in blocks], device)


class _AllGatherKV:
    """Every rank gets all K and V of the blocks; the cache is where they are gathered."""

    def __init__(
        self, sp: SequenceParallel, segments: Sequence[Segment], device: torch.device
    ) -> None:
        self.sp = sp
        self.segments = segments
        self.spans = build_spans(segments, device)

    def place(
        self, kv: torch.Tensor, kv_rows: torch.Tensor, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return kv, kv_rows

    def attend(
        self, q: torch.Tensor, own: torch.Tensor, kv: torch.Tensor, backend: Backend
    ) -> torch.Tensor:
        pairs = []
        for segment in self.segments:
            # Equal chunks, one behind the other: gathering them *is* writing the block's rows.
            # What the short last chunks lack lies behind the block and is never read.
            size = chunk_rows(segment.block_rows, self.sp.size)
            start = segment.own_rows.start
            whole = kv[start : start + size * self.sp.size]
            mine = whole[self.sp.rank * size : (self.sp.rank + 1) * size]
            pairs.append((whole, mine))
        all_gather_each(pairs, self.sp.group)
        return backend.attend(q, kv[:, 0], kv[:, 1], self.spans)


class _UlyssesRing:
    """All-to-all over heads within a Ulysses group, K and V around the ring of groups.

    A group *holds* the consecutive rows of its ranks' chunks; "held order" is by segment, then by
    row, as attention wants them, "arrival order" by rank first, as the all-to-all brings them.
    """

    def __init__(
        self, sp: SequenceParallel, segments: Sequence[Segment], device: torch.device
    ) -> None:
        self.sp = sp
        self.groups = sp.size // sp.ulysses
        self.here = sp.rank // sp.ulysses
        first = self.here * sp.ulysses
        chunks = [[chunk(s.rows, sp.size, first + u) for s in segments] for u in range(sp.ulysses)]
        self.rows_of = [sum(map(len, own)) for own in chunks]
        self.held = [
            [
                range(
                    chunk(s.rows, sp.size, g * sp.ulysses).start,
                    chunk(s.rows, sp.size, (g + 1) * sp.ulysses - 1).stop,
                )
                for s in segments
            ]
            for g in range(self.groups)
        ]
        # The held rows of each segment follow its prefix in the cache.
        self.segments = [
            replace(segment, rows=len(rows), block_rows=len(rows))
            for segment, rows in zip(segments, self.held[self.here], strict=True)
        ]
        self.spans = build_spans(self.segments, device)
        to_held, cache_rows = [], []  # in arrival order
        for own in chunks:
            before = 0
            for segment, rows, held in zip(segments, own, self.held[self.here], strict=True):
                place = torch.arange(rows.start, rows.stop) - held.start
                to_held.append(before + place)
                cache_rows.append(segment.own_rows.start + place)
                before += len(held)
        self.to_held = to_device(torch.cat(to_held), device)
        self.cache_rows = to_device(torch.cat(cache_rows), device)

    def place(
        self, kv: torch.Tensor, kv_rows: torch.Tensor, kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # All heads of these rows; the cache holds this rank's heads of all held rows.
        return kv.new_empty(len(kv_rows), 2, kv_heads, kv.shape[-1]), None

    def attend(
        self, q: torch.Tensor, own: torch.Tensor, kv: torch.Tensor, backend: Backend
    ) -> torch.Tensor:
        heads = q.shape[1] // self.sp.ulysses
        arrived = self._spread_heads(q, own, kv.shape[2])
        kv[self.cache_rows] = arrived[:, heads:].unflatten(1, (2, kv.shape[2]))
        query = torch.empty_like(arrived[:, :heads])
        query[self.to_held] = arrived[:, :heads]
        if self.groups == 1:
            y = backend.attend(query, kv[:, 0], kv[:, 1], self.spans)
        else:
            y = self._attend_in_ring(query, kv, backend)
        return self._collect_heads(y[self.to_held], len(q))

    def _spread_heads(self, q: torch.Tensor, own: torch.Tensor, cached: int) -> torch.Tensor:
        """Give each rank its heads of these rows; (held rows, H / U + 2 * cached, D)."""
        ranks = self.sp.ulysses
        # Of fewer KV heads than ranks, several ranks need the same.
        share = own.repeat_interleave(max(ranks // own.shape[2], 1), dim=2)
        to_send = torch.cat(
            [
                q.unflatten(1, (ranks, -1)).transpose(0, 1),
                share.unflatten(2, (ranks, cached)).permute(2, 0, 1, 3, 4).flatten(2, 3),
            ],
            dim=2,
        )
        return self._all_to_all(to_send.flatten(0, 1), [len(q)] * ranks, self.rows_of)

    def _collect_heads(self, y: torch.Tensor, rows: int) -> torch.Tensor:
        """y (held rows, H / U, D) in arrival order -> (rows, H, D) of this rank's rows."""
        ranks = self.sp.ulysses
        received = self._all_to_all(y, self.rows_of, [rows] * ranks)
        return received.unflatten(0, (ranks, rows)).transpose(0, 1).flatten(1, 2)

    def _all_to_all(
        self, send: torch.Tensor, send_rows: list[int], receive_rows: list[int]
    ) -> torch.Tensor:
        if self.sp.ulysses == 1:
            return send
        received = send.new_empty(sum(receive_rows), *send.shape[1:])
        dist.all_to_all_single(
            received, send.contiguous(), receive_rows, send_rows, group=self.sp.ulysses_group
        )
        return received

    def _attend_in_ring(self, q: torch.Tensor, kv: torch.Tensor, backend: Backend) -> torch.Tensor:
        """Attend to prefix and held rows, then to the other groups' rows as they come around."""
        group = self.sp.ring_group
        assert group is not None
        following = dist.get_global_rank(group, (self.here + 1) % self.groups)
        previous = dist.get_global_rank(group, (self.here - 1) % self.groups)
        most = max(sum(map(len, held)) for held in self.held)
        travelling = kv.new_empty(most, *kv.shape[1:])
        mine = torch.cat([kv[segment.own_rows] for segment in self.segments])
        travelling[: len(mine)] = mine
        queries = q.split([segment.rows for segment in self.segments])
        # Blocks of rows are on their way while those before them are attended to.
        arriving, works = self._pass_on(travelling, following, previous)
        parts = [
            backend.attend_with_lse(query, kv[segment.kv_rows, 0], kv[segment.kv_rows, 1])
            for query, segment in zip(queries, self.segments, strict=True)
        ]
        for hop in range(1, self.groups):
            for work in works:
                work.wait()
            travelling = arriving
            if hop < self.groups - 1:
                arriving, works = self._pass_on(travelling, following, previous)
            held = self.held[(self.here - hop) % self.groups]
            blocks = travelling[: sum(map(len, held))].split([len(rows) for rows in held])
            parts = [
                merge(part, backend.attend_with_lse(query, block[:, 0], block[:, 1]))
                if len(block)
                else part
                for part, query, block in zip(parts, queries, blocks, strict=True)
            ]
        return torch.cat([out for out, _ in parts]).to(q.dtype)

    def _pass_on(
        self, travelling: torch.Tensor, following: int, previous: int
    ) -> tuple[torch.Tensor, list[dist.Work]]:
        """Begin to send a block around the ring; what will arrive, and what to wait for."""
        group = self.sp.ring_group
        arriving = torch.empty_like(travelling)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, travelling, following, group),
                dist.P2POp(dist.irecv, arriving, previous, group),
            ]
        )
        return arriving, works
