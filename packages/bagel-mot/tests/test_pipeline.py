"""Requests: what each context sees, seeds, streaming, cancelling, sizes and errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from alone import denoise, generate_text
from context_rules import Item, PlainContexts, contexts_by_the_rules
from golden_data import GOLDEN, Judge, relative_error
from golden_requests import paint_and_judge, pipeline_for, request_parts
from PIL import Image
from test_context import forwards

from bagel_mot import pipeline as pipeline_module
from bagel_mot.images import resize, to_image, to_rgb, to_tensor, unpatchify
from bagel_mot.pipeline import BagelPipeline, Cancelled
from bagel_mot.request import Noise, Part, Request, Result, image_size
from bagel_mot.sampling import ImageSettings, Step

SMALL = {"height": 64, "width": 80}
QUICK = ImageSettings(num_timesteps=3)
# All three contexts at every step.
GUIDED = ImageSettings.for_editing(num_timesteps=3)
PROMPTS: dict[str, str] = GOLDEN.json("system_prompts.json")


def picture(name: str) -> Image.Image:
    with Image.open(GOLDEN.folder / "images" / f"{name}.png") as image:
        image.load()
        return image


STREET, PORTRAIT, LARGE = (picture(name) for name in ("street", "portrait", "large"))


def levels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=np.int32)


def assert_same_picture(got: Image.Image, want: Image.Image) -> None:
    """To the last bit."""
    assert got.size == want.size
    assert got.tobytes() == want.tobytes()


def assert_close_picture(got: Image.Image, want: Image.Image) -> None:
    """As golden float32 pictures are compared: a level apart where truncation falls otherwise."""
    assert got.size == want.size
    assert np.abs(levels(got) - levels(want)).max() <= 1


# --- whole requests against the rules


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


# --- pictures going in


def test_transparent_picture(cpu: BagelPipeline) -> None:
    """An RGBA picture is the picture composited on white."""
    alpha = Image.linear_gradient("L").resize(STREET.size)
    transparent = STREET.convert("RGB")
    transparent.putalpha(alpha)
    flat = Image.new("RGB", STREET.size, (255, 255, 255))
    flat.paste(STREET.convert("RGB"), mask=alpha)

    def edited(image: Image.Image) -> Image.Image:
        return cpu.edit(image, "x", settings=GUIDED, seed=1).image

    assert_same_picture(edited(transparent), edited(flat))
    assert edited(transparent).tobytes() != edited(STREET).tobytes()


def test_pictures_are_left_alone(cpu: BagelPipeline) -> None:
    grey = STREET.convert("L")
    before = grey.copy()
    cpu.edit(grey, "x", settings=QUICK, seed=1)
    assert (grey.mode, grey.size, grey.tobytes()) == (before.mode, before.size, before.tobytes())


def test_order_of_pictures_matters(cpu: BagelPipeline) -> None:
    options: dict[str, Any] = {"settings": GUIDED, "seed": 1, **SMALL}
    one = cpu.edit([STREET, PORTRAIT], "x", **options).image
    other = cpu.edit([PORTRAIT, STREET], "x", **options).image
    assert one.tobytes() != other.tobytes()


# --- sizes


def test_size_of_an_edit(cpu: BagelPipeline) -> None:
    """That of the last picture, resized; unless one is given."""
    street, portrait = (
        resize(image, cpu.config.vae_transform).size for image in (STREET, PORTRAIT)
    )
    assert street != portrait
    options: dict[str, Any] = {"settings": QUICK, "seed": 1}
    assert cpu.edit([PORTRAIT, STREET], "x", **options).image.size == street
    assert cpu.edit([STREET, PORTRAIT], "x", **options).image.size == portrait
    assert cpu.edit(STREET, "x", **options, **SMALL).image.size == (80, 64)
    assert cpu.chat([PORTRAIT, "x", STREET], output="image", **options).image.size == street


@pytest.mark.parametrize("call", ["generate", "chat"])
def test_size_without_a_picture(cpu: BagelPipeline, call: str) -> None:
    """The largest square: seen at the first step, which is the last."""
    seen = []

    def look(step: Step) -> None:
        seen.append(step.latents.shape)
        raise Cancelled

    settings = ImageSettings(num_timesteps=2, cfg_text_scale=1.0)
    with pytest.raises(Cancelled):
        if call == "generate":
            cpu.generate("a fox", settings=settings, on_step=look)
        else:
            cpu.chat(["a fox"], output="image", settings=settings, on_step=look)
    assert seen == [(64 * 64, 64)]


def test_size_without_a_picture_is_the_models(
    cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with a smaller grid than BAGEL-7B's, its own largest square."""
    smaller = cpu.config.with_grids(latent_rows=4**2, vit_rows=70**2)
    monkeypatch.setattr(cpu, "config", smaller)
    assert cpu.generate("a fox", settings=QUICK, seed=1).image.size == (64, 64)


