"""What is asked of the pipeline, what comes back, and where its random numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from PIL import Image

from bagel_mot.config import BagelConfig
from bagel_mot.numeric import check_whole, to_float
from bagel_mot.sampling import ImageSettings

Part = str | Image.Image

# Logits divided by less could overflow.
_LEAST_TEMPERATURE = 1e-6
# Room is made for all of them at once; the released model was trained on a thirtieth of it.
MOST_TEXT_TOKENS = 2**20
# Noise of all is drawn before the first one is painted (1 MiB for 1024x1024), and files are named;
# more are several requests.
MOST_IMAGES = 2**10
_WHOLE = ("height", "width", "num_images", "seed", "max_text_tokens")


@dataclass(frozen=True)
class Request:
    """What can be asked of the pipeline, checked when made as far as the model need not be known.

    Args:
        parts: strings and pictures in reading order; at least one.
        output: "text" or "image".
        think: reason in writing before the answer (the result's `text` then holds both), or plan
            before the image (`text` then holds the plan).
        height, width: of the image, multiples of 16; default the last picture's resized size, or
            the largest square if there is no picture.
        settings: how the image is sampled.
        num_images: images to make; image i has seed + i. All see the first one's encoding of the
            request's pictures and its thought.
        seed: for all random numbers of the request, see `Noise`; at least 0; drawn if None.
        max_text_tokens: most steps of writing an answer or thought, which has a token fewer: as in
            the official code the last one is chosen, but not kept.
        temperature: None writes the most likely text; otherwise text is sampled, at 1e-6 or more.
        negative_prompt: text that the image is guided away from, in place of the request's last
            text if no picture follows that, else behind all parts; None guides away from no text.

    Raises:
        TypeError, ValueError: an argument that makes no sense; the message says which.
    """

    parts: Sequence[Part]
    output: Literal["text", "image"]
    think: bool = False
    height: int | None = None
    width: int | None = None
    settings: ImageSettings = field(default_factory=ImageSettings)
    num_images: int = 1
    seed: int | None = None
    max_text_tokens: int = 1000
    temperature: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked_parts(self.parts))
        if self.negative_prompt is not None:
            _check_text("negative_prompt", self.negative_prompt)
        if self.output not in ("text", "image"):
            raise ValueError(f"output is {self.output!r}; expected 'text' or 'image'")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is None and name in ("height", "width", "seed"):
                continue
            check_whole(name, value)
            # NumPy's are no longer whole when they overflow.
            object.__setattr__(self, name, int(value))
        if self.num_images < 1 or self.max_text_tokens < 1:
            raise ValueError(
                f"num_images is {self.num_images} and max_text_tokens {self.max_text_tokens}; "
                "both start at 1"
            )
        if self.output == "text" and (self.num_images > 1 or self.height or self.width):
            raise ValueError(
                f"num_images is {self.num_images}, height {self.height} and width {self.width}, "
                "but output is 'text', of which there is one; leave them out"
            )
        for name, most in (("num_images", MOST_IMAGES), ("max_text_tokens", MOST_TEXT_TOKENS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at most {most}")
        if self.think not in (True, False):
            raise TypeError(f"think is {self.think!r}; expected True or False")
        if self.temperature is not None:
            object.__setattr__(
                self, "temperature", checked_temperature("temperature", self.temperature)
            )
        if not isinstance(self.settings, ImageSettings):
            raise TypeError(f"settings is a {type(self.settings).__name__}; expected ImageSettings")
        last = 2**63 - self.num_images
        if self.seed is not None and not 0 <= self.seed <= last:
            raise ValueError(f"seed is {self.seed}; expected 0..{last}")


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        images: generated images, empty if text was asked for.
        seeds: the seed of each image.
        text: the answer, or in think mode the thought before the image; None without either.
    """

    images: tuple[Image.Image, ...] = ()
    seeds: tuple[int, ...] = ()
    text: str | None = None

    @property
    def image(self) -> Image.Image:
        """The only image.

        Raises:
            ValueError: there is none, or there are several.
        """
        if len(self.images) != 1:
            raise ValueError(f"the result holds {len(self.images)} images; use .images")
        return self.images[0]


class Noise:
    """The random numbers of one request, drawn from torch's CPU generator.

    In the official order (the VAE noise of each picture, sampled tokens, then the initial noise),
    so a seed gives what the official code gives after `torch.manual_seed(seed)`, whatever the
    device and whatever else runs in the process.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(int(seed))

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32 on the CPU."""
        return torch.randn(
            *shape, generator=self.generator, dtype=torch.float32, device=torch.device("cpu")
        )


def image_size(
    config: BagelConfig, height: int | None, width: int | None, picture: Image.Image | None
) -> tuple[int, int]:
    """The (height, width) to paint, in pixels: as given, of the picture, or the largest square.

    Args:
        picture: last picture of the request, resized; None if there is none.

    Raises:
        ValueError: a side is no multiple of a latent token or out of range, or only one is given.
    """
    largest = config.latent_token_pixels * config.latent_grid
    if (height is None) != (width is None):
        raise ValueError(f"height is {height} and width {width}; give both or neither")
    if height is None or width is None:
        width, height = picture.size if picture is not None else (largest, largest)
    check_side(config, "height", height)
    check_side(config, "width", width)
    return height, width


def check_side(config: BagelConfig, name: str, side: int) -> None:
    """Refuse a picture's side that the model cannot paint.

    Args:
        name: of the argument, for the message.

    Raises:
        ValueError: it is no multiple of a latent token, or out of range.
    """
    unit = config.latent_token_pixels
    largest = unit * config.latent_grid
    if side % unit or not unit <= side <= largest:
        raise ValueError(f"{name} is {side}; expected a multiple of {unit} in {unit}..{largest}")


def _checked_parts(parts: object) -> tuple[Part, ...]:
    """The parts, as they are now: a list may change before it is read."""
    if isinstance(parts, str | Image.Image):
        raise ValueError("parts must be a list with at least one text or picture")
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise TypeError(f"parts is a {type(parts).__name__}; expected a list of texts and pictures")
    if not parts:
        raise ValueError("parts must be a list with at least one text or picture")
    parts = tuple(parts)
    for i, part in enumerate(parts):
        if isinstance(part, str):
            if not part.strip():
                raise ValueError(f"the text at parts[{i}] is empty; say what you want")
            _check_text(f"the text at parts[{i}]", part)
        elif not isinstance(part, Image.Image):
            raise TypeError(
                f"parts[{i}] is a {type(part).__name__}; expected a string or a PIL image"
            )
    return parts


def checked_temperature(name: str, value: object) -> float:
    """A caller's temperature to sample text at, as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is below 1e-6.
    """
    temperature = to_float(name, value)
    if not temperature >= _LEAST_TEMPERATURE:  # NaN included
        raise ValueError(
            f"{name} is {value}; expected {_LEAST_TEMPERATURE} or more (leave it out for the "
            "likeliest text)"
        )
    return temperature


def _check_text(name: str, text: object) -> None:
    """A shell passes bytes that are no UTF-8 as halves of surrogate pairs."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at position {error.start}, half of a surrogate "
            "pair; expected text that can be written as UTF-8"
        ) from error
