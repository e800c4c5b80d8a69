"""Results of `step`, `e2e` and `accuracy` as tables in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mot_bench.model_results import (
    AccuracyResults,
    Activity,
    AttentionRate,
    E2eResults,
    Memory,
    RequestResult,
    StepCase,
    StepProvider,
    StepResults,
    Subject,
)
from mot_bench.parallel_results import ModeResult, ParallelCase, ParallelResults, ms, span
from mot_bench.report_model import ACCURACY_COLUMNS, ACCURACY_KEY, accuracy_cells
from mot_bench.results import Environment, rate

_GIB = 1 << 30


def step_heading(results: StepResults) -> str:
    """Where the run took place, on which model, and what its ceilings are."""
    top = results.ceilings
    attention = ", ".join(map(_attention, results.attention))
    return (
        f"{_where(results.environment, results.subject)}\n"
        f"ceilings in this run: {top.dtype} matmul {rate(top.matmul_tflops)} TFLOP/s, copy "
        f"{rate(top.copy_gbps)} GB/s; attention {attention}\n"
        "× baseline is time: below 1 is faster than the baseline. % of floor: the time that dense "
        "unquantized matmuls, the fastest 16-bit attention and moving each activation once would "
        "take."
    )


def step_table(case: StepCase, results: StepResults) -> Group:
    """All providers on one case."""
    floor = results.floor_us(case.work)
    table = _table(
        *("ms / step", "20-80 %", "× baseline", "% of floor", "GiB beyond weights", "difference"),
    )
    baseline = next((p.timing.median_us for p in case.providers if p.baseline), None)
    for provider in case.providers:
        table.add_row(*_step_cells(provider, floor, baseline, results.subject.bytes))
    title = (
        f"{case.height}x{case.width}, {_count(case.branches, 'branch', 'branches')}, "
        f"{_count(case.batch, 'image', 'images')}, {case.rows:,} rows; "
        f"floor {floor / 1e3:.1f} ms"
    )
    return Group(Text(title, style="bold"), table)


def _step_cells(
    provider: StepProvider, floor: float, baseline: float | None, weights: int
) -> list[str]:
    timing = provider.timing
    return [
        f"{provider.name} (baseline)" if provider.baseline else provider.name,
        f"{timing.median_us / 1e3:.2f}",
        f"{timing.p20_us / 1e3:.2f}-{timing.p80_us / 1e3:.2f}",
        "-" if baseline is None else f"{timing.median_us / baseline:.2f}",
        f"{100 * floor / timing.median_us:.0f}",
        _memory(provider.memory, weights),
        f"{provider.difference:.1e}",
    ]


def activity_table(results: StepResults) -> Table | None:
    """What the GPU did in a step of each provider; None if there was no GPU."""
    table = _table(
        *("provider", "kernels", "launches", "GPU ms", "GPU busy %", "exchange %", "longest kernel")
    )
    for case in results.cases:
        size = f"{case.height}x{case.width}, {_count(case.branches, 'branch', 'branches')}"
        for provider in case.providers:
            seen = provider.activity
            if seen is None:
                continue
            longest = seen.longest[0] if seen.longest else None
            table.add_row(
                size,
                provider.name,
                f"{seen.kernels:.0f}",
                f"{seen.launches:.0f}",
                f"{seen.gpu_us / 1e3:.2f}",
                _busy(seen),
                f"{100 * seen.exchange_us / seen.gpu_us:.1f}" if seen.gpu_us else "-",
                # As text: rich takes [...] in a kernel's name for markup.
                Text("-" if longest is None else f"{longest.us / 1e3:.2f} ms {longest.name[:40]}"),
            )
    return table if table.rows else None


def parallel_heading(results: ParallelResults) -> str:
    """Where the run took place, on which model, and what the columns mean."""
    return (
        f"{_where(results.environment, results.subject)}\n"
        "speed-up: times the speed of one rank with its own choice of CUDA graphs, whose time is "
        "behind it; measured on all ranks in the same rounds (where they split the weights: "
        "beside other modes, or before, on the first one). exchange %: of "
        "the time that a rank's GPU works (on a CPU: of a step), in exchanges with other ranks, "
        "waiting for them included. GiB: peak of what torch takes of a rank's GPU, weights "
        "included, NCCL's buffers not. difference: of the velocities to those of one rank, "
        "relative L2. Where ranks differ: the least to the most."
    )


def parallel_table(case: ParallelCase) -> Group:
    """All modes on one case."""
    table = _table(
        *("CUDA graphs", "ms / step", "20-80 %", "speed-up", "of ms", "exchange %", "GiB"),
        *("rows of a rank", "difference"),
    )
    for mode in case.modes:
        table.add_row(*_mode_cells(case, mode))
    return Group(Text(case.title, style="bold"), table)


def _mode_cells(case: ParallelCase, mode: ModeResult) -> list[str]:
    timing, speed_up = mode.timing, case.speed_up(mode)
    shares = [rank.exchange_share for rank in mode.ranks]
    memory = [rank.memory for rank in mode.ranks]
    return [
        mode.mode,
        "on" if mode.cuda_graphs else "off",
        f"{timing.median_us / 1e3:.2f}",
        f"{timing.p20_us / 1e3:.2f}-{timing.p80_us / 1e3:.2f}",
        "-" if speed_up is None else f"{speed_up:.2f}",
        ms(case.alone_us(mode)),
        span([None if share is None else 100 * share for share in shares], "{:.1f}"),
        span([None if each is None else each.reserved / _GIB for each in memory], "{:.2f}"),
        span([rank.rows for rank in mode.ranks], "{:,}"),
        "-" if mode.difference is None else f"{mode.difference:.1e}",
    ]


def e2e_heading(results: E2eResults) -> str:
    """Where the run took place, on which model."""
    return (
        f"{_where(results.environment, results.subject)}\n"
        "seconds, medians; each request alone on the device. GPU busy: share of the denoising "
        "loop, under the profiler, which slows the host."
    )


def e2e_table(request: RequestResult, results: E2eResults) -> Group:
    """The phases of one request."""
    memory = _memory(request.memory, results.subject.bytes)
    title = f"{request.name}: {request.what}; first run {request.first_s:.2f} s"
    if request.loop is not None:
        title += f"; GPU busy {_busy(request.loop)} % of the loop"
    if request.memory is not None:
        title += f"; peak memory weights + {memory} GiB"
    table = _table("s", "20-80 %", "% of total", "a second")
    for phase in (*request.phases, request.total):
        table.add_row(
            phase.name,
            f"{phase.median_s:.3f}",
            f"{phase.p20_s:.3f}-{phase.p80_s:.3f}",
            f"{100 * phase.median_s / request.total.median_s:.1f}",
            _speed(request, phase.name, phase.median_s),
        )
    return Group(Text(title, style="bold"), table)


def accuracy_heading(results: AccuracyResults) -> str:
    """Where the run took place, on which model, and what the columns mean."""
    return (
        f"{_where(results.environment, results.subject)}\n"
        f"{results.height}x{results.width}, {_count(results.branches, 'branch', 'branches')}, "
        f"{_count(results.batch, 'image', 'images')}, {results.prompt!r}\n" + ACCURACY_KEY
    )


def accuracy_table(results: AccuracyResults) -> Table:
    """All variants."""
    table = _table(*ACCURACY_COLUMNS[1:], corner=ACCURACY_COLUMNS[0])
    for each in results.variants:
        table.add_row(*accuracy_cells(each))
    return table


def _speed(request: RequestResult, phase: str, seconds: float) -> str:
    """What a phase makes a second, in its own unit."""
    if phase == "denoise":
        return f"{request.batch * request.steps / seconds:.1f} steps"
    if phase == "write":
        return f"{request.batch * request.steps / seconds:.0f} tokens"
    if phase == "prefill":
        return f"{request.batch * request.prompt_tokens / seconds:.0f} tokens"
    return ""


def _where(environment: Environment, subject: Subject) -> str:
    return (
        f"{environment.device}, torch {environment.torch}, triton {environment.triton}, commit "
        f"{environment.commit}\n"
        f"weights: {subject.weights}, {subject.parameters / 1e9:.2f} billion parameters, "
        f"{subject.bytes / _GIB:.2f} GiB, {subject.dtype}; attention {subject.attention}, CUDA "
        f"graphs {subject.cuda_graphs}; quantization {subject.quantization}"
        + ("" if subject.loading is None else f", peak {subject.loading / _GIB:.2f} GiB loading")
    )


def _attention(found: AttentionRate) -> str:
    return f"{found.name} {'-' if found.tflops is None else f'{rate(found.tflops)} TFLOP/s'}"


def _busy(activity: Activity | None) -> str:
    return "-" if activity is None else f"{100 * activity.busy:.1f}"


def _memory(memory: Memory | None, weights: int) -> str:
    return "-" if memory is None else f"{(memory.reserved - weights) / _GIB:.2f}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _table(*columns: str, corner: str = "") -> Table:
    # Its title is printed before it: rich would break it at the table's width.
    table = Table()
    table.add_column(corner, no_wrap=True)
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    return table
