"""How anything is timed, written once.

A variant is a callable that takes the index of an input set. Inputs rotate over enough sets that
a call never finds its own in L2: in a model they were evicted by the layers in between. On CUDA
a variant is captured into one graph that runs it once per set, so that no launch overhead of
Python is timed; graph replays are timed with events. A round replays every variant once, and the
order is reversed every other round: clocks and temperature drift, and so they drift for all.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mot_bench.results import Ceilings, Timing, percentile

Variant = Callable[[int], object]
"""Runs once on the input set of this index. What it returns is kept during a graph's capture, so
that every set gets an output of its own."""

ROUNDS = 30

# "Cold" means that the bytes touched between two uses of a set exceed this many times L2.
_L2_MULTIPLE = 3
# More sets than this only help problems of a few KB, which stay warm and are marked so.
_MOST_SETS = 128


@dataclass(frozen=True)
class Prepared:
    """A variant ready to be timed.

    Attributes:
        start: runs it over all sets; returns a function that gives the microseconds it took,
            valid after `Stopwatch.wait`.
        method, note: see `Timing`.
    """

    start: Callable[[], Callable[[], float]]
    method: str
    note: str = ""


class Stopwatch(Protocol):
    """What differs between devices."""

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        """Warm every variant up and make it ready."""

    def wait(self) -> None:
        """Wait until everything started has finished."""


def measure(
    variants: Mapping[str, Variant],
    sets: int,
    rounds: int = ROUNDS,
    *,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Timing]:
    """Time variants against each other.

    Args:
        variants: by name; each is called with 0..sets - 1.
        sets: input sets to rotate over, see `rotation`.
        rounds: samples per variant. One more round runs first, untimed, to settle the clocks.
        stopwatch: by default that of the current CUDA device, or of the CPU if there is none.

    Raises:
        ValueError: `sets` or `rounds` < 1.
        Exception: whatever a variant raises while it warms up.
    """
    if sets < 1 or rounds < 1:
        raise ValueError(f"sets is {sets} and rounds is {rounds}; both must be at least 1")
    stopwatch = stopwatch or stopwatch_for(best_device())
    prepared = stopwatch.prepare(variants, sets)
    names = list(prepared)
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in names if index % 2 == 0 else reversed(names):
            reading = prepared[name].start()
            if index > 0:
                readings[name].append(reading)
    stopwatch.wait()
    return {
        name: _summary([read() / sets for read in readings[name]], prepared[name]) for name in names
    }


def _summary(samples: Sequence[float], prepared: Prepared) -> Timing:
    return Timing(
        statistics.median(samples),
        percentile(samples, 20),
        percentile(samples, 80),
        len(samples),
        prepared.method,
        prepared.note,
    )


class CpuStopwatch:
    """Times on the host: the device is the CPU."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` gives seconds."""
        self._clock = clock

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        def ready(variant: Variant) -> Prepared:
            def start() -> Callable[[], float]:
                begin = self._clock()
                for index in range(sets):
                    variant(index)
                elapsed = (self._clock() - begin) * 1e6
                return lambda: elapsed

            variant(0)
            return Prepared(start, "clock")

        return {name: ready(variant) for name, variant in variants.items()}

    def wait(self) -> None:
        """Nothing runs in the background."""


