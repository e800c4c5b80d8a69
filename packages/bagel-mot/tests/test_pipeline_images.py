"""Pictures that go in, sizes of images, and several of them: of one request and of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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

from bagel_mot import pipeline as pipeline_module
from bagel_mot.images import resize
from bagel_mot.pipeline import BagelPipeline, Cancelled
from bagel_mot.request import Noise, Request, image_size
from bagel_mot.sampling import ImageSettings, Step

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
