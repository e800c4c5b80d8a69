"""The grader: right about drawn pictures, also soft and noisy ones, and strict about wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bagel_mot.tiny.drawing import draw_image
from bagel_mot.tiny.grading import (
    grade_answer,
    grade_edit,
    grade_painting,
    grade_scene,
    look,
)
from bagel_mot.tiny.language import Caption, draw_edit, draw_painting, draw_question
from bagel_mot.tiny.scenes import COLOURS, SHAPES, Kind, Scene, Thing

# Enough for every shape, colour, size and count to come up several times.
SAMPLES = 40


def noisy(levels: float) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image).astype(float)
        pixels += np.random.default_rng(0).normal(0, levels, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return change


def soft(radius: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.filter(ImageFilter.GaussianBlur(radius))


def darker(image: Image.Image) -> Image.Image:
    return image.point(lambda level: int(level * 0.93))


@pytest.mark.parametrize(
    "change",
    [lambda image: image, soft(0.7), soft(1.0), noisy(8), noisy(15), darker],
    ids=["drawn", "soft", "softer", "noise8", "noise15", "darker"],
)
def test_drawn_scenes_are_right(change: Callable[[Image.Image], Image.Image]) -> None:
    for i in range(SAMPLES):
        painting = draw_painting(Random(i))
        image = change(draw_image(painting.scene))
        for grade in (
            grade_painting(image, painting.caption),
            grade_scene(image, painting.scene),
        ):
            assert grade.right(), (painting.caption.text, grade.why)
            assert not grade.why


def one_wrong(random: Random, scene: Scene) -> Scene:
    """The scene with one thing of another colour or shape, one too many or too few."""
    things = list(scene.things)
    victim = random.randrange(len(things))
    thing = things.pop(victim)
    match random.randrange(3):
        case 0:
            others = [colour for colour in COLOURS if colour != thing.colour]
            things.append(replace(thing, colour=random.choice(others)))
        case 1:
            others = [shape for shape in SHAPES if shape != thing.shape]
            things.append(replace(thing, shape=random.choice(others)))
    return replace(scene, things=tuple(things))


def test_wrong_pictures_are_wrong() -> None:
    for i in range(SAMPLES):
        painting = draw_painting(Random(i))
        image = soft(0.7)(draw_image(one_wrong(Random(i), painting.scene)))
        grade = grade_painting(image, painting.caption)
        assert not grade.points["things"], painting.caption.text
        assert grade.why
        assert not grade_scene(image, painting.scene).right("things")


def test_wrong_background() -> None:
    caption = Caption("a red circle", (Kind("red", "circle"),), "white", (None,))
    for background in ("black", "gray", "navy", "beige"):
        scene = Scene(64, 64, background, (Thing("red", "circle", 32, 32, 10),))
        grade = grade_painting(draw_image(scene), caption)
        assert grade.points == {"things": True, "background": False}
        assert grade.why == (f"background {background}, not white",)


def test_nothing_and_noise() -> None:
    caption = Caption("a red circle", (Kind("red", "circle"),), None, (None,))
    empty = Image.new("RGB", (64, 64), "white")
    assert grade_painting(empty, caption).why == ("1 red circle missing",)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not grade_painting(Image.fromarray(pixels), caption).right()


def test_shapeless_blob_is_no_shape() -> None:
    pixels = np.full((64, 64, 3), 250, dtype=np.uint8)
    pixels[20:24, 8:56] = COLOURS["red"]  # a bar
    (found,) = look(Image.fromarray(pixels)).found
    assert found.thing.shape == "blob"
    assert found.thing.colour == "red"


def test_specks_are_overlooked_things_are_not() -> None:
    scene = Scene(64, 64, "white", (Thing("red", "circle", 40, 40, 10),))
    pixels = np.asarray(draw_image(scene)).copy()
    pixels[10:13, 10:13] = COLOURS["blue"]
    assert len(look(Image.fromarray(pixels)).found) == 1
    pixels[8:18, 8:18] = COLOURS["blue"]
    assert len(look(Image.fromarray(pixels)).found) == 2


@pytest.mark.parametrize("size", ["small", "big"])
def test_size_words(size: str) -> None:
    caption = Caption("", (Kind("red", "circle"),), None, (size,))
    for share, fits in ((0.135, "small"), (0.17, None), (0.23, "big")):
        scene = Scene(96, 64, "white", (Thing("red", "circle", 32, 40, 64 * share),))
        assert grade_painting(draw_image(scene), caption).points["sizes"] == (fits == size)


def test_place_and_relation() -> None:
    left, right = Thing("red", "circle", 18, 32, 9), Thing("blue", "star", 46, 32, 9)
    scene = Scene(64, 64, "white", (left, right))
    kinds = (Kind("red", "circle"), Kind("blue", "star"))
    for relation, holds in (("to the left of", True), ("to the right of", False), ("above", False)):
        caption = Caption("", kinds, None, (None, None), None, relation)
        assert grade_painting(draw_image(scene), caption).points["relation"] == holds
    alone = draw_image(replace(scene, things=(left,)))
    for place, holds in (("on the left", True), ("on the right", False), ("in the middle", False)):
        caption = Caption("", kinds[:1], None, (None,), place)
        assert grade_painting(alone, caption).points["place"] == holds


def test_edits_done_and_not() -> None:
    for i in range(SAMPLES):
        edit = draw_edit(Random(i))
        done = grade_edit(soft(0.7)(draw_image(edit.after)), edit)
        assert done.points == {"done": True, "rest": True}, (edit.text, done.why)
        undone = grade_edit(draw_image(edit.before), edit)
        assert undone.points == {"done": False, "rest": True}, (edit.text, undone.why)


def test_edits_that_disturb_the_rest() -> None:
    checked = 0
    for i in range(SAMPLES):
        edit = draw_edit(Random(i))
        kept = [thing for thing in edit.after.things if thing in edit.before.things]
        if not kept or edit.task == "background":
            continue
        checked += 1
        middle = edit.after.width / 2
        others = tuple(thing for thing in edit.after.things if thing != kept[0])
        for disturbed in (
            (),
            (replace(kept[0], x=kept[0].x + (0.2 if kept[0].x < middle else -0.2) * middle * 2),),
            (replace(kept[0], radius=kept[0].radius * 0.6),),
            (replace(kept[0], colour="cyan" if kept[0].colour != "cyan" else "pink"),),
        ):
            image = draw_image(replace(edit.after, things=others + disturbed))
            assert not grade_edit(image, edit).points["rest"], (edit.text, disturbed)
        ground = "gray" if edit.after.background != "gray" else "white"
        image = draw_image(replace(edit.after, background=ground))
        assert not grade_edit(image, edit).points["rest"]
    assert checked > 20


def test_answers() -> None:
    question = replace(draw_question(Random(0)), answer="red")
    for answer, right in (("red", True), (" Red.", True), ("blue", False), ("", False)):
        grade = grade_answer(answer, question)
        assert grade.points == {"answer": right}
        assert bool(grade.why) != right
