"""Extrapolated steps: which, by what, what guidance makes of them, and how far off images get."""

from __future__ import annotations

import pytest
import torch
from alone import denoise
from golden_data import GOLDEN, relative_error
from pydantic import ValidationError
from small_images import contexts_of, noise_of
from torch import Tensor
from watched import forwards

from bagel_mot.denoising import Denoising
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, ImageSettings, Step, guide
from bagel_mot.taylorseer import Extrapolation, TaylorSeer

GRID = (3, 5)


def settings_with(**changes: object) -> ImageSettings:
    return ImageSettings(**({"num_timesteps": 20, "taylorseer": True} | changes))


# --- settings


def test_off_by_default() -> None:
    assert ImageSettings().taylorseer is None
    assert ImageSettings(taylorseer=False).taylorseer is None


def test_official_settings() -> None:
    official = TaylorSeer(interval=3, max_order=6, first_full=5)
    assert ImageSettings(taylorseer=True).taylorseer == TaylorSeer() == official


@pytest.mark.parametrize("bad", [{"interval": 0}, {"max_order": -1}, {"first_full": 0}, {"x": 1}])
def test_bad_settings(bad: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ImageSettings(taylorseer=bad)


# --- which steps


def full_steps(settings: TaylorSeer, total: int) -> list[int]:
    extrapolation, full = Extrapolation(settings), []
    for step in range(total):
        if extrapolation.is_full(step, 1):
            full.append(step)
            extrapolation.note(step, (torch.zeros(1),))
    return full


def test_full_steps() -> None:
    """The first five, then every third: 19 of the official 49."""
    assert full_steps(TaylorSeer(), 14) == [0, 1, 2, 3, 4, 7, 10, 13]
    assert len(full_steps(TaylorSeer(), 49)) == 19
    assert full_steps(TaylorSeer(interval=1), 6) == [0, 1, 2, 3, 4, 5]
    assert full_steps(TaylorSeer(interval=4, first_full=1), 10) == [0, 4, 8]


def test_branch_that_comes_later_is_computed_first() -> None:
    """Guidance that begins between full steps has nothing to extrapolate from yet."""
    extrapolation = Extrapolation(TaylorSeer())
    velocity = torch.ones(1)
    for step in range(5):
        extrapolation.note(step, (velocity,))
    assert not extrapolation.is_full(5, 1) and extrapolation.is_full(5, 2)
    extrapolation.note(5, (velocity, velocity))
    assert not extrapolation.is_full(7, 2) and extrapolation.is_full(8, 2)
    extrapolation.note(8, (velocity,))
    # What was computed at step 5 is too old for a branch that was left out at step 8.
    assert extrapolation.is_full(9, 2) and not extrapolation.is_full(9, 1)


# --- by what


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_backward_differences(order: int) -> None:
    """Against the differences written out, at the spacing that full steps have."""
    settings = TaylorSeer(max_order=order)
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
    extrapolation, table, last = Extrapolation(settings), [], -1
    for step in range(20):
        if extrapolation.is_full(step, 1):
            extrapolation.note(step, (values[step],))
            row = [values[step].double()]
            if step > 3 and table:
                for old in table[:order]:
                    row.append((row[-1] - old) / (step - last))
            table, last = row, step
            continue
        x = step - last
        want = sum(d * x**i / [1, 1, 2, 6][i] for i, d in enumerate(table))
        got = extrapolation.at(step, 1)[0]
        assert relative_error(got, torch.as_tensor(want)) <= 1e-5


def test_constant_and_linear_velocities_are_exact() -> None:
    slope = torch.tensor([2.0, 0.0, -0.5])
    extrapolation = Extrapolation(TaylorSeer())
    for step in range(15):
        value = 1 + slope * step
        if extrapolation.is_full(step, 1):
            extrapolation.note(step, (value,))
        else:
            torch.testing.assert_close(extrapolation.at(step, 1)[0], value)


# --- in the denoising


def paint(cpu: BagelPipeline, settings: ImageSettings, steps: list[Step] | None = None) -> Tensor:
    contexts = contexts_of(cpu, "a fox")
    seen = steps if steps is not None else []
    return denoise(cpu.model, contexts, noise_of(0), GRID, settings, seen.append)


def test_only_full_steps_are_computed(cpu: BagelPipeline) -> None:
    steps: list[Step] = []
    with forwards(cpu.model) as calls:
        paint(cpu, settings_with(), steps)
    # The prompt, then steps 0 to 4, 7, 10, 13, 16.
    assert len(calls) == 1 + 9 and [step.index for step in steps] == list(range(19))


def test_guidance_and_euler_of_extrapolated_steps(cpu: BagelPipeline) -> None:
    """The branches are extrapolated, then treated as computed ones are."""
    settings = settings_with(cfg_interval=(0.3, 1.0), cfg_renorm_type="channel")
    steps: list[Step] = []
    x = noise_of(0)
    paint(cpu, settings, steps)
    guided = settings.guided(settings.timesteps())
    assert True in guided[8:] and False in guided
    for step, on in zip(steps, guided, strict=True):
        assert len(step.velocities) == (2 if on else 1)
        used = guide(settings, *step.velocities, None) if on else step.velocities[0]
        assert relative_error(step.velocity, used) <= GOLDEN.fp32_bound
        times = settings.timesteps()
        x = x - step.velocity * float(times[step.index] - times[step.index + 1])
        assert relative_error(step.latents, x) <= GOLDEN.fp32_bound


def test_order_zero_repeats_the_last_velocity(cpu: BagelPipeline) -> None:
    steps: list[Step] = []
    paint(cpu, settings_with(taylorseer={"max_order": 0}), steps)
    assert torch.equal(steps[5].velocities[0], steps[4].velocities[0])
    assert not torch.equal(steps[7].velocities[0], steps[4].velocities[0])


def test_interval_one_is_the_full_run(cpu: BagelPipeline) -> None:
    full = paint(cpu, settings_with(taylorseer=None))
    assert torch.equal(paint(cpu, settings_with(taylorseer={"interval": 1})), full)


def test_batched_as_alone(cpu: BagelPipeline) -> None:
    """Images with and without, at other phases: each has its own series."""
    choices = [
        settings_with(),
        settings_with(taylorseer=None, num_timesteps=12),
        settings_with(taylorseer={"interval": 2, "first_full": 2}, cfg_text_scale=1.0),
    ]
    contexts = contexts_of(cpu, "a fox")
    jobs = [ImageJob(contexts, noise_of(i), GRID, each) for i, each in enumerate(choices)]
    denoising = Denoising(cpu.model, cpu.tokenizer, jobs)
    while not all(job.done for job in jobs):
        denoising.step()
    for i, (job, settings) in enumerate(zip(jobs, choices, strict=True)):
        want = denoise(cpu.model, contexts, noise_of(i), GRID, settings)
        assert relative_error(job.latents, want) <= GOLDEN.fp32_bound


@pytest.mark.parametrize("text_scale", [4.0, 1.0], ids=["guided", "unguided"])
def test_error_against_the_full_run(cpu: BagelPipeline, text_scale: float) -> None:
    """Official settings and schedule, on the golden model: `docs/engine.md` has the figures."""
    common = {"num_timesteps": 50, "cfg_text_scale": text_scale}
    full = paint(cpu, settings_with(**common, taylorseer=None))
    errors = {
        name: relative_error(paint(cpu, settings_with(**common, taylorseer=way)), full)
        for name, way in {
            "official": True,
            "order 1": {"max_order": 1},
            "order 0": {"max_order": 0},
        }.items()
    }
    print(f"text scale {text_scale}:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert 0 < errors["official"] < 6e-3
    assert errors["official"] < errors["order 0"]
