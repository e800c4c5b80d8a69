"""What is asked: built-in prompts, or those of a file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mot_bench.serve.images import Picture, inspect
from mot_bench.serve.settings import is_size

_PAINT = (
    "A red fox in the snow at dawn, photograph",
    "A lighthouse on a cliff above a stormy sea, oil painting",
    "A bowl of oranges on a blue table cloth, still life",
    "An astronaut reading a newspaper on a park bench",
    "A narrow street in an old town after the rain, neon signs",
    "A paper boat with the word MOT on its sail, in a puddle",
    "Isometric cutaway of a small library with three floors",
    "A hummingbird in front of a hibiscus flower, macro photograph",
)
_EDIT = (
    "Make it night, with light in the windows",
    "Cover the ground with snow",
    "Paint the house green",
    "Remove the sun",
    "Turn it into a water colour painting",
    "Put a tree beside the house",
)
_UNDERSTAND = (
    "Describe this picture in detail.",
    "Which colours does the house have?",
    "How many windows can be seen?",
    "What time of day may it be, and why?",
    "Write a short story that begins in this house.",
    "List everything that can be seen in the sky.",
)


# What a prompt may say in place of the option with its name.
OWN_KEYS = ("size", "num_inference_steps", "seed")


@dataclass(frozen=True)
class Prompt:
    """A text, and a picture that goes before it.

    Attributes:
        picture_name: what tells the picture from others: a hash of its file.
        size: of its images, "WIDTHxHEIGHT" in pixels; None is the run's, and so below.
        num_inference_steps: denoising steps.
        seed: of each request with this prompt.
    """

    text: str
    picture: Picture | None = None
    picture_name: str = ""
    size: str | None = None
    num_inference_steps: int | None = None
    seed: int | None = None

    @property
    def own(self) -> dict[str, str | int]:
        """What it says in place of options, by the option's name."""
        values = {key: getattr(self, key) for key in OWN_KEYS}
        return {key: value for key, value in values.items() if value is not None}


def built_in(endpoint: str, modality: str) -> tuple[Prompt, ...]:
    """Prompts for an endpoint ("generations", "edits", "chat") and what it is to answer with."""
    if endpoint == "edits":
        return tuple(Prompt(text, _house(), "built-in") for text in _EDIT)
    if modality == "text":
        return tuple(Prompt(text, _house(), "built-in") for text in _UNDERSTAND)
    return tuple(Prompt(text) for text in _PAINT)


def read(path: Path) -> tuple[Prompt, ...]:
    """Prompts of a file, empty lines left out.

    A file whose name ends in .jsonl has an object per line: "prompt"; "image" if there is one, a
    path relative to the file's folder; and what is this prompt's own of `OWN_KEYS`. Any other file
    has a prompt per line.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is wrong; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from error
    # Not splitlines: a prompt may hold one of the rarer line separators.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    prompts = []
    for number, line in lines:
        if not line:
            continue
        try:
            prompts.append(_entry(line, path.parent) if path.suffix == ".jsonl" else Prompt(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    if not prompts:
        raise ValueError("it holds no prompt")
    return tuple(prompts)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash that is equal for equal prompts only."""
    content = json.dumps(
        [
            # As it was before prompts could say more, so that earlier runs can be compared with.
            [prompt.text, prompt.picture_name, *([prompt.own] if prompt.own else [])]
            for prompt in prompts
        ]
    )
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _entry(line: str, folder: Path) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f'expected an object such as {{"prompt": "..."}}, found {line[:40]!r}')
    if unknown := sorted(set(entry) - {"prompt", "image", *OWN_KEYS}):
        raise ValueError(
            f"unknown key {unknown[0]!r}; expected 'prompt' and, if needed, 'image', "
            + ", ".join(map(repr, OWN_KEYS))
        )
    text, image = entry.get("prompt"), entry.get("image")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"key 'prompt' is {text!r}; expected a text")
    text.encode()  # JSON can spell half a character, which cannot be sent: a ValueError
    own = _own(entry)
    if image is None:
        return Prompt(text, **own)
    if not isinstance(image, str):
        raise ValueError(f"key 'image' is {image!r}; expected a path")
    try:
        data = (folder / image).read_bytes()
    except OSError as error:
        raise ValueError(f"image {image!r}: {error.strerror}") from error
    try:
        return Prompt(text, inspect(data), hashlib.sha256(data).hexdigest(), **own)
    except ValueError as error:
        raise ValueError(f"image {image!r}: {error}") from error


def _own(entry: dict[str, Any]) -> dict[str, Any]:
    """What a line says in place of options, checked; null is as if it were not there."""
    own = {key: value for key in OWN_KEYS if (value := entry.get(key)) is not None}
    size = own.get("size")
    if size is not None and not (isinstance(size, str) and is_size(size)):
        raise ValueError(f"key 'size' is {size!r}; expected WIDTHxHEIGHT, for example '1024x1024'")
    for key, least in (("num_inference_steps", 1), ("seed", 0)):
        value = own.get(key, least)
        if type(value) is not int or value < least:  # true is no number
            raise ValueError(
                f"key {key!r} is {value!r}; expected a whole number of at least {least}"
            )
    return own


def _house() -> Picture:
    """A drawing of 512x512 pixels, so that nothing need be fetched or shipped."""
    image = Image.new("RGB", (512, 512), (150, 200, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse((380, 40, 470, 130), fill=(250, 210, 60))
    draw.rectangle((0, 380, 512, 512), fill=(110, 160, 80))
    draw.rectangle((130, 230, 350, 420), fill=(220, 200, 170))
    draw.polygon(((110, 230), (370, 230), (240, 130)), fill=(170, 60, 50))
    draw.rectangle((215, 330, 265, 420), fill=(100, 70, 50))
    for left in (150, 290):
        draw.rectangle((left, 260, left + 40, 300), fill=(250, 250, 250), outline=(60, 60, 60))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return inspect(file.getvalue())
