"""Pictures in and out: PIL images, their official resizing, and patches.

Everything reproduces the official preprocessing to the bit, with Pillow and torch alone.
"""

from __future__ import annotations

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from bagel_mot.config import ImageLimits

PNG_STRATEGY = Image.RLE
"""How written images are compressed: runs of equal bytes, and Huffman codes; nothing is lost.

What a VAE paints hardly repeats itself in other ways, and looking for that takes time. 1024x1024 as
a VAE with random weights paints it: 70 ms and 2.63 MB, where Pillow's level 1 takes 101 ms for 2.68
MB, and its own 6 takes 110 ms for 2.63 MB. A noisy photo: 62 ms and 1.51 MB; 72 ms and 1.72 MB; 393
ms and 1.54 MB (docs/log.md, 2026-11-29). Levels make no difference to this strategy.
"""


def check_depth(image: Image.Image, name: str = "image") -> None:
    """Refuse a picture of more than 8 bits a channel: Pillow would clip it, not scale it.

    Raises:
        ValueError: it is one.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{name}: has mode {image.mode}, more than 8 bits a channel, of which all above 255 "
            "would be white; give it with 8 bits"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB picture, upright as its EXIF says, transparency composited on white.

    As in the official code, what counts as transparent is mode RGBA and any picture with a
    transparency entry (palettes, PNG colour keys). Modes that merely carry an alpha band, such as
    LA, are converted by Pillow, which drops it.

    Raises:
        TypeError: `image` is not a PIL image.
        ValueError: Pillow cannot convert its mode, e.g. La, or it has more than 8 bits a channel.
    """
    _check_image("image", image)
    check_depth(image)
    # Cameras write pictures as their sensor lies, and say how to turn them.
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    try:
        if image.mode == "RGBA" or image.info.get("transparency") is not None:
            layered = image.convert("RGBA")
            flat = Image.new("RGB", image.size, (255, 255, 255))
            flat.paste(layered, mask=layered.getchannel("A"))
            return flat
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise ValueError(
            f"image has mode {image.mode!r}, which Pillow does not convert to RGB ({error}); "
            "expected a mode such as RGB, RGBA, P, L or CMYK"
        ) from error


def resized_size(size: tuple[int, int], limits: ImageLimits) -> tuple[int, int]:
    """The size that the official resizing gives a picture.

    Shrinks the longer side to `max_side`, then grows the shorter to `min_side`, both sides in
    multiples of `stride`; then keeps to `max_pixels` and, last of all, to `max_side` again.

    Args:
        size: (width, height) in pixels, as PIL has it.
        limits: the limits, in pixels.

    Returns:
        (width, height) in pixels.

    Raises:
        ValueError: `size` is not two positive numbers.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {size!r}; expected (width, height), both at least 1 pixel")
    width, height = size
    scale = min(limits.max_side / max(width, height), 1.0)
    scale = max(scale, limits.min_side / min(width, height))
    width, height = _scaled(width, height, scale, limits.stride)
    if width * height > limits.max_pixels:
        # The ratio of the areas scales the sides: more than needed, but so the model was trained.
        width, height = _scaled(width, height, limits.max_pixels / (width * height), limits.stride)
    if max(width, height) > limits.max_side:
        width, height = _scaled(width, height, limits.max_side / max(width, height), limits.stride)
    return width, height


def resize(image: Image.Image, limits: ImageLimits) -> Image.Image:
    """Resize an RGB picture to `resized_size`, bicubic with antialiasing; as it is if that fits.

    Raises:
        TypeError: `image` is not a PIL image.
        ValueError: its mode is not RGB, or it has no pixels.
    """
    _check_rgb(image)
    size = resized_size(image.size, limits)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as a (3, H, W) float32 tensor in [-1, 1], on the CPU.

    Raises:
        TypeError: `image` is not a PIL image.
        ValueError: its mode is not RGB, or it has no pixels.
    """
    _check_rgb(image)
    width, height = image.size
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    planes = levels.view(height, width, 3).permute(2, 0, 1)
    x = planes.to(torch.float32, memory_format=torch.contiguous_format)
    # Equal to the reference's (x/255 - 0.5) / 0.5 in every bit: the halves only move the exponent.
    return x.div_(127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """The decoder's output as an 8-bit RGB picture, truncated as the official code does.

    Args:
        x: (3, H, W) floating point, [-1, 1] being black to white; what lies outside is clamped.

    Raises:
        TypeError: `x` is not a floating-point tensor.
        ValueError: it is not (3, H, W), or holds NaN.
    """
    _check_tensor("x", x)
    if x.ndim != 3 or x.shape[0] != 3 or x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (3, H, W), one decoded picture")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point tensor in [-1, 1]")
    if bool(x.isnan().any()):
        causes = "the weights hold NaN or infinity, or the settings are too extreme"
        if x.dtype == torch.float16:
            causes = f"the model overflowed in float16 (use bfloat16 or float32), {causes}"
        raise ValueError(f"x holds NaN; expected finite numbers. Likely causes: {causes}")
    _, height, width = x.shape
    pixels = bytearray(height * width * 3)
    torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).copy_(to_levels(x))
    return Image.frombytes("RGB", (width, height), bytes(pixels))


