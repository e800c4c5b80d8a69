"""What the command line says to bad input and to broken checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import ASK, CHECKPOINT, ON_CPU, SMALL, STREET, refused, run
from golden_data import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_mot import checkpoint
from bagel_mot.cli_io import open_images

pytestmark = pytest.mark.usefixtures("working_folder")

GENERATE = ["generate", "a fox", *SMALL]
GENERATE_UNSIZED = ["generate", "a fox", *ON_CPU]
EDIT = ["edit", "at night", *ON_CPU, "--num-timesteps", "3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "60", "--width", "64"],
            r"height is 60; expected a multiple of 16 in 16\.\.1024$",
            id="height-60",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "64", "--width", "2048"],
            r"width is 2048; expected a multiple of 16 in 16\.\.1024$",
            id="width-2048",
        ),
        pytest.param(
            ["generate", "a fox", "-m", "tiny", "--height", "65", "--width", "64"],
            r"height is 65; expected a multiple of 16 in 16\.\.128$",
            id="height-of-tiny",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "0", "--width", "64"],
            r"height is 0; expected a multiple of 16",
            id="height-0",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "64"],
            r"height is 64 and width None; give both or neither$",
            id="height-only",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--width", "64"],
            r"height is None and width 64; give both or neither$",
            id="width-only",
        ),
        pytest.param(
            [*EDIT, "-i", STREET, "--width", "64"],
            r"height is None and width 64; give both or neither$",
            id="edit-width-only",
        ),
        pytest.param(
            [*GENERATE_UNSIZED, "--height", "tall", "--width", "64"],
            r"'--height'.*valid integer",
            id="height-word",
        ),
        pytest.param([*EDIT], r"Missing option '--image'", id="edit-no-image"),
        pytest.param([*EDIT, "-i", "no.png"], r"--image no\.png: no such file$", id="edit-missing"),
        pytest.param([*ASK, "-i", "no.png"], r"--image no\.png: no such file$", id="ask-missing"),
        pytest.param(
            [*EDIT, "-i", STREET, "-i", __file__],
            r"--image .*test_cli_errors\.py: not a picture that can be read",
            id="edit-not-a-picture",
        ),
        pytest.param(
            [*EDIT, "-i", str(GOLDEN.folder)],
            r"--image .*golden: not a picture that can be read",
            id="edit-folder",
        ),
        pytest.param(["generate", "", *SMALL], r"the prompt is empty; say what", id="empty-prompt"),
        pytest.param(["generate", " \n", *SMALL], r"the prompt is empty", id="blank-prompt"),
        pytest.param(
            ["edit", "", *ON_CPU, "-i", STREET], r"the prompt is empty", id="edit-empty-prompt"
        ),
        pytest.param(["ask", " ", *ON_CPU], r"the question is empty", id="empty-question"),
        pytest.param(
            ["generate", *SMALL],
            r"give what to paint: either a PROMPT, or --prompts",
            id="no-prompt",
        ),
        pytest.param(["ask", *ON_CPU], r"Missing argument", id="no-question"),
        pytest.param(["generate", "a fox"], r"Missing option '--model'", id="no-model"),
        pytest.param(
            [*GENERATE, "--steps", "9"], r"No such option: --steps.*--num-timesteps", id="option"
        ),
        pytest.param(["paint", "a fox"], r"No such command 'paint'", id="command"),
        pytest.param(
            [*GENERATE, "--device", "banana"],
            r"device is 'banana'; expected 'cpu', 'cuda' or 'cuda:N'$",
            id="device",
        ),
        pytest.param(
            [*GENERATE, "--dtype", "int8"],
            r"dtype is 'int8'; expected one of bfloat16, float16, float32$",
            id="dtype",
        ),
        pytest.param(
            [*GENERATE, "--attention", "fa9"],
            r"attention is 'fa9'; known backends are fa3, fa3-fp8, fa2, cudnn, sdpa, math",
            id="attention",
        ),
        pytest.param(
            [*GENERATE, "--num-timesteps", "1"],
            r"num[-_]timesteps: .*greater than or equal to 2 \(got 1\)$",
            id="num-timesteps-1",
        ),
        pytest.param(
            [*GENERATE, "--timestep-shift", "0"],
            r"timestep[-_]shift: .*equal to 0\.001 \(got 0\.0\)$",
            id="shift-0",
        ),
        pytest.param(
            [*GENERATE, "--cfg-text-scale", "0.5"],
            r"cfg[-_]text[-_]scale: .*equal to 1 \(got 0\.5\)$",
            id="text-scale",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "0.9", "0.1"],
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1$",
            id="interval-reversed",
        ),
        pytest.param(
            [*EDIT, "-i", STREET, "--cfg-interval", "0.9", "0.1"],
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1$",
            id="edit-interval-reversed",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "nan", "1"],
            r"--cfg-interval: .*finite number \(got NaN\)$",
            id="interval-nan",
        ),
        pytest.param(
            [*GENERATE, "--cfg-interval", "0.9"],
            r"'--cfg-interval' requires 2 arguments",
            id="interval-half",
        ),
        pytest.param(
            [*GENERATE, "--cfg-renorm-type", "best"],
            r"cfg[-_]renorm[-_]type: .*'global', 'channel' or 'text_channel' \(got \"best\"\)$",
            id="renorm",
        ),
        pytest.param(
            [*GENERATE, "--cfg-renorm-min", "2"], r"cfg[-_]renorm[-_]min: .*equal to 1", id="min-2"
        ),
        pytest.param(
            [*GENERATE, "--seed", "-1"], r"'--seed'.*greater than or equal to 0", id="seed-negative"
        ),
        pytest.param(
            [*GENERATE, "--negative-prompt", "\udcff"],
            r"negative_prompt holds '.udcff' at position 0, half of a surrogate pair",
            id="negative-prompt-bytes",
        ),
        pytest.param(
            ["generate", "fox \udcff", *SMALL],
            r"the text at parts\[0\] holds '.udcff' at position 4",
            id="prompt-bytes",
        ),
        pytest.param([*GENERATE, "--seed", str(2**70)], r"seed.*expected 0\.\.", id="seed-huge"),
        pytest.param(
            [*GENERATE, "-n", "0"], r"'--num-images'.*greater than or equal to 1", id="no-images"
        ),
        pytest.param(
            [*GENERATE, "--temperature", "0"],
            r"temperature is 0\.0; expected 1e-06 or more",
            id="temperature-0",
        ),
        pytest.param(
            [*ASK, "--temperature", "nan"], r"temperature is nan; expected 1e-06", id="ask-hot-nan"
        ),
        pytest.param(
            [*ASK, "--temperature", "1e-320"], r"temperature is .*; expected 1e-06", id="ask-cold"
        ),
        pytest.param([*ASK, "--seed", str(2**70)], r"seed.*expected 0\.\.", id="ask-seed-huge"),
        pytest.param(
            [*GENERATE, "--timestep-shift", "inf"],
            r"--timestep-shift: .*finite number",
            id="shift-infinite",
        ),
        pytest.param(
            [*ASK, "--max-text-tokens", "0"],
            r"'--max-text-tokens'.*greater than or equal to 1",
            id="no-tokens",
        ),
        pytest.param(
            [*GENERATE, "-o", "fox.jpg"], r"--output fox\.jpg: expected .* ends in \.png$", id="jpg"
        ),
        pytest.param(
            [*GENERATE, "-o", "fox"], r"--output fox: expected .* ends in \.png$", id="no-suffix"
        ),
        pytest.param(
            [*GENERATE, "-o", f"{STREET}/fox.png"],
            r"--output .*street\.png/fox\.png: .*street\.png",
            id="output-below-a-file",
        ),
        pytest.param(
            ["generate", "a fox", "-m", "/nowhere"],
            r"--model /nowhere: no such folder; give a BAGEL checkpoint folder$",
            id="generate-no-folder",
        ),
        pytest.param(
            ["ask", "a fox?", "-m", "/nowhere"],
            r"--model /nowhere: no such folder",
            id="ask-no-folder",
        ),
        pytest.param(
            ["inspect", "-m", "/nowhere"], r"/nowhere' is not a folder", id="inspect-no-folder"
        ),
        pytest.param(
            ["generate", "a fox", "-m", str(GOLDEN.folder)],
            r"golden/llm_config\.json is missing.*copy llm_config\.json",
            id="not-a-checkpoint",
        ),
        pytest.param(
            ["inspect", "-m", CHECKPOINT, "--dtype", "int8"],
            r"dtype is 'int8'; expected one of",
            id="inspect-dtype",
        ),
    ],
)
def test_bad_input(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    """Refused before any weights are read, which takes a minute for the real model."""

    def fail(*_: object) -> None:
        raise AssertionError("the weights are read before the input is refused")

    monkeypatch.setattr(checkpoint, "load_checkpoint", fail)
    assert re.search(message, refused(run(*arguments)))


def test_huge_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = refused(run(*EDIT, "-i", STREET))
    assert re.search(r"--image .*street\.png: not a picture that can be read \(Image size", message)


def test_pictures_as_they_are_to_be_seen(tmp_path: Path) -> None:
    """As a camera says that they are to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    file = tmp_path / "photo.jpg"
    Image.new("RGB", (120, 40)).save(file, exif=exif)
    (image,) = open_images([file])
    assert image.size == (40, 120)


