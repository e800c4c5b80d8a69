"""What a forward pass works on: packed rows, where they attend, where their K and V go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mot_kernels import RoutePlan

UND, GEN = 0, 1


@dataclass(frozen=True)
class Segment:
    """Consecutive packed rows that attend to one context and to each other.

    Attributes:
        rows: number of packed rows.
        kv_start: first row of its context in the KV cache.
        prefix: cached rows of the context; the segment's own K and V follow them directly.
        causal: row i sees own rows 0..i (text); otherwise all of them (pictures).
    """

    rows: int
    kv_start: int
    prefix: int
    causal: bool

    @property
    def kv_rows(self) -> slice:
        """Cache rows the segment attends to, its own included."""
        return slice(self.kv_start, self.kv_start + self.prefix + self.rows)


@dataclass(frozen=True)
class Layout:
    """A packed sequence of M rows. Built on the host, without a device sync; reusable.

    Attributes:
        plan: which expert owns which row; None if all rows are und.
        positions: (M,) int32, RoPE position of each row.
        kv_rows: (M,) int32, cache row that each row's K and V are written to.
        segments: attention segments, in row order.
        positions_end: one more than the largest position, on the host.
    """

    plan: RoutePlan | None
    positions: torch.Tensor
    kv_rows: torch.Tensor
    segments: tuple[Segment, ...]
    positions_end: int

    @property
    def rows(self) -> int:
        """M, the number of packed rows."""
        return sum(segment.rows for segment in self.segments)


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


def build_layout(blocks: Sequence[Block], device: torch.device) -> Layout:
    """Lay out blocks one after the other."""
    runs = [run for block in blocks for run in block.runs]
    positions, kv_rows = [], []
    for block in blocks:
        segment = block.segment
        count = torch.arange(segment.rows, dtype=torch.int32)
        positions.append(block.position + (count if segment.causal else count * 0))
        kv_rows.append(count + segment.kv_start + segment.prefix)
    packed = torch.stack([torch.cat(positions), torch.cat(kv_rows)])
    if device.type == "cuda":  # from pinned memory: the host does not wait for the copy
        packed = packed.pin_memory().to(device, non_blocking=True)
    plan = None
    if any(expert != UND for expert, _ in runs):
        plan = RoutePlan.from_runs(runs, num_experts=2, device=device)
    return Layout(
        plan,
        packed[0],
        packed[1],
        tuple(block.segment for block in blocks),
        max(block.positions_end for block in blocks),
    )


class KVCache:
    """Keys and values of all layers, (layers, capacity, KV heads, head size) each.

    Rows are addressed by whoever owns the cache; it only stores and grows.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, capacity, kv_heads, head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Rows the cache can hold."""
        return self.k.shape[1]

    def grown(self, capacity: int, used: int) -> KVCache:
        """A cache with room for `capacity` rows holding the first `used` of this one.

        Returns self if there is room. Otherwise at least doubles, so that appending n rows one
        by one copies O(n) rows in all.
        """
        if capacity <= self.capacity:
            return self
        layers, _, kv_heads, head_dim = self.k.shape
        larger = KVCache(
            layers,
            max(capacity, 2 * self.capacity),
            kv_heads,
            head_dim,
            dtype=self.k.dtype,
            device=self.k.device,
        )
        larger.copy_rows(self, used, 0)
        return larger

    def copy_rows(self, source: KVCache, rows: int, start: int) -> None:
        """Copy the first `rows` rows of `source` to rows `start`..."""
        self.k[:, start : start + rows] = source.k[:, :rows]
        self.v[:, start : start + rows] = source.v[:, :rows]
