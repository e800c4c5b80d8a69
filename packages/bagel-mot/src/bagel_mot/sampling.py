"""Denoising an image: flow-matching schedule, guidance by up to three contexts, Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bagel_mot.context import Context, Contexts
from bagel_mot.images import grid_positions
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import (
    GEN,
    UND,
    Block,
    KVCache,
    Layout,
    Segment,
    build_layout,
)


class ImageSettings(BaseModel):
    """How an image is sampled; names and meanings are the official ones.

    The field defaults are those of the official text-to-image notebook; `for_editing` gives those
    of official editing.

    Attributes:
        num_timesteps: points of the schedule; the model is evaluated one time less.
        timestep_shift: s in t' = s t / (1 + (s - 1) t); larger spends more steps near noise.
        cfg_text_scale: guidance away from the context without the last text; 1 turns all guidance
            off, the image scale too.
        cfg_img_scale: guidance away from the context without pictures; 1 turns it off.
        cfg_interval: guidance is on where low < t <= high (t after the shift; 1 is noise).
        cfg_renorm_type: how the guided velocity is scaled back to the length of the unguided one:
            over everything ("global"), per token ("channel"), or per token between the text and
            the image guidance ("text_channel").
        cfg_renorm_min: least scale the renormalisation may give, 0..1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_timesteps: int = Field(50, ge=2)
    timestep_shift: float = Field(3.0, gt=0)
    cfg_text_scale: float = Field(4.0, ge=1)
    cfg_img_scale: float = Field(1.0, ge=1)
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    cfg_renorm_min: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> Self:
        low, high = self.cfg_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"cfg_interval is {low}, {high}; expected 0 <= low <= high <= 1")
        return self

    @classmethod
    def for_editing(cls, **changes: object) -> Self:
        """The official defaults for editing a picture, with changes."""
        defaults = {
            "cfg_img_scale": 2.0,
            "cfg_interval": (0.0, 1.0),
            "cfg_renorm_type": "text_channel",
        }
        return cls.model_validate(defaults | changes)

    def timesteps(self) -> torch.Tensor:
        """t_0 = 1 .. t_(T-1) = 0, (T,) float32 on the CPU."""
        s = torch.linspace(1, 0, self.num_timesteps)
        return self.timestep_shift * s / (1 + (self.timestep_shift - 1) * s)

    def guided(self, timesteps: torch.Tensor) -> list[bool]:
        """For each evaluation (all timesteps but the last), whether guidance is on."""
        if self.cfg_text_scale <= 1:
            return [False] * (len(timesteps) - 1)
        low, high = self.cfg_interval
        return ((timesteps > low) & (timesteps <= high))[:-1].tolist()


def guide(
    settings: ImageSettings, v: torch.Tensor, v_text: torch.Tensor, v_img: torch.Tensor | None
) -> torch.Tensor:
    """Combine velocities, all (N, 64) float32, of one image.

    Args:
        v: of the main context.
        v_text: of the context without the last text.
        v_img: of the context without pictures; None if `cfg_img_scale` is 1.
    """
    g = v_text + settings.cfg_text_scale * (v - v_text)
    if settings.cfg_renorm_type == "text_channel":
        g = g * _renorm(settings, v, g)
    if v_img is not None:
        g = v_img + settings.cfg_img_scale * (g - v_img)
    if settings.cfg_renorm_type != "text_channel":
        g = g * _renorm(settings, v, g)
    return g


