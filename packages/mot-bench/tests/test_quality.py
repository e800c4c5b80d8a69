"""`mot-bench quality`: a perfect painter gets full marks, a careless one does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("bagel_mot.pipeline", reason="needs bagel-mot and vLLM")

from bagel_mot import BagelPipeline, ImageSettings, Request, Result
from bagel_mot.quantization import Keep, Quantization
from bagel_mot.taylorseer import TaylorSeer
from bagel_mot.tiny.drawing import draw_image
from bagel_mot.tiny.language import draw_edit, draw_painting
from bagel_mot.tiny.scenes import Scene
from PIL import Image

from mot_bench import bagel, quality
from mot_bench.cli import main
from mot_bench.model_results import Subject
from mot_bench.quality import TARGETS, contact_sheet, measure
from mot_bench.quality_command import _image_settings

SAMPLES = 8


@pytest.fixture(autouse=True)
def perfect_vae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "through_vae", lambda _, image: image)


class Painter(BagelPipeline):
    """Knows the answers; careless, it gives those to another sample."""

    def __init__(self, *, careless: bool = False) -> None:
        self.requests: list[Request] = []
        self._next = iter(range(10**6))
        shift = 1 if careless else 0
        numbers = [(i + shift) % SAMPLES for i in range(SAMPLES)]
        paintings = [draw_painting(Random(f"0/paint/{i}"), held_out=True) for i in numbers]
        edits = [draw_edit(Random(f"0/edit/{i}"), held_out=True) for i in numbers]
        self._scenes: list[Scene] = [p.scene for p in paintings] + [e.after for e in edits]
        asked = list(quality._questions(SAMPLES, 0))
        self._answers = iter([question.answer for _, question in asked[shift:] + asked[:shift]])

    def run(self, requests: Sequence[Request], **_: object) -> list[Result]:
        self.requests += requests
        return [Result((draw_image(self._scenes[next(self._next)]),)) for _ in requests]

    def ask(self, images: object, question: str, **_: object) -> str:
        assert isinstance(images, Image.Image) or images is None
        return next(self._answers).capitalize()


def test_perfect_painter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_TOGETHER", 3)
    painter, done = Painter(), []
    measured = measure(painter, samples=SAMPLES, on_sample=done.append)
    assert [task.task for task in measured.tasks] == list(TARGETS)
    assert all((task.samples, task.right) == (SAMPLES, SAMPLES) for task in measured.tasks)
    assert not measured.failures
    assert sum(done) == SAMPLES * 6
    assert [request.seed for request in painter.requests] == [*range(SAMPLES)] * 2
    assert len(measured.pictures) == 2 * SAMPLES


def test_careless_painter() -> None:
    measured = measure(Painter(careless=True), samples=SAMPLES)
    right = {task.task: task.percent for task in measured.tasks}
    assert right["images: shapes, colours, counts"] < 30
    assert right["edits: done, and the rest left alone"] < 30
    assert right["questions: colour and shape"] < 100
    assert measured.failures
    assert all(why for _, why in measured.failures)


def test_settings_reach_painting_and_editing() -> None:
    painter = Painter()
    measure(painter, samples=SAMPLES, settings={"num_timesteps": "7"})
    assert painter.requests[0].settings == ImageSettings(num_timesteps=7)
    assert painter.requests[-1].settings == ImageSettings.for_editing(num_timesteps=7)


def test_samples_are_held_out() -> None:
    assert all(scene.held_out for scene in Painter()._scenes)
    asked = list(quality._questions(SAMPLES, 0))
    assert all(question.scene.held_out for _, question in asked)
    assert {question.told is None for _, question in asked} == {True, False}


def test_contact_sheet() -> None:
    pictures = [(Image.new("RGB", (64, 96)), Image.new("RGB", (128, 64)))] * 9
    assert contact_sheet(pictures, columns=4).size == (4 * (2 * 132 + 8), 3 * 132)


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    painter = Painter()
    painter.model = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]
    asked_for: dict[str, object] = {}

    def from_pretrained(path: str, **options: object) -> Painter:
        asked_for.update(options, path=path)
        return painter

    subjects: list[Any] = []

    def subject(choice: Any, pipeline: BagelPipeline) -> Subject:
        subjects.append((choice.folder, choice.weights, pipeline))
        return Subject("DIR", 1, 2, "float32", "math", "off", "0", "0", choice.weights)

    monkeypatch.setattr(BagelPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(bagel, "subject", subject)
    arguments = ["quality", "--model", "DIR", "--samples", str(SAMPLES), "--device", "cpu"]
    settings = ["--set", "num_timesteps=9", "--set", "cfg_text_scale=2"]
    settings += ["--quantization", "fp8", "--keep-bf16", "first", "--attention", "math"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, *settings, "--output", str(tmp_path)])
    assert exit_.value.code == 0
    assert asked_for == {
        "path": "DIR",
        "device": "cpu",
        "dtype": "float32",
        "attention": "math",
        "quantization": Quantization(format="fp8", keep=Keep(first=1)),
    }
    written = json.loads((tmp_path / "quality.json").read_text())
    assert [task["percent"] for task in written["tasks"]] == [100.0] * len(TARGETS)
    assert (written["schema"], written["kind"]) == (1, "quality")  # by which `report` knows it
    assert subjects == [(Path("DIR"), "fp8, first kept", painter)]
    facts = [written["subject"][key] for key in ("weights", "attention", "quantization")]
    assert facts == ["DIR", "math", "fp8, first kept"]
    assert written["settings"] == {"num_timesteps": "9", "cfg_text_scale": "2"}
    assert written["command"].startswith("mot-bench quality --model DIR")
    assert {file.name for file in tmp_path.iterdir()} == {"quality.json", "images.png", "edits.png"}
    said = capsys.readouterr().out
    assert "float32, quantization fp8, first kept, attention math" in said
    assert "images: shapes, colours, counts" in said
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--output", str(tmp_path)])
    assert exit_.value.code == 2
    assert "quality.json exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "num_timesteps"], "--set is 'num_timesteps'; expected NAME=VALUE"),
        (["--set", "steps=3"], "--set is 'steps'; expected one of num_timesteps, timestep_shift"),
        (["--set", "num_timesteps=x"], "--set: num_timesteps is 'x': Input should be a valid int"),
        (["--set", "cfg_interval=1,0"], "--set: cfg_interval is 1.0, 0.0; expected 0 <= low <= hi"),
        (["--set", "cfg_interval=1"], "--set: cfg_interval is '1': Input should be a valid tuple"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--quantization", "fp9"], "quantization is 'fp9'; expected one of fp8"),
        (["--keep-bf16", "first"], "--keep-bf16 is 'first', but nothing is quantized"),
    ],
)
def test_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["quality", *arguments])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert "http" not in said


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("0,1", "cfg_interval", (0.0, 1.0)),
        ("[0, 1]", "cfg_interval", (0.0, 1.0)),
        ("7", "num_timesteps", 7),
        ("channel", "cfg_renorm_type", "channel"),
        ("true", "taylorseer", TaylorSeer()),
    ],
)
def test_settings_are_read(text: str, name: str, value: object) -> None:
    assert getattr(ImageSettings.model_validate(_image_settings({name: text})), name) == value
