"""How the work of a launch of the Hopper kernel is dealt out: no arithmetic on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from mot_kernels.plan import TileRange, expert_tiles, tile_range

# What cutting units costs, in k steps: their programs trade sums. See docs/log.md, 2026-11-25.
_TRADING_STEPS = 6

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


def deal(units: int, steps: int, programs: int, most_parts: int) -> tuple[int, int]:
    """How `units` of `steps` k steps each are dealt to `programs` that run side by side.

    Returns:
        The units done whole, in full waves (or all of them), and the number of equal parts, at
        most `most_parts`, into which each of the others is cut along K. A program has at most
        one part.
    """
    rest = units % programs
    if rest == 0:
        return units, 1
    parts = min(programs // rest, most_parts, steps)
    if steps / parts + _TRADING_STEPS >= steps:
        return units, 1
    return units - rest, parts


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

    It is where programs so have fewer units: half of one at least. Otherwise their tile is done by
    programs that would wait, and reading weights beside the others would slow these down.

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
        whole, parts = deal(units, steps, programs, most_parts)
        cut = steps / parts + _TRADING_STEPS if parts > 1 else 0
        return -(-whole // programs) * steps + cut

    if length(every.tiles) - length(apart.tiles) < steps / 2:
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
