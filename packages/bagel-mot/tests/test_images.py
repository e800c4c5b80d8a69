"""Pictures in and out, against the recorded sizes, inputs and PNG files. All of it is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from golden_data import GOLDEN, GoldenCase
from PIL import Image

from bagel_mot.config import ImageLimits
from bagel_mot.images import (
    grid_positions,
    patchify,
    resize,
    resized_size,
    to_image,
    to_rgb,
    to_tensor,
    unpatchify,
)

SIZES: list[dict[str, Any]] = GOLDEN.json("resize.json")
VAE_CASES = ["b1", "b2", "b3"]
VIT_CASES = [*VAE_CASES, "c1", "c2"]
PICTURE_CASES = [*VIT_CASES, "b4"]
OUTPUT_CASES = ["a1", "a2", "a3", "a4", "a5", "a7", "b1", "b2", "b3"]
OFFICIAL = ImageLimits(max_side=1024, min_side=512, stride=16)
SMALL = ImageLimits(max_side=980, min_side=224, stride=14)  # the official limits of the ViT


def limits_of(case: GoldenCase, transform: str) -> ImageLimits:
    return ImageLimits.model_validate(case.json[f"{transform}_transform"])


def context_picture(case: GoldenCase) -> Image.Image:
    """The case's picture after the first resizing, from which everything starts."""
    (source,) = (part for part in case.json["inputs"] if part["type"] == "image")
    with Image.open(GOLDEN.folder / source["file"]) as image:
        return resize(to_rgb(image), limits_of(case, "vae"))


def colours(image: Image.Image) -> list[Any]:
    """Pixels of a picture, row by row."""
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


@pytest.mark.parametrize(
    "example", SIZES, ids=lambda e: f"{e['transform']}-{e['size'][0]}x{e['size'][1]}"
)
def test_resized_size_recorded(example: dict[str, Any]) -> None:
    limits = ImageLimits.model_validate(example["limits"])
    assert list(resized_size(tuple(example["size"]), limits)) == example["resized"]


@pytest.mark.parametrize(
    ("size", "limits", "resized"),
    [
        # 700 * 980/1783 = 384.7 -> 385 = 27.5 strides -> 28, though 384.7 is nearer to 27
        pytest.param((700, 1783), SMALL, (392, 980), id="rounds-twice"),
        # 164 * 224/107 = 343.3 -> 343 = 24.5 strides -> 24
        pytest.param((107, 164), SMALL, (224, 336), id="halves-to-even"),
        # 9728 x 512 is too many pixels: x 0.3627 -> 3520 x 192, then x 1024/3520 -> 1024 x 64
        pytest.param((399, 21), OFFICIAL, (1024, 64), id="too-many-pixels"),
        # 512 x 89760 -> 16 x 3520, then 16 * 1024/3520 = 4.7 -> 0 strides, at least 1
        pytest.param((10, 1753), OFFICIAL, (16, 1024), id="at-least-a-stride"),
    ],
)
def test_resized_size_by_hand(
    size: tuple[int, int], limits: ImageLimits, resized: tuple[int, int]
) -> None:
    assert resized_size(size, limits) == resized


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_resize_recorded_shape(name: str) -> None:
    case = GOLDEN.case(name)
    image = context_picture(case)
    assert [[image.height, image.width]] == case.json["resized_image_shapes"]


@pytest.mark.parametrize("name", VAE_CASES)
def test_vae_input_recorded(name: str) -> None:
    case = GOLDEN.case(name)
    x = to_tensor(resize(context_picture(case), limits_of(case, "vae")))
    assert x.dtype == torch.float32
    assert torch.equal(x, case.tensors["seg0.padded_image"][0])


@pytest.mark.parametrize("name", VIT_CASES)
def test_vit_input_recorded(name: str) -> None:
    case = GOLDEN.case(name)
    patches = patchify(to_tensor(resize(context_picture(case), limits_of(case, "vit"))), 14)
    ((prefix, _),) = case.segments("vit")
    assert torch.equal(patches, case.tensors[f"{prefix}.patches"])


@pytest.mark.parametrize("name", PICTURE_CASES)
def test_grid_positions_recorded(name: str) -> None:
    case = GOLDEN.case(name)
    image = resize(context_picture(case), limits_of(case, "vit"))
    for prefix, segment in case.segments("vit"):
        h, w = image.height // 14, image.width // 14
        positions = grid_positions(h, w, 70)
        assert segment["vit_patches"] == h * w
        assert positions.dtype == torch.int64
        assert positions.tolist() == case.tensors[f"{prefix}.patch_position_ids"].tolist()
    for prefix, segment in case.segments("vae"):
        h, w = segment["latent_grid"]
        positions = grid_positions(h, w, 64)
        assert positions.tolist() == case.tensors[f"{prefix}.patch_position_ids"].tolist()


