"""What the GPU did while something ran: kernels, launches, how much of the time it worked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mot_bench.model_results import Activity, KernelTime, Memory

# Names of CUDA's and HIP's calls that start work on the GPU, without their prefixes.
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset", "LaunchCooperativeKernel")
_PREFIXES = ("cuda", "cu", "hip")

_WAITS = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")

# Parts of the names of kernels that exchange data between GPUs: NCCL's, and the all-reduces that
# vLLM may choose instead (its own, torch's over symmetric memory, FlashInfer's).
_EXCHANGES = ("nccl", "cross_device_reduce", "all_reduce", "allreduce")

_LONGEST = 15
_NAME_LENGTH = 120


def observe(run: Callable[[], object], steps: int, device: torch.device) -> Activity | None:
    """Run something of `steps` steps under the profiler; None on a CPU, where there is no GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    # Without torch's own operators: to note those, too, would slow the host much more.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        run()
        torch.cuda.synchronize(device)
    events = profiled.events()
    assert events is not None
    on_gpu, launches = [], 0
    for event in events:
        if event.device_type == DeviceType.CUDA:
            # Ranges that the program marked and waits appear here, too, but are no work.
            marked = getattr(event, "is_user_annotation", False)
            if not marked and event.name not in _WAITS:
                on_gpu.append((event.name, event.time_range.start, event.time_range.end))
        elif _is_launch(event.name):
            launches += 1
    return summary(on_gpu, launches, steps)


def summary(on_gpu: Iterable[tuple[str, float, float]], launches: int, steps: int) -> Activity:
    """Summarise (name, start, end) of GPU activities, in microseconds; they may overlap."""
    runs: dict[str, list[float]] = defaultdict(list)
    ordered = sorted(on_gpu, key=lambda each: each[1])
    worked, until = 0.0, float("-inf")
    for name, start, end in ordered:
        runs[name[:_NAME_LENGTH]].append(end - start)
        worked += max(end - max(start, until), 0.0)
        until = max(until, end)
    span = until - ordered[0][1] if ordered else 0.0
    longest = sorted(runs.items(), key=lambda item: sum(item[1]), reverse=True)[:_LONGEST]
    return Activity(
        kernels=len(ordered) / steps,
        launches=launches / steps,
        gpu_us=worked / steps,
        span_us=span / steps,
        exchange_us=sum(
            sum(times) for name, times in runs.items() if any(part in name for part in _EXCHANGES)
        )
        / steps,
        longest=tuple(
            KernelTime(name, len(times) / steps, sum(times) / steps) for name, times in longest
        ),
    )


def peak_memory(run: Callable[[], object], device: torch.device) -> Memory | None:
    """The memory's peaks while something runs; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def _is_launch(name: str) -> bool:
    return name.startswith(_PREFIXES) and any(part in name for part in _LAUNCHES)
