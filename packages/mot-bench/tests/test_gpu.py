"""What only a GPU shows: graphs, cold caches, compiled candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mot_bench.model_results import AccuracyResults, E2eResults, StepResults
from mot_bench.protocol import StreamStopwatch, ceilings, measure, rotation

pytestmark = pytest.mark.gpu


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_graph_times_agree_with_plain_events() -> None:
    sets = 4
    x = [torch.randn(4096, 4096, device=device(), dtype=torch.bfloat16) for _ in range(sets)]
    timing = measure({"mm": lambda i: x[i] @ x[i]}, sets, 20)["mm"]
    assert timing.method == "graph"
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(25):
        for i in range(sets):
            _ = x[i] @ x[i]
    end.record()
    torch.cuda.synchronize()
    plain = begin.elapsed_time(end) * 1e3 / 100
    assert 0.7 * plain < timing.median_us < 1.3 * plain


def test_stream_times_hold_launches_of_other_variants_apart() -> None:
    """A variant that keeps the host busy is not helped by one that keeps the GPU busy."""
    x = torch.randn(8192, 8192, device=device(), dtype=torch.bfloat16)
    small = torch.ones(8, device=device())

    def launches(index: int) -> None:
        for _ in range(500):
            small.add_(1)

    alone = measure({"launches": launches}, 1, 5, stopwatch=StreamStopwatch(device()))
    both = measure(
        {"gpu": lambda i: x @ x, "launches": launches}, 1, 5, stopwatch=StreamStopwatch(device())
    )
    assert both["launches"].median_us > 0.7 * alone["launches"].median_us
    assert both["launches"].method == "stream"


def test_a_variant_that_waits_is_marked_and_the_next_are_captured() -> None:
    x = [torch.randn(512, 512, device=device()) for _ in range(2)]

    def waits(index: int) -> float:
        return float(x[index].sum())

    def breaks_only_captures(index: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return x[index] * 2

    def copies_from_the_host(index: int) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # invalidates the capture itself
        return x[index] * 2

    variants = {
        "before": lambda i: x[i] * 2,
        "waits": waits,
        "raises": breaks_only_captures,
        "invalidates": copies_from_the_host,
        "after": lambda i: x[i] * 2,
    }
    for _ in range(2):
        timings = measure(variants, 2, 3)
        methods = {name: timing.method for name, timing in timings.items()}
        notes = {name: timing.note for name, timing in timings.items()}
        assert methods.pop("before") == methods.pop("after") == "graph", notes
        assert set(methods.values()) == {"stream"}
        assert all(timings[name].note.startswith("no CUDA graph: ") for name in methods)
        assert all(timing.median_us > 0 for timing in timings.values())
    # Memory can still be had and given back.
    torch.cuda.empty_cache()
    torch.randn(1024, 1024, device=device())


def test_rotation_is_cold() -> None:
    """Reading and writing 10 MB each takes longer where they are not in L2."""
    elements = 10 << 18
    if torch.cuda.get_device_properties(device()).L2_cache_size < 40 << 20:
        pytest.skip("L2 is too small to see the difference")
    turns = rotation(8 * elements, device())
    assert turns.cold
    x = [torch.ones(elements, device=device()) for _ in range(turns.sets)]
    y = [torch.empty_like(each) for each in x]
    timings = measure(
        {
            "cold": lambda i: torch.neg(x[i], out=y[i]),
            "warm": lambda i: torch.neg(x[0], out=y[0]),
        },
        turns.sets,
    )
    assert timings["cold"].median_us > timings["warm"].median_us


def test_ceilings_are_plausible() -> None:
    found = ceilings(device(), rounds=5)
    assert found.matmul_tflops > 10
    assert found.copy_gbps > 100


def test_kernels_at_a_layers_size(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(
        *("kernels", "--branches", 1, "--image-tokens", 1024, "--rounds", 3),
        *("--output", tmp_path),
    )
    assert answer.code == 0, answer.err + answer.out
    (path,) = tmp_path.glob("*.json")
    for case in json.loads(path.read_text())["cases"]:
        for provider in case["providers"]:
            if provider["timing"] is not None:
                assert provider["timing"]["method"] == "graph", provider


def test_tune_a_small_shape(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(
        *("tune", "--shape", "512,512", "--rows", "2,256", "--rounds", 5, "--output", tmp_path)
    )
    assert answer.code == 0, answer.err
    (path,) = (tmp_path / "mot_linear").glob("*.json")
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["us"] <= entry["default_us"] * 1.05


def test_accuracy_through_the_kernels(mot_bench: Any, tmp_path: Path) -> None:
    run = ("accuracy", "--model", "tiny", "--resolution", "96x96")
    answer = mot_bench(*run, "--quantization", "w8a16,w4a16:32", "--output", tmp_path)
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("*.json")
    results = AccuracyResults.read(path)
    assert results.subject.dtype == "bfloat16"
    _, eight, four = results.variants
    for near, far in zip(eight.velocities, four.velocities, strict=True):
        assert 0 < near.relative < 0.05 < far.relative < 0.5


def test_step_and_e2e_see_the_gpu(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(
        *("step", "--random", "tiny", "--resolutions", "64x64", "--branches", 2),
        *("--rounds", 2, "--output", tmp_path),
    )
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("step-*.json")
    results = StepResults.read(path)
    assert results.subject.dtype == "bfloat16"
    assert results.subject.cuda_graphs == "on"
    assert any(rate.tflops for rate in results.attention)
    (case,) = results.cases
    for provider in case.providers:
        assert provider.timing.method == "stream"
        memory, seen = provider.memory, provider.activity
        assert memory is not None
        assert seen is not None
        assert results.subject.bytes < memory.allocated <= memory.reserved
        # Two layers, of which each has four products at the least, and their launches.
        assert seen.kernels > 8
        assert seen.launches > 0
        assert 0 < seen.gpu_us <= seen.span_us
        assert sum(kernel.us for kernel in seen.longest) <= 1.01 * seen.gpu_us

    answer = mot_bench(
        *("e2e", "--random", "tiny", "--resolution", "64x64", "--timesteps", 4, "--rounds", 1),
        *("--context-tokens", 40, "--new-tokens", 5, "--output", tmp_path),
    )
    assert answer.code == 0, answer.err
    (path,) = tmp_path.glob("e2e-*.json")
    for request in E2eResults.read(path).requests:
        assert request.memory is not None
        assert (request.loop is None) == (request.name == "text")
        if request.loop is not None:
            assert request.loop.kernels > 8
            assert 0 < request.loop.busy <= 1
