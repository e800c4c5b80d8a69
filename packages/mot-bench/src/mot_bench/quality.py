"""How well a model paints, edits and answers in the tiny model's world of coloured shapes.

Captions, instructions and questions are about combinations that training never shows. A grader
without a network (`bagel_mot.tiny.grading`) looks at the pictures. All seeds are fixed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch
from bagel_mot import BagelPipeline, ImageSettings, Request
from bagel_mot.images import to_image, to_tensor
from bagel_mot.tiny.drawing import draw_image
from bagel_mot.tiny.grading import Grade, grade_answer, grade_edit, grade_painting, grade_scene
from bagel_mot.tiny.language import Question, draw_edit, draw_painting, draw_question
from PIL import Image

# Requests denoised together.
_TOGETHER = 50

# Task -> what must be right for a sample to count, and the share that we want, in percent.
TARGETS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "images: shapes, colours, counts": (("things",), 90.0),
    "reconstructions: the VAE alone": (("things", "background"), None),
    "images: everything the caption says": ((), None),
    "edits: done, and the rest left alone": (("done", "rest"), 80.0),
    "edits: done": (("done",), None),
    "questions: colour and shape": (("answer",), 95.0),
    "questions: counting": (("answer",), 85.0),
    "questions: background, existence, description": (("answer",), None),
    "questions about words alone": (("answer",), None),
}
_QUESTIONS = {
    "questions: colour and shape": ("colour", "shape"),
    "questions: counting": ("count",),
    "questions: background, existence, description": ("background", "exists", "describe"),
}


@dataclass
class TaskResult:
    """One line of the report.

    Attributes:
        task: of `TARGETS`.
        samples, right: counts.
        target: percent wanted, or None.
        points: for each point that was graded, how many samples had it and got it right.
    """

    task: str
    samples: int
    right: int
    target: float | None
    points: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def percent(self) -> float:
        """Share of right samples, in percent."""
        return 100 * self.right / max(self.samples, 1)


@dataclass
class Quality:
    """What was measured.

    Attributes:
        tasks: one result for each entry of `TARGETS`.
        failures: what was asked, and what was wrong with the result.
        pictures: prompts with the pictures that belong to them, in the order they were made; an
            edit has the picture before and after.
    """

    tasks: list[TaskResult]
    failures: list[tuple[str, str]]
    pictures: list[tuple[str, tuple[Image.Image, ...]]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures."""
        tasks = [asdict(task) | {"percent": round(task.percent, 1)} for task in self.tasks]
        return {"tasks": tasks, "failures": self.failures}


def measure(
    pipeline: BagelPipeline,
    *,
    samples: int = 200,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    on_sample: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Let a model paint, edit and answer, and grade it.

    Args:
        samples: captions, edits, and questions of each kind.
        seed: of the scenes; sample i is painted with seed i.
        settings: of `ImageSettings`, changed from the defaults for painting and for editing.
        on_sample: called with the number of samples just done.
    """
    changes = dict(settings or {})
    grades: dict[str, list[Grade]] = defaultdict(list)
    failures: list[tuple[str, str]] = []
    pictures: list[tuple[str, tuple[Image.Image, ...]]] = []

    def note(tasks: Sequence[str], asked: str, grade: Grade) -> None:
        for task in tasks:
            grades[task].append(grade)
        if not grade.right():
            failures.append((asked, "; ".join(grade.why)))
        on_sample(1)

    images = [name for name in TARGETS if name.startswith("images")]
    for i, painting in _together(
        [draw_painting(Random(f"{seed}/paint/{i}"), held_out=True) for i in range(samples)]
    ):
        requests = [
            Request(
                [each.caption.text],
                "image",
                height=each.scene.height,
                width=each.scene.width,
                settings=ImageSettings(**changes),
                seed=i + k,
            )
            for k, each in enumerate(painting)
        ]
        for each, result in zip(painting, pipeline.run(requests), strict=True):
            drawn = through_vae(pipeline, draw_image(each.scene))
            grades["reconstructions: the VAE alone"].append(grade_scene(drawn, each.scene))
            note(images, each.caption.text, grade_painting(result.image, each.caption))
            pictures.append((each.caption.text, (result.image,)))

    edits = [name for name in TARGETS if name.startswith("edits")]
    for i, several in _together(
        [draw_edit(Random(f"{seed}/edit/{i}"), held_out=True) for i in range(samples)]
    ):
        befores = [draw_image(edit.before) for edit in several]
        requests = [
            Request(
                [before, edit.text],
                "image",
                settings=ImageSettings.for_editing(**changes),
                seed=i + k,
            )
            for k, (edit, before) in enumerate(zip(several, befores, strict=True))
        ]
        for edit, before, result in zip(several, befores, pipeline.run(requests), strict=True):
            note(edits, edit.text, grade_edit(result.image, edit))
            pictures.append((edit.text, (before, result.image)))

    for task, question in _questions(samples, seed):
        shown = None if question.told else draw_image(question.scene)
        answer = pipeline.ask(shown, question.prompt, max_text_tokens=40)
        note([task], question.prompt, grade_answer(answer, question))
    return Quality([_result(task, grades[task]) for task in TARGETS], failures, pictures)


@torch.no_grad()
def through_vae(pipeline: BagelPipeline, image: Image.Image) -> Image.Image:
    """A picture encoded and decoded: no painting can be better."""
    vae = pipeline.model.vae
    pixels = to_tensor(image)[None].to(pipeline.model.device)
    moments = vae.moments(pixels)
    latent = vae.encode(pixels, torch.zeros_like(moments[:, : vae.cfg.z_channels]).float())
    return to_image(vae.decode(latent)[0])


def contact_sheet(pictures: Sequence[tuple[Image.Image, ...]], columns: int = 8) -> Image.Image:
    """Pictures on one, each entry's side by side."""
    cell = max(max(image.size) for entry in pictures for image in entry) + 4
    across = max(map(len, pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (across * cell + 8), rows * cell), (255, 255, 255))
    for number, entry in enumerate(pictures):
        for k, image in enumerate(entry):
            left = number % columns * (across * cell + 8) + k * cell
            sheet.paste(image, (left + 2, number // columns * cell + 2))
    return sheet


def _questions(samples: int, seed: int) -> Iterator[tuple[str, Question]]:
    """`samples` questions of each kind, and as many about scenes in words."""
    for task, kinds in _QUESTIONS.items():
        found = i = 0
        while found < samples:
            question = draw_question(Random(f"{seed}/ask/{task}/{i}"), held_out=True)
            i += 1
            if question.task in kinds:
                found += 1
                yield task, question
    for i in range(samples):
        told = draw_question(Random(f"{seed}/told/{i}"), held_out=True, told=True)
        yield "questions about words alone", told


def _together(items: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Slices of a list, each with the number of its first item."""
    for first in range(0, len(items), _TOGETHER):
        yield first, items[first : first + _TOGETHER]


def _result(task: str, grades: Sequence[Grade]) -> TaskResult:
    names, target = TARGETS[task]
    points: dict[str, tuple[int, int]] = {}
    for grade in grades:
        for name, ok in grade.points.items():
            asked, right = points.get(name, (0, 0))
            points[name] = (asked + 1, right + ok)
    return TaskResult(
        task, len(grades), sum(grade.right(*names) for grade in grades), target, points
    )
