"""Steps over static buffers: reuse by other requests, several users, bounds. Uncaptured, on a CPU.

What a graph adds is in `test_graphs.py`, for GPUs.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alone import denoise, generate_text
from golden_data import GOLDEN, Judge, relative_error
from golden_requests import paint_and_judge
from torch import Tensor
from traced import TracingWorkspace

from bagel_mot import graphs
from bagel_mot.context import Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.model.attention import Math
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, ImageSettings, Step

GRID = (3, 5)
GUIDED = ImageSettings(num_timesteps=4, cfg_interval=(0.5, 1.0))


@pytest.fixture(scope="module")
def roomy() -> BagelPipeline:
    """A model whose attention reads lengths on the device: prefixes have rooms."""
    return BagelPipeline.from_pretrained(
        GOLDEN.checkpoint, device="cpu", dtype="float32", attention="math"
    )


def contexts_of(pipeline: BagelPipeline, text: str) -> Contexts:
    contexts = Contexts(pipeline.model, pipeline.tokenizer)
    contexts.add_text(text)
    return contexts


def noise_of(seed: int, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(seed))


def paint(
    pipeline: BagelPipeline,
    text: str,
    seed: int = 0,
    *,
    grid: tuple[int, int] = GRID,
    settings: ImageSettings = GUIDED,
    workspace: Workspace | None = None,
) -> Tensor:
    contexts = contexts_of(pipeline, text)
    return denoise(
        pipeline.model, contexts, noise_of(seed, grid), grid, settings, workspace=workspace
    )


def assert_close(got: Tensor, want: Tensor) -> None:
    error = relative_error(got, want)
    assert error <= GOLDEN.fp32_bound, f"error {error:.2e} > {GOLDEN.fp32_bound:.0e}"


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
        assert_close(image, paint(roomy, text, seed, settings=settings))
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
    assert_close(got, paint(roomy, "a fox", settings=settings, grid=grid))


def test_lengths_are_part_of_the_shape_where_attention_needs_them_on_the_host(
    cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(cpu.model)
    assert not cpu.model.attention.device_lengths
    with shapes_built(monkeypatch) as built:
        for text in ("a fox", "a red fox", "a cat"):
            got = paint(cpu, text, workspace=workspace)
            assert_close(got, paint(cpu, text))
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


# --- several users


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
        assert_close(job.latents, paint(roomy, text, i, grid=grids[i]))


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
        assert_close(job.latents, paint(roomy, text, i))


def test_latents_put_in_place_between_steps(roomy: BagelPipeline) -> None:
    job = ImageJob(contexts_of(roomy, "a fox"), noise_of(0), GRID, GUIDED)
    batch = Denoising(roomy.model, roomy.tokenizer, [job], workspace=Workspace(roomy.model))
    batch.step()
    moved = job.latents * 0.5
    job.latents = moved.clone()
    (step,) = batch.step()
    dt = float(job.timesteps[1]) - float(job.timesteps[2])
    assert_close(job.latents, moved - step.velocity * dt)


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
    assert_close(paint(roomy, "a cat", 1, workspace=workspace), paint(roomy, "a cat", 1))


# --- bounds


def test_shapes_are_bounded(roomy: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(roomy.model)
    grids = [(1, n) for n in range(1, graphs._SHAPES + 3)]
    # The largest first: a cache that has to grow would drop everything anyway.
    paint(roomy, "a fox", grid=(4, 4), workspace=workspace)
    with shapes_built(monkeypatch) as built:
        for grid in [*grids, grids[-1], grids[0]]:
            got = paint(roomy, "a fox", grid=grid, workspace=workspace)
            assert_close(got, paint(roomy, "a fox", grid=grid))
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
    assert_close(paint(roomy, "a fox", workspace=workspace), paint(roomy, "a fox"))


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
    assert_close(paint(roomy, "a cat", workspace=workspace), paint(roomy, "a cat"))
    assert not set(map(id, old)) & set(map(id, workspace._shapes.values()))


# --- the switch and the order of capturing, with a stand-in for CUDA


def test_capture_needs_a_gpu(cpu: BagelPipeline) -> None:
    with pytest.raises(ValueError, match="capture is True, but the model is on cpu"):
        Workspace(cpu.model, capture=True)
    assert not cpu.workspace.capture


class _Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def capturing(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    workspace = Workspace(cpu.model)
    workspace.capture = True
    streams: list[object] = []

    @contextmanager
    def graph(_graph: _Graph, **options: Any) -> Iterator[None]:
        # A pool is shared among captures of one stream.
        streams.append(options["stream"])
        assert options["pool"] is not None and set(streams) == {streams[0]} != {None}
        yield

    @contextmanager
    def device(_device: torch.device) -> Iterator[None]:
        yield

    stand_in = SimpleNamespace(
        CUDAGraph=_Graph,
        Stream=lambda device: object(),
        graph=graph,
        device=device,
        graph_pool_handle=lambda: (0, 1),
        synchronize=lambda device: None,
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    yield workspace
    workspace.drop_graphs()


def test_second_call_captures(capturing: Workspace) -> None:
    runs: list[int] = []
    call = capturing.call(lambda: runs.append(0) or len(runs))
    assert call() == 1 and not call.is_captured
    assert call() == 2 and call.is_captured
    assert call() == 2 and len(runs) == 2
    graph, _ = call._captured or (None, None)
    assert isinstance(graph, _Graph) and graph.replays == 2
    call.drop()
    assert call() == 3 and call.is_captured


def test_graphs_go_before_the_groups(capturing: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for them; the next call captures anew."""
    callbacks: list[Callable[[], None]] = []
    monkeypatch.setattr(graphs, "before_shutdown", callbacks.append)
    calls = [capturing.call(lambda: None) for _ in range(2)]
    for call in calls * 2:
        call()
    assert all(call.is_captured for call in calls)
    (callback,) = callbacks
    callback()
    assert not any(call.is_captured for call in calls) and not capturing._graphs
    calls[0]()
    assert calls[0].is_captured and callbacks == [callback]


