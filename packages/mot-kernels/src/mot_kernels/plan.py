"""`RoutePlan`: which expert owns which row, worked out once and used by every layer.

A packed sequence of M rows is split among E experts. Kernels do not want a mask or an index
list per call; they want rows grouped by expert, cut into tiles, with all counts known on the
host so that no layer ever waits for the device. The plan holds exactly that.

Example: 8 rows, expert 1 owns rows 1..6, expert 0 the two at the ends (an image between its
two markers)::

    plan = RoutePlan.from_indices(torch.tensor([0, 7]), torch.tensor([1, 2, 3, 4, 5, 6]))
    plan.counts      # (2, 6)
    plan.row_ids     # [0, 7 | 1, 2, 3, 4, 5, 6]        grouped by expert
    plan.expert_ids  # [0, 1, 1, 1, 1, 1, 1, 0]         one label per row
    plan.runs        # [[0, 0, 1], [1, 1, 6], [0, 7, 1]]  (expert, first row, length)
    plan.tiles_for(16)   # [[1, 2, 6, 1], [0, 0, 2, -1]]  (expert, offset, rows, first row)

The first tile's rows are consecutive, so a kernel may address it as `first row + i` (and by
TMA); the second tile's are not (-1) and are gathered through `row_ids`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch

from mot_kernels.replay import UNROUTED, Replays

# Row counts a tile may have. Tables for all of them are built with the plan (some tens of KB)
# so that its tensors never change afterwards and a CUDA graph can replay over them.
TILE_ROWS = (16, 32, 64, 128, 256)

# Programs of one launch that may wait for each other: more than any GPU has multiprocessors.
MOST_PROGRAMS = 256

# A run at least this long gets tiles of its own, which are then contiguous. Shorter runs share
# gathered tiles: a tile of its own for each would run the matrix units mostly empty.
_LONG_RUN = 64


@dataclass(frozen=True, eq=False)
class RoutePlan:
    """The routing of M packed rows to E experts. Build it with one of the `from_*` methods.

    Attributes:
        counts: rows per expert, on the host; `sum(counts) == num_rows`, zeros allowed.
        runs: (R, 3) int64 numpy array on the host, maximal runs of one expert in row order:
            expert, first row, length.
        row_ids: (M,) int32 on the device, all rows grouped by expert. Within an expert the long
            contiguous runs come first, then the scattered rows, each part ascending.
        expert_ids: (M,) int32 on the device, the expert of each row.
        tiles: (T, 4) int32 on the device, the tile tables for all `TILE_ROWS`, one after the
            other: expert, offset into `row_ids`, live rows, first row or -1 if not consecutive.
            In a table the tiles of consecutive rows come first.
        tile_offsets: on the host, for each entry of `TILE_ROWS`, where in `tiles` its table
            starts, where in it the tiles of consecutive rows of each expert end, then where the
            other tiles of each expert end; see `tile_range` and `expert_tiles`.
        flags: (2 * MOST_PROGRAMS,) int32 on the device, zeros: with these the programs of one
            launch tell each other that a part is done, and leave zeros behind (`mot_linear` on
            Hopper GPUs, and with few rows on any). So launches that use one plan must not run at
            the same time: use a plan on one stream.
        flat_offsets: `tile_offsets` as one tuple.
        is_grouped: whether rows are grouped by expert as they are: `row_ids` counts up.
        replays: what operations keep of calls with this plan, to do them again faster.
    """

    counts: tuple[int, ...]
    runs: np.ndarray
    row_ids: torch.Tensor
    expert_ids: torch.Tensor
    tiles: torch.Tensor
    tile_offsets: tuple[tuple[int, ...], ...]
    flags: torch.Tensor
    flat_offsets: tuple[int, ...] = field(init=False, repr=False)
    is_grouped: bool = field(init=False)
    replays: Replays = field(init=False, repr=False, default_factory=Replays)

    def __post_init__(self) -> None:
        flat = tuple(offset for table in self.tile_offsets for offset in table)
        object.__setattr__(self, "flat_offsets", flat)
        # Once: torch.compile cannot look into it.
        is_grouped = bool((np.diff(self.runs[:, 0]) > 0).all())
        object.__setattr__(self, "is_grouped", is_grouped)

    @property
    def num_rows(self) -> int:
        """M, the number of packed rows."""
        return sum(self.counts)

    @property
    def num_experts(self) -> int:
        """E, the number of experts (some may have no rows)."""
        return len(self.counts)

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors live."""
        return self.row_ids.device

    def rows_of(self, expert: int) -> torch.Tensor:
        """Row ids of one expert, (counts[expert],) int32: a view of `row_ids`."""
        start = sum(self.counts[:expert])
        return self.row_ids[start : start + self.counts[expert]]

    def tiles_for(self, tile_rows: int) -> torch.Tensor:
        """The tile table for tiles of `tile_rows` rows, (T, 4) int32: a view of `tiles`."""
        if tile_rows not in TILE_ROWS:
            raise ValueError(f"tile_rows is {tile_rows}; a plan has tables for {TILE_ROWS}")
        start, _, end = tile_range(self.flat_offsets, tile_rows, self.num_experts)
        return self.tiles[start:end]

    @classmethod
    def from_indices(cls, *indices: torch.Tensor, num_rows: int | None = None) -> RoutePlan:
        """Plan from one index tensor per expert.

        Args:
            indices: E 1-D integer tensors on one device, in any order and of any integer type
                (also empty); `indices[e]` lists the rows of expert e. Together they must name
                each of the M rows exactly once.
            num_rows: M, if you want it checked; otherwise the total number of indices.

        Raises:
            TypeError: an argument is not a 1-D integer tensor.
            ValueError: no tensors, several devices, an index out of range, given twice or missing.

        Tensors on a GPU are read back once (one device sync); use `from_runs` to avoid it.
        """
        if not indices:
            raise ValueError("from_indices: got no index tensors; give one per expert")
        for e, index in enumerate(indices):
            _check_integer_vector(f"indices[{e}]", index)
            if index.device != indices[0].device:
                raise ValueError(
                    f"indices[{e}] is on {index.device} but indices[0] is on {indices[0].device}; "
                    "put all of them on one device"
                )
        host = [index.detach().cpu().numpy().astype(np.int64) for index in indices]
        total = sum(len(h) for h in host)
        if num_rows is not None and num_rows != total:
            raise ValueError(
                f"num_rows is {num_rows} but the index tensors hold {total} rows; every row "
                "belongs to exactly one expert"
            )
        labels = np.full(total, -1, dtype=np.int32)
        for e, h in enumerate(host):
            if len(h) and (h.min() < 0 or h.max() >= total):
                bad = h[(h < 0) | (h >= total)][0]
                raise ValueError(
                    f"indices[{e}] contains row {bad}, outside 0..{total - 1}: the {len(host)} "
                    f"tensors list {total} rows, so those are the valid rows"
                )
            twice = h[labels[h] >= 0]
            if len(twice) or len(np.unique(h)) != len(h):
                row = twice[0] if len(twice) else _first_repeat(h)
                raise ValueError(
                    f"indices[{e}] names row {row}, which is already taken; every row belongs to "
                    "exactly one expert"
                )
            labels[h] = e
        # total distinct in-range rows among `total` rows: none can be missing.
        return cls._from_host_labels(labels, len(host), indices[0].device)

    @classmethod
    def from_labels(cls, labels: torch.Tensor, num_experts: int) -> RoutePlan:
        """Plan from the expert of each row.

        Args:
            labels: (M,) integer tensor, values in 0..num_experts - 1.
            num_experts: E >= 1.

        Raises:
            TypeError: `labels` is not a 1-D integer tensor, or `num_experts` no integer.
            ValueError: `num_experts` < 1 or a label out of range.

        A tensor on a GPU is read back once (one device sync).
        """
        _check_integer_vector("labels", labels)
        _check_num_experts(num_experts)
        host = labels.detach().cpu().numpy().astype(np.int64)
        if len(host) and (host.min() < 0 or host.max() >= num_experts):
            row = int(np.flatnonzero((host < 0) | (host >= num_experts))[0])
            raise ValueError(
                f"labels[{row}] is {host[row]}; with num_experts={num_experts} a label must be in "
                f"0..{num_experts - 1}"
            )
        return cls._from_host_labels(host.astype(np.int32), num_experts, labels.device)

    @classmethod
    def from_runs(
        cls,
        runs: Iterable[tuple[int, int]],
        *,
        num_experts: int,
        device: torch.device | str = "cpu",
    ) -> RoutePlan:
        """Plan from a layout known on the host; never waits for the device.

        Args:
            runs: (expert, length) pairs in row order; lengths >= 0, neighbours may repeat an
                expert. M is the sum of the lengths.
            num_experts: E >= 1.
            device: where the plan's tensors go (from pinned memory, asynchronously, for CUDA).

        Raises:
            TypeError: an expert, a length or `num_experts` is no integer.
            ValueError: `num_experts` < 1, an expert out of range or a negative length.
        """
        _check_num_experts(num_experts)
        runs = list(runs)
        for i, run in enumerate(runs):
            if not (isinstance(run, Sequence) and len(run) == 2):
                raise TypeError(f"runs[{i}] is {run!r}; expected (expert, length)")
            expert, length = run
            for name, value in (("expert", expert), ("length", length)):
                if not isinstance(value, Integral):
                    raise TypeError(f"runs[{i}] has {name} {value!r}; expected an integer")
            if not 0 <= expert < num_experts or length < 0:
                raise ValueError(
                    f"runs[{i}] is (expert {expert}, length {length}); the expert must be in "
                    f"0..{num_experts - 1} and the length >= 0"
                )
        experts = np.array([expert for expert, _ in runs], dtype=np.int32)
        lengths = np.array([length for _, length in runs], dtype=np.int64)
        return cls._from_host_labels(np.repeat(experts, lengths), num_experts, torch.device(device))

    def to(self, device: torch.device | str) -> RoutePlan:
        """The same plan with its tensors on `device` (self if they are there already)."""
        device = torch.empty(0, device=device).device  # "cuda" is then the current one, with index
        if device == self.device:
            return self
        return RoutePlan(
            self.counts,
            self.runs,
            self.row_ids.to(device),
            self.expert_ids.to(device),
            self.tiles.to(device),
            self.tile_offsets,
            self.flags.to(device),
        )

    @classmethod
    def _from_host_labels(
        cls, labels: np.ndarray, num_experts: int, device: torch.device
    ) -> RoutePlan:
        runs = _find_runs(labels)
        row_ids, segments = _group_rows(runs, num_experts)
        tables, tile_offsets = _cut_tiles(row_ids, segments)
        counts = tuple(int(c) for c in np.bincount(labels, minlength=num_experts))
        # One transfer for everything. The tables come first so that each 16-byte entry is aligned.
        flags = np.zeros(2 * MOST_PROGRAMS, dtype=np.int32)
        parts = [tables.ravel(), row_ids, labels, flags]
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32, copy=False))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        elif device.type != "cpu":
            packed = packed.to(device)
        tiles, rows, experts, zeros = packed.split([part.size for part in parts])
        return cls(counts, runs, rows, experts, tiles.view(-1, 4), tile_offsets, zeros)


