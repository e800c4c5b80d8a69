"""Guidance against README section 3, written out again in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden_data import assert_close
from guidance_rules import RENORMS, guide_by_the_rules
from torch import Tensor

from bagel_mot.sampling import ImageSettings, guide


def random_velocities(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities of the three contexts; the kinds reach all sides of the clamp."""
    generator = torch.Generator().manual_seed(seed)
    v, vt, vi = (torch.randn(6, 64, generator=generator) for _ in range(3))
    if kind == "shrinking":  # guidance makes them shorter, so r would exceed 1
        vt, vi = v * 1.2 + 0.01 * vt, v * 1.1 + 0.01 * vi
    if kind == "mixed":  # some tokens longer, some shorter
        vt[::2], vi[::2] = v[::2] * 1.2, v[::2] * 1.1
    if kind == "near-zero":  # the 1e-8 counts
        v, vt, vi = v * 1e-9, vt * 1e-9, vi * 1e-9
    if kind == "equal":
        vt, vi = v.clone(), v.clone()
    if kind == "zero":
        v, vt, vi = v * 0, vt * 0, vi * 0
    return v, vt, vi


@pytest.mark.parametrize("kind", ["random", "shrinking", "mixed", "near-zero", "equal", "zero"])
@pytest.mark.parametrize("image_scale", [1.0, 1.5, 3.0], ids=lambda scale: f"image-{scale}")
@pytest.mark.parametrize("renorm", RENORMS)
def test_guide(renorm: str, image_scale: float, kind: str) -> None:
    for seed, (text_scale, least) in enumerate(itertools.product((1.5, 4.0), (0.0, 0.4, 1.0))):
        settings = ImageSettings(
            cfg_text_scale=text_scale,
            cfg_img_scale=image_scale,
            cfg_renorm_type=renorm,
            cfg_renorm_min=least,
        )
        v, vt, vi = random_velocities(kind, seed)
        used = vi if image_scale > 1 else None
        got = guide(settings, v, vt, used)
        assert got.dtype == torch.float32
        assert_close(
            f"text {text_scale}, min {least}", got, guide_by_the_rules(settings, v, vt, used)
        )
