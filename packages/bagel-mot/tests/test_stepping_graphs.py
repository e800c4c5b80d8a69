"""Capturing and replaying steps on a CPU, with stand-ins for CUDA and its graphs.

What a real graph adds is in `test_graphs.py`, for GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_data import GOLDEN, Judge, assert_close
from golden_requests import paint_and_judge
from small_images import GRID, GUIDED, contexts_of, noise_of, paint
from traced import TracingWorkspace

from bagel_mot import graphs
from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob

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
        assert_close("image", got, paint(pipeline, text, seed, settings=settings))
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
            assert_close("image", job.latents, paint(roomy, text, i))
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
