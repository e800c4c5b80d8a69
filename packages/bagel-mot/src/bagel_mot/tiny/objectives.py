"""What the tiny model is trained for: the losses of batches of all tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel_mot.model.bagel import Bagel
from bagel_mot.model.embeddings import rope_table
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.tiny.drawing import SceneArrays, draw
from bagel_mot.tiny.packing import (
    Grouping,
    Packed,
    Packing,
    Shape,
    patchify_all,
    run_together,
)
from bagel_mot.tiny.pool import Pool
from bagel_mot.tokenizer import BagelTokenizer

# No position in training comes near this: two pictures and a text.
_POSITIONS = 256
# Guidance needs the velocity without the text and without the picture: they are left out as often.
_NO_TEXT, _NO_PICTURE = 0.1, 0.1
# Latents become about standard normal: a nudge, strong enough over thousands of steps.
_KL, _MOMENTS = 1e-4, 1e-3
# Least noise on the VAE's latents in training, next to their unit spread: whatever paints latents
# is a little wrong everywhere, and the decoder must bear that. It also learns faster so.
_LEAST_NOISE = 0.15
# Of the VAE's error: squares, which see small things (an absolute error alone settled for the bare
# ground: that is the median of what it could not tell apart); the squares of differences between
# neighbours, because edges tell the shapes apart; and a little absolute error, for flat colours.
_SQUARES, _EDGES, _ABSOLUTE = 4.0, 2.0, 0.1

# Pictures that the VAE encodes together.
_TOGETHER = 512

# A batch ready to run, and its loss given its hidden states (B, rows, D).
_Prepared: TypeAlias = tuple[Packed, Callable[[Tensor], Tensor]]


class Objectives:
    """The losses of a model on batches of `Pool` samples.

    Args:
        model: every leaf of `weights.leaves` learns; the VAE is in float32.
        tokenizer: what the pools' tokens were made with.
    """

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer) -> None:
        self.model = model
        llm = model.config.llm
        self._rope = rope_table(_POSITIONS, llm.head_dim, llm.rope_theta, model.device)
        markers = [tokenizer.vision_start, tokenizer.vision_end]
        self._markers = torch.tensor(markers, device=model.device)
        self._packings: dict[Shape, Packing] = {}
        self._groupings: dict[tuple[Shape, ...], Grouping] = {}
        self._encoder: AutoEncoder | None = None
        # Of its hundred passes over every picture, one is left.
        on_gpu = model.device.type == "cuda"
        self._draw = torch.compile(draw, dynamic=True) if on_gpu else draw

    @torch.no_grad()
    def encode(self, task: str, pool: Pool) -> Pool:
        """The pool with `moments`, of a task that paints.

        The VAE must not learn any more: whoever trains calls this once, not with every batch.
        """
        if self._encoder is None:
            # On a GPU half the bytes are nearly half the time.
            dtype = torch.bfloat16 if self.model.device.type == "cuda" else torch.float32
            self._encoder = copy.deepcopy(self.model.vae).to(dtype)
        moments = []
        for index in torch.arange(len(pool), device=self.model.device).split(_TOGETHER):
            part = pool.select(index)
            scenes = [part.scenes, part.sources] if task == "edit" else [part.scenes]
            pictures = [self._draw(each, *pool.size) for each in scenes]
            moments.append(torch.stack([self._encoder.moments(x) for x in pictures], dim=1))
        return replace(pool, moments=torch.cat(moments))

    def losses(self, batches: Mapping[str, Pool], generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of each task (`paint`, `edit`, `ask`), from one pass through the model.

        Batches to paint are encoded here if they are not yet.

        Raises:
            ValueError: the batches' pictures are not of one size.
        """
        sizes = {task: batch.size for task, batch in batches.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"batches have pictures of {sizes}; expected one size")
        batches = {
            task: batch if task == "ask" or batch.moments is not None else self.encode(task, batch)
            for task, batch in batches.items()
        }
        seen = self._see(batches)
        made: dict[str, _Prepared] = {}
        for task, batch in batches.items():
            match task:
                case "paint":
                    made[task] = self._paint(batch, generator)
                case "edit":
                    made[task] = self._edit(batch, seen[task], generator)
                case "ask":
                    made[task] = self._ask(batch, seen[task])
        packed = [batch for batch, _ in made.values()]
        shapes = tuple(batch.packing.shape for batch in packed)
        if shapes not in self._groupings:
            packings = [batch.packing for batch in packed]
            self._groupings[shapes] = Grouping(packings, self.model.device)
        hidden = run_together(self.model, self._rope, self._groupings[shapes], packed)
        return {
            task: loss(rows) for (task, (_, loss)), rows in zip(made.items(), hidden, strict=True)
        }

    def _see(self, batches: Mapping[str, Pool]) -> dict[str, Tensor]:
        """What tasks with pictures see of them, (B, rows of the ViT part, D) each, in one pass."""
        shown = {
            task: batch.sources if task == "edit" else batch.scenes
            for task, batch in batches.items()
            if task != "paint"
        }
        if not shown:
            return {}
        task = next(iter(shown))
        pixels = self._draw(SceneArrays.joined(list(shown.values())), *batches[task].size)
        packing = self.packing(task, batches[task])
        rows = packing.embed_vit(self.model, pixels, self._embedded_markers())
        parts = rows.split([len(batches[task]) for task in shown])
        return dict(zip(shown, parts, strict=True))

    def _paint(self, batch: Pool, generator: torch.Generator) -> _Prepared:
        """Rectified flow from a text: mean square error of the velocity."""
        packing = self.packing("paint", batch)
        has_text = _share(len(batch), 1 - _NO_TEXT, generator)
        text = packing.embed_text(self.model, batch.tokens)
        return self._flow(packing, batch, [text], has_text, has_text, generator)

    def _edit(self, batch: Pool, seen: Tensor, generator: torch.Generator) -> _Prepared:
        """Rectified flow from a picture and an instruction."""
        packing = self.packing("edit", batch)
        clean = torch.zeros(1, device=self.model.device)
        markers = self._embedded_markers()
        latents = self._latents(batch, 1, generator)
        parts = [
            packing.embed_latents(self.model, latents, clean, markers),
            seen,
            packing.embed_text(self.model, batch.tokens),
        ]
        has_text = _share(len(batch), 1 - _NO_TEXT, generator)
        has_picture = _share(len(batch), 1 - _NO_PICTURE, generator)
        return self._flow(packing, batch, parts, has_picture, has_text, generator)

    def _ask(self, batch: Pool, seen: Tensor) -> _Prepared:
        """Cross-entropy of the answer's tokens, after a picture and a question or a text alone."""
        packing = self.packing("ask", batch)
        parts = [seen, packing.embed_text(self.model, batch.tokens)]
        tokens, everywhere = batch.tokens, torch.ones_like(batch.shown)
        place = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        answer = (place >= batch.answers[:, None]) & (place < batch.lengths[:, None] - 1)

        def loss(hidden: Tensor) -> Tensor:
            logits = self.model.logits(hidden[:, packing.text_slice][:, : len(place)])
            # Selecting the answers' rows would wait for the device to count them.
            losses = F.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            return (losses * answer.flatten()).sum() / answer.sum()

        return packing.pack(parts, batch.lengths, batch.shown, everywhere), loss

    def reconstruct(
        self, scenes: SceneArrays, size: tuple[int, int], noise: Tensor
    ) -> dict[str, Tensor]:
        """The VAE's losses: `pixels`, `edges` and `latents`.

        Args:
            noise: (n, 16, H/8, W/8) standard normal.
        """
        vae = self.model.vae
        scale, shift = vae.cfg.scale_factor, vae.cfg.shift_factor
        x = self._draw(scenes, *size)
        # On a GPU, whose convolutions take 16 bits faster; the losses are float32.
        narrow = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=x.is_cuda)
        with narrow():
            moments = vae.moments(x).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(2 * math.log(_LEAST_NOISE / scale), 10)
        z = mean + torch.exp(0.5 * log_variance) * noise
        # Everything about the latents is said of them as the language model gets them.
        latent = (z - shift) * scale
        with narrow():
            decoded = vae.decode(latent).float()
        error = decoded - x
        edges = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
        pixels = _SQUARES * error.square().mean() + _ABSOLUTE * error.abs().mean()
        centre, variance = (mean - shift) * scale, log_variance.exp() * scale**2
        kl = 0.5 * (centre.square() + variance - 1 - variance.log()).mean()
        channels = latent.transpose(0, 1).flatten(1)
        moments = channels.mean(1).square().mean() + (channels.std(1) - 1).square().mean()
        return {"pixels": pixels, "edges": _EDGES * edges, "latents": _KL * kl + _MOMENTS * moments}

    def _flow(
        self,
        packing: Packing,
        batch: Pool,
        parts: list[Tensor],
        has_picture: Tensor,
        has_text: Tensor,
        generator: torch.Generator,
    ) -> _Prepared:
        """Predict eps - x0 at x_t = (1 - t) x0 + t eps, where `parts` are the context."""
        x0 = self._latents(batch, 0, generator)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        t = draw_times(len(batch), x0.shape[1], generator)
        x_t = torch.lerp(x0, eps, t[:, None, None])
        noisy = packing.embed_latents(self.model, x_t, t, self._embedded_markers())

        def loss(hidden: Tensor) -> Tensor:
            velocity = self.model.velocity(hidden[:, packing.image_rows])
            return F.mse_loss(velocity, eps - x0)

        return packing.pack([*parts, noisy], batch.lengths, has_picture, has_text), loss

    def _latents(self, batch: Pool, picture: int, generator: torch.Generator) -> Tensor:
        """(B, n, 64) latent tokens of the scenes (0) or the sources (1), float32."""
        assert batch.moments is not None
        mean_and_variance = batch.moments[:, picture]
        noise = torch.randn(
            mean_and_variance.chunk(2, dim=1)[0].shape,
            generator=generator,
            device=generator.device,
        )
        latents = self.model.vae.sample(mean_and_variance, noise)
        return patchify_all(latents, self.model.config.latent_patch_size)

    def packing(self, task: str, batch: Pool) -> Packing:
        """How the rows of such a batch are laid out; made once for each shape."""
        source = {"paint": None, "edit": "both", "ask": "vit"}[task]
        shape = Shape(len(batch), batch.size, batch.tokens.shape[1], source, image=task != "ask")
        if shape not in self._packings:
            self._packings[shape] = Packing(self.model.config, shape, self.model.device)
        return self._packings[shape]

    def _embedded_markers(self) -> Tensor:
        return self.model.embed_text(self._markers)


def _share(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """(count,) bool, true with this probability."""
    return torch.rand(count, generator=generator, device=generator.device) < probability


def draw_times(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Times to train at: half of them uniform, half near noise, where the composition is decided.

    The latter are logit-normal with the sampler's shift of 3 at 32 latent tokens. The same noise
    hides less of a larger picture, where more is then decided earlier: the shift grows as the root
    of the tokens (Esser et al., arXiv:2403.03206, on higher resolutions).
    """
    device = generator.device
    uniform = torch.rand(count, generator=generator, device=device)
    s = torch.randn(count, generator=generator, device=device).sigmoid()
    shift = 3 * math.sqrt(tokens / 32)
    shifted = shift * s / (1 + (shift - 1) * s)
    return torch.where(_share(count, 0.5, generator), uniform, shifted)
