"""How the work of a launch of the Hopper kernel is dealt out: no arithmetic on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from mot_kernels.plan import TileRange, expert_tiles, tile_range

# What cutting units costs, in k steps: their programs trade sums. See docs/log.md, 2026-11-25.
_TRADING_STEPS = 6
# What leaving the sums of a tail costs, and adding them up.
_HANDING_STEPS = 5
_TAKING_STEPS = 6

FEW_ROWS = (2, 4, 8)
"""Most rows of an expert whose rows are computed beside the tiles: each kind is compiled."""

FEW_COLUMNS = 256
"""K is a multiple of this where experts are beside."""


class Share(NamedTuple):
    """What a launch computes as tiles of 128 rows, and what beside them (`hopper_few.py`)."""

    tiles: TileRange
    few: TileRange
    few_rows: int
    """One of `FEW_ROWS`, or 0 where nothing is beside."""


def all_as_tiles(tiles: TileRange) -> Share:
    """Nothing beside."""
    return Share(tiles, TileRange(tiles.end, tiles.end, tiles.end), 0)


class Dealing(NamedTuple):
    """How units are dealt to programs that run side by side, one at a time each."""

    whole: int
    """Units done whole, dealt in turn; the others are cut along K."""
    parts: int
    """Equal parts of each of the others, of which a program has at most one."""
    head: int
    """Or: k steps of the first part, which is done last, by the program whose turn it is."""
    tails: int
    """And most of the second parts that a program without a head does, before all else; or 0."""

    def length(self, units: int, steps: int, programs: int) -> float:
        """What it takes, in k steps."""
        waves = -(-self.whole // programs) * steps
        if self.whole == units:
            return waves
        if self.tails:
            return waves + self.head + _TAKING_STEPS
        return waves + steps / self.parts + _TRADING_STEPS


def deal(units: int, steps: int, programs: int, most_parts: int) -> Dealing:
    """Deal `units` of `steps` k steps each.

    Full waves are done whole. The units of the last one are cut into equal parts, at most
    `most_parts`, if there are programs enough; otherwise into heads for some and tails for the
    others, who may have several. Or not at all, if that would take longer.
    """
    rest = units % programs
    uncut = Dealing(units, 1, 0, 0)
    if rest == 0:
        return uncut
    cuts = [Dealing(units - rest, min(programs // rest, most_parts, steps), 0, 0)]
    tails = -(-rest // (programs - rest))
    tail = (steps + _TAKING_STEPS - tails * _HANDING_STEPS) // (tails + 1)
    if 0 < tail < steps:
        cuts.append(Dealing(units - rest, 1, steps - tail, tails))
    shortest = min(cuts, key=lambda cut: cut.length(units, steps, programs))
    if shortest.length(units, steps, programs) >= uncut.length(units, steps, programs):
        return uncut
    return shortest


def share_out(
    offsets: Sequence[int],
    tile_rows: int,
    counts: Sequence[int],
    blocks: int,
    steps: int,
    programs: int,
    most_parts: int,
) -> Share:
    """Set experts of few rows beside the tiles, where that is shorter.

    By a tenth of a unit at least: reading weights beside the others slows these down.

    Args:
        offsets: `RoutePlan.flat_offsets`.
        counts: rows of each expert.
        blocks: units a tile has.
        steps: k steps a unit has.
        programs, most_parts: as `deal` has them.
    """
    every = all_as_tiles(tile_range(offsets, tile_rows, len(counts)))
    apart = _set_apart(offsets, tile_rows, counts)
    if apart is None:
        return every

    def length(tiles: TileRange) -> float:
        units = (tiles.end - tiles.start) * blocks
        return deal(units, steps, programs, most_parts).length(units, steps, programs)

    if length(every.tiles) - length(apart.tiles) < steps / 10:
        return every
    return apart


def _set_apart(offsets: Sequence[int], tile_rows: int, counts: Sequence[int]) -> Share | None:
    """None if there are no few rows, or if the tiles without them were not one range of
    consecutive rows."""
    experts = len(counts)
    few_counts = [count for count in counts if 0 < count <= FEW_ROWS[-1]]
    of_few, others = (
        [
            at
            for expert, count in enumerate(counts)
            if (count <= FEW_ROWS[-1]) is is_few
            for at in expert_tiles(offsets, tile_rows, expert, experts)
        ]
        for is_few in (True, False)
    )
    few, tiles = _joined(of_few), _joined(others)
    if few is None or tiles is None or tiles.gathered < tiles.end:
        return None
    return Share(tiles, few, next(size for size in FEW_ROWS if size >= max(few_counts)))


def _joined(ranges: list[TileRange]) -> TileRange | None:
    """One range, if there are some and they follow each other."""
    ranges = sorted(ranges)
    if not ranges or any(a.end != b.start for a, b in pairwise(ranges)):
        return None
    gathered = next((each.gathered for each in ranges if each.gathered < each.end), ranges[-1].end)
    return TileRange(ranges[0].start, gathered, ranges[-1].end)
