"""Pictures: decoded from an answer, looked at, kept."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mot_bench.files import write_bytes

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


@dataclass(frozen=True)
class Picture:
    """A picture that can be decoded to the last row.

    Attributes:
        data: the file's content.
        format: one of `SUFFIXES`.
        width, height: pixels.
    """

    data: bytes
    format: str
    width: int
    height: int

    @property
    def suffix(self) -> str:
        """Of a file's name, without the dot."""
        return SUFFIXES[self.format]

    @property
    def mime(self) -> str:
        """The media type."""
        return f"image/{self.format.lower()}"

    @property
    def data_url(self) -> str:
        """The picture as a URL that holds it."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.suffix}"


def inspect(data: bytes) -> Picture:
    """Decode a picture completely.

    Raises:
        ValueError: it is none, is broken, or is of another format.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size, name = image.size, image.format
    except Image.UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes are not a picture") from None
    except Exception as error:  # each decoder has its own class for what it stumbles over
        raise ValueError(f"broken picture of {len(data)} bytes: {error}") from error
    if name not in SUFFIXES:
        raise ValueError(f"picture is {name}; expected one of {', '.join(SUFFIXES)}")
    return Picture(data, name, *size)


def from_base64(text: str) -> Picture:
    """The picture in plain base64.

    Raises:
        ValueError: no base64, or see `inspect`.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64: {error}") from error
    return inspect(data)


def from_url(url: str) -> Picture:
    """The picture in a data URL. Nothing is fetched from elsewhere.

    Raises:
        ValueError: another kind of URL, or see `from_base64`.
    """
    head, comma, text = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        raise ValueError(f"picture is at {url[:60]!r}; only base64 data URLs are read")
    return from_base64(text)


def save(picture: Picture, folder: Path, request: int, image: int) -> None:
    """Write it as `req_<request>_<image>.<suffix>`, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    write_bytes(folder / f"req_{request:04d}_{image}.{picture.suffix}", picture.data)