def replays_of(plan: RoutePlan | None) -> Replays:
    """Where an operation keeps how it did a call with this plan, or without one.

    Raises:
        TypeError: the plan is something else.
    """
    check_kind(plan)
    return UNROUTED if plan is None else plan.replays


def check_kind(plan: object) -> None:
    """Refuse a caller's plan that is none."""
    if plan is not None and not isinstance(plan, RoutePlan):
        raise TypeError(f"plan is a {type(plan).__name__}; expected a RoutePlan or None")


class TileRange(NamedTuple):
    """Tiles `start` to `end` of `RoutePlan.tiles`; from `gathered` on rows are not consecutive."""

    start: int
    gathered: int
    end: int


def tile_range(offsets: Sequence[int], tile_rows: int, experts: int) -> TileRange:
    """The table for tiles of `tile_rows` rows, given `RoutePlan.flat_offsets`."""
    table = _table(offsets, tile_rows, experts)
    return TileRange(table[0], table[experts], table[-1])


def expert_tiles(
    offsets: Sequence[int], tile_rows: int, expert: int, experts: int
) -> list[TileRange]:
    """As `tile_range`, of one expert: its tiles are in at most two places."""
    table = _table(offsets, tile_rows, experts)
    start, end = table[expert : expert + 2]
    gathered, gathered_end = table[experts + expert : experts + expert + 2]
    ranges = [TileRange(start, end, end), TileRange(gathered, gathered, gathered_end)]
    return [each for each in ranges if each.start < each.end]


