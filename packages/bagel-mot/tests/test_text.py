"""Writing several texts at a time over static buffers: each is what it would be alone."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from alone import generate_text
from golden_data import GOLDEN, relative_error
from torch import Tensor
from traced import TracingWorkspace
from watched import forwards

from bagel_mot import text as text_module
from bagel_mot.context import Context, Contexts, append_text
from bagel_mot.graphs import Workspace
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Request
from bagel_mot.text import TextJob, fed_tokens, generate_texts

PROMPTS = [
    "How long is a year?",
    "Write a poem about the sea, the wind and the long way home.",
    "x",
    "What animal is this? " * 24,
]


def context_of(pipeline: BagelPipeline, prompt: str) -> Context:
    contexts = Contexts(pipeline.model, pipeline.tokenizer)
    contexts.add_text(prompt)
    return contexts.main


def alone(cpu: BagelPipeline, prompt: str, **options: Any) -> list[int]:
    return generate_text(cpu.model, cpu.tokenizer, context_of(cpu, prompt), **options)


def by_appending(cpu: BagelPipeline, prompt: str, steps: int) -> tuple[list[int], Tensor]:
    """Greedy decoding as a growing context: tokens chosen, and logits."""
    context, token, chosen, logits = context_of(cpu, prompt), cpu.tokenizer.bos, [], []
    with torch.no_grad():
        for _ in range(steps):
            context, hidden = append_text(cpu.model, context, [token])
            logits.append(cpu.model.logits(hidden))
            token = int(logits[-1][0].argmax())
            chosen.append(token)
            if token == cpu.tokenizer.eos:
                break
    return chosen, torch.cat(logits)


@pytest.fixture(params=["sdpa", "math"])
def either(request: pytest.FixtureRequest) -> BagelPipeline:
    return BagelPipeline.from_pretrained(
        GOLDEN.checkpoint, device="cpu", dtype="float32", attention=request.param
    )


def test_decoding_in_place_is_appending(either: BagelPipeline) -> None:
    """Logits of every step, past the first 256 rows too (where SDPA looks at more)."""
    for prompt in PROMPTS:
        logits: list[Tensor] = []
        job = TextJob(context_of(either, prompt), 20, on_logits=logits.append)
        generate_texts(either.model, either.tokenizer, [job])
        chosen, want = by_appending(either, prompt, 20)
        assert job.chosen == chosen
        assert relative_error(torch.cat(logits), want) <= GOLDEN.fp32_bound
    assert context_of(either, PROMPTS[-1]).length + 20 > 256


def test_together_as_alone(cpu: BagelPipeline) -> None:
    limits = [5, 40, 1, 12]
    jobs = [
        TextJob(context_of(cpu, prompt), limit)
        for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    with forwards(cpu.model) as calls:
        generate_texts(cpu.model, cpu.tokenizer, jobs)
    assert set(calls) == {4} and len(calls) == max(len(job.chosen) for job in jobs)
    for job, prompt, limit in zip(jobs, PROMPTS, limits, strict=True):
        assert fed_tokens(cpu.tokenizer, job) == alone(cpu, prompt, max_tokens=limit)
        assert 1 <= len(job.chosen) <= limit


def test_three_texts_are_written_as_four(cpu: BagelPipeline) -> None:
    """Numbers of texts are rounded up to powers of two; nobody sees the text that is too many."""
    jobs = [TextJob(context_of(cpu, prompt), 6) for prompt in PROMPTS[:3]]
    with forwards(cpu.model) as calls:
        generate_texts(cpu.model, cpu.tokenizer, jobs)
    assert set(calls) == {4}
    for job, prompt in zip(jobs, PROMPTS, strict=False):
        assert fed_tokens(cpu.tokenizer, job) == alone(cpu, prompt, max_tokens=6)


def test_a_text_that_is_done_does_not_run_into_its_neighbour(
    cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ends at once with its room nearly full, and is computed on with the second."""
    monkeypatch.setattr(text_module, "_ROOM_STEP", 16)
    long, short = context_of(cpu, PROMPTS[3]), context_of(cpu, PROMPTS[0])
    jobs = [TextJob(long, 2), TextJob(short, 60)]
    room = text_module._room(jobs[0])
    assert long.length + 60 > room >= short.length + 60
    generate_texts(cpu.model, cpu.tokenizer, jobs)
    assert fed_tokens(cpu.tokenizer, jobs[1]) == alone(cpu, PROMPTS[0], max_tokens=60)


