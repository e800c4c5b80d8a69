"""Scenes become pixels: signed distances of the shapes, in torch, many scenes at a time.

An edge is one pixel soft. The same code draws one picture for a test and, on a GPU, the batches
of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, hypot, pi, sin
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from bagel_mot.tiny.scenes import BACKGROUNDS, COLOURS, MAX_THINGS, SHAPES, Scene

# Dimensions of the shapes in radii; all have about the same area, and none exceeds REACH.
_SQUARE = 0.88  # half a side
_TRIANGLE = 0.62  # the inner circle
_CROSS = (1.05, 0.38)  # half the length and half the width of an arm
_STAR = (1.25, 0.55)  # tips and inner corners
# From a star's tip to the inner corner beside it: that edge's normal, and how far out it lies.
_FIFTH = 2 * pi / 5
_STAR_EDGE = (_STAR[1] * sin(_FIFTH / 2), _STAR[1] * cos(_FIFTH / 2) - _STAR[0])
_STAR_NORMAL = (-_STAR_EDGE[1] / hypot(*_STAR_EDGE), _STAR_EDGE[0] / hypot(*_STAR_EDGE))
_STAR_OFFSET = _STAR_NORMAL[1] * _STAR[0]
# Area of a shape of radius 1.
AREAS = {
    "circle": pi,
    "square": 4 * _SQUARE**2,
    "triangle": 3 * 3**0.5 * _TRIANGLE**2,
    "cross": 8 * _CROSS[0] * _CROSS[1] - 4 * _CROSS[1] ** 2,
    "star": 5 * _STAR[0] * _STAR[1] * sin(pi / 5),
}


@dataclass(frozen=True)
class SceneArrays:
    """Scenes as numbers; those drawn together have one size.

    Attributes:
        ground: (n, 3) uint8, the background's RGB levels.
        places: (n, MAX_THINGS, 3) float32: x, y, radius in pixels; radius 0 where there is none.
        looks: (n, MAX_THINGS, 4) uint8: index in `SHAPES`, then RGB levels.
    """

    ground: Tensor
    places: Tensor
    looks: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Self:
        """Pack scenes, on the CPU."""
        ground = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes])
        places = torch.zeros(len(scenes), MAX_THINGS, 3)
        looks = torch.zeros(len(scenes), MAX_THINGS, 4, dtype=torch.uint8)
        for i, scene in enumerate(scenes):
            if not scene.things:
                continue
            things = scene.things
            places[i, : len(things)] = torch.tensor([(t.x, t.y, t.radius) for t in things])
            looks[i, : len(things)] = torch.tensor(
                [(SHAPES.index(t.shape), *COLOURS[t.colour]) for t in things], dtype=torch.uint8
            )
        return cls(ground.to(torch.uint8), places, looks)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Scenes of several, one behind the other."""
        tensors = zip(*((p.ground, p.places, p.looks) for p in parts), strict=True)
        return cls(*map(torch.cat, tensors))

    def select(self, index: Tensor) -> Self:
        """The scenes of these numbers."""
        return type(self)(self.ground[index], self.places[index], self.looks[index])

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return type(self)(*(t.to(device) for t in (self.ground, self.places, self.looks)))


def draw(scenes: SceneArrays, height: int, width: int) -> Tensor:
    """Pictures (n, 3, height, width) float32 in [-1, 1]."""
    device = scenes.ground.device
    ys = torch.arange(height, device=device) + 0.5
    xs = torch.arange(width, device=device) + 0.5
    x, y, radius = scenes.places[:, :, None, None].unbind(-1)  # (n, things, 1, 1)
    shape = scenes.looks[:, :, None, None, 0]
    dx, dy = torch.broadcast_tensors(xs - x, ys[:, None] - y)
    distance = torch.full_like(dx, float("inf"))
    for index, name in enumerate(SHAPES):
        distance = torch.where(shape == index, signed_distance(name, dx, dy, radius), distance)
    cover = ((0.5 - distance).clamp(0, 1) * (radius > 0)).unsqueeze(2)
    colours = _unit(scenes.looks[:, :, 1:])[..., None, None]
    picture = _unit(scenes.ground)[..., None, None].expand(-1, -1, height, width)
    for k in range(cover.shape[1]):
        picture = torch.lerp(picture, colours[:, k].expand_as(picture), cover[:, k])
    return picture


def draw_image(scene: Scene) -> Image.Image:
    """One scene as an 8-bit RGB picture."""
    pixels = draw(SceneArrays.of([scene]), scene.height, scene.width)[0]
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(levels.numpy())


def signed_distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """How far points lie outside a shape's outline, in pixels; negative inside.

    Exact near straight edges; near corners it is the distance to the nearest edge's line.

    Args:
        dx, dy: from the shape's centre, y downwards.
    """
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - _SQUARE * radius
    if shape == "triangle":
        sloping = cos(pi / 6) * dx.abs() - 0.5 * dy
        return torch.maximum(dy, sloping) - _TRIANGLE * radius
    if shape == "cross":
        length, width = _CROSS
        far = torch.maximum(dx.abs(), dy.abs()) - length * radius
        near = torch.minimum(dx.abs(), dy.abs()) - width * radius
        return torch.maximum(far, near)
    if shape == "star":
        # Folded into the wedge between a tip (at angle 0) and the inner corner beside it.
        angle = torch.atan2(dx, -dy)
        angle = (torch.remainder(angle + _FIFTH / 2, _FIFTH) - _FIFTH / 2).abs()
        reach = torch.hypot(dx, dy)
        along, across = _STAR_NORMAL
        return reach * (angle.sin() * along + angle.cos() * across) - _STAR_OFFSET * radius
    raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")


def _unit(levels: Tensor) -> Tensor:
    """Levels 0..255 to [-1, 1]."""
    return levels.float() / 127.5 - 1