def test_graphs_are_bounded(capturing: Workspace) -> None:
    calls = [capturing.call(lambda: None) for _ in range(graphs._GRAPHS + 3)]
    for call in calls:
        call()
        call()
        calls[0]()  # used all the time, so never the oldest
    captured = [call.is_captured for call in calls]
    assert captured == [True] + [False] * 3 + [True] * (graphs._GRAPHS - 1)
    assert len(capturing._graphs) == graphs._GRAPHS


def test_failure_to_capture_is_an_error(capturing: Workspace) -> None:
    def body() -> None:
        if runs:
            raise RuntimeError("operation not permitted")
        runs.append(0)

    runs: list[int] = []
    call = capturing.call(body)
    call()
    with pytest.raises(RuntimeError, match=r"failed: operation not permitted.*--no-cuda-graphs"):
        call()
    assert not call.is_captured and not capturing._graphs


def test_math_is_what_gives_rooms(roomy: BagelPipeline) -> None:
    """The tests above would show nothing with a backend that bakes lengths in."""
    assert isinstance(roomy.model.attention, Math) and roomy.model.attention.device_lengths


# --- replayed, with traces in place of CUDA graphs


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_replays_are_what_is_called(roomy: BagelPipeline, cpu: BagelPipeline, backend: str) -> None:
    """Nothing that differs between requests of a shape is baked into its graph."""
    pipeline = roomy if backend == "math" else cpu
    workspace = TracingWorkspace(pipeline.model)
    other_scales = {"cfg_text_scale": 7.0, "cfg_renorm_min": 0.3, "timestep_shift": 2.0}
    requests = [
        ("a fox", 0, GUIDED),
        ("a cat", 1, GUIDED.model_copy(update={"num_timesteps": 9})),
        ("a red fox in the snow, seen from afar", 2, GUIDED),
        ("an owl", 3, GUIDED.model_copy(update=other_scales)),
        ("a fox", 0, GUIDED),
    ]
    for text, seed, settings in requests:
        got = paint(pipeline, text, seed, settings=settings, workspace=workspace)
        assert_close(got, paint(pipeline, text, seed, settings=settings))
    # Guided and unguided steps; where lengths are baked in, for each length.
    assert len(workspace.traces) == 2 if backend == "math" else len(workspace.traces) > 2
    assert all(trace.replays >= 1 for trace in workspace.traces)
    assert sum(trace.replays for trace in workspace.traces) >= 10


def test_batches_in_turn_replayed(roomy: BagelPipeline) -> None:
    workspace = TracingWorkspace(roomy.model)
    texts = ("a fox", "a red cat on a mat")
    for _ in range(2):
        jobs = [
            ImageJob(contexts_of(roomy, text), noise_of(i), GRID, GUIDED)
            for i, text in enumerate(texts)
        ]
        batches = [
            Denoising(roomy.model, roomy.tokenizer, [job], workspace=workspace) for job in jobs
        ]
        while not all(job.done for job in jobs):
            for batch in batches:
                batch.step()
        for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            assert_close(job.latents, paint(roomy, text, i))
    assert len(workspace.traces) == 1  # all their steps are guided


@pytest.mark.parametrize("name", ["a2", "b1"])
def test_golden_image_replayed(roomy: BagelPipeline, name: str) -> None:
    """A recorded request, from the second time on replayed from its first step."""
    own = BagelPipeline(roomy.model, roomy.tokenizer)
    own.workspace = workspace = TracingWorkspace(roomy.model)
    for _ in range(2):
        paint_and_judge(own, Judge(torch.float32), GOLDEN.case(name))
    steps = GOLDEN.case(name).json["params"]["num_timesteps"] - 1
    assert sum(trace.replays for trace in workspace.traces) >= 2 * steps - 2


def test_what_a_step_launches(cpu: BagelPipeline) -> None:
    """Seven routed operators and attention a layer; few others, however many layers there are."""
    workspace = TracingWorkspace(cpu.model)
    paint(cpu, "a fox", workspace=workspace)
    launches = workspace.traces[0].launches()
    layers = cpu.config.llm.num_hidden_layers
    routed = Counter(name for name in launches if name.startswith("mot."))
    assert routed == {
        "mot.rms_norm_.default": 2 * layers + 1,
        "mot.linear_.default": 4 * layers,
        "mot.qk_norm_rope_.default": layers,
    }
    others = [name for name in launches if not name.startswith("mot.")]
    # Of SDPA a call for each of two branches, and one to join them.
    assert len(others) <= 3 * layers + 19, others
