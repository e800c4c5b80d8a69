"""Schedule, guidance and denoising against README section 3, written out again in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from alone import denoise
from context_rules import NAMES, PlainContexts, feed, request_items, rows
from golden_data import GOLDEN, relative_error
from pydantic import ValidationError
from test_context import forwards, poison_caches
from torch import Tensor

from bagel_mot.context import Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import KVCache
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, ImageSettings, Step, guide

RENORMS = ("global", "channel", "text_channel")
GRID = (3, 5)
TOKENS = GRID[0] * GRID[1]


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    error = relative_error(got, want)
    assert error <= GOLDEN.fp32_bound, f"{name}: error {error:.2e} > {GOLDEN.fp32_bound:.0e}"


# --- settings and schedule


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0], ids=lambda shift: f"shift-{shift}")
@pytest.mark.parametrize("points", [2, 3, 8, 50], ids=lambda points: f"{points}-points")
def test_timesteps(points: int, shift: float) -> None:
    settings = ImageSettings(num_timesteps=points, timestep_shift=shift)
    timesteps = settings.timesteps()
    s = [1 - i / (points - 1) for i in range(points)]
    want = torch.tensor([shift * x / (1 + (shift - 1) * x) for x in s], dtype=torch.float64)
    assert timesteps.dtype == torch.float32
    assert_close("timesteps", timesteps, want)
    assert (float(timesteps[0]), float(timesteps[-1])) == (1.0, 0.0)
    assert bool((timesteps.diff() < 0).all())


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        # With a shift of 1 and five points t is 1, 0.75, 0.5, 0.25 (and 0), exactly.
        pytest.param((0.0, 1.0), [True, True, True, True], id="all"),
        pytest.param((0.25, 0.75), [False, True, True, False], id="low-open-high-closed"),
        pytest.param((0.5, 0.5), [False, False, False, False], id="empty"),
        pytest.param((0.74, 0.76), [False, True, False, False], id="one-step"),
        pytest.param((0.75, 1.0), [True, False, False, False], id="first-step"),
    ],
)
def test_guided(interval: tuple[float, float], guided: list[bool]) -> None:
    settings = ImageSettings(num_timesteps=5, timestep_shift=1.0, cfg_interval=interval)
    timesteps = settings.timesteps()
    assert timesteps.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert settings.guided(timesteps) == guided
    for image_scale in (1.0, 2.0):
        changes = {"cfg_text_scale": 1.0, "cfg_img_scale": image_scale}
        assert settings.model_copy(update=changes).guided(timesteps) == [False] * 4


def test_guided_compares_shifted_times() -> None:
    """The official defaults: 41 guided steps, then 8 plain ones."""
    settings = ImageSettings()
    assert settings.guided(settings.timesteps()) == [True] * 41 + [False] * 8


def test_settings_defaults() -> None:
    """The columns of README section 3, text to image (notebook) and editing."""
    common = {
        "num_timesteps": 50,
        "timestep_shift": 3.0,
        "cfg_text_scale": 4.0,
        "cfg_renorm_min": 0.0,
        "taylorseer": None,
    }
    text_to_image = {
        "cfg_img_scale": 1.0,
        "cfg_interval": (0.4, 1.0),
        "cfg_renorm_type": "global",
    }
    editing = {
        "cfg_img_scale": 2.0,
        "cfg_interval": (0.0, 1.0),
        "cfg_renorm_type": "text_channel",
    }
    assert ImageSettings().model_dump() == common | text_to_image
    assert ImageSettings.for_editing().model_dump() == common | editing
    changed = ImageSettings.for_editing(num_timesteps=9, cfg_img_scale=1.5)
    assert changed.model_dump() == common | editing | {"num_timesteps": 9, "cfg_img_scale": 1.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"num_timesteps": 1}, r"num_timesteps\n.*greater than or equal to 2", id="T"),
        pytest.param({"num_timesteps": 2.5}, r"num_timesteps\n.*integer", id="T-fraction"),
        pytest.param({"num_timesteps": 10**12}, r"num_timesteps\n.*equal to 100000", id="T-huge"),
        pytest.param({"timestep_shift": 0}, r"timestep_shift\n.*equal to 0\.001", id="shift"),
        pytest.param(
            {"timestep_shift": 1e-300}, r"timestep_shift\n.*equal to 0\.001", id="shift-tiny"
        ),
        pytest.param(
            {"timestep_shift": 1e300}, r"timestep_shift\n.*equal to 1000", id="shift-huge"
        ),
        pytest.param(
            {"timestep_shift": float("inf")}, r"timestep_shift\n.*finite", id="shift-infinite"
        ),
        pytest.param({"cfg_text_scale": 0.9}, r"cfg_text_scale\n.*equal to 1", id="text-scale"),
        pytest.param(
            {"cfg_text_scale": 1e38}, r"cfg_text_scale\n.*equal to 1000", id="text-scale-huge"
        ),
        pytest.param(
            {"cfg_img_scale": 1e38}, r"cfg_img_scale\n.*equal to 1000", id="image-scale-huge"
        ),
        pytest.param({"cfg_img_scale": 0.9}, r"cfg_img_scale\n.*equal to 1", id="image-scale"),
        pytest.param(
            {"cfg_interval": (0.9, 0.1)},
            r"cfg_interval is 0\.9, 0\.1; expected 0 <= low <= high <= 1",
            id="interval-reversed",
        ),
        pytest.param(
            {"cfg_interval": (-0.1, 0.5)}, r"cfg_interval is -0\.1, 0\.5", id="interval-below-0"
        ),
        pytest.param(
            {"cfg_interval": (0.5, 1.1)}, r"cfg_interval is 0\.5, 1\.1", id="interval-above-1"
        ),
        pytest.param({"cfg_interval": (0.5,)}, r"cfg_interval\.1\n.*required", id="interval-one"),
        pytest.param(
            {"cfg_renorm_type": "none"},
            r"cfg_renorm_type\n.*'global', 'channel' or 'text_channel'",
            id="renorm",
        ),
        pytest.param({"cfg_renorm_min": -0.1}, r"cfg_renorm_min\n.*equal to 0", id="min-below-0"),
        pytest.param({"cfg_renorm_min": 1.1}, r"cfg_renorm_min\n.*equal to 1", id="min-above-1"),
        pytest.param({"steps": 50}, r"steps\n.*not permitted", id="unknown"),
    ],
)
@pytest.mark.parametrize("make", [ImageSettings, ImageSettings.for_editing], ids=["plain", "edit"])
def test_settings_bad_value(
    make: Callable[..., ImageSettings], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ImageSettings().num_timesteps = 3  # type: ignore[misc]


# --- guidance


def guide_by_the_rules(s: ImageSettings, v: Tensor, vt: Tensor, vi: Tensor | None) -> Tensor:
    """README section 3, token by token, in float64."""
    v, vt = v.double(), vt.double()
    a, b = s.cfg_text_scale, s.cfg_img_scale
    tokens = range(v.shape[0])

    def length(x: Tensor) -> float:
        return sum(number * number for number in x.flatten().tolist()) ** 0.5

    def clamped(of: Tensor, by: Tensor) -> float:
        return min(max(length(of) / (length(by) + 1e-8), s.cfg_renorm_min), 1.0)

    def per_token(g: Tensor) -> Tensor:
        return torch.stack([g[n] * clamped(v[n], g[n]) for n in tokens])

    g = vt + a * (v - vt)
    if s.cfg_renorm_type == "text_channel":
        g = per_token(g)
    if b > 1:
        assert vi is not None
        g = vi.double() + b * (g - vi.double())
    if s.cfg_renorm_type == "channel":
        g = per_token(g)
    if s.cfg_renorm_type == "global":
        g = g * clamped(v, g)
    return g


def random_velocities(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities of the three contexts; the kinds reach all sides of the clamp."""
    generator = torch.Generator().manual_seed(seed)
    v, vt, vi = (torch.randn(6, 64, generator=generator) for _ in range(3))
    if kind == "shrinking":  # guidance makes them shorter, so r would exceed 1
        vt, vi = v * 1.2 + 0.01 * vt, v * 1.1 + 0.01 * vi
    if kind == "mixed":  # some tokens longer, some shorter
        vt[::2], vi[::2] = v[::2] * 1.2, v[::2] * 1.1
    if kind == "near-zero":  # the 1e-8 counts
        v, vt, vi = v * 1e-9, vt * 1e-9, vi * 1e-9
    if kind == "equal":
        vt, vi = v.clone(), v.clone()
    if kind == "zero":
        v, vt, vi = v * 0, vt * 0, vi * 0
    return v, vt, vi


@pytest.mark.parametrize("kind", ["random", "shrinking", "mixed", "near-zero", "equal", "zero"])
@pytest.mark.parametrize("image_scale", [1.0, 1.5, 3.0], ids=lambda scale: f"image-{scale}")
@pytest.mark.parametrize("renorm", RENORMS)
def test_guide(renorm: str, image_scale: float, kind: str) -> None:
    for seed, (text_scale, least) in enumerate(itertools.product((1.5, 4.0), (0.0, 0.4, 1.0))):
        settings = ImageSettings(
            cfg_text_scale=text_scale,
            cfg_img_scale=image_scale,
            cfg_renorm_type=renorm,
            cfg_renorm_min=least,
        )
        v, vt, vi = random_velocities(kind, seed)
        used = vi if image_scale > 1 else None
        got = guide(settings, v, vt, used)
        assert got.dtype == torch.float32
        assert_close(
            f"text {text_scale}, min {least}", got, guide_by_the_rules(settings, v, vt, used)
        )


# --- denoising


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


GUIDED = ImageSettings(num_timesteps=3, cfg_img_scale=2.0, cfg_interval=(0.0, 1.0))


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
