"""A prompt of texts and pictures becomes KV prefixes.

A `Context` is a growing prefix: cached rows, and the RoPE position of whatever comes next. BAGEL
guides an image with up to three of them (`Contexts`): everything, everything without the last
text, and the texts alone. The second is a prefix of the first, and until a picture comes the
third equals it, so neither costs a computation of its own where it need not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from bagel_mot.images import grid_positions, patchify
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.model.layout import GEN, UND, Block, Segment, build_layout, to_device
from bagel_mot.tokenizer import BagelTokenizer


@dataclass(frozen=True)
class Context:
    """A KV prefix, immutable: appending gives a new one.

    Appending writes behind `length` rows of the shared cache, so earlier contexts stay valid;
    of several contexts with one cache only the longest may be appended to and kept.

    Attributes:
        cache: storage, shared with the contexts this one grew from.
        length: cached rows.
        position: RoPE position of the next block.
    """

    cache: KVCache
    length: int = 0
    position: int = 0


@dataclass
class Contexts:
    """The contexts of one request, fed in the order of its texts and pictures.

    Attributes:
        main: everything.
        no_text: main as it was before the last text, if a text came last; else main. Behind it
            the negative text, if there is one.
        no_image: the texts only. The same object as `main` while no picture has come.
        needs_no_image: whether anyone will read `no_image`; if not, it is not kept up.
    """

    model: Bagel
    tokenizer: BagelTokenizer
    needs_no_image: bool = True
    main: Context = field(init=False)
    no_text: Context = field(init=False)
    no_image: Context = field(init=False)

    def __post_init__(self) -> None:
        self.main = self.no_text = self.no_image = Context(self.model.new_cache(64))

    def add_system(self, text: str) -> None:
        """Append a system prompt: a text that stays in every context."""
        self._add_to_texts(self.tokenizer.text_segment(text))
        self.no_text = self.main

    def add_text(self, text: str) -> None:
        """Append a text of the request."""
        self.no_text = self.main
        self._add_to_texts(self.tokenizer.text_segment(text))

    def add_thought(self, text: str) -> None:
        """Append a text that the model thought: to the main context only."""
        before = self.main
        self.main, _ = append_text(self.model, self.main, self.tokenizer.text_segment(text))
        self._part_from(before)

    def add_picture(self, latent: torch.Tensor | None, vit_pixels: torch.Tensor | None) -> None:
        """Append a picture as VAE block and/or ViT block (None leaves one out).

        Args:
            latent: (16, H/8, W/8) scaled VAE latent.
            vit_pixels: (3, H', W') in [-1, 1], sides multiples of the ViT's patch.
        """
        before = self.main
        ids = (self.tokenizer.vision_start, self.tokenizer.vision_end)
        if latent is not None:
            self.main, _ = append_latent(self.model, self.main, latent, ids)
        if vit_pixels is not None:
            self.main, _ = append_vit(self.model, self.main, vit_pixels, ids)
        self._part_from(before)
        self.no_text = self.main

    def add_negative(self, text: str) -> None:
        """Give the no-text context a text of its own: what the image is guided away from.

        Call it once, after the last text or picture: a later one starts `no_text` anew.
        """
        cache = self.model.new_cache(self.no_text.length + 64)
        cache.copy_rows(self.no_text.cache, self.no_text.length, 0)
        apart = replace(self.no_text, cache=cache)
        self.no_text, _ = append_text(self.model, apart, self.tokenizer.text_segment(text))

    def _add_to_texts(self, token_ids: list[int]) -> None:
        before = self.main
        self.main, _ = append_text(self.model, before, token_ids)
        if self.no_image is before:
            self.no_image = self.main
        elif self.needs_no_image:
            self.no_image, _ = append_text(self.model, self.no_image, token_ids)

    def _part_from(self, before: Context) -> None:
        """`main` got something that `no_image` does not: if they were one, copy what they share.

        `no_image` then grows in a cache of its own, not over the rows of `main`.
        """
        if self.no_image is not before or not self.needs_no_image:
            return
        cache = self.model.new_cache(before.length + 64)
        cache.copy_rows(before.cache, before.length, 0)
        self.no_image = replace(before, cache=cache)


def append_text(
    model: Bagel, context: Context, token_ids: list[int]
) -> tuple[Context, torch.Tensor]:
    """Append a causal text block; returns the new context and the block's hidden states (n, D)."""
    ids = to_device(torch.tensor(token_ids), model.device)
    return _append(
        model, context, model.embed_text(ids), causal=True, runs=((UND, len(token_ids)),)
    )


def append_latent(
    model: Bagel, context: Context, latent: torch.Tensor, markers: tuple[int, int]
) -> tuple[Context, torch.Tensor]:
    """Append a picture as VAE tokens (time 0) between its markers; see `append_text`."""
    patch = model.config.latent_patch_size
    grid = (latent.shape[1] // patch, latent.shape[2] // patch)
    clean = model.embed_times(torch.zeros(1, dtype=torch.float32, device=model.device))
    tokens = model.embed_latents(patchify(latent, patch), clean, grid)
    return _append_picture(model, context, tokens, markers, GEN)


def append_vit(
    model: Bagel, context: Context, pixels: torch.Tensor, markers: tuple[int, int]
) -> tuple[Context, torch.Tensor]:
    """Append a picture as ViT tokens between its markers; see `append_text`."""
    patch = model.config.vit.patch_size
    height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
    grid = to_device(grid_positions(height, width, model.config.vit_grid), model.device)
    tokens = model.embed_patches(patchify(to_device(pixels, model.device), patch), grid)
    return _append_picture(model, context, tokens, markers, UND)


def _append_picture(
    model: Bagel,
    context: Context,
    tokens: torch.Tensor,
    markers: tuple[int, int],
    expert: int,
) -> tuple[Context, torch.Tensor]:
    start, end = model.embed_text(to_device(torch.tensor(markers), model.device)).split(1)
    x = torch.cat([start, tokens, end])
    runs = ((UND, 1), (expert, tokens.shape[0]), (UND, 1))
    return _append(model, context, x, causal=False, runs=runs)


def _append(
    model: Bagel,
    context: Context,
    x: torch.Tensor,
    *,
    causal: bool,
    runs: tuple[tuple[int, int], ...],
) -> tuple[Context, torch.Tensor]:
    rows = x.shape[0]
    cache = context.cache.grown(context.length + rows, used=context.length)
    block = Block(Segment(rows, 0, context.length, causal), runs, context.position)
    layout = build_layout([block], model.device, routes_und_rows=model.routes_und_rows)
    hidden = model(x, layout, cache)
    return Context(cache, context.length + rows, block.positions_end), hidden
