"""Looks at a picture and says what is on it, without a neural network.

The background is the most common colour. What differs from it is cut into connected components;
a component's colour is that of its inner pixels, its shape the one whose drawing, at the same
place and of the same area, overlaps it best. Soft edges and mild noise do no harm: a pixel belongs
to a thing by the share of the thing's colour in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from bagel_mot.tiny.drawing import AREAS, signed_distance
from bagel_mot.tiny.language import Caption, Edit, Question
from bagel_mot.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    RADII,
    SHAPES,
    Kind,
    Scene,
    Thing,
    in_place,
    lies,
)

Pixels: TypeAlias = np.ndarray  # (H, W, 3) float32, levels 0..255

# A pixel this far from the background's colour (Euclidean, levels) is part of something.
_DISTINCT = 40.0
# Smaller components are specks: no thing has less than twice this radius, in shares of the side.
_SPECK = 0.06
# The least overlap (intersection over union) with the drawing of its shape that a thing must have.
_LEAST_FIT = 0.7
BLOB = "blob"
# A pixel and its four neighbours, as offsets into a picture padded by one.
_CROSS = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
# How far a thing that an edit leaves alone may move, and how much it may grow or shrink.
_STAYS_WITHIN = 0.08
_SAME_SIZE = (0.8, 1.25)


@dataclass(frozen=True)
class Found:
    """A thing seen on a picture.

    Attributes:
        thing: colour, shape, centre and radius. The shape of what fits none is "blob".
        fit: intersection over union with the drawing of such a thing, 0..1.
    """

    thing: Thing
    fit: float


@dataclass(frozen=True)
class Seen:
    """What is on a picture."""

    height: int
    width: int
    background: str
    found: tuple[Found, ...]

    @property
    def kinds(self) -> Counter[tuple[str, str]]:
        """How many things there are of each colour and shape."""
        return Counter((each.thing.colour, each.thing.shape) for each in self.found)


@dataclass(frozen=True)
class Grade:
    """The points in which a result is right or wrong.

    Attributes:
        points: name of the point -> whether it is right; only what was asked for is there.
        why: what is wrong, in words; empty if nothing is.
    """

    points: Mapping[str, bool]
    why: tuple[str, ...] = field(default=())

    def right(self, *names: str) -> bool:
        """Whether these points (all, if none is named) are right; those not asked for count so."""
        return all(ok for name, ok in self.points.items() if not names or name in names)


def look(image: Image.Image) -> Seen:
    """Find the things on an RGB picture."""
    pixels = _median(np.asarray(image.convert("RGB"), dtype=np.float32))
    height, width, _ = pixels.shape
    nearest = _nearest(pixels.reshape(-1, 3), BACKGROUNDS)
    ground_name = Counter(nearest.tolist()).most_common(1)[0][0]
    # Not the table's own levels: the whole picture may be a little too dark.
    ground = np.median(pixels.reshape(-1, 3)[nearest == ground_name], axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    found = []
    for component in _components(distance > _DISTINCT):
        if component.sum() >= np.pi * (_SPECK * min(height, width)) ** 2:
            found.append(_recognise(pixels, ground, distance, component))
    return Seen(height, width, list(BACKGROUNDS)[ground_name], tuple(found))


def grade_painting(image: Image.Image, caption: Caption) -> Grade:
    """Points: `things` (colours, shapes and counts), `background`, `sizes`, `place`, `relation`."""
    seen = look(image)
    points, why = _compare_kinds(seen, caption.kinds)
    if caption.background is not None:
        points["background"] = seen.background == caption.background
        if not points["background"]:
            why.append(f"background {seen.background}, not {caption.background}")
    things = {(f.thing.colour, f.thing.shape): f.thing for f in seen.found}
    wanted = [things.get((kind.colour, kind.shape)) for kind in caption.kinds]
    side = min(seen.height, seen.width)
    if any(caption.sizes):
        points["sizes"] = all(
            thing is not None and _size_fits(thing.radius / side, size)
            for thing, size in zip(wanted, caption.sizes, strict=True)
        )
    if caption.place is not None:
        points["place"] = wanted[0] is not None and in_place(
            wanted[0].x, wanted[0].y, seen.height, seen.width, caption.place
        )
    if caption.relation is not None:
        first, second = wanted
        points["relation"] = (
            first is not None and second is not None and lies(first, second, caption.relation)
        )
    why += [
        f"wrong {name}" for name in ("sizes", "place", "relation") if not points.get(name, True)
    ]
    return Grade(points, tuple(why))


def are_right(levels: np.ndarray, captions: Sequence[Caption]) -> list[bool]:
    """Whether each of n paintings, (n, H, W, 3) uint8, is right in all points."""
    images = map(Image.fromarray, levels)
    return [grade_painting(*each).right() for each in zip(images, captions, strict=True)]


def grade_edit(image: Image.Image, edit: Edit) -> Grade:
    """Points: `done` (what was asked for) and `rest` (everything else is as it was)."""
    seen = look(image)
    side = min(seen.height, seen.width)
    before = set(edit.before.things)
    kept = [thing for thing in edit.after.things if thing in before]
    changed = [thing for thing in edit.after.things if thing not in before]
    left = [found.thing for found in seen.found]
    why: list[str] = []
    stays = True
    for thing in kept:
        stays &= _take(left, thing, side, why)
    done = True
    for thing in changed:
        if edit.place is None:
            done &= _take(left, thing, side, why)
            continue
        match = next((f for f in left if (f.colour, f.shape) == (thing.colour, thing.shape)), None)
        done &= match is not None
        if match is None:
            why.append(f"no {thing.colour} {thing.shape}")
            continue
        left.remove(match)
        if not in_place(match.x, match.y, seen.height, seen.width, edit.place):
            done = False
            why.append(f"the {thing.colour} {thing.shape} is not {edit.place}")
    # What should have gone was asked for; anything else that is too much is not.
    gone = [thing for thing in edit.before.things if thing not in edit.after.things]
    for thing in left:
        old = any(_same(thing, other, side) for other in gone)
        done, stays = done and not old, stays and old
        why.append(f"a {thing.colour} {thing.shape} too much")
    ground = seen.background == edit.after.background
    if not ground:
        why.append(f"background {seen.background}, not {edit.after.background}")
    if edit.task == "background":
        done &= ground
    else:
        stays &= ground
    return Grade({"done": done, "rest": stays}, tuple(why))


def grade_answer(answer: str, question: Question) -> Grade:
    """Point: `answer`, the very words but for case, spaces and a full stop."""
    said = " ".join(answer.lower().split()).removesuffix(".")
    right = said == question.answer
    return Grade({"answer": right}, () if right else (f"{answer!r}, not {question.answer!r}",))


def grade_scene(image: Image.Image, scene: Scene) -> Grade:
    """Points: `things` and `background` of a drawn scene, and `places`: each where it was drawn."""
    seen = look(image)
    points, why = _compare_kinds(seen, scene.kinds)
    points["background"] = seen.background == scene.background
    left = [found.thing for found in seen.found]
    side = min(scene.height, scene.width)
    points["places"] = all([_take(left, thing, side, why) for thing in scene.things])
    return Grade(points, tuple(why))


def _compare_kinds(seen: Seen, kinds: Sequence[Kind]) -> tuple[dict[str, bool], list[str]]:
    wanted = Counter({(kind.colour, kind.shape): kind.count for kind in kinds})
    why = [f"{n} {c} {s} missing" for (c, s), n in (wanted - seen.kinds).items()]
    why += [f"{n} {c} {s} too much" for (c, s), n in (seen.kinds - wanted).items()]
    return {"things": not why}, why


def _take(left: list[Thing], thing: Thing, side: int, why: list[str]) -> bool:
    """Strike a thing off the list if it is there, where and as large as it should be."""
    match = next((other for other in left if _same(other, thing, side)), None)
    if match is None:
        why.append(f"no {thing.colour} {thing.shape} at {thing.x:.0f}, {thing.y:.0f}")
        return False
    left.remove(match)
    return True


def _same(one: Thing, other: Thing, side: int) -> bool:
    low, high = _SAME_SIZE
    return (
        (one.colour, one.shape) == (other.colour, other.shape)
        and hypot(one.x - other.x, one.y - other.y) <= _STAYS_WITHIN * side
        and low <= one.radius / other.radius <= high
    )


def _size_fits(share: float, size: str | None) -> bool:
    """Whether a radius, as a share of the side, is nearer to the size's own than to the others."""
    middles = {name: sum(span) / 2 for name, span in RADII.items()}
    return size is None or min(middles, key=lambda name: abs(middles[name] - share)) == size


