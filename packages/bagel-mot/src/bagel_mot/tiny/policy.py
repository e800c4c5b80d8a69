"""The tiny model as a painter of many captioned pictures at once, of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_mot.images import unpatchify
from bagel_mot.model.bagel import Bagel
from bagel_mot.sampling import ImageSettings, guide
from bagel_mot.tiny.packing import Grouping, Packing, Shape, run_together
from bagel_mot.tokenizer import BagelTokenizer

# Tokens of the longest text. Batches are filled up to it, so that all of a size have one shape.
_TEXT = 24
# Pictures that the VAE decodes together.
_TOGETHER = 256

_unpatchify_all = torch.vmap(unpatchify, in_dims=(0, None, None, None))


@dataclass(frozen=True)
class Asked:
    """What n pictures of one size are to show.

    Attributes:
        size: (height, width) in pixels.
        tokens: (n, `_TEXT`) int64, the captions, filled up with zeros.
        lengths: (n,) int64, tokens that are no filling.
    """

    size: tuple[int, int]
    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        size: tuple[int, int],
        tokenizer: BagelTokenizer,
        device: torch.device,
    ) -> Asked:
        """Of these captions.

        Raises:
            ValueError: one is longer than any caption of `language`.
        """
        tokens = torch.zeros(len(texts), _TEXT, dtype=torch.int64)
        lengths = []
        for row, text in zip(tokens, texts, strict=True):
            ids = tokenizer.text_segment(text)
            if len(ids) > _TEXT:
                raise ValueError(f"a text has {len(ids)} tokens: {text!r}; expected <= {_TEXT}")
            row[: len(ids)] = torch.tensor(ids)
            lengths.append(len(ids))
        return cls(size, tokens.to(device), torch.tensor(lengths, device=device))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, index: Tensor) -> Asked:
        """Those of these numbers."""
        return Asked(self.size, self.tokens[index], self.lengths[index])


class Policy:
    """A model and the velocity that the pipeline makes of it.

    Args:
        settings: guidance, away from no text; timesteps.
    """

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer, settings: ImageSettings) -> None:
        self._model = model
        self._settings = settings
        self._rope = model.rope_for(2 * _TEXT)
        markers = [tokenizer.vision_start, tokenizer.vision_end]
        self._markers = torch.tensor(markers, device=model.device)
        self._layouts: dict[Shape, tuple[Packing, Grouping]] = {}

    def velocity(self, asked: Asked, x: Tensor, t: Tensor) -> Tensor:
        """Guided where the settings guide.

        Args:
            x: (n, N, 64) float32 latent tokens.
            t: (n,) their times.
        """
        if self._settings.cfg_text_scale <= 1:
            return self._plain(asked, x, t)
        low, high = self._settings.cfg_interval
        is_guided = (t > low) & (t <= high)
        plain, guided = self._both(asked, x, t)
        return torch.where(is_guided[:, None, None], guided, plain)

    @torch.no_grad()
    def paint(self, asked: Asked, noise: Tensor) -> Tensor:
        """(n, N, 64) latent tokens from noise, by the pipeline's Euler steps."""
        times = self._settings.timesteps()
        x = noise
        for now, after, guided in zip(
            times[:-1].tolist(), times[1:].tolist(), self._settings.guided(times), strict=True
        ):
            t = torch.full((len(asked),), now, device=x.device)
            if guided:
                _, v = self._both(asked, x, t)
            else:
                v = self._plain(asked, x, t)
            x = x - (now - after) * v
        return x

    @torch.no_grad()
    def decode(self, size: tuple[int, int], latents: Tensor) -> Tensor:
        """(n, N, 64) -> (n, 3, H, W)."""
        h, w = self.grid(size)
        patch = self._model.config.latent_patch_size
        parts = _unpatchify_all(latents, h, w, patch).split(_TOGETHER)
        return torch.cat([self._model.vae.decode(part).float() for part in parts])

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) latent tokens of a picture."""
        height, width = size
        unit = self._model.config.latent_token_pixels
        return height // unit, width // unit

    def _both(self, asked: Asked, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """With the text, and guided."""
        twice = torch.arange(len(asked), device=x.device).repeat(2)
        has_text = torch.arange(2 * len(asked), device=x.device) < len(asked)
        both = self._run(asked.select(twice), x.repeat(2, 1, 1), t.repeat(2), has_text)
        plain, without = both.chunk(2)
        guided = torch.vmap(lambda v, v_text: guide(self._settings, v, v_text, None))
        return plain, guided(plain, without)

    def _plain(self, asked: Asked, x: Tensor, t: Tensor) -> Tensor:
        has_text = torch.ones(len(asked), dtype=torch.bool, device=x.device)
        return self._run(asked, x, t, has_text)

    def _run(self, asked: Asked, x: Tensor, t: Tensor, has_text: Tensor) -> Tensor:
        model = self._model
        shape = Shape(len(asked), asked.size, _TEXT, image=True)
        if shape not in self._layouts:
            packing = Packing(model.config, shape, model.device)
            self._layouts[shape] = packing, Grouping([packing], model.device)
        packing, grouping = self._layouts[shape]
        parts = [
            packing.embed_text(model, asked.tokens),
            packing.embed_latents(model, x, t, model.embed_text(self._markers)),
        ]
        packed = packing.pack(parts, asked.lengths, has_text, has_text)
        (hidden,) = run_together(model, self._rope, grouping, [packed])
        return model.velocity(hidden[:, packing.image_rows])
