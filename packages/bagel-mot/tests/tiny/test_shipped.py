"""The tiny model that is shipped, once it is: small enough, and really painting."""

from __future__ import annotations

import pytest

from bagel_mot import BagelPipeline, Request, tiny
from bagel_mot.tiny.drawing import draw_image
from bagel_mot.tiny.grading import grade_edit, grade_painting
from bagel_mot.tiny.language import Caption, Edit
from bagel_mot.tiny.scenes import Kind, Scene, Thing

pytestmark = pytest.mark.skipif(
    not tiny.FOLDER.is_dir(), reason=f"needs the trained weights in {tiny.FOLDER} (docs/tiny.md)"
)


@pytest.fixture(scope="module")
def shipped() -> BagelPipeline:
    return BagelPipeline.from_pretrained("tiny", device="cpu", dtype="float32")


def test_size() -> None:
    assert sum(file.stat().st_size for file in tiny.FOLDER.iterdir()) <= 24e6


def test_paints_shapes_and_colours(shipped: BagelPipeline) -> None:
    """Nine of ten is what is promised of the whole world; these are the plainest of captions."""
    pairs = [(colour, shape) for colour in ("red", "blue") for shape in ("circle", "square")]
    captions = [
        Caption(f"a {colour} {shape} on a white background", (Kind(colour, shape),), "white")
        for colour, shape in pairs
    ]
    requests = [
        Request([caption.text], "image", height=64, width=64, seed=i)
        for i, caption in enumerate(captions)
    ]
    results = shipped.run(requests)
    grades = [grade_painting(r.image, c) for r, c in zip(results, captions, strict=True)]
    assert sum(grade.right("things") for grade in grades) >= 3, [grade.why for grade in grades]


def test_edits_and_answers(shipped: BagelPipeline) -> None:
    circle = Thing("red", "circle", 20, 30, 10)
    square = Thing("green", "square", 46, 34, 10)
    before = Scene(64, 64, "white", (circle, square))
    after = Scene(64, 64, "white", (Thing("blue", "circle", 20, 30, 10), square))
    edit = Edit("recolour", "make the circle blue", before, after)
    images = [shipped.edit(draw_image(before), edit.text, seed=seed).image for seed in range(3)]
    grades = [grade_edit(image, edit) for image in images]
    assert sum(grade.right() for grade in grades) >= 2, [grade.why for grade in grades]
    assert shipped.ask(draw_image(before), "what colour is the circle?") == "red"
    assert shipped.ask(draw_image(before), "what colour is the square?") == "green"
