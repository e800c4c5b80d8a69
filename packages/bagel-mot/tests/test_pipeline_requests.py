"""Whole requests: what each context sees, against the rules and against recordings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from alone import denoise, generate_text
from context_rules import Item, PlainContexts, contexts_by_the_rules
from golden_data import GOLDEN, Judge, relative_error
from golden_requests import paint_and_judge, pipeline_for, request_parts
from pictures import (
    GUIDED,
    PORTRAIT,
    QUICK,
    SMALL,
    STREET,
    assert_close_picture,
    assert_same_picture,
)
from PIL import Image

from bagel_mot.images import resize, to_image, to_rgb, to_tensor, unpatchify
from bagel_mot.pipeline import BagelPipeline, Cancelled
from bagel_mot.request import Noise, Part, Request
from bagel_mot.sampling import ImageSettings, Step

PROMPTS: dict[str, str] = GOLDEN.json("system_prompts.json")


def items_of(
    own: BagelPipeline, parts: list[Part], noise: Noise, *, think: bool, wants_image: bool
) -> list[Item]:
    """A request's texts and encoded pictures, noise drawn in their order."""
    items = []
    if think:
        prompt = PROMPTS["generation" if wants_image else "understanding"]
        items.append(Item("system", prompt))
    for part in parts:
        if isinstance(part, str):
            items.append(Item("text", part))
            continue
        resized = resize(to_rgb(part), own.config.vae_transform)
        latent = None
        if wants_image:
            pixels = to_tensor(resize(resized, own.config.vae_transform))[None]
            drawn = noise.normal(1, 16, pixels.shape[2] // 8, pixels.shape[3] // 8)
            latent = own.model.vae.encode(pixels, drawn)[0]
        pixels = to_tensor(resize(resized, own.config.vit_transform))
        items.append(Item("picture", latent=latent, pixels=pixels))
    return items


@dataclass(frozen=True)
class Asked:
    """A request of `test_request`."""

    parts: list[Part]
    output: str
    think: bool = False
    negative: str | None = None

    @property
    def size(self) -> dict[str, int]:
        """Given where it does not follow from a picture."""
        return {} if any(isinstance(part, Image.Image) for part in self.parts) else SMALL


ASKED = {
    "text-to-image": Asked(["a red fox"], "image"),
    "think-text-to-image": Asked(["a red fox"], "image", think=True),
    "edit": Asked([STREET, "at night"], "image"),
    "think-edit": Asked([STREET, "at night"], "image", think=True),
    "two-pictures": Asked([STREET, PORTRAIT, "put her into the street"], "image"),
    "interleaved": Asked(["a street", STREET, "a woman", PORTRAIT, "together"], "image"),
    "think-interleaved": Asked(["a", STREET, "b", PORTRAIT, "c"], "image", think=True),
    "picture-last": Asked(["draw her as in the last picture", PORTRAIT, STREET], "image"),
    "think-picture-last": Asked(["like this:", PORTRAIT], "image", think=True),
    "picture-only": Asked([PORTRAIT], "image"),
    "negative": Asked(["a red fox"], "image", negative="blurred"),
    "negative-edit": Asked([STREET, "at night"], "image", negative="blurred"),
    "negative-think-edit": Asked([STREET, "dark"], "image", think=True, negative="blurred"),
    "question": Asked(["What is a fox?"], "text"),
    "think-question": Asked(["What is a fox?"], "text", think=True),
    "picture-question": Asked([STREET, "What is this?"], "text"),
    "think-picture-question": Asked([STREET, "What is this?"], "text", think=True),
    "interleaved-question": Asked(["first", STREET, "or second", PORTRAIT, "?"], "text"),
    "two-texts-question": Asked(["I have a fox.", "What is it?"], "text"),
}


@pytest.mark.parametrize("name", ASKED)
def test_request(cpu: BagelPipeline, name: str) -> None:
    """Text, velocities, latents and image, against contexts prefilled block by block."""
    asked, seed, limit = ASKED[name], 31, 9
    wants_image = asked.output == "image"
    steps: list[Step] = []
    result = cpu.chat(
        asked.parts,
        output=asked.output,
        think=asked.think,
        negative_prompt=asked.negative,
        settings=GUIDED,
        seed=seed,
        max_text_tokens=limit,
        on_step=steps.append,
        **(asked.size if wants_image else {}),
    )
    noise = Noise(seed)
    items = items_of(cpu, asked.parts, noise, think=asked.think, wants_image=wants_image)
    if asked.negative:
        items.append(Item("negative", asked.negative))
    contexts = contexts_by_the_rules(cpu.model, cpu.tokenizer, items)
    if asked.think or not wants_image:
        fed = generate_text(cpu.model, cpu.tokenizer, contexts["main"], max_tokens=limit)
        assert result.text == cpu.tokenizer.answer(fed)
        items.append(Item("thought", result.text))
        contexts = contexts_by_the_rules(cpu.model, cpu.tokenizer, items)
    else:
        assert result.text is None
    if not wants_image:
        assert (result.images, result.seeds, steps) == ((), (), [])
        return
    width, height = result.image.size
    last = [part for part in asked.parts if not isinstance(part, str)][-1:]
    sizes = [resize(to_rgb(part), cpu.config.vae_transform).size for part in last]
    assert [(width, height)] == (sizes or [(80, 64)])
    grid = (height // 16, width // 16)
    want: list[Step] = []
    by_hand = PlainContexts(cpu.tokenizer, **contexts).typed()
    start = noise.normal(grid[0] * grid[1], 64)
    latents = denoise(cpu.model, by_hand, start, grid, GUIDED, want.append)
    for got_step, want_step in zip(steps, want, strict=True):
        pairs = [
            (got_step.latents, want_step.latents),
            (got_step.velocity, want_step.velocity),
            *zip(got_step.velocities, want_step.velocities, strict=True),
        ]
        assert len(pairs) == 5
        for got, wanted in pairs:
            assert relative_error(got, wanted) <= GOLDEN.fp32_bound
    decoded = cpu.model.vae.decode(unpatchify(latents, *grid, 2)[None])[0]
    assert_close_picture(result.image, to_image(decoded))


@pytest.mark.parametrize("shift", [0.001, 1000])
@pytest.mark.parametrize("renorm_min", [0.0, 1.0])
def test_most_extreme_settings(cpu: BagelPipeline, shift: float, renorm_min: float) -> None:
    """What is taken at all stays finite."""
    settings = ImageSettings(
        num_timesteps=4,
        timestep_shift=shift,
        cfg_text_scale=1000,
        cfg_img_scale=1000,
        cfg_interval=(0, 1),
        cfg_renorm_min=renorm_min,
    )
    image = cpu.edit(STREET, "at night", settings=settings, height=32, width=32, seed=1).image
    assert image.size == (32, 32)


# --- the calls are requests


def test_generate_is_chat(cpu: BagelPipeline) -> None:
    options: dict[str, Any] = {"seed": 3, **SMALL, "settings": QUICK}
    assert_same_picture(
        cpu.generate("a fox", **options).image,
        cpu.chat(["a fox"], output="image", **options).image,
    )


def test_edit_is_chat(cpu: BagelPipeline) -> None:
    for pictures in ([STREET], [PORTRAIT, STREET]):
        assert_same_picture(
            cpu.edit(pictures, "at night", settings=GUIDED, seed=3).image,
            cpu.chat([*pictures, "at night"], output="image", settings=GUIDED, seed=3).image,
        )
    assert_same_picture(
        cpu.edit(STREET, "at night", settings=GUIDED, seed=3).image,
        cpu.edit([STREET], "at night", settings=GUIDED, seed=3).image,
    )


def test_ask_is_chat(cpu: BagelPipeline) -> None:
    for given, pictures in (
        (STREET, [STREET]),
        ([STREET], [STREET]),
        ([STREET, PORTRAIT], [STREET, PORTRAIT]),
        ([], []),
        (None, []),
    ):
        answer = cpu.ask(given, "What is this?", max_text_tokens=6)
        wanted = cpu.chat([*pictures, "What is this?"], output="text", max_text_tokens=6)
        assert answer == wanted.text


def test_default_settings(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` takes the official text-to-image defaults, `edit` those for editing."""
    requests = []

    def keep(_self: BagelPipeline, request: Request, **_: Any) -> None:
        requests.append(request)
        raise Cancelled

    monkeypatch.setattr(BagelPipeline, "prepare", keep)
    for call in (
        lambda: cpu.generate("a fox"),
        lambda: cpu.edit(STREET, "x"),
        lambda: cpu.chat([STREET, "x"], output="image"),
    ):
        with pytest.raises(Cancelled):
            call()
    plain, editing = ImageSettings(), ImageSettings.for_editing()
    assert [request.settings for request in requests] == [plain, editing, plain]
    sizes = [(request.height, request.width) for request in requests]
    assert sizes == [(None, None)] * 3


# --- bfloat16


@pytest.fixture(scope="module")
def half() -> BagelPipeline:
    return BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", ["a1", "a5", "b1", "b3"])
def test_image_in_bfloat16(half: BagelPipeline, name: str) -> None:
    """Recorded requests on the CPU in bfloat16, within the bounds of golden/tolerances.json."""
    case, judge = GOLDEN.case(name), Judge(torch.bfloat16)
    paint_and_judge(half, judge, case)
    assert {"gen.final_latent", "step0.v"} <= judge.checked


def test_text_in_bfloat16(half: BagelPipeline) -> None:
    case = GOLDEN.case("c1")
    assert min(case.json["texts"][0]["margins"]) > 0.15  # so that every token must agree
    image, question = request_parts(case)
    limit = case.json["params"]["max_think_token_n"]
    answer = pipeline_for(half, case).ask(image, question, max_text_tokens=limit)
    assert answer == case.json["text_output"]


def test_a_request_is_what_it_was_when_made() -> None:
    """A conversation's list grows."""
    parts: list[Part] = [STREET, "what is this?"]
    request = Request(parts, "text")
    parts.append("and now?")
    assert request.parts == (STREET, "what is this?")
