"""The tiny model that is shipped: small enough, and really painting, whatever computes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from plain_captions import CAPTIONS, paint_plain

from bagel_mot import BagelPipeline, tiny
from bagel_mot.launch import run_ranks
from bagel_mot.tiny.drawing import draw_image
from bagel_mot.tiny.grading import grade_edit
from bagel_mot.tiny.language import Edit
from bagel_mot.tiny.scenes import Scene, Thing

WORKER = Path(__file__).with_name("painting_worker.py")

on_devices = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", "float32", id="cpu-float32"),
        pytest.param("cuda", "bfloat16", id="cuda-bfloat16", marks=pytest.mark.gpu),
    ],
)


def test_size() -> None:
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) <= 24e6


@on_devices
@pytest.mark.parametrize("quantization", [None, "fp8", "int8", "w8a16", "w4a16:64"])
def test_paints_in_every_format(quantization: str | None, device: str, dtype: str) -> None:
    """Nine of ten are promised in the whole world; of these, one may fail to rounding."""
    pipeline = BagelPipeline.from_pretrained(
        "tiny", device=device, dtype=dtype, quantization=quantization
    )
    grades = paint_plain(pipeline)
    assert sum(grade.right("things") for grade in grades) >= len(CAPTIONS) - 1, grades


@on_devices
@pytest.mark.parametrize(
    "ways", [["2//1"], ["1/ulysses:2/1", "1/ring:2/1", "1/allgather:2/1", "1//2"]], ids=str
)
def test_paints_on_two_ranks(
    ways: list[str],
    device: str,
    dtype: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, torch sees {torch.cuda.device_count()}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    code = run_ranks([sys.executable, str(WORKER), device, *ways], 2, seconds=180.0)
    printed = capfd.readouterr()
    lines = [line.split(": ") for line in printed.out.splitlines() if " of " in line]
    assert code == 0 and [way for way, _ in lines] == ways, printed.out + printed.err
    for way, found in lines:
        assert int(found.split()[0]) >= len(CAPTIONS) - 1, (way, found)


def test_edits_and_answers() -> None:
    pipeline = BagelPipeline.from_pretrained("tiny", device="cpu", dtype="float32")
    circle = Thing("red", "circle", 20, 30, 10)
    square = Thing("green", "square", 46, 34, 10)
    before = Scene(64, 64, "white", (circle, square))
    after = Scene(64, 64, "white", (Thing("blue", "circle", 20, 30, 10), square))
    edit = Edit("recolour", "make the circle blue", before, after)
    images = [pipeline.edit(draw_image(before), edit.text, seed=seed).image for seed in range(3)]
    grades = [grade_edit(image, edit) for image in images]
    assert sum(grade.right() for grade in grades) >= 2, [grade.why for grade in grades]
    assert pipeline.ask(draw_image(before), "what colour is the circle?") == "red"
    assert pipeline.ask(draw_image(before), "what colour is the square?") == "green"
