"""Contexts against README section 3, what they share, and that nothing is ever overwritten."""

from __future__ import annotations

import pytest
import torch
from alone import generate_text
from context_rules import (
    NAMES,
    assert_same_context,
    blocks_of,
    contexts_by_the_rules,
    feed,
    request_items,
    rows,
)
from golden_data import GOLDEN, relative_error
from torch import Tensor
from watched import forwards, poison_caches

from bagel_mot.context import Context, Contexts, append_text
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.pipeline import BagelPipeline

# s: system prompt, t: text, n: negative text, p: picture, h: thought
REQUESTS = {
    "text": "t",
    "two-texts": "tt",
    "picture": "p",
    "picture-text": "pt",
    "text-picture": "tp",
    "three-pictures-text": "pppt",
    "picture-text-picture": "ptp",
    "text-picture-text-picture-text": "tptpt",
    "system-prompt-alone": "s",
    "think-text": "sth",
    "think-picture-text": "spth",
    "think-text-picture": "stph",
    "think-picture": "sph",
    "think-interleaved": "stptpth",
    "negative-text": "tn",
    "negative-picture-text": "ptn",
    "negative-text-picture": "tpn",
    "negative-think-interleaved": "stptnh",
}
LETTERS = [pytest.param(letters, id=name) for name, letters in REQUESTS.items()]


def snapshot(contexts: Contexts) -> list[tuple[Context, Tensor]]:
    """The three contexts with copies of their rows."""
    return [(context, rows(context)) for context in (getattr(contexts, name) for name in NAMES)]


def write_draft(cpu: BagelPipeline, contexts: Contexts) -> None:
    """Text written from main and thrown away, as before a thought: it leaves stale rows."""
    generate_text(cpu.model, cpu.tokenizer, contexts.main, max_tokens=7)


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize(
    ("with_vae", "needs_no_image"),
    [
        pytest.param(True, True, id="image"),
        pytest.param(True, False, id="image-no_image-unread"),
        pytest.param(False, False, id="understanding"),
    ],
)
def test_contexts(cpu: BagelPipeline, letters: str, with_vae: bool, needs_no_image: bool) -> None:
    """Length, position, keys and values of each context, against lists of blocks."""
    items = request_items(cpu.config, letters, with_vae=with_vae)
    contexts = Contexts(cpu.model, cpu.tokenizer, needs_no_image=needs_no_image)
    for item in items:
        if item.kind == "thought":
            write_draft(cpu, contexts)
        feed(contexts, item)
    for name, want in contexts_by_the_rules(cpu.model, cpu.tokenizer, items).items():
        if name != "no_image" or needs_no_image:
            assert_same_context(name, getattr(contexts, name), want)


def test_blocks_of_an_interleaved_request(cpu: BagelPipeline) -> None:
    """The rules themselves, on the request that uses all of them."""
    blocks = blocks_of(request_items(cpu.config, "stptph"))
    kinds = {name: [block.kind for block in own] for name, own in blocks.items()}
    first = ["text", "text", "vae", "vit", "text", "vae", "vit"]
    assert kinds == {"main": [*first, "text"], "no_text": first, "no_image": ["text"] * 3}


# Long enough for caches to grow (from 64 rows) on the way.
@pytest.mark.parametrize("letters", ["ttttt", "tptpt", "ptptp", "sttht", "tpptnh"])
def test_older_contexts_stay(cpu: BagelPipeline, letters: str) -> None:
    """Whatever is appended or written later, no context changes: not by a bit."""
    contexts = Contexts(cpu.model, cpu.tokenizer)
    before = snapshot(contexts)
    for item in request_items(cpu.config, letters):
        feed(contexts, item)
        before += snapshot(contexts)
        write_draft(cpu, contexts)
    assert contexts.main.cache.capacity > 64
    for index, (context, wanted) in enumerate(before):
        assert torch.equal(rows(context), wanted), f"context {index} has changed"


@pytest.mark.parametrize(
    ("letters", "needs_no_image", "count"),
    [
        # A picture is two forwards; a text one, and after a picture one more for no_image.
        pytest.param("t", True, 1, id="text"),
        pytest.param("tt", True, 2, id="two-texts"),
        pytest.param("sth", True, 3, id="think-text"),
        pytest.param("p", True, 2, id="picture"),
        pytest.param("tp", True, 3, id="text-picture"),
        pytest.param("pt", True, 4, id="picture-text"),
        pytest.param("pt", False, 3, id="picture-text-no-image-unread"),
        pytest.param("tptpt", True, 9, id="interleaved"),
        pytest.param("tptpt", False, 7, id="interleaved-no-image-unread"),
        pytest.param("stpth", True, 7, id="think-interleaved"),
    ],
)
def test_contexts_forwards(
    cpu: BagelPipeline, letters: str, needs_no_image: bool, count: int
) -> None:
    """What contexts have in common is computed once."""
    contexts = Contexts(cpu.model, cpu.tokenizer, needs_no_image=needs_no_image)
    with forwards(cpu.model) as calls:
        for item in request_items(cpu.config, letters):
            feed(contexts, item)
    assert len(calls) == count