@pytest.mark.parametrize("size", [(16, 16), (16, 96), (112, 32)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_size_given(cpu: BagelPipeline, size: tuple[int, int]) -> None:
    height, width = size
    result = cpu.generate("a fox", height=height, width=width, settings=QUICK, seed=1)
    assert result.image.size == (width, height)
    assert result.image.mode == "RGB"


def test_image_size(cpu: BagelPipeline) -> None:
    assert image_size(cpu.config, None, None, None) == (1024, 1024)
    assert image_size(cpu.config, 1024, 16, STREET) == (1024, 16)
    assert image_size(cpu.config, None, None, Image.new("RGB", (96, 64))) == (64, 96)
    smaller = cpu.config.with_grids(latent_rows=32**2, vit_rows=70**2)
    assert image_size(smaller, None, None, None) == (512, 512)


# --- several images, several requests


def test_num_images(cpu: BagelPipeline) -> None:
    """Image i is the image of seed + i."""
    options: dict[str, Any] = {"settings": QUICK, **SMALL}
    result = cpu.generate("a fox", seed=5, num_images=3, **options)
    assert result.seeds == (5, 6, 7)
    for image, seed in zip(result.images, result.seeds, strict=True):
        alone = cpu.generate("a fox", seed=seed, **options)
        assert alone.seeds == (seed,)
        assert_close_picture(image, alone.image)
    assert len({image.tobytes() for image in result.images}) == 3
    with pytest.raises(ValueError, match=r"holds 3 images; use \.images"):
        _ = result.image


def test_num_images_of_an_edit(cpu: BagelPipeline) -> None:
    """All images see the first one's encoding of the picture; the initial noise is their own."""
    result = cpu.edit(STREET, "at night", settings=GUIDED, seed=5, num_images=2)

    second = cpu.edit(STREET, "at night", settings=GUIDED, noise=DrawnFrom(5, 6))
    first = cpu.edit(STREET, "at night", settings=GUIDED, seed=5)
    assert result.seeds == (5, 6)
    assert_close_picture(result.images[0], first.image)
    assert_close_picture(result.images[1], second.image)


class DrawnFrom(Noise):
    """A picture's noise from one seed, an image's initial noise from another."""

    def __init__(self, pictures: int, image: int) -> None:
        super().__init__(pictures)
        self.image = Noise(image)

    def normal(self, *shape: int) -> torch.Tensor:
        return self.image.normal(*shape) if len(shape) == 2 else super().normal(*shape)


def test_num_images_think_once(cpu: BagelPipeline) -> None:
    """One thought for all, written (here: sampled) with the first seed."""
    options: dict[str, Any] = {"think": True, "max_text_tokens": 6, "temperature": 1.0}
    options |= {"settings": QUICK, **SMALL}
    texts: list[str] = []
    result = cpu.generate("a fox", seed=5, num_images=2, on_text=texts.append, **options)
    alone = cpu.generate("a fox", seed=5, **options)
    assert result.text == alone.text
    assert len(texts) <= 6
    assert_close_picture(result.images[0], alone.image)


@pytest.mark.parametrize("together", [1, 60, 16384], ids=lambda rows: f"{rows}-rows-together")
def test_run(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Several requests: each as if alone, however many images are denoised together."""
    monkeypatch.setattr(pipeline_module, "_ROWS_TOGETHER", together)
    requests = [
        Request(["a fox"], "image", settings=QUICK, seed=1, num_images=2, height=32, width=48),
        Request([STREET, "What is this?"], "text", max_text_tokens=5),
        Request([PORTRAIT, "x"], "image", settings=GUIDED, seed=2),
        Request(["a"], "image", think=True, settings=QUICK, max_text_tokens=4, seed=3, **SMALL),
    ]
    results = cpu.run(requests)
    assert [len(result.images) for result in results] == [2, 0, 1, 1]
    for request, result in zip(requests, results, strict=True):
        (alone,) = cpu.run([request])
        assert (result.seeds, result.text) == (alone.seeds, alone.text)
        for image, wanted in zip(result.images, alone.images, strict=True):
            assert_close_picture(image, wanted)
    assert cpu.run([]) == []


# --- random numbers


def small_image(cpu: BagelPipeline, **options: Any) -> Image.Image:
    return cpu.generate("a fox", **({"settings": QUICK, **SMALL} | options)).image


def test_same_seed_same_image(cpu: BagelPipeline) -> None:
    """Whatever else draws random numbers in the process, and without touching theirs."""
    first = small_image(cpu, seed=7)
    torch.manual_seed(0)
    torch.randn(100)
    state = torch.random.get_rng_state()

    def draw(_step: Step) -> None:
        torch.randn(3)

    assert_same_picture(small_image(cpu, seed=7, on_step=draw), first)
    torch.random.set_rng_state(state)
    assert_same_picture(small_image(cpu, seed=7), first)
    cpu.edit(STREET, "x", settings=QUICK, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert small_image(cpu, seed=8).tobytes() != first.tobytes()


def test_no_seed_draws_one(cpu: BagelPipeline) -> None:
    """Another one each time, also after `torch.manual_seed`; the result says which."""

    def paint() -> Result:
        torch.manual_seed(0)
        return cpu.generate("a fox", settings=QUICK, **SMALL)

    first, second = paint(), paint()
    assert first.seeds != second.seeds
    assert_same_picture(small_image(cpu, seed=first.seeds[0]), first.image)


class GlobalNoise(Noise):
    """Torch's default generator, as the official code draws from it."""

    def __init__(self) -> None:
        self.generator = None

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape)


@pytest.mark.parametrize("temperature", [None, 1.0], ids=["greedy", "sampled"])
def test_seed_is_the_official_one(cpu: BagelPipeline, temperature: float | None) -> None:
    """What `torch.manual_seed(seed)` and the official order of draws give."""
    options: dict[str, Any] = {
        "settings": GUIDED,
        "think": True,
        "max_text_tokens": 5,
        "temperature": temperature,
    }
    wanted = cpu.edit([STREET, PORTRAIT], "x", seed=11, **options)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(11)
        got = cpu.edit([STREET, PORTRAIT], "x", noise=GlobalNoise(), **options)
    finally:
        torch.random.set_rng_state(state)
    assert got.text == wanted.text
    assert_same_picture(got.image, wanted.image)


def test_noise_is_drawn_in_the_official_order(cpu: BagelPipeline) -> None:
    """Each picture's, in order, then the image's (README, end of section 3)."""
    shapes = []

    class Recording(Noise):
        def normal(self, *shape: int) -> torch.Tensor:
            shapes.append(shape)
            return super().normal(*shape)

    cpu.chat(
        [PORTRAIT, "a", STREET, "b"], output="image", settings=QUICK, noise=Recording(1), **SMALL
    )
    assert shapes == [(1, 16, 12, 8), (1, 16, 8, 12), (20, 64)]
    cpu.ask([PORTRAIT], "b", noise=Recording(1), max_text_tokens=2)
    assert len(shapes) == 3


def test_coldest_text(cpu: BagelPipeline) -> None:
    """At the least temperature that is taken, sampling gives the likeliest text."""
    want = cpu.ask(None, "What is this?", max_text_tokens=8)
    assert want
    got = cpu.ask(None, "What is this?", max_text_tokens=8, temperature=1e-6, seed=1)
    assert got == want


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


def test_sampled_text(cpu: BagelPipeline) -> None:
    """A seed gives its text again; other seeds and other temperatures give others."""

    def ask(seed: int | None, temperature: float | None) -> str:
        return cpu.ask(None, "Tell me.", seed=seed, temperature=temperature, max_text_tokens=12)

    assert ask(1, 1.0) == ask(1, 1.0)
    assert len({ask(seed, 1.0) for seed in range(4)}) == 4
    assert ask(1, 1.0) != ask(1, 3.0)
    # So cold that the likeliest token is certain.
    assert ask(1, 1e-4) == ask(None, None) == ask(2, None)


# --- callbacks, cancelling


@pytest.mark.parametrize("num_images", [1, 2], ids=["one-image", "two-images"])
def test_on_step(cpu: BagelPipeline, num_images: int) -> None:
    settings = ImageSettings(num_timesteps=5)
    steps: list[Step] = []
    cpu.generate(
        "a fox", settings=settings, seed=1, num_images=num_images, on_step=steps.append, **SMALL
    )
    timesteps = settings.timesteps().tolist()
    assert len(steps) == 4 * num_images
    assert sorted(step.index for step in steps) == sorted([0, 1, 2, 3] * num_images)
    for step in steps:
        assert step.total == 4
        assert step.t == timesteps[step.index]
        assert step.latents.shape == step.velocity.shape == (20, 64)
        assert step.latents.dtype == step.velocity.dtype == torch.float32


@pytest.mark.parametrize(
    ("question", "limit"),
    [
        pytest.param("How long is a year?", 40, id="stops-at-end-token"),
        pytest.param("How long is a year?", 9, id="stops-at-limit"),
        pytest.param("How long is a year?", 1, id="limit-of-one"),
    ],
)
def test_on_text(cpu: BagelPipeline, question: str, limit: int) -> None:
    """What is streamed grows, character by whole character, to the answer and no further."""
    texts: list[str] = []
    answer = cpu.ask(None, question, max_text_tokens=limit, on_text=texts.append)
    for before, after in pairwise([*texts, answer]):
        # A character of several tokens is U+FFFD until its last one has come.
        assert after.startswith(before.rstrip("\ufffd"))
    assert ["", *texts][-1] == answer
    assert len(texts) <= limit


def test_text_ends_at_the_end_token(cpu: BagelPipeline) -> None:
    """Nothing is computed behind it: 14 tokens are fed of 40 allowed, as recorded."""
    case = GOLDEN.case("d2")
    (question,) = request_parts(case)
    with forwards(cpu.model) as calls:
        assert cpu.ask(None, question, max_text_tokens=40) == case.json["text_output"]
    assert calls[1:] == [1] * case.json["texts"][0]["steps"]
    assert len(calls) < 40


def test_on_text_streams_the_thought(cpu: BagelPipeline) -> None:
    texts: list[str] = []
    result = cpu.generate(
        "a fox", settings=QUICK, think=True, max_text_tokens=8, on_text=texts.append, **SMALL
    )
    assert len(texts) > 2
    assert texts[-1] == result.text


def test_exception_in_a_callback(cpu: BagelPipeline) -> None:
    """It comes through, and the pipeline works on."""
    want = small_image(cpu, seed=1)

    def fail(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        small_image(cpu, seed=1, on_step=fail)
    with pytest.raises(KeyError, match="mine"):
        cpu.ask(None, "x", on_text=fail)
    assert_same_picture(small_image(cpu, seed=1), want)


def test_cancelled_before_it_begins(cpu: BagelPipeline) -> None:
    cancel = threading.Event()
    cancel.set()
    with forwards(cpu.model) as calls:
        for call in (
            lambda: small_image(cpu, cancel=cancel),
            lambda: cpu.edit(STREET, "x", cancel=cancel),
            lambda: cpu.ask(None, "x", cancel=cancel),
            lambda: cpu.run([Request(["x"], "text")], cancel=cancel),
        ):
            with pytest.raises(Cancelled, match="cancelled"):
                call()
    assert calls == []


def test_cancel_from_on_step(cpu: BagelPipeline) -> None:
    """No further step is made, and a later request is not touched."""
    want = small_image(cpu, seed=1)
    cancel, seen = threading.Event(), []

    def second(step: Step) -> None:
        seen.append(step.index)
        if step.index == 1:
            cancel.set()

    with pytest.raises(Cancelled):
        small_image(
            cpu,
            settings=ImageSettings(num_timesteps=9),
            on_step=second,
            cancel=cancel,
        )
    assert seen == [0, 1]
    assert_same_picture(small_image(cpu, seed=1), want)


def test_cancel_at_the_last_step(cpu: BagelPipeline) -> None:
    cancel = threading.Event()

    def last(step: Step) -> None:
        if step.index + 1 == step.total:
            cancel.set()

    with pytest.raises(Cancelled):
        small_image(cpu, on_step=last, cancel=cancel)


def test_cancel_from_on_text(cpu: BagelPipeline) -> None:
    cancel, texts = threading.Event(), []

    def third(text: str) -> None:
        texts.append(text)
        if len(texts) == 3:
            cancel.set()

    with pytest.raises(Cancelled), forwards(cpu.model) as calls:
        cpu.ask(None, "How long is a year?", on_text=third, cancel=cancel)
    assert len(texts) == 3
    assert len(calls) <= 1 + 4  # the question, and a token at a time


@pytest.mark.parametrize("what", ["image", "text"])
def test_cancel_from_another_thread(cpu: BagelPipeline, what: str) -> None:
    """A request that would take minutes stops soon after."""
    cancel, begun = threading.Event(), threading.Event()
    want = small_image(cpu, seed=1)

    def wait_then_cancel() -> None:
        begun.wait(timeout=60)
        cancel.set()

    thread = threading.Thread(target=wait_then_cancel)
    thread.start()
    count = 0

    def note(_: object) -> None:
        nonlocal count
        count += 1
        begun.set()

    try:
        with pytest.raises(Cancelled):
            if what == "image":
                endless = ImageSettings(num_timesteps=20_000)
                small_image(cpu, settings=endless, on_step=note, cancel=cancel)
            else:
                # Hot enough never to choose the end token by itself for long.
                for seed in range(1000):
                    cpu.ask(None, "x", temperature=9.0, seed=seed, on_text=note, cancel=cancel)
    finally:
        begun.set()
        thread.join(timeout=60)
    assert 1 <= count < 20_000
    assert_same_picture(small_image(cpu, seed=1), want)


# --- errors: nothing is computed for a request that makes no sense


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        pytest.param([], {}, ValueError, "parts .*at least one text or picture", id="no-parts"),
        pytest.param("a fox", {}, ValueError, "parts must be a list", id="bare-text"),
        pytest.param(STREET, {}, ValueError, "parts must be a list", id="bare-picture"),
        pytest.param(["a", " \n"], {}, ValueError, r"text at parts\[1\] is empty", id="blank"),
        pytest.param(
            ["a", 3], {}, TypeError, r"parts\[1\] is a int; expected a string or a PIL", id="number"
        ),
        pytest.param([None], {}, TypeError, r"parts\[0\] is a NoneType", id="none"),
        pytest.param([b"a"], {}, TypeError, r"parts\[0\] is a bytes", id="bytes"),
        pytest.param(
            ["a"],
            {"output": "video"},
            ValueError,
            "output is 'video'; expected 'text' or 'image'",
            id="output",
        ),
        pytest.param(["a"], {"num_images": 0}, ValueError, "num_images is 0", id="no-images"),
        pytest.param(
            ["a"], {"max_text_tokens": 0}, ValueError, "max_text_tokens 0", id="no-tokens"
        ),
        pytest.param(
            ["a"],
            {"temperature": 0.0},
            ValueError,
            r"temperature is 0\.0; expected 1e-06 or more \(leave it out for the likeliest text\)",
            id="temperature-0",
        ),
        pytest.param(
            ["a"], {"temperature": float("nan")}, ValueError, "temperature is nan", id="hot-nan"
        ),
        pytest.param(
            ["a"], {"height": 64}, ValueError, "height is 64 and width None; give both", id="height"
        ),
        pytest.param(
            ["a"], {"width": 64}, ValueError, "height is None and width 64; give both", id="width"
        ),
        pytest.param(
            ["a"],
            {"height": 60, "width": 64},
            ValueError,
            r"height is 60; expected a multiple of 16 in 16\.\.1024",
            id="height-60",
        ),
        pytest.param(
            ["a"],
            {"height": 64, "width": 1040},
            ValueError,
            r"width is 1040; expected a multiple of 16 in 16\.\.1024",
            id="width-1040",
        ),
        pytest.param(
            ["a"], {"height": 0, "width": 64}, ValueError, "height is 0; expected", id="height-0"
        ),
        pytest.param(
            ["a"],
            {"height": -16, "width": 64},
            ValueError,
            "height is -16; expected",
            id="height-negative",
        ),
        pytest.param(["a"], {"seed": -1}, ValueError, "seed is -1; expected 0", id="seed-negative"),
        pytest.param(
            ["a"], {"seed": 2**64}, ValueError, "seed is 18446744073709551616", id="seed-too-large"
        ),
        pytest.param(
            ["a"],
            {"seed": 2**63 - 2, "num_images": 3},
            ValueError,
            "seed is 9223372036854775806",
            id="last-seed-too-large",
        ),
        *(
            pytest.param(
                ["a"],
                {name: value},
                TypeError,
                f"{name} is {value!r}; expected a (whole )?number",
                id=f"{name}-{type(value).__name__}",
            )
            for name, value in (
                *(("height", "64"), ("height", 64.0), ("width", "64"), ("seed", 1.5)),
                *(("seed", "0"), ("num_images", "2"), ("num_images", True)),
                *(("num_images", None), ("max_text_tokens", 1.5), ("temperature", "1")),
            )
        ),
        pytest.param(
            ["a"], {"temperature": 1e-45}, ValueError, "temperature is 1e-45; expected", id="cold"
        ),
        pytest.param(["a"], {"steps": 3}, TypeError, "argument 'steps'", id="unknown-option"),
        pytest.param(
            ["a"],
            {"settings": {"num_timesteps": 3}},
            TypeError,
            "settings is a dict; expected ImageSettings",
            id="settings-dict",
        ),
    ],
)
def test_bad_request(
    cpu: BagelPipeline,
    parts: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with forwards(cpu.model) as calls, pytest.raises(error, match=message):
        cpu.chat(parts, **({"output": "image", "settings": QUICK} | options))
    assert calls == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda own: own.edit([], "x"), ValueError, "images is empty; give at least", id="empty"
        ),
        pytest.param(
            lambda own: own.edit("cat.png", "x"), TypeError, "images.*is a str", id="edit-path"
        ),
        pytest.param(
            lambda own: own.edit(["cat.png"], "x"), TypeError, "images.*is a str", id="edit-paths"
        ),
        pytest.param(
            lambda own: own.ask("cat.png", "x"), TypeError, "images.*is a str", id="ask-path"
        ),
        pytest.param(lambda own: own.edit(None, "x"), TypeError, "images.*NoneType", id="none"),
        pytest.param(lambda own: own.edit(STREET, ""), ValueError, "is empty", id="no-prompt"),
        pytest.param(lambda own: own.ask(STREET, ""), ValueError, "is empty", id="no-question"),
        pytest.param(lambda own: own.generate(" "), ValueError, "is empty", id="generate-blank"),
        pytest.param(lambda own: own.generate(None), TypeError, "NoneType", id="generate-none"),
    ],
)
def test_bad_call(
    cpu: BagelPipeline,
    call: Callable[[BagelPipeline], object],
    error: type[Exception],
    message: str,
) -> None:
    with forwards(cpu.model) as calls, pytest.raises(error, match=message):
        call(cpu)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"dtype": "int8"}, "dtype is 'int8'; expected one of bfloat16", id="dtype"),
        pytest.param({"dtype": torch.int8}, "dtype is torch.int8; expected", id="torch-dtype"),
        pytest.param({"device": "banana"}, "device is 'banana'; expected", id="device"),
        pytest.param({"device": "cpu:x"}, "device is 'cpu:x'; expected", id="device-index"),
        pytest.param(
            {"attention": "fa9"},
            "attention is 'fa9'; known backends are fa3, fa2, cudnn, sdpa",
            id="attention",
        ),
    ],
)
def test_from_pretrained_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, **({"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"quantization": 8}, "quantization is 8; expected one of fp8", id="format"),
        pytest.param({"parallel": "tp:2"}, "parallel is 'tp:2'; expected .*Config", id="parallel"),
    ],
)
def test_from_pretrained_bad_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cpu", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_from_pretrained_no_gpu() -> None:
    with pytest.raises(ValueError, match=r"device is cuda:1 but torch sees no GPU; use .*'cpu'"):
        BagelPipeline.from_pretrained(GOLDEN.checkpoint, device="cuda:1")


def test_from_pretrained_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match="'/nowhere' is not a folder"):
        BagelPipeline.from_pretrained("/nowhere", device="cpu")


def test_result_without_image() -> None:
    with pytest.raises(ValueError, match="holds 0 images"):
        _ = Result(text="hello").image


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
