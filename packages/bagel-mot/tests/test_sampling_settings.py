"""Settings and schedule against README section 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_data import assert_close
from pydantic import ValidationError

from bagel_mot.sampling import ImageSettings


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0], ids=lambda shift: f"shift-{shift}")
@pytest.mark.parametrize("points", [2, 3, 8, 50], ids=lambda points: f"{points}-points")
def test_timesteps(points: int, shift: float) -> None:
    settings = ImageSettings(num_timesteps=points, timestep_shift=shift)
    timesteps = settings.timesteps()
    s = [1 - i / (points - 1) for i in range(points)]
    want = torch.tensor([shift * x / (1 + (shift - 1) * x) for x in s], dtype=torch.float64)
    assert timesteps.dtype == torch.float32
    assert_close("timesteps", timesteps, want)
    assert (float(timesteps[0]), float(timesteps[-1])) == (1.0, 0.0)
    assert bool((timesteps.diff() < 0).all())


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        # With a shift of 1 and five points t is 1, 0.75, 0.5, 0.25 (and 0), exactly.
        pytest.param((0.0, 1.0), [True, True, True, True], id="all"),
        pytest.param((0.25, 0.75), [False, True, True, False], id="low-open-high-closed"),
        pytest.param((0.5, 0.5), [False, False, False, False], id="empty"),
        pytest.param((0.74, 0.76), [False, True, False, False], id="one-step"),
        pytest.param((0.75, 1.0), [True, False, False, False], id="first-step"),
    ],
)
def test_guided(interval: tuple[float, float], guided: list[bool]) -> None:
    settings = ImageSettings(num_timesteps=5, timestep_shift=1.0, cfg_interval=interval)
    timesteps = settings.timesteps()
    assert timesteps.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert settings.guided(timesteps) == guided
    for image_scale in (1.0, 2.0):
        changes = {"cfg_text_scale": 1.0, "cfg_img_scale": image_scale}
        assert settings.model_copy(update=changes).guided(timesteps) == [False] * 4


def test_guided_compares_shifted_times() -> None:
    """The official defaults: 41 guided steps, then 8 plain ones."""
    settings = ImageSettings()
    assert settings.guided(settings.timesteps()) == [True] * 41 + [False] * 8


def test_settings_defaults() -> None:
    """The columns of README section 3, text to image (notebook) and editing."""
    common = {
        "num_timesteps": 50,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_renorm_min": 0.0,
        "taylorseer": None,
    }
    text_to_image = {
        "cfg_img_scale": 1.0,
        "cfg_interval": (0.4, 1.0),
        "cfg_renorm_type": "global",
    }
    editing = {
        "cfg_img_scale": 2.0,
        "cfg_interval": (0.0, 1.0),
        "cfg_renorm_type": "text_channel",
    }
    assert ImageSettings().model_dump() == common | text_to_image
    assert ImageSettings.for_editing().model_dump() == common | editing
    changed = ImageSettings.for_editing(num_timesteps=9, cfg_img_scale=1.5)
    assert changed.model_dump() == common | editing | {"num_timesteps": 9, "cfg_img_scale": 1.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_timesteps": 1}, r"num_timesteps\n.*greater than or equal to 2", id="T"),
        pytest.param({"num_timesteps": 2.5}, r"num_timesteps\n.*integer", id="T-fraction"),
        pytest.param({"num_timesteps": 10**12}, r"num_timesteps\n.*equal to 100000", id="T-huge"),
        pytest.param({"timestep_shift": 0}, r"timestep_shift\n.*equal to 0\.001", id="shift"),
        pytest.param(
            {"timestep_shift": 1e-300}, r"timestep_shift\n.*equal to 0\.001", id="shift-tiny"
        ),
        pytest.param(
            {"timestep_shift": 1e300}, r"timestep_shift\n.*equal to 1000", id="shift-huge"
        ),
        pytest.param(
            {"timestep_shift": float("inf")}, r"timestep_shift\n.*finite", id="shift-infinite"
        ),
        pytest.param({"cfg_text_scale": 0.9}, r"cfg_text_scale\n.*equal to 1", id="text-scale"),
        pytest.param(
            {"cfg_text_scale": 1e38}, r"cfg_text_scale\n.*equal to 1000", id="text-scale-huge"
        ),
        pytest.param(
            {"cfg_img_scale": 1e38}, r"cfg_img_scale\n.*equal to 1000", id="image-scale-huge"
        ),
        pytest.param({"cfg_img_scale": 0.9}, r"cfg_img_scale\n.*equal to 1", id="image-scale"),
        pytest.param(
            {"cfg_interval": (0.9, 0.1)},
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1",
            id="interval-reversed",
        ),
        pytest.param(
            {"cfg_interval": (-0.1, 0.5)}, r"cfg_interval is -0\.1, 0\.5", id="interval-below-0"
        ),
        pytest.param(
            {"cfg_interval": (0.5, 1.1)}, r"cfg_interval is 0\.5, 1\.1", id="interval-above-1"
        ),
        pytest.param({"cfg_interval": (0.5,)}, r"cfg_interval\.1\n.*required", id="interval-one"),
        pytest.param(
            {"cfg_renorm_type": "none"},
            r"cfg_renorm_type\n.*'global', 'channel' or 'text_channel'",
            id="renorm",
        ),
        pytest.param({"cfg_renorm_min": -0.1}, r"cfg_renorm_min\n.*equal to 0", id="min-below-0"),
        pytest.param({"cfg_renorm_min": 1.1}, r"cfg_renorm_min\n.*equal to 1", id="min-above-1"),
        pytest.param({"steps": 50}, r"steps\n.*not permitted", id="unknown"),
    ],
)
@pytest.mark.parametrize("make", [ImageSettings, ImageSettings.for_editing], ids=["plain", "edit"])
def test_settings_bad_value(
    make: Callable[..., ImageSettings], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ImageSettings().num_timesteps = 3  # type: ignore[misc]


@pytest.mark.parametrize("shift", [0.2, 0.54, 1.0, 3.0, 8.39, 16.03])
def test_the_first_step_is_guided(shift: float) -> None:
    """Also where float32 would round its time up, beyond any interval."""
    settings = ImageSettings(timestep_shift=shift)
    timesteps = settings.timesteps()
    assert timesteps[0] == 1
    assert settings.guided(timesteps)[0]
