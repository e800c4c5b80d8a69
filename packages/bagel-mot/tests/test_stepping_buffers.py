"""Steps over static buffers: reuse by other requests, and bounds. Uncaptured, on a CPU.

Capturing is in `test_stepping_graphs.py`; what a graph adds is in `test_graphs.py`, for GPUs.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from alone import generate_text
from golden_data import assert_close
from small_images import GRID, GUIDED, contexts_of, noise_of, paint

from bagel_mot import graphs
from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.model.attention import Math
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob
from bagel_mot.stepping import StepRunner
from bagel_mot.taylorseer import Extrapolation, TaylorSeer


@contextmanager
def shapes_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    from bagel_mot.stepping import StepRunner

    built: list[object] = []
    plain = StepRunner.__init__

    def noted(self: StepRunner, *args: Any) -> None:
        built.append(self)
        plain(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "__init__", noted)
        yield built


# --- reuse


def test_a_first_step_that_fails_can_be_made_again(
    roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job() -> ImageJob:
        return ImageJob(contexts_of(roomy, "a fox"), noise_of(0), GRID, GUIDED)

    def no_memory(*arguments: object) -> None:
        raise MemoryError("the KV cache does not fit")

    workspace = Workspace(roomy.model)
    alone, retried = (
        Denoising(roomy.model, roomy.tokenizer, [job()], workspace=workspace) for _ in range(2)
    )
    (want,) = [step.kept() for step in alone.step()]
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "cache", no_memory)
        with pytest.raises(MemoryError):
            retried.step()
    (got,) = retried.step()
    assert torch.equal(got.latents, want.latents)


@pytest.mark.parametrize("place", ["note", "at", "advance"])
def test_a_step_that_fails_half_way_can_be_made_again(
    place: str, roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other images of the batch, or this one, had moved on by then."""
    settings = GUIDED.model_copy(
        update={"num_timesteps": 9, "taylorseer": TaylorSeer(first_full=2)}
    )
    pictures = []
    for failures in ((), (1, 3, 6, 7)):
        workspace = Workspace(roomy.model)
        jobs = [
            ImageJob(contexts_of(roomy, text), noise_of(0), GRID, own)
            for text, own in (("a fox", settings), ("x", settings), ("a dog", GUIDED))
        ]
        denoising = Denoising(roomy.model, roomy.tokenizer, jobs, workspace=workspace)
        owner = StepRunner if place == "advance" else Extrapolation
        plain, calls = getattr(owner, place), 0

        def fails(*given: Any, plain: Any = plain, failures: tuple[int, ...] = failures) -> Any:
            nonlocal calls
            calls += 1
            if calls in failures:
                raise RuntimeError("no memory")
            return plain(*given)

        with monkeypatch.context() as patch:
            patch.setattr(owner, place, fails)
            failed = 0
            while not all(job.done for job in jobs):
                try:
                    denoising.step()
                except RuntimeError:
                    failed += 1
        assert failed == len(failures)
        pictures.append([job.latents.clone() for job in jobs])
    for got, want in zip(*pictures, strict=True):
        assert_close("image", got, want)


