"""Guidance of README section 3, written out again in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bagel_mot.sampling import ImageSettings

RENORMS = ("global", "channel", "text_channel")


def guide_by_the_rules(s: ImageSettings, v: Tensor, vt: Tensor, vi: Tensor | None) -> Tensor:
    """README section 3, token by token, in float64."""
    v, vt = v.double(), vt.double()
    a, b = s.cfg_text_scale, s.cfg_img_scale
    tokens = range(v.shape[0])

    def length(x: Tensor) -> float:
        return sum(number * number for number in x.flatten().tolist()) ** 0.5

    def clamped(of: Tensor, by: Tensor) -> float:
        return min(max(length(of) / (length(by) + 1e-8), s.cfg_renorm_min), 1.0)

    def per_token(g: Tensor) -> Tensor:
        return torch.stack([g[n] * clamped(v[n], g[n]) for n in tokens])

    g = vt + a * (v - vt)
    if s.cfg_renorm_type == "text_channel":
        g = per_token(g)
    if b > 1:
        assert vi is not None
        g = vi.double() + b * (g - vi.double())
    if s.cfg_renorm_type == "channel":
        g = per_token(g)
    if s.cfg_renorm_type == "global":
        g = g * clamped(v, g)
    return g