def _recognise(
    pixels: Pixels, ground: np.ndarray, distance: np.ndarray, component: np.ndarray
) -> Found:
    inner = component & (distance >= np.quantile(distance[component], 0.5))
    # The inner half: what lies on the edge is a mixture, and red on white has a pink edge.
    colour_levels = np.median(pixels[inner], axis=0)
    colour = list(COLOURS)[int(_nearest(colour_levels[None], COLOURS)[0])]
    direction = colour_levels - ground
    share = ((pixels - ground) @ direction / (direction @ direction)).clip(0, 1)
    cover = np.where(_grown(component), share, 0.0)
    area = float(cover.sum())
    ys, xs = (np.arange(side) + 0.5 for side in cover.shape)
    x, y = float(cover.sum(0) @ xs) / area, float(cover.sum(1) @ ys) / area
    best, fit, best_radius = SHAPES[0], -1.0, 0.0
    for shape in SHAPES:
        radius = (area / AREAS[shape]) ** 0.5
        dy, dx = torch.meshgrid(torch.tensor(ys - y), torch.tensor(xs - x), indexing="ij")
        ideal = (0.5 - signed_distance(shape, dx, dy, radius)).clamp(0, 1).numpy()
        overlap = float(np.minimum(ideal, cover).sum() / np.maximum(ideal, cover).sum())
        if overlap > fit:
            best, fit, best_radius = shape, overlap, radius
    return Found(Thing(colour, best if fit >= _LEAST_FIT else BLOB, x, y, best_radius), fit)


def _nearest(levels: np.ndarray, table: Mapping[str, tuple[int, int, int]]) -> np.ndarray:
    """(n, 3) levels -> (n,) numbers of the nearest colours in a table."""
    known = np.array(list(table.values()), dtype=np.float32)
    return np.linalg.norm(levels[:, None] - known, axis=-1).argmin(1)


def _median(pixels: Pixels) -> Pixels:
    """Median of each pixel's cross of five, channel by channel: takes single wrong pixels out."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width, _ = pixels.shape
    around = [padded[dy : dy + height, dx : dx + width] for dy, dx in _CROSS]
    return np.median(np.stack(around), axis=0)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels around it, where the outermost shade of an edge lies."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce(
        [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    )


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask that hang together by their sides, as masks."""
    height, width = mask.shape
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label around it until nothing changes
        padded = np.pad(labels, 1)
        around = [padded[dy : dy + height, dx : dx + width] for dy, dx in _CROSS]
        spread = np.where(mask, np.maximum.reduce(around), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels) if label]
        labels = spread