def test_prompts_of_other_lengths_use_the_same_buffers(
    roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shape serves prompts, seeds, scales and schedules; each image is as if alone."""
    workspace = Workspace(roomy.model)
    requests = [
        ("a fox", 0, GUIDED),
        ("a red fox in the snow, seen from afar", 1, GUIDED),
        ("x", 2, GUIDED.model_copy(update={"cfg_text_scale": 7.0, "cfg_renorm_min": 0.3})),
        ("a fox", 0, GUIDED.model_copy(update={"num_timesteps": 6, "timestep_shift": 1.0})),
        ("a fox", 0, GUIDED),
    ]
    with shapes_built(monkeypatch) as built:
        got = [
            paint(roomy, text, seed, settings=settings, workspace=workspace)
            for text, seed, settings in requests
        ]
    assert len(built) == 1
    for image, (text, seed, settings) in zip(got, requests, strict=True):
        assert_close("image", image, paint(roomy, text, seed, settings=settings))
    assert torch.equal(got[0], got[-1])


@pytest.mark.parametrize(
    ("changes", "grid"),
    [({"cfg_renorm_type": "channel"}, GRID), ({"cfg_text_scale": 1.0}, GRID), ({}, (5, 3))],
    ids=["renorm", "branches", "grid"],
)
def test_other_shapes_have_other_buffers(
    roomy: BagelPipeline,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    grid: tuple[int, int],
) -> None:
    workspace = Workspace(roomy.model)
    settings = GUIDED.model_copy(update=changes)
    with shapes_built(monkeypatch) as built:
        paint(roomy, "a fox", workspace=workspace)
        got = paint(roomy, "a fox", settings=settings, grid=grid, workspace=workspace)
    assert len(built) == 2
    assert_close("image", got, paint(roomy, "a fox", settings=settings, grid=grid))


def test_lengths_are_part_of_the_shape_where_attention_needs_them_on_the_host(
    cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(cpu.model)
    assert not cpu.model.attention.device_lengths
    with shapes_built(monkeypatch) as built:
        for text in ("a fox", "a red fox", "a cat"):
            got = paint(cpu, text, workspace=workspace)
            assert_close("image", got, paint(cpu, text))
    same_length = len(cpu.tokenizer.text_segment("a fox")) == len(
        cpu.tokenizer.text_segment("a cat")
    )
    assert len(built) - 3 == (2 if same_length else 3)  # three of them by the other workspaces


def test_finished_images_stay(roomy: BagelPipeline) -> None:
    """A later request writes into the same buffers, not into what was handed out."""
    workspace = Workspace(roomy.model)
    first = paint(roomy, "a fox", workspace=workspace)
    kept = first.clone()
    paint(roomy, "a cat", 1, workspace=workspace)
    assert torch.equal(first, kept)


def test_buffers_outlast_inference_mode(roomy: BagelPipeline) -> None:
    """Servers run models in inference mode; who comes next need not."""
    workspace = Workspace(roomy.model)
    with torch.inference_mode():
        first = paint(roomy, "a fox", workspace=workspace).clone()
        generate_text(
            roomy.model,
            roomy.tokenizer,
            contexts_of(roomy, "a fox").main,
            max_tokens=2,
            workspace=workspace,
        )
    again = paint(roomy, "a fox", workspace=workspace)
    assert torch.equal(again, first)
    context = contexts_of(roomy, "a fox").main
    generate_text(roomy.model, roomy.tokenizer, context, max_tokens=2, workspace=workspace)


def test_noise_is_not_written_to(roomy: BagelPipeline) -> None:
    noise = noise_of(0)
    job = ImageJob(contexts_of(roomy, "a fox"), noise, GRID, GUIDED)
    Denoising(roomy.model, roomy.tokenizer, [job]).step()
    assert torch.equal(noise, noise_of(0))


# --- bounds


def test_shapes_are_bounded(roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(roomy.model)
    grids = [(1, n) for n in range(1, graphs._SHAPES + 3)]
    # The largest first: a cache that has to grow would drop everything anyway.
    paint(roomy, "a fox", grid=(4, 4), workspace=workspace)
    with shapes_built(monkeypatch) as built:
        for grid in [*grids, grids[-1], grids[0]]:
            got = paint(roomy, "a fox", grid=grid, workspace=workspace)
            assert_close("image", got, paint(roomy, "a fox", grid=grid))
            assert len(workspace._shapes) <= graphs._SHAPES
    # The last one was still there, the first one no more (as many are made without a workspace).
    assert len(built) - len(grids) - 2 == len(grids) + 1


def test_a_larger_cache_replaces_all(roomy: BagelPipeline) -> None:
    workspace = Workspace(roomy.model)
    gc.collect()
    gc.disable()
    try:
        paint(roomy, "a fox", workspace=workspace)
        generate_text(
            roomy.model,
            roomy.tokenizer,
            contexts_of(roomy, "a fox").main,
            max_tokens=2,
            workspace=workspace,
        )
        before, capacity = weakref.ref(workspace.cache(1)), workspace.cache(1).capacity
        paint(roomy, "a fox", grid=(30, 30), workspace=workspace)
        # Freed at once, without the garbage collector: there may be no memory for both.
        assert before() is None and len(workspace._shapes) == 1
    finally:
        gc.enable()
    assert workspace.cache(1).capacity > capacity
    assert_close("image", paint(roomy, "a fox", workspace=workspace), paint(roomy, "a fox"))


def test_a_cache_that_one_request_needed_is_given_back(
    roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_KEPT_ROWS", 50)
    workspace = Workspace(roomy.model)
    large = workspace.cache(1000)
    for _ in range(graphs._PATIENCE):
        assert workspace.cache(10) is large
    assert workspace.cache(300) is large  # needed again
    for _ in range(graphs._PATIENCE):
        assert workspace.cache(10) is large
    assert workspace.cache(10).capacity < 50


def test_cache_of_other_heads(roomy: BagelPipeline) -> None:
    """Under Ulysses parallelism steps cache fewer heads than texts."""
    workspace = Workspace(roomy.model)
    before = workspace.cache(100, 1)
    assert workspace.cache(50, 1) is before
    assert workspace.cache(50).kv.shape[3] == roomy.model.kv_heads == 2


def test_a_longer_rotary_table_replaces_all(roomy: BagelPipeline) -> None:
    """Graphs read the table they were captured with."""
    model, workspace = roomy.model, Workspace(roomy.model)
    paint(roomy, "a fox", workspace=workspace)
    old = list(workspace._shapes.values())
    model.rope_for(len(model.rope) + 1)
    assert_close("image", paint(roomy, "a cat", workspace=workspace), paint(roomy, "a cat"))
    assert not set(map(id, old)) & set(map(id, workspace._shapes.values()))


def test_math_is_what_gives_rooms(roomy: BagelPipeline) -> None:
    """The tests above would show nothing with a backend that bakes lengths in."""
    assert isinstance(roomy.model.attention, Math) and roomy.model.attention.device_lengths
