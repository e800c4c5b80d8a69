"""Sampling an image: flow-matching schedule, guidance by up to three contexts, Euler steps.

How the velocities come about is `denoising.py`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bagel_mot.context import Context, Contexts
from bagel_mot.taylorseer import Extrapolation, TaylorSeer

MOST_TIMESTEPS = 100_000


class ImageSettings(BaseModel):
    """How an image is sampled; names and meanings are the official ones.

    The field defaults are those of the official text-to-image notebook; `for_editing` gives those
    of official editing.

    Attributes:
        num_timesteps: points of the schedule, 2..100000; the model is evaluated one time less.
        timestep_shift: s in t' = s t / (1 + (s - 1) t), 0.001..1000; larger spends more steps near
            noise.
        cfg_text_scale: guidance away from the context without the last text, 1..1000; 1 turns all
            guidance off, the image scale too.
        cfg_img_scale: guidance away from the context without pictures, 1..1000; 1 turns it off.
        cfg_interval: guidance is on where low < t <= high (t after the shift; 1 is noise).
        cfg_renorm_type: how the guided velocity is scaled back to the length of the unguided one:
            over everything ("global"), per token ("channel"), or per token between the text and
            the image guidance ("text_channel").
        cfg_renorm_min: least scale the renormalisation may give, 0..1.
        taylorseer: compute only some steps in full and extrapolate the others; True stands for
            the official settings, None or False for no such thing. The images change a little.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Beyond any use; what is still larger overflows float32 on the way.
    num_timesteps: int = Field(50, ge=2, le=MOST_TIMESTEPS)
    timestep_shift: float = Field(3.0, ge=0.001, le=1000)
    cfg_text_scale: float = Field(4.0, ge=1, le=1000)
    cfg_img_scale: float = Field(1.0, ge=1, le=1000)
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    cfg_renorm_min: float = Field(0.0, ge=0, le=1)
    taylorseer: TaylorSeer | None = None

    @field_validator("taylorseer", mode="before")
    @classmethod
    def _official_taylorseer(cls, value: object) -> object:
        return {True: TaylorSeer(), False: None}[value] if isinstance(value, bool) else value

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
        cpu = torch.device("cpu")
        s = torch.linspace(1, 0, self.num_timesteps, dtype=torch.float32, device=cpu)
        t = self.timestep_shift * s / (1 + (self.timestep_shift - 1) * s)
        # Some shifts round t_0 up, and then no guidance interval would hold it.
        return t.clamp(max=1)

    def guided(self, timesteps: torch.Tensor) -> list[bool]:
        """For each evaluation (all timesteps but the last), whether guidance is on."""
        if self.cfg_text_scale <= 1:
            return [False] * (len(timesteps) - 1)
        low, high = self.cfg_interval
        return ((timesteps > low) & (timesteps <= high))[:-1].tolist()


class Guidance(NamedTuple):
    """What `guide` reads of `ImageSettings`, with the scales as tensors: a CUDA graph is then good
    for all scales."""

    cfg_renorm_type: str
    cfg_text_scale: torch.Tensor
    cfg_img_scale: torch.Tensor
    cfg_renorm_min: torch.Tensor


def guide(
    settings: ImageSettings | Guidance,
    v: torch.Tensor,
    v_text: torch.Tensor,
    v_img: torch.Tensor | None,
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


def _renorm(settings: ImageSettings | Guidance, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    if settings.cfg_renorm_type == "global":
        ratio = v.norm() / (g.norm() + 1e-8)
    else:
        ratio = v.norm(dim=-1, keepdim=True) / (g.norm(dim=-1, keepdim=True) + 1e-8)
    return ratio.clamp(max=1.0).clamp(min=settings.cfg_renorm_min)


@dataclass(frozen=True)
class Step:
    """One denoising step as a callback sees it, after its update.

    Attributes:
        job: the image's.
        index: from 0.
        total: number of steps.
        t: time the velocity was taken at.
        latents: (N, 64) float32, x after the update.
        velocities: of the contexts that were evaluated, main, without text, without pictures.
        velocity: (N, 64) float32, the one used.
    """

    job: ImageJob
    index: int
    total: int
    t: float
    latents: torch.Tensor
    velocities: tuple[torch.Tensor, ...]
    velocity: torch.Tensor

    def kept(self) -> Step:
        """The same with tensors of its own, which the next step does not overwrite."""
        return replace(
            self,
            latents=self.latents.clone(),
            velocities=tuple(velocity.clone() for velocity in self.velocities),
            velocity=self.velocity.clone(),
        )


class ImageJob:
    """One image being denoised: what guides it, how, and how far it is.

    Args:
        contexts: what guides the image; left as they are.
        noise: (N, 64) float32, tokens in row-major order over the grid.
        grid: (h, w) latent tokens, N = h * w.

    Attributes:
        latents: (N, 64) float32, x as it is now; on the model's device once a step was made. Until
            the job is done that may be a buffer which the next step overwrites. Another tensor may
            be put in its place between steps.
        index: steps made.
        extrapolation: of the velocities between full steps; None without `settings.taylorseer`.
        branches: the contexts whose velocities the guided steps need: main, then (where the
            settings ask for them) without the last text and without pictures. None once it is done.
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
        self.extrapolation = Extrapolation(settings.taylorseer) if settings.taylorseer else None
        self.branches = [contexts.main]
        if any(self.guided):
            self.branches.append(contexts.no_text)
            if settings.cfg_img_scale > 1:
                self.branches.append(contexts.no_image)

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.index == len(self.guided)

    @property
    def branches_now(self) -> list[Context]:
        """The branches whose velocities the next step needs; none if done."""
        if self.done:
            return []
        return self.branches if self.guided[self.index] else self.branches[:1]

    def finish(self) -> None:
        """Keep nothing but latents of its own: contexts hold gigabytes that decoding may need."""
        self.latents = self.latents.clone()
        self.branches, self.extrapolation = [], None

    @property
    def is_full_now(self) -> bool:
        """Whether the next step computes the velocities that it needs; it may extrapolate them."""
        count = len(self.branches_now)
        return self.extrapolation is None or self.extrapolation.is_full(self.index, count)