class CudaStopwatch:
    """Times on a CUDA (or ROCm) device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        # Graphs of one pool reuse each other's memory, so the largest counts and not their sum.
        # They never run at the same time, and nobody reads their outputs.
        pool = torch.cuda.graph_pool_handle()
        ready = {}
        with torch.cuda.device(self._device):
            for name, variant in variants.items():
                ready[name] = self._capture(variant, sets, pool)
                if ready[name].method != "graph":  # torch 2.11 cannot use that pool again
                    pool = torch.cuda.graph_pool_handle()
        return ready

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def _capture(self, variant: Variant, sets: int, pool: tuple[int, int]) -> Prepared:
        def run_directly() -> None:
            for index in range(sets):
                variant(index)

        # Twice on a stream of its own: libraries allocate their workspaces and compilers compile
        # on the first call, and neither may happen during the capture.
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run_directly()
            waits = _why_it_waits(run_directly)
        current.wait_stream(side)
        torch.cuda.synchronize()
        if waits:
            return Prepared(_between_events(run_directly), "stream", f"no CUDA graph: {waits}")

        graph = torch.cuda.CUDAGraph()
        outputs = []
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                for index in range(sets):
                    outputs.append(variant(index))
        except Exception as error:  # anything the variant does may forbid a capture
            outputs.clear()
            torch.cuda.set_stream(current)
            _clean_up_after(graph, pool, self._device)
            # What went wrong comes before the complaint that the capture is broken.
            note = f"no CUDA graph: {first_line(error.__context__ or error)}"
            return Prepared(_between_events(run_directly), "stream", note)
        return Prepared(_between_events(graph.replay), "graph")


class SustainedStopwatch(CudaStopwatch):
    """Samples long enough for the GPU to settle on the clock that its power limit allows.

    A matrix product draws more power than that: on an H200 it takes up to a fifth longer after a
    tenth of a second, and which tiles are fastest then is not what short samples say. Each sample
    follows as long a time of the same variant that is not timed.
    """

    SECONDS = 0.12

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        return {
            name: self._lengthened(each) for name, each in super().prepare(variants, sets).items()
        }

    def _lengthened(self, prepared: Prepared) -> Prepared:
        reading = prepared.start()
        self.wait()
        runs = max(1, round(self.SECONDS * 1e6 / reading()))

        def start() -> Callable[[], float]:
            for _ in range(runs):
                prepared.start()
            readings = [prepared.start() for _ in range(runs)]
            return lambda: sum(read() for read in readings) / runs

        return Prepared(start, prepared.method, prepared.note)


class StreamStopwatch:
    """Times what is launched from Python as it is: programs that choose their own CUDA graphs.

    Every sample begins on an idle device: launches made while another variant still runs would
    hide the time that they take.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        def ready(variant: Variant) -> Prepared:
            def run() -> None:
                for index in range(sets):
                    variant(index)

            def start() -> Callable[[], float]:
                torch.cuda.synchronize(self._device)
                return _between_events(run)()

            run()
            run()
            return Prepared(start, "stream")

        with torch.cuda.device(self._device):
            return {name: ready(variant) for name, variant in variants.items()}

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def _why_it_waits(run: Callable[[], None]) -> str:
    """Why a variant waits for the GPU and so cannot be captured, or "".

    Asked before the capture, because torch 2.11 does not recover well from a failed one.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # It says each time that it is a prototype, also where warnings are errors.
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            return first_line(error)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return ""


_failed_graphs: list[torch.cuda.CUDAGraph] = []


def _clean_up_after(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device
) -> None:
    """After a failed capture make the allocator usable again.

    torch < 2.12 leaves it believing that the capture goes on (pytorch/pytorch#180395), so that
    every later capture fails; and it keeps asking the graph, which therefore has to stay alive.
    """
    _failed_graphs.append(graph)
    with contextlib.suppress(RuntimeError):  # later releases have done it already
        torch._C._cuda_endAllocateToPool(device.index, pool)
    torch.cuda.synchronize()


def _between_events(run: Callable[[], None]) -> Callable[[], Callable[[], float]]:
    def start() -> Callable[[], float]:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        return lambda: float(begin.elapsed_time(end)) * 1e3

    return start


def best_device() -> torch.device:
    """The current CUDA device, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The stopwatch of a device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


def sustained_stopwatch_for(device: torch.device) -> Stopwatch:
    """As `stopwatch_for`, with samples that outlast what a GPU can do above its power limit."""
    return SustainedStopwatch(device) if device.type == "cuda" else CpuStopwatch()


@dataclass(frozen=True)
class Rotation:
    """How many input sets to rotate over.

    Attributes:
        sets: at least 2, so that no call repeats its predecessor's inputs.
        cold: whether the bytes touched exceed three times the device's L2. Always true on a CPU,
            where there is no such promise to keep.
    """

    sets: int
    cold: bool


def rotation(bytes_per_call: int, device: torch.device) -> Rotation:
    """The rotation for calls that touch this many bytes each."""
    if device.type != "cuda":
        return Rotation(2, True)
    target = _L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    sets = min(max(target // max(bytes_per_call, 1) + 1, 2), _MOST_SETS)
    return Rotation(sets, sets * bytes_per_call > target)


def ceilings(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, rounds: int = ROUNDS
) -> Ceilings:
    """Measure the ceilings of a device."""
    size, elements = (8192, 1 << 27) if device.type == "cuda" else (256, 1 << 20)
    sets = 2
    # Random numbers: a GPU multiplies zeros at a higher clock.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (
        [torch.randn(size, size, device=device, generator=draw).to(dtype) for _ in range(sets)]
        for _ in range(2)
    )
    product = torch.empty(size, size, device=device, dtype=dtype)
    sources = [torch.ones(elements, device=device) for _ in range(sets)]
    target = torch.empty_like(sources[0])
    timings = measure(
        {
            "matmul": lambda i: torch.mm(a[i], b[i], out=product),
            "copy": lambda i: target.copy_(sources[i]),
            # A copy may go through the copy engines; what kernels can move is the ceiling.
            "negate": lambda i: torch.neg(sources[i], out=target),
        },
        sets,
        rounds,
        stopwatch=stopwatch_for(device),
    )
    moved = 2 * elements * target.element_size()
    move_us = min(timings["copy"].median_us, timings["negate"].median_us)
    return Ceilings(
        str(dtype).removeprefix("torch."),
        2.0 * size**3 / timings["matmul"].median_us / 1e6,
        moved / move_us / 1e3,
        size,
        moved,
    )


def first_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
