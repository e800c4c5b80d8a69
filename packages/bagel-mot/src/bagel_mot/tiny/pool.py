"""Training samples as tensors, drawn once before training, in worker processes.

Sample i of a pool depends on the seed and i alone, so a pool is the same however many workers
make it. Scenes are kept as numbers and drawn on the device, batch by batch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from bagel_mot.tiny.drawing import SceneArrays
from bagel_mot.tiny.language import draw_edit, draw_painting, draw_question
from bagel_mot.tiny.scenes import Scene
from bagel_mot.tokenizer import BagelTokenizer

TASKS = ("paint", "edit", "ask")
# Of the questions, those about a scene that is described, not shown.
_TOLD = 0.15
# Of scenes of one thing, which are soon painted well, those drawn again when something is painted.
_AGAIN = 0.5
_CHUNK = 2000


@dataclass(frozen=True)
class Pool:
    """n samples of one task, pictures of one size.

    Attributes:
        size: (height, width) in pixels.
        scenes: what is to be painted; for questions, what they are about.
        sources: the pictures to edit; equal to `scenes` for other tasks.
        tokens: (n, T) int64, what is said, filled up with zeros. For questions: the question's
            block, then the answer's.
        lengths: (n,) int64, tokens that are no filling.
        answers: (n,) int64, place of the answer's start token; 0 for other tasks.
        shown: (n,) bool, whether the question's picture is shown.
        moments: (n, k, 32, H/8, W/8), what the VAE makes of `scenes` and, for edits, of `sources`,
            once it has learnt; see `Objectives.encode`.
    """

    size: tuple[int, int]
    scenes: SceneArrays
    sources: SceneArrays
    tokens: Tensor
    lengths: Tensor
    answers: Tensor
    shown: Tensor
    moments: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, index: Tensor) -> Pool:
        """The samples of these numbers."""
        return Pool(
            self.size,
            self.scenes.select(index),
            self.sources.select(index),
            self.tokens[index],
            self.lengths[index],
            self.answers[index],
            self.shown[index],
            None if self.moments is None else self.moments[index],
        )

    def to(self, device: torch.device) -> Pool:
        """The same on a device."""
        parts = {
            name: getattr(self, name).to(device)
            for name in ("scenes", "sources", "tokens", "lengths", "answers", "shown", "moments")
            if getattr(self, name) is not None
        }
        return replace(self, **parts)


# A part of a pool on its way from a worker: by value, as numpy arrays go. Tensors would each take
# a file descriptor of the receiving process.
_Arrays: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Job:
    """A part of a pool: samples `first` to `first + count`."""

    task: str
    size: tuple[int, int]
    seed: int
    first: int
    count: int
    folder: Path


def make_pools(
    folder: Path,
    samples: int,
    sizes: Sequence[tuple[int, int]],
    *,
    first: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> dict[str, list[Pool]]:
    """Pools for every task, one for each size.

    Args:
        folder: where the tokenizer is.
        samples: per task and size.
        first: number of the first one.
        workers: processes; 0 makes everything in this one.
    """
    jobs = [
        _Job(task, size, seed, first + done, min(_CHUNK, samples - done), folder)
        for task in TASKS
        for size in sizes
        for done in range(0, samples, _CHUNK)
    ]
    with ExitStack() as stack:
        parts: Iterable[_Arrays] = map(_make, jobs)
        if workers:
            # Not forked: torch's threads do not survive that.
            context = multiprocessing.get_context("spawn")
            executor: Executor = ProcessPoolExecutor(workers, mp_context=context)
            parts = stack.enter_context(executor).map(_make, jobs)
        made = list(zip(jobs, parts, strict=True))
    return {
        task: [
            _joined(size, [part for job, part in made if (job.task, job.size) == (task, size)])
            for size in sizes
        ]
        for task in TASKS
    }


def _make(job: _Job) -> _Arrays:
    tokenizer = BagelTokenizer.from_folder(job.folder)
    scenes: list[Scene] = []
    sources: list[Scene] = []
    said: list[list[int]] = []
    answers: list[int] = []
    shown: list[bool] = []
    for i in range(job.first, job.first + job.count):
        random = Random(f"{job.seed}/{job.task}/{job.size}/{i}")
        answer: list[int] = []
        picture = True
        if job.task == "paint":
            painting = draw_painting(random, size=job.size)
            if len(painting.scene.things) == 1 and random.random() < _AGAIN:
                painting = draw_painting(random, size=job.size)
            scene = source = painting.scene
            text = painting.caption.text
        elif job.task == "edit":
            edit = draw_edit(random, size=job.size)
            scene, source, text = edit.after, edit.before, edit.text
        else:
            picture = random.random() >= _TOLD
            question = draw_question(random, size=job.size, told=not picture)
            scene = source = question.scene
            text = question.prompt
            answer = tokenizer.text_segment(question.answer)
        block = tokenizer.text_segment(text)
        scenes.append(scene)
        sources.append(source)
        said.append(block + answer)
        answers.append(len(block) if answer else 0)
        shown.append(picture)
    tokens = np.zeros((job.count, max(map(len, said))), dtype=np.int64)
    for row, ids in zip(tokens, said, strict=True):
        row[: len(ids)] = ids
    arrays = {
        "tokens": tokens,
        "lengths": np.array([len(ids) for ids in said]),
        "answers": np.array(answers),
        "shown": np.array(shown),
    }
    for name, drawn in (("scenes", scenes), ("sources", sources)):
        packed = SceneArrays.of(drawn)
        for field in fields(packed):
            arrays[f"{name}.{field.name}"] = getattr(packed, field.name).numpy()
    return arrays


def _joined(size: tuple[int, int], parts: Sequence[_Arrays]) -> Pool:
    """One pool of the parts, in order."""
    longest = max(part["tokens"].shape[1] for part in parts)
    for part in parts:
        filling = longest - part["tokens"].shape[1]
        part["tokens"] = np.pad(part["tokens"], ((0, 0), (0, filling)))
    whole = {name: torch.from_numpy(np.concatenate([p[name] for p in parts])) for name in parts[0]}
    scenes, sources = (
        SceneArrays(**{each.name: whole[f"{name}.{each.name}"] for each in fields(SceneArrays)})
        for name in ("scenes", "sources")
    )
    return Pool(
        size,
        scenes,
        sources,
        whole["tokens"],
        whole["lengths"],
        whole["answers"],
        whole["shown"],
    )
