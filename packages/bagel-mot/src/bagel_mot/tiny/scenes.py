"""The world of the tiny model: flat shapes on a plain ground, and which of them it may not see.

Everything is drawn from a `random.Random`, so a seed gives the same scenes everywhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from random import Random

# RGB levels. No two names of these two tables are closer than 80 levels (Euclidean).
COLOURS = {
    "red": (222, 40, 40),
    "green": (40, 170, 70),
    "blue": (45, 90, 230),
    "yellow": (245, 215, 40),
    "orange": (245, 135, 30),
    "purple": (135, 60, 180),
    "pink": (250, 130, 190),
    "cyan": (60, 210, 225),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "navy": (20, 35, 100),
    "beige": (222, 200, 160),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")

# Both sides of a picture are of these, in pixels: nine sizes, from 4 x 4 to 8 x 8 latent tokens.
SIDES = (64, 96, 128)
SIZES = tuple((height, width) for height in SIDES for width in SIDES)

# Column and row of the picture's 3 x 3 cells; None leaves one free.
PLACES: dict[str, tuple[int | None, int | None]] = {
    "on the left": (0, None),
    "on the right": (2, None),
    "at the top": (None, 0),
    "at the bottom": (None, 2),
    "in the middle": (1, 1),
    "at the top left": (0, 0),
    "at the top right": (2, 0),
    "at the bottom left": (0, 2),
    "at the bottom right": (2, 2),
}
_CELLS = ((0.0, 0.36), (0.38, 0.62), (0.64, 1.0))

# Which way the second thing lies from the first: "a red circle above a blue square".
RELATIONS = {
    "to the left of": (1, 0),
    "to the right of": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}

# Radius as a share of the picture's shorter side: said in words, or left open.
RADII = {"small": (0.125, 0.145), None: (0.15, 0.195), "big": (0.21, 0.25)}
CROWDED = (0.125, 0.145)  # where there are three things or more

REACH = 1.25  # no shape reaches farther from its centre than this, in radii
MAX_THINGS = 5


@dataclass(frozen=True)
class Kind:
    """A colour and a shape, and how many such things there are."""

    colour: str
    shape: str
    count: int = 1


@dataclass(frozen=True)
class Thing:
    """One shape. x and y (of its centre, downwards) and radius are in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; sides in pixels."""

    height: int
    width: int
    background: str
    things: tuple[Thing, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What there is, and how often; sorted."""
        counted = Counter((thing.colour, thing.shape) for thing in self.things)
        return tuple(Kind(*pair, counted[pair]) for pair in sorted(counted))

    @property
    def held_out(self) -> bool:
        """Whether training never shows this combination."""
        return is_held_out(self.background, self.kinds)


@dataclass(frozen=True)
class Wanted:
    """A thing to be placed: what, how large (a key of `RADII`), and where (of `PLACES`)."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


def is_held_out(background: str, kinds: Sequence[Kind]) -> bool:
    """Whether this combination of background, colours, shapes and counts is kept for testing.

    A tenth of all combinations is, chosen by a hash; sizes and positions do not matter.
    """
    words = [background, *sorted(f"{kind.count} {kind.colour} {kind.shape}" for kind in kinds)]
    digest = hashlib.blake2s("|".join(words).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def place_things(
    random: Random,
    height: int,
    width: int,
    wanted: Sequence[Wanted],
    *,
    among: Sequence[Thing] = (),
    relation: str | None = None,
) -> tuple[Thing, ...] | None:
    """Place things where none touches another.

    Args:
        among: things that are there already.
        relation: of `RELATIONS`, how the first of two wanted things lies to the second.

    Returns:
        The wanted things, or None if they found no room in a few attempts.
    """
    crowded = len(wanted) + len(among) >= 3
    for _ in range(20):
        things: list[Thing] = []
        for each in wanted:
            thing = _placed(random, height, width, each, [*among, *things], crowded)
            if thing is None:
                break
            things.append(thing)
        else:
            if relation is None or lies(things[0], things[1], relation):
                return tuple(things)
    return None


def lies(first: Thing, second: Thing, relation: str) -> bool:
    """Whether the first thing lies to the second as `relation` says, plainly so."""
    right, down = RELATIONS[relation]
    dx, dy = second.x - first.x, second.y - first.y
    along, across = right * dx + down * dy, abs(right * dy + down * dx)
    return along > first.radius + second.radius and along > across


def in_place(x: float, y: float, height: int, width: int, place: str) -> bool:
    """Whether a point is where `place` says, with the cells' borders taken generously."""
    column, row = PLACES[place]
    within = {None: (0.0, 1.0), 0: (0.0, 0.45), 1: (0.3, 0.7), 2: (0.55, 1.0)}
    return all(
        within[cell][0] <= share <= within[cell][1]
        for cell, share in ((column, x / width), (row, y / height))
    )


def _placed(
    random: Random,
    height: int,
    width: int,
    wanted: Wanted,
    others: Sequence[Thing],
    crowded: bool,
) -> Thing | None:
    smallest, largest = CROWDED if crowded and wanted.size is None else RADII[wanted.size]
    radius = random.uniform(smallest, largest) * min(height, width)
    column, row = (None, None) if wanted.place is None else PLACES[wanted.place]
    for _ in range(12):
        x = _coordinate(random, width, radius, column)
        y = _coordinate(random, height, radius, row)
        if all(
            hypot(x - other.x, y - other.y) > REACH * (radius + other.radius) + 2
            for other in others
        ):
            return Thing(wanted.colour, wanted.shape, x, y, radius)
    return None


def _coordinate(random: Random, side: int, radius: float, cell: int | None) -> float:
    """Somewhere along a side, in a third of it or anywhere, with the whole shape inside."""
    low, high = (0.0, 1.0) if cell is None else _CELLS[cell]
    margin = REACH * radius + 1
    low, high = max(low * side, margin), min(high * side, side - margin)
    # A big shape does not fit into the outer thirds: it then stands as far out as it can.
    return random.uniform(low, high) if low < high else (low if cell == 0 else high)


def draw_size(random: Random, sizes: Sequence[tuple[int, int]]) -> int:
    """The number of one of some (height, width), in proportion to their areas."""
    areas = [height * width for height, width in sizes]
    return random.choices(range(len(areas)), areas)[0]