def _table(offsets: Sequence[int], tile_rows: int, experts: int) -> Sequence[int]:
    size = 2 * experts + 1
    first = size * TILE_ROWS.index(tile_rows)
    return offsets[first : first + size]


def _check_integer_vector(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a 1-D integer tensor")
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    if value.dim() != 1 or not is_integer:
        hint = " (a mask? use mask.nonzero().flatten())" if value.dtype is torch.bool else ""
        raise TypeError(
            f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; give a 1-D integer "
            f"tensor{hint}"
        )


def _check_num_experts(num_experts: int) -> None:
    if not isinstance(num_experts, int | np.integer):
        raise TypeError(f"num_experts is {num_experts!r}; expected an integer")
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; there must be at least one expert")


def _first_repeat(rows: np.ndarray) -> int:
    values, counts = np.unique(rows, return_counts=True)
    return int(values[counts > 1][0])


def _find_runs(labels: np.ndarray) -> np.ndarray:
    """(R, 3) maximal runs of equal labels in row order: expert, first row, length."""
    if len(labels) == 0:
        return np.empty((0, 3), dtype=np.int64)
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    lengths = np.diff(np.r_[starts, len(labels)])
    return np.stack([labels[starts].astype(np.int64), starts, lengths], axis=1)


def _group_rows(runs: np.ndarray, num_experts: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Order the rows by expert, long runs first.

    Returns row ids (M,) int32 and, per expert, the lengths of its segments: one per long run and
    one for all its scattered rows together.
    """
    rows: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    for expert in range(num_experts):
        own = runs[runs[:, 0] == expert]
        long = own[:, 2] >= _LONG_RUN
        ordered = np.concatenate([own[long], own[~long]])
        rows.append(_ranges(ordered[:, 1], ordered[:, 2]))
        scattered = own[~long, 2].sum(keepdims=True)
        segments.append(np.concatenate([own[long, 2], scattered[scattered > 0]]))
    return np.concatenate(rows).astype(np.int32), segments


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of `arange(start, start + length)` without a Python loop."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.arange(total, dtype=np.int64) + np.repeat(starts - before, lengths)


def _cut_tiles(
    row_ids: np.ndarray, segments: list[np.ndarray]
) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    """Cut every segment into tiles, for each size in `TILE_ROWS`; see `RoutePlan.tiles`."""
    lengths = np.concatenate(segments).astype(np.int64)
    experts = np.repeat(np.arange(len(segments)), [len(s) for s in segments])
    starts = np.cumsum(lengths) - lengths
    tables: list[np.ndarray] = []
    all_offsets: list[tuple[int, ...]] = []
    base = 0
    for size in TILE_ROWS:
        per_segment = -(-lengths // size)
        nth = _ranges(np.zeros_like(per_segment), per_segment)
        offset = np.repeat(starts, per_segment) + nth * size
        live = np.minimum(np.repeat(lengths, per_segment) - nth * size, size)
        expert = np.repeat(experts, per_segment)
        first, last = row_ids[offset], row_ids[offset + live - 1]
        first = np.where(last - first == live - 1, first, -1)  # ascending within a segment
        table = np.stack([expert, offset, live, first], axis=1)
        place = expert + len(segments) * (first < 0)
        tables.append(table[np.argsort(place, kind="stable")])
        ends = base + np.cumsum(np.bincount(place, minlength=2 * len(segments)))
        all_offsets.append((base, *map(int, ends)))
        base += len(table)
    return np.concatenate(tables).astype(np.int32), tuple(all_offsets)
