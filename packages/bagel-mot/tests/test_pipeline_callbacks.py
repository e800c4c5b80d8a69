"""Callbacks and cancelling: what they see, and how a request ends early."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from golden_data import GOLDEN
from golden_requests import request_parts
from pictures import QUICK, SMALL, STREET, assert_same_picture, small_image
from PIL import Image
from watched import forwards

from bagel_mot.pipeline import BagelPipeline, Cancelled
from bagel_mot.request import Request
from bagel_mot.sampling import ImageSettings, Step

# --- callbacks


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


def test_on_step_may_use_the_pipeline(cpu: BagelPipeline) -> None:
    """Requests of one size share buffers with what the callback paints."""
    settings = ImageSettings(num_timesteps=4)
    requests = [
        Request([text], "image", settings=settings, seed=i, **SMALL)
        for i, text in enumerate(("a fox", "a dog"))
    ]
    plain: list[Step] = []
    nested: list[Step] = []
    cpu.run(requests, on_step=plain.append)

    def paint_others(step: Step) -> None:
        nested.append(step)
        cpu.run([Request(["a cat"], "image", settings=settings, seed=9, **SMALL)] * 2)

    cpu.run(requests, on_step=paint_others)
    assert len(nested) == len(plain) == 6
    for one, other in zip(plain, nested, strict=True):
        torch.testing.assert_close(one.latents, other.latents)
        torch.testing.assert_close(one.velocity, other.velocity)


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


# --- cancelling


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


# --- who calls, and from where


def test_threads_wait_for_each_other(cpu: BagelPipeline) -> None:
    texts = ["a fox", "a cat", "an owl"]
    want = [cpu.generate(text, settings=QUICK, seed=1, **SMALL).image for text in texts]
    got: dict[str, Image.Image | None] = {}

    def paint(text: str) -> None:
        got[text] = cpu.generate(text, settings=QUICK, seed=1, **SMALL).image

    threads = [threading.Thread(target=paint, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, image in zip(texts, want, strict=True):
        assert_same_picture(got[text], image)


def test_default_device_of_the_caller(cpu: BagelPipeline) -> None:
    want = cpu.generate("a fox", settings=QUICK, seed=1, **SMALL).image
    picture = small_image(cpu)
    answer = cpu.ask(picture, "What is this?", max_text_tokens=3)
    with torch.device("meta"):
        assert_same_picture(cpu.generate("a fox", settings=QUICK, seed=1, **SMALL).image, want)
        assert cpu.ask(picture, "What is this?", max_text_tokens=3) == answer
