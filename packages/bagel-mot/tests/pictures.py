"""Golden pictures, the small images that requests ask for, and how images are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from golden_data import GOLDEN
from PIL import Image

from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings

SMALL = {"height": 64, "width": 80}
QUICK = ImageSettings(num_timesteps=3)
# All three contexts at every step.
GUIDED = ImageSettings.for_editing(num_timesteps=3)


def opened(file: Path | str) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


STREET, PORTRAIT = (
    opened(GOLDEN.folder / "images" / f"{name}.png") for name in ("street", "portrait")
)


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


def small_image(cpu: BagelPipeline, **options: Any) -> Image.Image:
    return cpu.generate("a fox", **({"settings": QUICK, **SMALL} | options)).image