def test_pictures_of_16_bits(tmp_path: Path) -> None:
    file = tmp_path / "deep.png"
    Image.new("I;16", (8, 8)).save(file)
    with pytest.raises(ValueError, match=r"deep\.png: has mode I;16, more than 8 bits a channel"):
        open_images([file])


def test_damaged_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow raises: one line that names the file."""
    file = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(file)

    def fail(*_: object) -> None:
        raise SyntaxError("broken PNG file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(ValueError, match=r"photo\.png: not a picture that can be read \(broken"):
        open_images([file])


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        pytest.param(
            "ema.safetensors",
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            r"checkpoint/ema\.safetensors: not a complete safetensors file .*truncated",
            id="truncated",
        ),
        pytest.param(
            "ae.safetensors",
            lambda file: file.unlink(),
            r"checkpoint/ae\.safetensors not found",
            id="missing",
        ),
        pytest.param(
            "llm_config.json",
            lambda file: file.write_text("{"),
            r"checkpoint/llm_config\.json is not valid JSON",
            id="broken-config",
        ),
        pytest.param(
            "model.safetensors.index.json",
            lambda file: file.write_text("[]"),
            r"index\.json: expected JSON with a 'weight_map'",
            id="broken-index",
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "ask", "inspect"])
def test_broken_checkpoint(
    checkpoint_copy: Path, command: str, file: str, spoil: Callable[[Path], object], message: str
) -> None:
    """Refused before anything is written, folders for the output included."""
    spoil(checkpoint_copy / file)
    words = {"generate": ["a fox", "-o", "new/folder/fox.png"], "ask": ["What?"], "inspect": []}
    result = run(command, *words[command], "--model", str(checkpoint_copy))
    assert re.search(message, refused(result))


def test_checkpoint_with_problems(checkpoint_copy: Path) -> None:
    """A line for each, whole."""
    tensors = load_file(checkpoint_copy / "ema.safetensors")
    name = "language_model.model.layers.1.post_attention_layernorm_moe_gen.weight"
    del tensors[name]
    save_file(tensors | {"surplus": torch.zeros(1)}, checkpoint_copy / "ema.safetensors")
    result = run("ask", "What?", "--model", str(checkpoint_copy), "--device", "cpu")
    refused(result)
    lines = [line.strip() for line in result.stderr.splitlines()]
    assert {f"missing: {name} [64]", "not part of the model: surplus"} <= set(lines)


def test_messages_are_not_wrapped(checkpoint_copy: Path) -> None:
    """A path can be copied from the message, however long it is."""
    long = checkpoint_copy.parent / ("long " * 30) / "checkpoint"
    long.parent.mkdir()
    checkpoint_copy.rename(long)
    (long / "ae.safetensors").unlink()
    result = run("ask", "What?", "--model", str(long), "--device", "cpu")
    refused(result)
    assert f"{long / 'ae.safetensors'} not found" in result.stderr


@pytest.mark.parametrize("command", [["generate", "a fox", *SMALL], ["ask", "What?", *ON_CPU]])
def test_errors_of_the_model_are_ours(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """They are not told as if the user could mend them."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("bagel_mot.pipeline.read_prompt", fail)
    result = run(*command)
    assert isinstance(result.exception, ValueError) and "error:" not in result.stderr