@pytest.mark.parametrize("name", OUTPUT_CASES)
def test_unpatchify_recorded(name: str) -> None:
    case = GOLDEN.case(name)
    height, width = case.json["image"]["shape"]
    tokens = case.tensors["gen.final_latent"]
    latent = unpatchify(tokens, height // 16, width // 16, 2)
    assert torch.equal(latent, case.tensors["gen.vae_input"][0])
    assert torch.equal(patchify(latent, 2), tokens)


@pytest.mark.parametrize("name", OUTPUT_CASES)
def test_to_image_recorded(name: str) -> None:
    case = GOLDEN.case(name)
    image = to_image(case.tensors["gen.image_float"])
    with Image.open(GOLDEN.folder / "cases" / f"{case.name}.png") as recorded:
        assert image.mode == "RGB"
        assert image.size == recorded.size
        assert image.tobytes() == recorded.convert("RGB").tobytes()


def test_to_image_clamps_and_truncates() -> None:
    values = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0, float("inf"), -float("inf")])
    image = to_image(values.expand(3, 1, 8))
    assert [pixel[0] for pixel in colours(image)] == [0, 0, 127, 254, 255, 255, 255, 0]


def test_to_image_leaves_its_input_alone() -> None:
    x = torch.linspace(-2, 2, 48).view(3, 4, 4)
    before = x.clone()
    to_image(x)
    assert torch.equal(x, before)


def test_to_image_inverts_to_tensor() -> None:
    levels = bytes(range(256)) * 3
    image = Image.frombytes("RGB", (16, 16), levels)
    # Truncation may lose a level to rounding, never more, and never gains one.
    back = to_image(to_tensor(image)).tobytes()
    assert all(0 <= old - new <= 1 for old, new in zip(levels, back, strict=True))


def test_to_rgb_composites_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(200, 10, 0, 0), (200, 10, 0, 255), (0, 0, 0, 51)]):
        image.putpixel((x, 0), pixel)
    assert colours(to_rgb(image)) == [(255, 255, 255), (200, 10, 0), (204, 204, 204)]


def test_to_rgb_turns_photos(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (96, 64))
    photo.paste((255, 255, 255), (0, 0, 96, 8))
    photo.save(tmp_path / "photo.png", exif=exif)
    turned = to_rgb(Image.open(tmp_path / "photo.png"))
    assert turned.size == (64, 96)
    assert turned.getpixel((63, 48)) == (255, 255, 255) and turned.getpixel((0, 48)) == (0, 0, 0)
    assert to_rgb(turned) is turned


def test_to_rgb_palette_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 30, 20, 10])
    image.putpixel((1, 0), 1)
    assert colours(to_rgb(image)) == [(9, 8, 7), (30, 20, 10)]
    image.info["transparency"] = 0
    assert colours(to_rgb(image)) == [(255, 255, 255), (30, 20, 10)]
    image.info["transparency"] = bytes([255, 0])
    assert colours(to_rgb(image)) == [(9, 8, 7), (255, 255, 255)]


def test_to_rgb_colour_key() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    assert to_rgb(image) is image
    image.info["transparency"] = (1, 2, 3)
    assert colours(to_rgb(image)) == [(255, 255, 255), (4, 5, 6)]


