"""Denoising an image: flow-matching schedule, guidance by up to three contexts, Euler steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from bagel_mot.tokenizer import BagelTokenizer


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


class ImageJob:
    """One image being denoised: what guides it, how, and how far it is.

    Args:
        contexts: what guides the image; left as they are.
        noise: (N, 64) float32, tokens in row-major order over the grid.
        grid: (h, w) latent tokens, N = h * w.

    Attributes:
        latents: (N, 64) float32, x as it is now; on the model's device once a step was made.
        index: steps made.
        branches: the contexts whose velocities the guided steps need: main, then (where the
            settings ask for them) without the last text and without pictures.
    """

    def __init__(
        self,
        contexts: Contexts,
        noise: torch.Tensor,
        grid: tuple[int, int],
        settings: ImageSettings,
    ) -> None:
        tokens = grid[0] * grid[1]
        if noise.dim() != 2 or noise.shape[0] != tokens:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; expected ({tokens}, channels) for a grid "
                f"of {grid[0]} x {grid[1]}"
            )
        self.grid = grid
        self.settings = settings
        self.latents = noise.float()
        self.timesteps = settings.timesteps()
        self.guided = settings.guided(self.timesteps)
        self.index = 0
        self.branches = [contexts.main]
        if any(self.guided):
            self.branches.append(contexts.no_text)
            if settings.cfg_img_scale > 1:
                self.branches.append(contexts.no_image)

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.index == len(self.guided)


class Denoising:
    """Images denoised together, one packed forward a step for all their branches.

    The images may differ in everything: contexts, sizes, settings, progress. Make a new
    `Denoising` when one joins or leaves; the jobs hold their own state.

    Branches of a job with equal contexts have equal velocities and are computed once: plain
    text-to-image with an image scale has three branches and two forwards' worth of rows.
    """

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer, jobs: Sequence[ImageJob]) -> None:
        self.model = model
        self.jobs = list(jobs)
        self._images = []
        length = 0
        for job in self.jobs:
            self._images.append(_PackedImage(job, length))
            length = self._images[-1].end
        self._cache = model.new_cache(length)
        for image in self._images:
            image.copy_prefixes(self._cache)
        ids = torch.tensor([tokenizer.vision_start, tokenizer.vision_end], device=model.device)
        self._markers = model.embed_text(ids)
        side = model.config.latent_grid
        grids = [grid_positions(*job.grid, side) for job in self.jobs]
        self._grid_ids = torch.cat(grids).to(model.device)
        sizes = torch.tensor([len(grid) for grid in grids])
        self._job_of_token = torch.arange(len(grids)).repeat_interleave(sizes).to(model.device)
        self._packings: dict[tuple[int, ...], _Packing] = {}

    @torch.no_grad()
    def step(self) -> list[Step]:
        """Advance every unfinished job by one step; returns a `Step` for each of them."""
        active = [0 if job.done else _branches_now(job) for job in self.jobs]
        copies = [
            max(image.source[:count]) + 1 if count else 0
            for image, count in zip(self._images, active, strict=True)
        ]
        velocities = self._velocities(tuple(copies))
        steps = []
        for job, image, count in zip(self.jobs, self._images, active, strict=True):
            if not count:
                continue
            own = velocities[: max(image.source[:count]) + 1]
            velocities = velocities[len(own) :]
            steps.append(_advance(job, tuple(own[c] for c in image.source[:count])))
        return steps

    def _velocities(self, copies: tuple[int, ...]) -> list[torch.Tensor]:
        """Velocities (N, 64) of the first `copies[j]` packed copies of each job j, in order."""
        if copies not in self._packings:
            blocks = [
                (job.grid[0] * job.grid[1], image.blocks[:n])
                for job, image, n in zip(self.jobs, self._images, copies, strict=True)
            ]
            self._packings[copies] = _Packing.build(blocks, self.model.device)
        packing = self._packings[copies]
        device = self.model.device
        latents = torch.cat([job.latents.to(device) for job in self.jobs])
        # A finished job's rows are embedded, but not packed: its last timestep does no harm.
        now = torch.stack([job.timesteps[job.index] for job in self.jobs]).to(device)
        tokens = self.model.embed_latents(latents, now, self._grid_ids, self._job_of_token)
        rows = torch.cat([self._markers, tokens])[packing.sources]
        hidden = self.model(rows, packing.layout, self._cache)
        return list(self.model.velocity(hidden[packing.gen_rows]).split(packing.sizes))


@torch.no_grad()
def denoise(
    model: Bagel,
    contexts: Contexts,
    noise: torch.Tensor,
    grid: tuple[int, int],
    settings: ImageSettings,
    on_step: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Turn the noise of one image into its latent tokens; see `ImageJob` for the arguments.

    Args:
        on_step: called after each step; an exception of its ends the denoising.

    Returns:
        (N, 64) float32 on the model's device.
    """
    job = ImageJob(contexts, noise, grid, settings)
    denoising = Denoising(model, contexts.tokenizer, [job])
    while not job.done:
        (step,) = denoising.step()
        if on_step is not None:
            on_step(step)
    return job.latents