def to_levels(x: Tensor) -> Tensor:
    """(..., 3, H, W) floating point, [-1, 1] -> (..., H, W, 3) uint8, truncated; see `to_image`."""
    levels = (x.detach().float() * 0.5 + 0.5).clamp_(0, 1).mul_(255).to(torch.uint8)
    return levels.movedim(-3, -1)


def patchify(x: Tensor, p: int) -> Tensor:
    """Cut a picture or a latent into square patches.

    Args:
        x: (C, H, W), any dtype.
        p: side of a patch, in the units of H and W.

    Returns:
        (H/p * W/p, p*p*C): patches row by row; the numbers of each ordered (row, column,
        channel), channel fastest.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: `x` is not (C, H, W), or `p` does not divide H and W.
    """
    _check_tensor("x", x)
    if x.ndim != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (C, H, W)")
    channels, height, width = x.shape
    if p < 1 or height % p or width % p:
        raise ValueError(
            f"p is {p} but x is {height} high and {width} wide; expected a patch side that "
            "divides both"
        )
    grid = x.reshape(channels, height // p, p, width // p, p)  # a view: axes are only split
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, p * p * channels)


def unpatchify(tokens: Tensor, h: int, w: int, p: int) -> Tensor:
    """Put patches together again; the inverse of `patchify`.

    Args:
        tokens: (h*w, p*p*C), any dtype, as `patchify` gives them.
        h: rows of patches.
        w: columns of patches.
        p: side of a patch.

    Returns:
        (C, h*p, w*p).

    Raises:
        TypeError: `tokens` is not a tensor.
        ValueError: the sizes do not agree.
    """
    _check_tensor("tokens", tokens)
    if tokens.ndim != 2 or h < 1 or w < 1 or tokens.shape[0] != h * w:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)} for a grid of {h} x {w} patches; expected "
            f"({h * w}, p*p*channels)"
        )
    if p < 1 or tokens.shape[1] % (p * p):
        raise ValueError(
            f"p is {p} but tokens has {tokens.shape[1]} numbers per patch; expected a multiple of "
            "p*p"
        )
    grid = tokens.reshape(h, w, p, p, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, h * p, w * p)


def grid_positions(h: int, w: int, side: int) -> Tensor:
    """Rows of a position table that a picture's tokens use.

    Args:
        h: rows of patches.
        w: columns of patches.
        side: side of the square grid the table was made for (64 latents, 70 ViT patches).

    Returns:
        (h*w,) int64 on the CPU: row * side + column, row by row.

    Raises:
        ValueError: the picture does not fit into the grid.
    """
    if not (1 <= h <= side and 1 <= w <= side):
        raise ValueError(
            f"h is {h} and w is {w}, but the position table holds a grid of {side} x {side}; "
            "expected a picture of 1 to that many patches a side"
        )
    rows = torch.arange(h, dtype=torch.int64)
    columns = torch.arange(w, dtype=torch.int64)
    return (rows[:, None] * side + columns).flatten()


def _scaled(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    """Both sides scaled and brought to multiples of the stride; halves go to even numbers."""

    def side(pixels: int) -> int:
        return max(stride, round(round(pixels * scale) / stride) * stride)

    return side(width), side(height)


def _check_image(name: str, image: object) -> None:
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name} is a {type(image).__name__}; expected a PIL.Image.Image")


def _check_rgb(image: Image.Image) -> None:
    _check_image("image", image)
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode!r}; expected 'RGB', use to_rgb first")
    if min(image.size) < 1:
        raise ValueError(f"image has size {image.size}; expected at least one pixel")


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
