"""The protocol: who runs when, and what becomes of the samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import pytest
import torch

from mot_bench import protocol
from mot_bench.protocol import (
    CpuStopwatch,
    Prepared,
    SustainedStopwatch,
    Variant,
    measure,
    percentile,
    rotation,
)
from mot_bench.results import Ceilings


class RecordingStopwatch:
    """Writes down who is started; a pass takes as many microseconds as its place in the record."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.waited_after: int | None = None

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        def ready(name: str) -> Prepared:
            def start() -> Callable[[], float]:
                self.started.append(name)
                place = len(self.started)

                def read() -> float:
                    assert self.waited_after is not None, "read before the device was waited for"
                    return float(place * sets)

                return read

            return Prepared(start, "fake", f"note of {name}")

        return {name: ready(name) for name in variants}

    def wait(self) -> None:
        self.waited_after = len(self.started)


def nothing(index: int) -> None:
    """A variant."""


def test_measure_interleaves_and_reverses_every_other_round() -> None:
    stopwatch = RecordingStopwatch()
    measure(dict.fromkeys("abc", nothing), sets=4, rounds=3, stopwatch=stopwatch)
    assert "".join(stopwatch.started) == "abccbaabccba"
    assert stopwatch.waited_after == 12


def test_measure_leaves_the_first_round_out_and_divides_by_sets() -> None:
    timings = measure({"a": nothing, "b": nothing}, 4, 3, stopwatch=RecordingStopwatch())
    # Places in "ab ba ab ba": a at 1 (left out), 4, 5, 8; b at 2 (left out), 3, 6, 7.
    assert timings["a"].median_us == 5.0
    assert timings["b"].median_us == 6.0
    assert timings["a"].samples == 3
    assert (timings["a"].method, timings["b"].note) == ("fake", "note of b")


def test_measure_on_a_cpu_with_a_scripted_clock() -> None:
    now = 0.0
    indices: list[int] = []
    seconds_of_round = iter([50.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def variant(index: int) -> None:
        nonlocal now
        if indices and index == 0:  # the very first call only warms up
            now += next(seconds_of_round) * 1e-6
        indices.append(index)

    timing = measure({"v": variant}, 3, 5, stopwatch=CpuStopwatch(lambda: now))["v"]
    assert indices == [0, *[0, 1, 2] * 6]
    # Three calls a round: 1/3 .. 5/3 microseconds each.
    assert timing.median_us == pytest.approx(1.0)
    assert timing.p20_us == pytest.approx(1.8 / 3)
    assert timing.p80_us == pytest.approx(4.2 / 3)
    assert (timing.samples, timing.method, timing.note) == (5, "clock", "")


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [([7.0], 20, 7.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0, 5.0], 80, 4.2)],
    ids=["one_sample", "between_two", "unsorted"],
)
def test_percentile(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == pytest.approx(expected)


@pytest.mark.parametrize(("sets", "rounds"), [(0, 1), (1, 0)], ids=["no_sets", "no_rounds"])
def test_measure_refuses(sets: int, rounds: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        measure({"v": nothing}, sets, rounds)


def test_measure_passes_on_what_a_variant_raises() -> None:
    def broken(index: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        measure({"v": broken}, 1, 1, stopwatch=CpuStopwatch())


@pytest.mark.parametrize(
    ("megabytes", "sets", "cold"),
    [(33, 6, True), (700, 2, True), (0.001, 128, False)],
    ids=["several_sets", "two_at_least", "too_small_to_be_cold"],
)
def test_rotation(megabytes: float, sets: int, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    l2 = SimpleNamespace(L2_cache_size=60_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: l2)
    found = rotation(int(megabytes * 1e6), torch.device("cuda", 0))
    assert (found.sets, found.cold) == (sets, cold)
    assert found.cold == (found.sets * megabytes > 180)


def test_ceilings_are_measured() -> None:
    found = protocol.ceilings(torch.device("cpu"), torch.float32, rounds=2)
    assert found.dtype == "float32"
    assert found.matmul_tflops > 0
    assert found.copy_gbps > 0


def test_floor_is_the_longer_of_computing_and_moving() -> None:
    top = Ceilings("bfloat16", matmul_tflops=500.0, copy_gbps=4000.0, matmul_size=1, copy_bytes=1)
    assert top.floor_us(flops=1e12, bytes_moved=4e6) == pytest.approx(2000.0)
    assert top.floor_us(flops=1e6, bytes_moved=4e9) == pytest.approx(1000.0)


class FakeCuda:
    """Stands in for torch.cuda: time passes when a variant or a graph runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds = 0.0
        self.capturing = False
        self.sync_mode: int | str = 0
        self.restored: list[object] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.milliseconds

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class Graph:
            def replay(self) -> None:
                fake.milliseconds += 1

        @contextlib.contextmanager
        def graph(_: Graph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
            fake.capturing = True
            try:
                yield
            except Exception:
                raise RuntimeError("the capture is invalid") from None
            finally:
                fake.capturing = False

        stream = SimpleNamespace(wait_stream=lambda other: None)
        stands_in = {
            "CUDAGraph": Graph,
            "Event": Event,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "device": lambda device: contextlib.nullcontext(),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "set_stream": self.restored.append,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda *args: None,
        }
        for name, value in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(protocol, "_clean_up_after", lambda *args: None)


def test_what_cannot_be_captured_is_timed_without_a_graph_and_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)

    def breaks_captures(index: int) -> None:
        if cuda.capturing:
            raise ValueError("not in a graph")
        cuda.milliseconds += 2

    def waits(index: int) -> None:
        if cuda.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        cuda.milliseconds += 3

    timings = measure(
        {"plain": nothing, "breaks": breaks_captures, "waits": waits},
        sets=2,
        rounds=3,
        stopwatch=protocol.CudaStopwatch(torch.device("cuda", 0)),
    )
    assert {name: (t.method, t.median_us, t.note) for name, t in timings.items()} == {
        "plain": ("graph", 500.0, ""),
        "breaks": ("stream", 2000.0, "no CUDA graph: ValueError: not in a graph"),
        "waits": (
            "stream",
            3000.0,
            "no CUDA graph: RuntimeError: called a synchronizing CUDA operation",
        ),
    }
    assert cuda.sync_mode == 0
    assert len(cuda.restored) == 1, "a failed capture leaves its stream behind"


def test_sustained_samples_settle_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay takes 1 ms here: a sample is what lasts 0.12 s, after as long untimed."""
    cuda = FakeCuda(monkeypatch)
    stopwatch = SustainedStopwatch(torch.device("cuda"))
    (prepared,) = stopwatch.prepare({"graph": lambda index: None}, 4).values()
    begin = cuda.milliseconds
    reading = prepared.start()
    assert (cuda.milliseconds - begin, prepared.method) == (240, "graph")
    assert reading() == pytest.approx(1000)
    timing = measure({"graph": lambda index: None}, 4, 3, stopwatch=stopwatch)["graph"]
    assert (timing.median_us, timing.samples) == (pytest.approx(250), 3)
