"""Several users of static buffers, in one batch or in turn, leave one another alone; on a CPU."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from golden_data import assert_close
from small_images import GRID, GUIDED, contexts_of, noise_of, paint
from torch import Tensor

from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, Step


@pytest.mark.parametrize("grids", [(GRID, GRID), (GRID, (2, 2))], ids=["same-shape", "another"])
def test_two_batches_in_turn(roomy: BagelPipeline, grids: tuple[tuple[int, int], ...]) -> None:
    """Batches that take turns on one workspace leave one another alone."""
    workspace = Workspace(roomy.model)
    jobs = [
        ImageJob(contexts_of(roomy, text), noise_of(i, grid), grid, GUIDED)
        for i, (text, grid) in enumerate(zip(("a fox", "a red cat"), grids, strict=True))
    ]
    batches = [Denoising(roomy.model, roomy.tokenizer, [job], workspace=workspace) for job in jobs]
    while not all(job.done for job in jobs):
        for batch in batches:
            batch.step()
    for i, (job, text) in enumerate(zip(jobs, ("a fox", "a red cat"), strict=True)):
        assert_close("image", job.latents, paint(roomy, text, i, grid=grids[i]))


def test_batch_changes_while_images_are_denoised(roomy: BagelPipeline) -> None:
    """One image leaves and another joins between steps, and they change places."""
    workspace = Workspace(roomy.model)
    texts = ("a fox", "a cat", "an owl")
    jobs = [
        ImageJob(contexts_of(roomy, text), noise_of(i), GRID, GUIDED)
        for i, text in enumerate(texts)
    ]
    for members in ((0, 1), (1, 0), (1, 2), (2, 0), (0, 1, 2), (0, 1, 2), (0, 1, 2)):
        batch = Denoising(
            roomy.model, roomy.tokenizer, [jobs[i] for i in members], workspace=workspace
        )
        batch.step()
    assert all(job.done for job in jobs)
    for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
        assert_close("image", job.latents, paint(roomy, text, i))


def test_job_that_another_batch_moves_on(roomy: BagelPipeline) -> None:
    """Two batches that share a job and take its steps in turn."""
    workspace = Workspace(roomy.model)
    texts = ("a fox", "a cat")
    jobs = [
        ImageJob(contexts_of(roomy, text), noise_of(i), GRID, GUIDED)
        for i, text in enumerate(texts)
    ]
    one, both = (
        Denoising(roomy.model, roomy.tokenizer, members, workspace=workspace)
        for members in (jobs[:1], jobs)
    )
    for batch in (one, both, one, both):
        batch.step()
    while not all(job.done for job in jobs):
        both.step()
    for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
        assert_close("image", job.latents, paint(roomy, text, i))


def test_latents_put_in_place_between_steps(roomy: BagelPipeline) -> None:
    job = ImageJob(contexts_of(roomy, "a fox"), noise_of(0), GRID, GUIDED)
    batch = Denoising(roomy.model, roomy.tokenizer, [job], workspace=Workspace(roomy.model))
    batch.step()
    moved = job.latents * 0.5
    job.latents = moved.clone()
    (step,) = batch.step()
    dt = float(job.timesteps[1]) - float(job.timesteps[2])
    assert_close("image", job.latents, moved - step.velocity * dt)


def test_kept_steps_stay(roomy: BagelPipeline) -> None:
    job = ImageJob(contexts_of(roomy, "a fox"), noise_of(0), GRID, GUIDED)
    batch = Denoising(roomy.model, roomy.tokenizer, [job])
    kept: list[Step] = []
    values: list[Tensor] = []
    while not job.done:
        (step,) = batch.step()
        kept.append(step.kept())
        values.append(step.latents.clone())
        assert kept[-1].job is job
    for step, value in zip(kept, values, strict=True):
        assert torch.equal(step.latents, value)
    assert torch.equal(kept[-1].latents, job.latents)


def test_workspace_keeps_no_request_alive(roomy: BagelPipeline) -> None:
    """Contexts hold gigabytes: buffers for the next request must not."""
    workspace = Workspace(roomy.model)
    contexts = contexts_of(roomy, "a fox")
    job = ImageJob(contexts, noise_of(0), GRID, GUIDED)
    Denoising(roomy.model, roomy.tokenizer, [job], workspace=workspace).step()
    gone = weakref.ref(job), weakref.ref(contexts.main.cache)
    del job, contexts
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert_close("image", paint(roomy, "a cat", 1, workspace=workspace), paint(roomy, "a cat", 1))