def _branches_now(job: ImageJob) -> int:
    """Branches whose velocities the job's next step needs."""
    return len(job.branches) if job.guided[job.index] else 1


def _advance(job: ImageJob, velocities: tuple[torch.Tensor, ...]) -> Step:
    """Guide and make the Euler step."""
    v = velocities[0]
    if job.guided[job.index]:
        v = guide(job.settings, v, velocities[1], velocities[2] if len(velocities) > 2 else None)
    t, following = job.timesteps[job.index : job.index + 2].tolist()
    job.latents = job.latents.to(v.device) - v * (t - following)
    job.index += 1
    return Step(job.index - 1, len(job.guided), t, job.latents, velocities, v)


class _PackedImage:
    """A job's copies of the denoised block, one per distinct context, and their cache rows."""

    def __init__(self, job: ImageJob, start: int) -> None:
        self.contexts: list[Context] = []
        self.source: list[int] = []  # which copy each branch reads
        for context in job.branches:
            if context not in self.contexts:
                self.contexts.append(context)
            self.source.append(self.contexts.index(context))
        tokens = job.grid[0] * job.grid[1]
        runs = ((UND, 1), (GEN, tokens), (UND, 1))
        self.blocks = []
        for context in self.contexts:
            segment = Segment(tokens + 2, start, context.length, causal=False)
            self.blocks.append(Block(segment, runs, context.position))
            start = segment.kv_rows.stop
        self.end = start

    def copy_prefixes(self, cache: KVCache) -> None:
        for context, block in zip(self.contexts, self.blocks, strict=True):
            cache.copy_rows(context.cache, context.length, block.segment.kv_start)


@dataclass(frozen=True)
class _Packing:
    """How the embedded tokens of all jobs become packed rows, and rows become velocities.

    Attributes:
        layout: of the packed rows.
        sources: (M,) int64, for each row its place in [start marker, end marker, tokens of all
            jobs].
        gen_rows: int64, the rows of latent tokens.
        sizes: latent tokens of each copy.
    """

    layout: Layout
    sources: torch.Tensor
    gen_rows: torch.Tensor
    sizes: list[int]

    @classmethod
    def build(cls, images: Sequence[tuple[int, list[Block]]], device: torch.device) -> Self:
        """Pack, for each job, its number of latent tokens and the copies to evaluate."""
        sources, sizes = [], []
        first_token = 2
        for tokens, blocks in images:
            own = torch.arange(first_token, first_token + tokens)
            for _ in blocks:
                sources += [torch.tensor([0]), own, torch.tensor([1])]
                sizes.append(tokens)
            first_token += tokens
        packed = torch.cat(sources)
        gen_rows = torch.nonzero(packed >= 2).flatten()
        layout = build_layout([block for _, blocks in images for block in blocks], device)
        return cls(layout, packed.to(device), gen_rows.to(device), sizes)
