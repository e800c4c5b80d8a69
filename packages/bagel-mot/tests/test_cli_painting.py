"""The commands generate and edit: the images they paint, and what their files say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import ON_CPU, PORTRAIT, SMALL, STREET, metadata, succeed, written
from pictures import QUICK, assert_same_picture, opened

from bagel_mot import __version__
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings

pytestmark = pytest.mark.usefixtures("working_folder")


def as_options(settings: dict[str, Any]) -> list[str]:
    """A PNG's settings as command line options."""
    options = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{name.replace('_', '-')}", *map(str, values)]
    return options


def test_generate(cpu: BagelPipeline) -> None:
    result = succeed("generate", "a red fox", *SMALL, "--seed", "5", "--output", "fox.png")
    assert result.stdout == f"{Path.cwd() / 'fox.png'}\n"
    assert written() == ["fox.png"]
    want = cpu.generate("a red fox", height=64, width=64, settings=QUICK, seed=5)
    assert_same_picture(opened("fox.png"), want.image)


def test_generate_default_name() -> None:
    succeed("generate", "a red fox", *SMALL)
    assert written() == ["bagel.png"]


def test_generate_metadata_makes_it_again() -> None:
    """Prompt, seed, settings and version; from them the same pixels."""
    options = ["--cfg-text-scale", "5", "--cfg-interval", "0.2", "0.9", "--cfg-renorm-min", "0.1"]
    options += ["--cfg-renorm-type", "channel", "--timestep-shift", "2", "--cfg-img-scale", "1.5"]
    succeed("generate", "a fox — “red” 狐", *SMALL, *options, "-o", "one.png")
    first = metadata(Path("one.png"))
    assert first.keys() == {"prompt", "seed", "settings", "software"}
    assert first["prompt"] == "a fox — “red” 狐"
    assert first["software"] == f"bagel-mot {__version__}"
    settings = json.loads(first["settings"])
    assert settings == {
        "num_timesteps": 3,
        "timestep_shift": 2.0,
        "cfg_text_scale": 5.0,
        "cfg_img_scale": 1.5,
        "cfg_interval": [0.2, 0.9],
        "cfg_renorm_type": "channel",
        "cfg_renorm_min": 0.1,
        "taylorseer": None,
    }
    size = ["--height", "64", "--width", "64"]
    again = [first["prompt"], *ON_CPU, *size, "--seed", first["seed"], *as_options(settings)]
    succeed("generate", *again, "-o", "two.png")
    assert_same_picture(opened("two.png"), opened("one.png"))
    assert metadata(Path("two.png")) == first


def test_generate_with_taylorseer(cpu: BagelPipeline) -> None:
    options = ["--num-timesteps", "9", "--taylorseer", "--no-cuda-graphs"]
    succeed("generate", "a fox", *SMALL, *options, "--seed", "1", "-o", "fox.png")
    settings = json.loads(metadata(Path("fox.png"))["settings"])
    assert settings["taylorseer"] == {"interval": 3, "max_order": 6, "first_full": 5}
    quick = ImageSettings(num_timesteps=9, taylorseer=True)
    want = cpu.generate("a fox", height=64, width=64, settings=quick, seed=1)
    assert_same_picture(opened("fox.png"), want.image)


def test_generate_several(cpu: BagelPipeline) -> None:
    """NAME-0.png, NAME-1.png, each with the seed that makes it alone."""
    result = succeed("generate", "a fox", *SMALL, "--seed", "5", "-n", "2", "-o", "out/fox.png")
    files = [Path.cwd() / "out" / f"fox-{i}.png" for i in range(2)]
    assert result.stdout == "".join(f"{file}\n" for file in files)
    assert written() == ["out", "out/fox-0.png", "out/fox-1.png"]
    assert [metadata(file)["seed"] for file in files] == ["5", "6"]
    want = cpu.generate("a fox", height=64, width=64, settings=QUICK, seed=5, num_images=2)
    for file, image in zip(files, want.images, strict=True):
        assert_same_picture(opened(file), image)


def test_generate_think(cpu: BagelPipeline) -> None:
    """The thought goes to stderr and into the file; stdout still holds the path alone."""
    options = ["--think", "--max-text-tokens", "7", "--temperature", "1.0", "--seed", "5"]
    result = succeed("generate", "a fox", *SMALL, *options, "-o", "fox.png")
    want = cpu.generate(
        "a fox",
        height=64,
        width=64,
        settings=QUICK,
        seed=5,
        think=True,
        max_text_tokens=7,
        temperature=1.0,
    )
    assert want.text
    assert result.stdout == f"{Path.cwd() / 'fox.png'}\n"
    assert want.text in result.stderr
    assert metadata(Path("fox.png"))["thought"] == want.text
    assert_same_picture(opened("fox.png"), want.image)


def test_edit(cpu: BagelPipeline) -> None:
    """Several pictures in their order, and the defaults for editing."""
    pictures = ["--image", PORTRAIT, "-i", STREET]
    options = ["--num-timesteps", "3", "--seed", "5", "-o", "night.png"]
    result = succeed("edit", "at night", *ON_CPU, *pictures, *options)
    assert result.stdout == f"{Path.cwd() / 'night.png'}\n"
    settings = ImageSettings.for_editing(num_timesteps=3)
    want = cpu.edit([opened(PORTRAIT), opened(STREET)], "at night", settings=settings, seed=5)
    assert_same_picture(opened("night.png"), want.image)
    found = metadata(Path("night.png"))
    assert json.loads(found["settings"]) == json.loads(settings.model_dump_json())
    assert (found["prompt"], found["seed"]) == ("at night", "5")


def test_several_of_an_edit_tell_how_to_make_them_again() -> None:
    """They share the first one's encoding of the picture: alone, its seed makes another one."""
    words = ["edit", "at night", *ON_CPU, "-i", STREET, "--num-timesteps", "3", "-n", "2"]
    succeed(*words, "--seed", "5", "-o", "night.png")
    for i in range(2):
        found = metadata(Path(f"night-{i}.png"))
        assert (found["seed"], found["num_images"]) == ("5", f"2, of which this is number {i}")


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_negative_prompt(cpu: BagelPipeline, command: str) -> None:
    words = ["--negative-prompt", "a dog", "--num-timesteps", "3", "--seed", "5", "-o", "fox.png"]
    words += ["--height", "64", "--width", "64", *ON_CPU]
    make: dict[str, Any] = {"negative_prompt": "a dog", "seed": 5, "height": 64, "width": 64}
    if command == "generate":
        succeed("generate", "a fox", *words)
        want = cpu.generate("a fox", settings=QUICK, **make).image
        other = cpu.generate("a fox", settings=QUICK, **make | {"negative_prompt": None}).image
    else:
        succeed("edit", "a fox", "-i", STREET, *words)
        settings = ImageSettings.for_editing(num_timesteps=3)
        make["settings"] = settings
        want = cpu.edit(opened(STREET), "a fox", **make).image
        other = cpu.edit(opened(STREET), "a fox", **make | {"negative_prompt": None}).image
    assert_same_picture(opened("fox.png"), want)
    assert want.tobytes() != other.tobytes()
    assert metadata(Path("fox.png"))["negative_prompt"] == "a dog"