def test_sampled_and_greedy_together(cpu: BagelPipeline) -> None:
    """Each text draws from its own generator, in its own order."""

    def job(i: int) -> TextJob:
        temperature = None if i == 1 else 1.5
        generator = torch.Generator().manual_seed(i)
        return TextJob(context_of(cpu, PROMPTS[i]), 15, temperature, generator)

    jobs = [job(i) for i in range(4)]
    generate_texts(cpu.model, cpu.tokenizer, jobs)
    for i, together in enumerate(jobs):
        own = job(i)
        generate_texts(cpu.model, cpu.tokenizer, [own])
        assert together.chosen == own.chosen


def test_texts_are_split_by_room(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_ROWS_TOGETHER", 2 * 1024)
    jobs = [TextJob(context_of(cpu, prompt), 3) for prompt in (*PROMPTS, *PROMPTS[:1])]
    with forwards(cpu.model) as calls:
        generate_texts(cpu.model, cpu.tokenizer, jobs)
    assert set(calls) <= {1, 2} and max(calls) == 2
    for job in jobs:
        assert job.chosen
    assert jobs[0].chosen == jobs[4].chosen


def test_reading_one_token_behind(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step more is made than tokens are wanted, and nobody sees it."""
    plain = text_module._Texts.__init__

    def on_gpu(self: Any, *args: Any) -> None:
        plain(self, *args)
        self.on_gpu = True

    wanted = [alone(cpu, prompt, max_tokens=9) for prompt in PROMPTS]
    monkeypatch.setattr(text_module._Texts, "__init__", on_gpu)
    for prompt, want in zip(PROMPTS, wanted, strict=True):
        seen: list[int] = []
        with forwards(cpu.model) as calls:
            fed = alone(cpu, prompt, max_tokens=9, on_token=seen.append)
        assert fed == want and len(seen) == len(want)
        assert len(calls) - 1 in (len(seen), len(seen) + 1) and len(calls) - 1 <= 9


def test_one_shape_for_prompts_of_many_lengths(cpu: BagelPipeline) -> None:
    workspace = Workspace(cpu.model)
    for prompt in PROMPTS:
        got = alone(cpu, prompt, max_tokens=5, workspace=workspace)
        assert got == alone(cpu, prompt, max_tokens=5)
    assert len(workspace._shapes) == 1


def test_pipeline_used_from_on_token(cpu: BagelPipeline) -> None:
    """Whatever else runs in between on the same buffers, the text goes on as it was."""
    workspace = Workspace(cpu.model)
    want = alone(cpu, PROMPTS[0], max_tokens=8)

    def interrupt(_token: int) -> None:
        alone(cpu, PROMPTS[1], max_tokens=3, workspace=workspace)

    got = alone(cpu, PROMPTS[0], max_tokens=8, workspace=workspace, on_token=interrupt)
    assert got == want


def test_workspace_keeps_no_text_alive(cpu: BagelPipeline) -> None:
    """Nor copies it for whoever comes next, once it is written or given up."""
    workspace = Workspace(cpu.model)

    def give_up(_token: int) -> None:
        raise KeyError("enough")

    for on_token in (None, give_up):
        context = context_of(cpu, PROMPTS[0])
        job = TextJob(context, 3, on_token=on_token)
        with suppress(KeyError):
            generate_texts(cpu.model, cpu.tokenizer, [job], workspace=workspace)
        assert workspace.on_leave is None
        gone = weakref.ref(context.cache)
        del context, job
        gc.collect()
        assert gone() is None


def test_run_writes_texts_together(cpu: BagelPipeline) -> None:
    requests = [
        Request([prompt], "text", max_text_tokens=10, seed=i, temperature=[None, 1.2][i % 2])
        for i, prompt in enumerate(PROMPTS)
    ]
    with forwards(cpu.model) as calls:
        together = cpu.run(requests)
    assert 4 in calls
    assert [result.text for result in together] == [cpu.run([one])[0].text for one in requests]


def test_no_texts() -> None:
    generate_texts(None, None, [], workspace=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("together", [1, 4])
def test_replays_are_what_is_called(either: BagelPipeline, together: int) -> None:
    """Prompts, lengths and neighbours are not baked into a graph."""
    workspace = TracingWorkspace(either.model)
    for i in range(5):
        prompts = [PROMPTS[(i + j) % 4] for j in range(together)]
        jobs = [TextJob(context_of(either, prompt), 20) for prompt in prompts]
        generate_texts(either.model, either.tokenizer, jobs, workspace=workspace)
        for job, prompt in zip(jobs, prompts, strict=True):
            assert fed_tokens(either.tokenizer, job) == alone(either, prompt, max_tokens=20)
    # SDPA looks at 256 or at 512 rows.
    assert len(workspace.traces) == (1 if either.model.attention.device_lengths else 2)
    assert sum(trace.replays for trace in workspace.traces) >= 20
