"""CUDA graphs: the same images and texts with and without, and no waiting in the loop."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, Judge, relative_error
from golden_requests import (
    RecordedNoise,
    paint_and_judge,
    pipeline_for,
    request_parts,
    settings_of,
)

from bagel_mot.context import Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Request
from bagel_mot.sampling import ImageJob, ImageSettings
from bagel_mot.text import TextJob, fed_tokens, generate_texts

pytestmark = pytest.mark.gpu
BACKENDS = ["fa3", "fa2", "cudnn", "sdpa", "math"]


def load(attention: str | None = None, cuda_graphs: bool = True) -> BagelPipeline:
    try:
        return BagelPipeline.from_pretrained(
            GOLDEN.checkpoint, device="cuda", attention=attention, cuda_graphs=cuda_graphs
        )
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def graphed() -> BagelPipeline:
    return load()


@pytest.fixture(scope="module")
def eager() -> BagelPipeline:
    return load(cuda_graphs=False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, says torch
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(pipeline: BagelPipeline) -> int:
    return len(pipeline.workspace._graphs)


def jobs_of(pipeline: BagelPipeline, prompts: list[str], size: int = 128) -> list[ImageJob]:
    settings = ImageSettings(num_timesteps=8, cfg_img_scale=1.5)
    jobs = []
    for seed, prompt in enumerate(prompts):
        request = Request([prompt], "image", height=size, width=size, settings=settings, seed=seed)
        jobs += pipeline.prepare(request).jobs
    return jobs


@pytest.mark.parametrize("name", [name for name in GOLDEN.names if name[0] in "ab"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_golden_image(
    graphed: BagelPipeline, eager: BagelPipeline, graphs: bool, name: str
) -> None:
    """Twice: the second time everything is replayed from the start."""
    pipeline = graphed if graphs else eager
    for _ in range(2):
        paint_and_judge(pipeline, Judge(torch.bfloat16), GOLDEN.case(name))
    assert bool(captured(pipeline)) == graphs


@pytest.mark.parametrize("attention", BACKENDS)
def test_golden_image_with_each_backend(attention: str) -> None:
    pipeline = load(attention)
    for name in ("a1", "b1"):
        for _ in range(2):
            paint_and_judge(pipeline, Judge(torch.bfloat16), GOLDEN.case(name))
    assert captured(pipeline)


def test_steps_do_not_wait(graphed: BagelPipeline) -> None:
    """All of a batch's steps, moving in included, once the shape is known."""
    prompts = ["a fox", "a much longer description of a cat"]
    for attempt in range(3):  # a selection that is used once a request is captured in the second
        jobs = jobs_of(graphed, prompts)
        denoising = Denoising(graphed.model, graphed.tokenizer, jobs, workspace=graphed.workspace)
        torch.cuda.synchronize()
        with no_waiting() if attempt == 2 else nullcontext():
            while not all(job.done for job in jobs):
                denoising.step()
        torch.cuda.synchronize()


def test_replay_is_exact(graphed: BagelPipeline) -> None:
    """A graph over buffers that others used since gives the same image to the last bit."""

    def paint(prompt: str, seed: int) -> bytes:
        settings = ImageSettings(num_timesteps=6)
        result = graphed.generate(prompt, height=64, width=96, seed=seed, settings=settings)
        return result.image.tobytes()

    paint("a fox", 3)
    first = paint("a fox", 3)
    other = paint("a very long-winded description of another animal", 4)
    before = captured(graphed)
    assert paint("a fox", 3) == first != other
    assert captured(graphed) == before


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_batched_as_alone(graphed: BagelPipeline, eager: BagelPipeline, graphs: bool) -> None:
    """A request's image does not depend on its neighbours, but for bfloat16's rounding.

    `run` paints recorded cases together; each is judged by its own recording.
    """
    pipeline = graphed if graphs else eager
    cases = [GOLDEN.case(name) for name in ("a1", "a2", "a4")]
    prepared = []
    for case in cases:
        height, width = case.json["image"]["shape"]
        request = Request(
            request_parts(case), "image", height=height, width=width, settings=settings_of(case)
        )
        own = pipeline_for(pipeline, case)
        prepared.append(own.prepare(request, noise=RecordedNoise(case)))
    pipeline.denoise([job for each in prepared for job in each.jobs])
    for case, each in zip(cases, prepared, strict=True):
        judge = Judge(torch.bfloat16)
        judge.check(case, "gen.final_latent", each.jobs[0].latents)
        judge.assert_nothing_missed(case, "gen.final")