def _renorm(settings: ImageSettings, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    if settings.cfg_renorm_type == "global":
        ratio = v.norm() / (g.norm() + 1e-8)
    else:
        ratio = v.norm(dim=-1, keepdim=True) / (g.norm(dim=-1, keepdim=True) + 1e-8)
    return ratio.clamp(settings.cfg_renorm_min, 1.0)


@dataclass(frozen=True)
class Step:
    """One denoising step as a callback sees it, after its update.

    Attributes:
        index: from 0.
        total: number of steps.
        t: time the velocity was taken at.
        latents: (N, 64) float32, x after the update.
        velocities: of the contexts that were evaluated, main, without text, without pictures.
        velocity: (N, 64) float32, the one used.
    """

    index: int
    total: int
    t: float
    latents: torch.Tensor
    velocities: tuple[torch.Tensor, ...]
    velocity: torch.Tensor


@torch.no_grad()
def denoise(
    model: Bagel,
    contexts: Contexts,
    noise: torch.Tensor,
    grid: tuple[int, int],
    settings: ImageSettings,
    on_step: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Turn noise into the latent tokens of an image.

    Args:
        contexts: what guides the image; left as they are.
        noise: (N, 64) float32, tokens in row-major order over the grid.
        grid: (h, w) latent tokens, N = h * w.
        on_step: called after each step; an exception of its ends the denoising.

    Returns:
        (N, 64) float32 on the model's device.
    """
    timesteps = settings.timesteps()
    guided = settings.guided(timesteps)
    branches = [contexts.main]
    if any(guided):
        branches.append(contexts.no_text)
        if settings.cfg_img_scale > 1:
            branches.append(contexts.no_image)
    block = _ImageBlock(model, contexts, branches, grid)

    x = noise.to(model.device, torch.float32)
    times = timesteps.to(model.device)
    for i, guidance in enumerate(guided):
        velocities = block.velocities(x, times[i], len(branches) if guidance else 1)
        v = velocities[0]
        if guidance:
            v = guide(settings, v, velocities[1], velocities[2] if len(velocities) > 2 else None)
        x = x - v * (times[i] - times[i + 1])
        if on_step is not None:
            on_step(Step(i, len(guided), float(timesteps[i]), x, velocities, v))
    return x


class _ImageBlock:
    """The denoised block, packed once per distinct context, behind copies of their prefixes."""

    def __init__(
        self,
        model: Bagel,
        contexts: Contexts,
        branches: list[Context],
        grid: tuple[int, int],
    ) -> None:
        self.model = model
        tokenizer = contexts.tokenizer
        markers = torch.tensor([tokenizer.vision_start, tokenizer.vision_end], device=model.device)
        self.start, self.end = model.embed_text(markers).split(1)
        self.grid_ids = grid_positions(*grid, model.config.latent_grid).to(model.device)
        self.tokens = len(self.grid_ids)
        # Equal contexts have equal velocities: `source[b]` is the packed copy branch b reads.
        distinct: list[Context] = []
        self.source: list[int] = []
        for context in branches:
            if context not in distinct:
                distinct.append(context)
            self.source.append(distinct.index(context))
        self.cache, self.blocks = self._place(distinct)
        self.layouts: dict[int, Layout] = {}

    def _place(self, contexts: list[Context]) -> tuple[KVCache, list[Block]]:
        rows = self.tokens + 2
        runs = ((UND, 1), (GEN, self.tokens), (UND, 1))
        cache = self.model.new_cache(sum(context.length + rows for context in contexts))
        blocks, start = [], 0
        for context in contexts:
            cache.copy_rows(context.cache, context.length, start)
            segment = Segment(rows, start, context.length, causal=False)
            blocks.append(Block(segment, runs, context.position))
            start += context.length + rows
        return cache, blocks

    def velocities(
        self, x: torch.Tensor, t: torch.Tensor, branches: int
    ) -> tuple[torch.Tensor, ...]:
        """Velocities (N, 64) of the first `branches` branches at time t."""
        copies = max(self.source[:branches]) + 1
        if copies not in self.layouts:
            self.layouts[copies] = build_layout(self.blocks[:copies], self.model.device)
        tokens = self.model.embed_latents(x, t, self.grid_ids)
        rows = torch.cat([self.start, tokens, self.end]).repeat(copies, 1)
        hidden = self.model(rows, self.layouts[copies], self.cache)
        gen = hidden.view(copies, self.tokens + 2, -1)[:, 1:-1]
        per_copy = self.model.velocity(gen).unbind()
        return tuple(per_copy[c] for c in self.source[:branches])