def test_to_rgb_drops_other_alpha_as_the_reference() -> None:
    assert colours(to_rgb(Image.new("LA", (1, 1), (40, 0)))) == [(40, 40, 40)]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB"],
)
def test_to_rgb_any_mode(mode: str) -> None:
    rgb = to_rgb(Image.new(mode, (4, 3)))
    assert (rgb.mode, rgb.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_to_rgb_of_more_bits(mode: str) -> None:
    """Pillow clips them: of a 16-bit scan most would be white, of numbers up to 1 all black."""
    with pytest.raises(ValueError, match=f"has mode {mode}, more than 8 bits a channel"):
        to_rgb(Image.new(mode, (4, 3)))


def test_resize_leaves_a_fitting_picture_alone() -> None:
    image = Image.new("RGB", (512, 528))
    assert resize(image, OFFICIAL) is image


def test_to_tensor_range_and_layout() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 0), (255, 51, 0))
    x = to_tensor(image)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 2, 3), torch.float32, True)
    assert x[:, 0, 2].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert x[:, 1, 0].tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_patchify_order_and_inverse(layout: str) -> None:
    channels, h, w, p = 5, 2, 3, 4
    x = torch.arange(channels * h * p * w * p).view(channels, h * p, w * p)
    if layout == "strided":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    tokens = patchify(x, p)
    assert tokens.shape == (h * w, p * p * channels)
    for row, column, inner_row, inner_column in [(0, 0, 0, 1), (0, 2, 3, 0), (1, 1, 2, 3)]:
        got = tokens[row * w + column].view(p, p, channels)[inner_row, inner_column]
        assert torch.equal(got, x[:, row * p + inner_row, column * p + inner_column])
    assert torch.equal(unpatchify(tokens, h, w, p), x)


X = torch.zeros(3, 8, 12)


# id, call, error, message. Any: what is passed is wrong on purpose.
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rgb-path": (
        lambda: to_rgb(cast(Any, "a.png")),
        TypeError,
        r"image is a str; expected a PIL\.Image\.Image",
    ),
    "rgb-mode": (lambda: to_rgb(Image.new("La", (1, 1))), ValueError, r"image has mode 'La'"),
    "size-zero": (
        lambda: resized_size((0, 5), OFFICIAL),
        ValueError,
        r"size is \(0, 5\); expected \(width",
    ),
    "resize-tensor": (
        lambda: resize(cast(Any, X), OFFICIAL),
        TypeError,
        r"image is a Tensor; expected a PIL",
    ),
    "resize-mode": (
        lambda: resize(Image.new("L", (4, 4)), OFFICIAL),
        ValueError,
        r"image has mode 'L'; expected 'RGB', use to_rgb first",
    ),
    "tensor-empty": (
        lambda: to_tensor(Image.new("RGB", (0, 4))),
        ValueError,
        r"image has size \(0, 4\)",
    ),
    "image-text": (
        lambda: to_image(cast(Any, "x")),
        TypeError,
        r"x is a str; expected a torch\.Tensor",
    ),
    "image-batch": (
        lambda: to_image(X[None]),
        ValueError,
        r"x has shape \(1, 3, 8, 12\); expected \(3, H, W",
    ),
    "image-integers": (
        lambda: to_image(X.to(torch.uint8)),
        TypeError,
        r"x is torch\.uint8; expected a floating",
    ),
    "image-nan": (
        lambda: to_image(X / 0),
        ValueError,
        r"x holds NaN; expected finite numbers\. Likely causes: the weights .*, or the settings",
    ),
    "image-nan-float16": (
        lambda: to_image((X / 0).half()),
        ValueError,
        r"Likely causes: the model overflowed in float16 \(use bfloat16 or float32\), the weights",
    ),
    "patchify-plane": (
        lambda: patchify(X[0], 4),
        ValueError,
        r"x has shape \(8, 12\); expected \(C, H, W\)",
    ),
    "patchify-remainder": (
        lambda: patchify(X, 5),
        ValueError,
        r"p is 5 but x is 8 high and 12 wide; expected",
    ),
    "patchify-zero": (lambda: patchify(X, 0), ValueError, r"p is 0 but x"),
    "patchify-list": (
        lambda: patchify(cast(Any, [1]), 2),
        TypeError,
        r"x is a list; expected a torch\.Tensor",
    ),
    "unpatchify-grid": (
        lambda: unpatchify(torch.zeros(6, 48), 2, 4, 4),
        ValueError,
        r"tokens has shape \(6, 48\) for a grid of 2 x 4 patches; expected \(8, p\*p\*channel",
    ),
    "unpatchify-side": (
        lambda: unpatchify(torch.zeros(6, 48), 2, 3, 5),
        ValueError,
        r"p is 5 but tokens has 48 numbers per patch; expected a multiple of p\*p",
    ),
    "grid-too-wide": (
        lambda: grid_positions(2, 65, 64),
        ValueError,
        r"h is 2 and w is 65, but the position table holds a grid of 64 x 64; expected",
    ),
    "grid-empty": (lambda: grid_positions(0, 3, 64), ValueError, r"h is 0 and w is 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_grid_positions_order() -> None:
    assert grid_positions(2, 3, 5).tolist() == [0, 1, 2, 5, 6, 7]