def test_no_image_is_main_until_a_picture_comes(cpu: BagelPipeline) -> None:
    contexts = Contexts(cpu.model, cpu.tokenizer)
    for item in request_items(cpu.config, "stt"):
        feed(contexts, item)
        assert contexts.no_image is contexts.main
    (picture,) = request_items(cpu.config, "p")
    feed(contexts, picture)
    assert contexts.no_image.cache is not contexts.main.cache


def test_no_text_shares_the_cache_of_main(cpu: BagelPipeline) -> None:
    contexts = Contexts(cpu.model, cpu.tokenizer)
    contexts.add_text("short")
    assert contexts.no_text.cache is contexts.main.cache
    (picture,) = request_items(cpu.config, "p")
    feed(contexts, picture)
    assert contexts.no_text is contexts.main


def test_contexts_leave_one_another_alone(cpu: BagelPipeline) -> None:
    """Two requests at a time on one model, item by item in turn."""
    letters = ("tptpt", "sptph")
    requests = [request_items(cpu.config, each) for each in letters]
    both = [Contexts(cpu.model, cpu.tokenizer) for _ in requests]
    for turn in zip(*requests, strict=True):
        for contexts, item in zip(both, turn, strict=True):
            feed(contexts, item)
    for contexts, items in zip(both, requests, strict=True):
        for name, want in contexts_by_the_rules(cpu.model, cpu.tokenizer, items).items():
            assert_same_context(name, getattr(contexts, name), want)


def test_unwritten_rows_are_not_read(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh caches full of NaN change nothing."""
    items = request_items(cpu.config, "stptpth")
    want = contexts_by_the_rules(cpu.model, cpu.tokenizer, items)
    poison_caches(monkeypatch)
    contexts = Contexts(cpu.model, cpu.tokenizer)
    for item in items:
        feed(contexts, item)
    for name in NAMES:
        assert_same_context(name, getattr(contexts, name), want[name])


def small_cache(capacity: int) -> KVCache:
    cache = KVCache(2, capacity, 2, 4, dtype=torch.float32, device=torch.device("cpu"))
    cache.k.copy_(torch.randn(cache.k.shape))
    cache.v.copy_(torch.randn(cache.v.shape))
    return cache


def test_grown_cache_with_room_is_the_same() -> None:
    cache = small_cache(8)
    assert cache.grown(8, used=8) is cache


@pytest.mark.parametrize(
    ("wanted", "capacity"), [pytest.param(9, 16, id="doubles"), pytest.param(40, 40, id="fits")]
)
def test_grown_cache_keeps_rows(wanted: int, capacity: int) -> None:
    cache = small_cache(8)
    before = cache.k.clone(), cache.v.clone()
    larger = cache.grown(wanted, used=5)
    assert larger.capacity == capacity
    for name, kept in zip(("k", "v"), before, strict=True):
        assert torch.equal(getattr(larger, name)[:, :5], kept[:, :5])
        assert torch.equal(getattr(cache, name), kept)
    larger.k.zero_()
    assert torch.equal(cache.k, before[0])


def test_cache_grows_by_few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row to 1000 rows: at most two copies a row in all, never every row every time."""
    copied = 0
    plain = KVCache.copy_rows

    def counting(self: KVCache, source: KVCache, rows: int, *args: object) -> None:
        nonlocal copied
        copied += rows
        plain(self, source, rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(KVCache, "copy_rows", counting)
    cache = small_cache(1)
    for used in range(1, 1000):
        cache = cache.grown(used + 1, used=used)
    assert cache.capacity >= 1000
    assert copied <= 2 * 1000


@pytest.mark.parametrize("step", [1, 3, 50], ids=lambda step: f"{step}-tokens-a-time")
def test_append_text_in_pieces(cpu: BagelPipeline, step: int) -> None:
    """A text appended piece by piece, over growing caches, is the text appended at once."""
    ids = cpu.tokenizer.text_segment("The wind turned to the north, and by noon it rained." * 2)
    whole, want = append_text(cpu.model, Context(cpu.model.new_cache(500)), ids)
    context, hidden = Context(cpu.model.new_cache(1)), []
    for start in range(0, len(ids), step):
        context, out = append_text(cpu.model, context, ids[start : start + step])
        hidden.append(out)
    assert_same_context("pieces", context, whole)
    assert relative_error(torch.cat(hidden), want) <= GOLDEN.fp32_bound


def test_positions_beyond_the_first_rotary_table(cpu: BagelPipeline) -> None:
    """Past 4096 positions the model's rotary table grows, and old positions keep their angles."""
    model = cpu.model
    ids = cpu.tokenizer.text_segment("far away")

    def keys_and_values(position: int) -> tuple[Tensor, Tensor]:
        start = Context(model.new_cache(1), position=position)
        context, hidden = append_text(model, start, ids)
        assert context.position == position + len(ids)
        assert bool(hidden.isfinite().all())
        return context.cache.k[0, : len(ids)], context.cache.v[0, : len(ids)]

    near, far, again = (keys_and_values(position) for position in (0, 9000, 0))
    assert torch.equal(again[0], near[0])
    # In the first layer only keys know about positions.
    assert torch.equal(far[1], near[1])
    assert not torch.equal(far[0], near[0])


def test_no_memory_for_a_cache() -> None:
    with pytest.raises(MemoryError, match=r"no memory for 1,000,000,000,000 rows .* GiB on cpu: "):
        small_cache(10**12)
