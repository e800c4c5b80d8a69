"""The three contexts of golden/README.md, section 3, the slow way.

Each context is spelled out as a list of blocks, by the README's rules alone, and prefilled from
nothing: no sharing, no copies. `bagel_mot.context.Contexts` has to end up with the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from golden_data import GOLDEN, relative_error
from torch import Tensor

from bagel_mot.config import BagelConfig
from bagel_mot.context import Context, Contexts, append_latent, append_text, append_vit
from bagel_mot.model.bagel import Bagel
from bagel_mot.tokenizer import BagelTokenizer

NAMES = ("main", "no_text", "no_image")


@dataclass(frozen=True, eq=False)
class Item:
    """What a request brings, in order: a text of some kind, or a picture."""

    kind: Literal["system", "text", "negative", "thought", "picture"]
    text: str = ""
    latent: Tensor | None = None
    pixels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RuleBlock:
    """One block of a context."""

    kind: Literal["text", "vae", "vit"]
    text: str = ""
    tensor: Tensor | None = None


def blocks_of(items: Iterable[Item]) -> dict[str, list[RuleBlock]]:
    """The blocks of the contexts main, no_text and no_image."""
    main: list[RuleBlock] = []
    no_text: list[RuleBlock] = []
    no_image: list[RuleBlock] = []
    for item in items:
        if item.kind == "picture":
            if item.latent is not None:
                main.append(RuleBlock("vae", tensor=item.latent))
            if item.pixels is not None:
                main.append(RuleBlock("vit", tensor=item.pixels))
            no_text = list(main)
        elif item.kind == "negative":  # our own addition: the README knows no negative text
            no_text = [*no_text, RuleBlock("text", item.text)]
        else:
            if item.kind == "text":
                no_text = list(main)
            main.append(RuleBlock("text", item.text))
            if item.kind != "thought":
                no_image.append(RuleBlock("text", item.text))
            if item.kind == "system":
                no_text = list(main)
    return {"main": main, "no_text": no_text, "no_image": no_image}


def prefill(model: Bagel, tokenizer: BagelTokenizer, blocks: Iterable[RuleBlock]) -> Context:
    """A context of its own with these blocks."""
    markers = (tokenizer.vision_start, tokenizer.vision_end)
    context = Context(model.new_cache(1))
    for block in blocks:
        if block.kind == "text":
            context, _ = append_text(model, context, tokenizer.text_segment(block.text))
        else:
            assert block.tensor is not None
            append = append_latent if block.kind == "vae" else append_vit
            context, _ = append(model, context, block.tensor, markers)
    return context


def contexts_by_the_rules(
    model: Bagel, tokenizer: BagelTokenizer, items: Iterable[Item]
) -> dict[str, Context]:
    """All three contexts, each prefilled on its own."""
    return {name: prefill(model, tokenizer, own) for name, own in blocks_of(items).items()}


@dataclass
class PlainContexts:
    """Three contexts as the sampler reads them, however they came to be."""

    tokenizer: BagelTokenizer
    main: Context
    no_text: Context
    no_image: Context

    def typed(self) -> Contexts:
        """The same object, for functions that only read the three."""
        return cast(Contexts, self)


def feed(contexts: Contexts, item: Item) -> None:
    """Give an item to the contexts under test."""
    if item.kind == "picture":
        contexts.add_picture(item.latent, item.pixels)
    else:
        add = {
            "system": contexts.add_system,
            "text": contexts.add_text,
            "negative": contexts.add_negative,
            "thought": contexts.add_thought,
        }[item.kind]
        add(item.text)


def picture_item(config: BagelConfig, seed: int, *, with_vae: bool = True) -> Item:
    """A picture of random latents and pixels; its size depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    unit = config.latent_patch_size
    height, width = unit * (1 + seed % 3), unit * (2 + seed % 2)
    patch = config.vit.patch_size
    return Item(
        "picture",
        latent=torch.randn(config.vae.z_channels, height, width, generator=generator)
        if with_vae
        else None,
        pixels=torch.rand(3, patch * (2 + seed % 2), patch * (1 + seed % 3), generator=generator)
        .mul(2)
        .sub(1),
    )


def request_items(config: BagelConfig, letters: str, *, with_vae: bool = True) -> list[Item]:
    """Items of a request, a letter each.

    s is a system prompt, t a text, n a negative text, p a picture and h a thought.
    """
    kinds: dict[str, Literal["system", "text", "negative", "thought"]]
    kinds = {"s": "system", "t": "text", "n": "negative", "h": "thought"}
    return [
        picture_item(config, index, with_vae=with_vae)
        if letter == "p"
        else Item(kinds[letter], text=f"{kinds[letter]} number {index}: a quiet harbour")
        for index, letter in enumerate(letters)
    ]


def rows(context: Context) -> Tensor:
    """The keys and values of a context, (2, layers, length, KV heads, head size), a copy."""
    kept = slice(0, context.length)
    return torch.stack([context.cache.k[:, kept], context.cache.v[:, kept]])


def assert_same_context(name: str, got: Context, want: Context) -> None:
    """Fail unless lengths and positions agree, and all rows within float32's bound."""
    assert (got.length, got.position) == (want.length, want.position), name
    error = relative_error(rows(got), rows(want))
    assert error <= GOLDEN.fp32_bound, f"{name}: error {error:.2e} > {GOLDEN.fp32_bound:.0e}"
