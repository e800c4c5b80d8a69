"""Random numbers: seeds, the order in which noise is drawn, sampled text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pictures import GUIDED, PORTRAIT, QUICK, SMALL, STREET, assert_same_picture, small_image

from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Noise, Result
from bagel_mot.sampling import Step


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_seed_whatever_the_default_dtype(cpu: BagelPipeline, dtype: torch.dtype) -> None:
    """Also of what a workspace keeps for later requests, and with a scale that bfloat16 rounds."""
    settings = GUIDED.model_copy(update={"cfg_text_scale": 7.3})
    first, guided = small_image(cpu, seed=7), small_image(cpu, seed=7, settings=settings)
    cpu.workspace._forget()
    torch.set_default_dtype(dtype)
    try:
        assert_same_picture(small_image(cpu, seed=np.int64(7)), first)
        assert_same_picture(small_image(cpu, seed=7, settings=settings), guided)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_picture(small_image(cpu, seed=7), first)


def test_autocast_changes_nothing(cpu: BagelPipeline) -> None:
    first, answer = small_image(cpu, seed=7), cpu.ask(STREET, "what?", max_text_tokens=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_picture(small_image(cpu, seed=7), first)
        assert cpu.ask(STREET, "what?", max_text_tokens=4) == answer


def test_whole_numbers_of_numpy(cpu: BagelPipeline) -> None:
    """Seeds count on beyond their range."""
    result = cpu.generate(
        "a fox", settings=QUICK, seed=np.uint8(255), num_images=np.int64(2), **SMALL
    )
    assert result.seeds == (255, 256)
    assert all(type(seed) is int for seed in result.seeds)


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


def test_sampled_text(cpu: BagelPipeline) -> None:
    """A seed gives its text again; other seeds and other temperatures give others."""

    def ask(seed: int | None, temperature: float | None) -> str:
        return cpu.ask(None, "Tell me.", seed=seed, temperature=temperature, max_text_tokens=12)

    assert ask(1, 1.0) == ask(1, 1.0)
    assert len({ask(seed, 1.0) for seed in range(4)}) == 4
    assert ask(1, 1.0) != ask(1, 3.0)
    # So cold that the likeliest token is certain.
    assert ask(1, 1e-4) == ask(None, None) == ask(2, None)