def test_graphs_and_eager_agree(graphed: BagelPipeline, eager: BagelPipeline) -> None:
    """The same kernels: to the last bit, unless a kernel's own choice differs."""

    def paint(pipeline: BagelPipeline) -> list[torch.Tensor]:
        jobs = jobs_of(pipeline, ["a fox", "a cat on a mat"])
        pipeline.denoise(jobs)
        return [job.latents for job in jobs]

    for _ in range(2):
        for got, want in zip(paint(graphed), paint(eager), strict=True):
            assert relative_error(got.cpu(), want.cpu()) <= 6e-3


def test_memory_stays(graphed: BagelPipeline) -> None:
    """Prompts of many lengths need no more memory than one: their graphs are the same."""
    if not graphed.model.attention.device_lengths:
        pytest.skip("this attention backend has a graph for each length")

    def paint(words: int) -> None:
        settings = ImageSettings(num_timesteps=4)
        graphed.generate("fox " * words, height=64, width=64, seed=1, settings=settings)

    paint(2)
    paint(2)
    gc.collect()
    graphs, memory = captured(graphed), torch.cuda.memory_allocated()
    for words in range(1, 12):
        paint(words)
    gc.collect()
    assert captured(graphed) == graphs
    assert torch.cuda.memory_allocated() - memory < 2**20


def test_pixels_are_close(graphed: BagelPipeline, eager: BagelPipeline) -> None:
    """From the prompt to the picture."""
    settings = ImageSettings(num_timesteps=5)
    pictures = [
        np.asarray(
            each.generate("a fox", height=64, width=64, seed=1, settings=settings).image, np.int32
        )
        for each in (graphed, eager)
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1.0


# --- text


TEXT_CASES = [name for name in GOLDEN.names if name[0] in "cd"]


def answers(pipeline: BagelPipeline, limit: int = 40) -> list[str]:
    """Greedy answers to the recorded questions, one after the other."""
    found = []
    for name in TEXT_CASES:
        case = GOLDEN.case(name)
        request = Request(request_parts(case), "text", max_text_tokens=limit, seed=0)
        (result,) = pipeline_for(pipeline, case).run([request])
        found.append(result.text)
    return found


def test_text_with_graphs(graphed: BagelPipeline, eager: BagelPipeline) -> None:
    first = answers(graphed)
    assert captured(graphed)
    # Replayed from the start, over other texts' buffers.
    assert answers(graphed) == first == answers(eager)


@pytest.mark.parametrize("attention", BACKENDS)
def test_text_with_each_backend(attention: str) -> None:
    """The recorded answers, up to a step that is too close to call in bfloat16."""
    pipeline = load(attention)
    for name in TEXT_CASES:
        case = GOLDEN.case(name)
        own = pipeline_for(pipeline, case)
        limit = case.json["params"]["max_think_token_n"]
        want = case.tensors["text0.token_ids"].tolist()
        request = Request(request_parts(case), "text", max_text_tokens=limit, seed=0)
        reading = own._read(request)
        job = reading.text_job(own.tokenizer, lambda: None)
        generate_texts(own.model, own.tokenizer, [job], workspace=own.workspace)
        fed = fed_tokens(own.tokenizer, job)
        Judge(torch.bfloat16).equal_tokens(fed, want, case.json["texts"][0]["margins"])


def test_texts_together(graphed: BagelPipeline) -> None:
    """Several texts at a time: their logits are those of each alone, but for rounding."""
    prompts = ["How long is a year?", "x", "Tell me of the sea. " * 30, "What is this?"]

    def write(some: list[str]) -> list[tuple[list[int], torch.Tensor]]:
        logits: list[list[torch.Tensor]] = [[] for _ in some]
        jobs = []
        for prompt, own in zip(some, logits, strict=True):
            contexts = Contexts(graphed.model, graphed.tokenizer)
            contexts.add_text(prompt)
            jobs.append(TextJob(contexts.main, 6, on_logits=own.append))
        generate_texts(graphed.model, graphed.tokenizer, jobs, workspace=graphed.workspace)
        return [(job.chosen, torch.cat(own)) for job, own in zip(jobs, logits, strict=True)]

    together = write(prompts)
    for i, prompt in enumerate(prompts):
        ((chosen, want),) = write([prompt])
        same = 1  # steps up to the first that chose otherwise had the same input
        while same < len(chosen) and together[i][0][:same] == chosen[:same]:
            same += 1
        error = relative_error(together[i][1][:same].cpu(), want[:same].cpu())
        assert error <= 2e-2, f"text {i}: error {error:.2e}"


def test_text_does_not_wait(graphed: BagelPipeline) -> None:
    """But for the token before, through an event."""
    contexts = Contexts(graphed.model, graphed.tokenizer)
    contexts.add_text("How long is a year?")
    for attempt in range(3):
        job = TextJob(contexts.main, 20)
        with no_waiting() if attempt == 2 else nullcontext():
            generate_texts(graphed.model, graphed.tokenizer, [job], workspace=graphed.workspace)
    assert job.chosen
