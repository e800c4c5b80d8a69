"""Denoising: its steps by README section 3, the contexts it reads, and several images together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from alone import denoise
from context_rules import NAMES, PlainContexts, feed, request_items, rows
from golden_data import assert_close
from guidance_rules import RENORMS, guide_by_the_rules
from torch import Tensor
from watched import forwards, poison_caches

from bagel_mot.context import Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, ImageSettings, Step

GRID = (3, 5)
TOKENS = GRID[0] * GRID[1]
GUIDED = ImageSettings(num_timesteps=3, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))


def contexts_of(cpu: BagelPipeline, letters: str) -> Contexts:
    contexts = Contexts(cpu.model, cpu.tokenizer)
    for item in request_items(cpu.config, letters):
        feed(contexts, item)
    return contexts


def noise_of(seed: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed))


def paint(
    cpu: BagelPipeline,
    contexts: Contexts,
    settings: ImageSettings,
    seed: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    return denoise(cpu.model, contexts, noise_of(seed), GRID, settings, on_step)


@pytest.mark.parametrize("renorm", RENORMS)
def test_denoise_steps(cpu: BagelPipeline, renorm: str) -> None:
    """What a callback sees: times, velocities combined by the rules, Euler steps."""
    settings = ImageSettings(
        num_timesteps=5, cfg_img_scale=2.0, cfg_interval=(0.5, 0.95), cfg_renorm_type=renorm
    )
    steps: list[Step] = []
    x = noise_of(0)
    final = paint(cpu, contexts_of(cpu, "tpt"), settings, on_step=steps.append)
    timesteps = settings.timesteps()
    guided = settings.guided(timesteps)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert guided == [False, True, True, False]
    for step, on in zip(steps, guided, strict=True):
        assert step.total == 4
        assert step.t == float(timesteps[step.index])
        assert len(step.velocities) == (3 if on else 1)
        v = guide_by_the_rules(settings, *step.velocities) if on else step.velocities[0]
        assert_close("velocity", step.velocity, v)
        dt = float(timesteps[step.index]) - float(timesteps[step.index + 1])
        x = x - step.velocity * dt
        assert_close("latents", step.latents, x)
    assert torch.equal(final, steps[-1].latents)


@pytest.mark.parametrize(
    ("letters", "changes", "read", "copies"),
    [
        pytest.param("t", {}, NAMES[:2], [2, 2], id="no-picture-no_image-is-main"),
        pytest.param("tt", {}, NAMES[:2], [2, 2], id="texts-no_image-is-main"),
        pytest.param("sth", {}, NAMES, [3, 3], id="thought-makes-three"),
        pytest.param("pt", {}, NAMES, [3, 3], id="picture-text"),
        pytest.param("tp", {}, ["main", "no_image"], [2, 2], id="picture-last-no_text-is-main"),
        pytest.param("pt", {"cfg_img_scale": 1.0}, NAMES[:2], [2, 2], id="no-image-scale"),
        pytest.param("tp", {"cfg_img_scale": 1.0}, NAMES[:1], [1, 1], id="picture-last-no-image"),
        pytest.param("pt", {"cfg_text_scale": 1.0}, NAMES[:1], [1, 1], id="no-text-scale"),
        pytest.param("pt", {"cfg_interval": (0.8, 1.0)}, NAMES, [3, 1], id="interval-ends"),
        pytest.param("pt", {"cfg_interval": (0.0, 0.8)}, NAMES, [1, 3], id="interval-begins"),
    ],
)
def test_equal_contexts_are_evaluated_once(
    cpu: BagelPipeline,
    monkeypatch: pytest.MonkeyPatch,
    letters: str,
    changes: dict[str, Any],
    read: list[str],
    copies: list[int],
) -> None:
    """One copy of the image block for each distinct context that is read: rows, and cache."""
    contexts = contexts_of(cpu, letters)
    capacities = []
    new_cache = type(cpu.model).new_cache

    def counted(model: Bagel, capacity: int, *others: Any) -> KVCache:
        capacities.append(capacity)
        return new_cache(model, capacity, *others)

    monkeypatch.setattr(type(cpu.model), "new_cache", counted)
    with forwards(cpu.model) as packed:
        paint(cpu, contexts, GUIDED.model_copy(update=changes))
    assert packed == [count * (TOKENS + 2) for count in copies]
    assert capacities == [sum(getattr(contexts, name).length + TOKENS + 2 for name in read)]


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("letters", ["t", "tp"], ids=["no_image-is-main", "no_text-is-main"])
def test_equal_contexts_give_what_distinct_ones_give(
    cpu: BagelPipeline, letters: str, renorm: str
) -> None:
    """The same image as with three contexts that only happen to hold the same rows."""
    settings = GUIDED.model_copy(update={"cfg_renorm_type": renorm})
    contexts = contexts_of(cpu, letters)
    copies = {}
    for name in NAMES:
        context = getattr(contexts, name)
        cache = cpu.model.new_cache(context.length + 1)
        cache.copy_rows(context.cache, context.length, 0)
        copies[name] = replace(context, cache=cache)
    distinct = PlainContexts(cpu.tokenizer, **copies).typed()
    with forwards(cpu.model) as shared_rows:
        shared = paint(cpu, contexts, settings)
    with forwards(cpu.model) as distinct_rows:
        wanted = paint(cpu, distinct, settings)
    assert (shared_rows, distinct_rows) == ([34, 34], [51, 51])
    assert_close("latents", shared, wanted)


def test_denoise_has_no_memory(cpu: BagelPipeline) -> None:
    """The same noise gives the same latents to the last bit, whatever came between."""
    contexts, other = contexts_of(cpu, "tpt"), contexts_of(cpu, "pp")
    noise = noise_of(0)
    first = denoise(cpu.model, contexts, noise, GRID, GUIDED)
    denoise(cpu.model, other, noise_of(1, 4), (2, 2), ImageSettings(num_timesteps=4))
    assert not torch.equal(paint(cpu, contexts, GUIDED, seed=1), first)
    assert torch.equal(denoise(cpu.model, contexts, noise, GRID, GUIDED), first)
    assert torch.equal(noise, noise_of(0))


def test_denoise_leaves_contexts_alone(cpu: BagelPipeline) -> None:
    contexts = contexts_of(cpu, "tpt")
    before = [(getattr(contexts, name), rows(getattr(contexts, name))) for name in NAMES]
    paint(cpu, contexts, GUIDED)
    for name, (context, kept) in zip(NAMES, before, strict=True):
        assert getattr(contexts, name) is context
        assert torch.equal(rows(context), kept)


def test_denoise_reads_no_unwritten_row(
    cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = contexts_of(cpu, "tpt")
    settings = GUIDED.model_copy(update={"cfg_interval": (0.8, 1.0)})
    want = paint(cpu, contexts, settings)
    poison_caches(monkeypatch)
    assert torch.equal(paint(cpu, contexts, settings), want)


def test_exception_in_on_step_stops(cpu: BagelPipeline) -> None:
    contexts = contexts_of(cpu, "pt")
    want = paint(cpu, contexts, GUIDED)
    seen = []

    def stop(step: Step) -> None:
        seen.append(step.index)
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), forwards(cpu.model) as calls:
        paint(cpu, contexts, GUIDED, on_step=stop)
    assert (seen, len(calls)) == ([0], 1)
    assert torch.equal(paint(cpu, contexts, GUIDED), want)


def test_denoise_needs_no_gradients(cpu: BagelPipeline) -> None:
    with torch.enable_grad():
        assert not paint(cpu, contexts_of(cpu, "t"), GUIDED).requires_grad


@pytest.mark.parametrize(
    "noise", [torch.zeros(14, 64), torch.zeros(1, 15, 64)], ids=["one-token-less", "batched"]
)
def test_image_job_bad_noise(cpu: BagelPipeline, noise: Tensor) -> None:
    with pytest.raises(ValueError, match=r"noise has shape .*; expected \(15, .*grid of 3 x 5"):
        ImageJob(contexts_of(cpu, "t"), noise, GRID, GUIDED)


def test_denoising_together(cpu: BagelPipeline) -> None:
    """Images of different sizes, contexts, settings and numbers of steps: each as if alone."""
    plain, edit = contexts_of(cpu, "t"), contexts_of(cpu, "spt")
    requests: list[tuple[Contexts, tuple[int, int], ImageSettings]] = [
        (plain, (3, 5), ImageSettings(num_timesteps=4)),
        (edit, (2, 2), ImageSettings.for_editing(num_timesteps=3)),
        (plain, (1, 7), ImageSettings(num_timesteps=2, cfg_text_scale=1.0)),
        (edit, (4, 3), ImageSettings(num_timesteps=6, cfg_img_scale=1.5, timestep_shift=1.0)),
    ]
    jobs, wanted = [], []
    for seed, (contexts, grid, settings) in enumerate(requests):
        noise = noise_of(seed, grid[0] * grid[1])
        jobs.append(ImageJob(contexts, noise, grid, settings))
        wanted.append(denoise(cpu.model, contexts, noise, grid, settings))
    denoising = Denoising(cpu.model, cpu.tokenizer, jobs)
    counts = []
    with forwards(cpu.model) as calls:
        while not all(job.done for job in jobs):
            counts.append(len(denoising.step()))
    assert counts == [4, 3, 2, 1, 1]
    assert len(calls) == 5
    for index, (job, want) in enumerate(zip(jobs, wanted, strict=True)):
        assert_close(f"image {index}", job.latents, want)
