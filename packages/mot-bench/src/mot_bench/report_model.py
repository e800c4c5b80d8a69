"""The part of `mot-bench report` about whole models: their sections and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType

from mot_bench.markdown import environment_facts, percent, table
from mot_bench.model_results import (
    AccuracyResults,
    Distance,
    E2eResults,
    Run,
    StepCase,
    StepProvider,
    StepResults,
    Subject,
    VariantResult,
)
from mot_bench.parallel_results import ModeResult, ParallelCase, ParallelResults, ms, span
from mot_bench.results import rate

ACCURACY_COLUMNS = (
    *("weights", "attention", "GiB", "velocities", "guided", "logits", "attention alone"),
)
ACCURACY_KEY = (
    "Cosines with the first line's, and by how much numbers are off (relative L2, all in one "
    "vector); of velocities the branch that is worst. Attention alone: velocities against the same "
    "weights with the first backend."
)


def step_sections(path: PurePath, results: StepResults) -> list[str]:
    """One run of `mot-bench step`."""
    rates = {each.name: each.tflops for each in results.attention if each.tflops}
    top = results.ceilings
    attention = ", ".join(f"{name} {rate(tflops)} TFLOP/s" for name, tflops in rates.items())
    facts = {
        "ceilings": f"{top.dtype} matmul {rate(top.matmul_tflops)} TFLOP/s, copy "
        f"{rate(top.copy_gbps)} GB/s; attention {attention or '-'}",
    }
    rows = [
        _step_row(case, provider, results) for case in results.cases for provider in case.providers
    ]
    header = ["step", "provider", "ms", "× baseline", "% of floor", "GPU busy, %", "launches"]
    return [
        *_opening(f"Denoising step, {results.environment.device}", path, results, facts),
        "The floor is the time of dense unquantized matmuls, the fastest 16-bit attention and "
        "moving each activation once at the ceilings of the run. Memory is what torch reserved "
        "beyond the weights.",
        table([*header, "GiB beyond weights"], rows),
    ]


def parallel_sections(path: PurePath, results: ParallelResults) -> list[str]:
    """One run of `mot-bench step` on several ranks."""
    header = ["step", "mode", "CUDA graphs", "ms", "speed-up", "of ms", "exchange, %"]
    return [
        *_opening(f"Denoising step on several GPUs, {results.environment.device}", path, results),
        "Speed-up: over one GPU, whose time is in the next column. Each GPU made steps by itself "
        "in the same rounds; where a mode splits the weights it cannot, so that the time is from "
        "another mode's rounds or from the first GPU before (as in all results of before "
        "2026-11-29). Exchange: of the time "
        "that a GPU works, in exchanges with others, waiting included. Memory is what torch "
        "reserved, weights included, and NCCL's buffers not. Where GPUs differ: the least to the "
        "most. Difference: of the velocities to one GPU's, relative L2.",
        table(
            [*header, "GiB of a GPU", "rows of a GPU", "difference"],
            [_mode_row(case, mode) for case in results.cases for mode in case.modes],
        ),
    ]


def _mode_row(case: ParallelCase, mode: ModeResult) -> list[str]:
    speed_up, ranks = case.speed_up(mode), mode.ranks
    shares = [None if (s := each.exchange_share) is None else 100 * s for each in ranks]
    memory = [None if each.memory is None else each.memory.reserved / 2**30 for each in ranks]
    images = "" if case.batch == 1 else f", {case.batch} images"
    return [
        f"{case.height}x{case.width}, {case.branches} branch{'es' * (case.branches > 1)}{images}",
        mode.mode,
        "on" if mode.cuda_graphs else "off",
        f"{mode.timing.median_us / 1e3:.2f}",
        "-" if speed_up is None else f"{speed_up:.2f}",
        ms(case.alone_us(mode)),
        span(shares, "{:.1f}"),
        span(memory, "{:.2f}"),
        span([each.rows for each in ranks], "{:,}"),
        "-" if mode.difference is None else f"{mode.difference:.1e}",
    ]


def e2e_sections(path: PurePath, results: E2eResults) -> list[str]:
    """One run of `mot-bench e2e`."""
    rows = []
    for request in results.requests:
        phases = ", ".join(f"{phase.name} {phase.median_s:.3f}" for phase in request.phases)
        busy = "-" if request.loop is None else percent(100 * request.loop.busy)
        memory = request.memory
        rows.append(
            [
                request.name,
                request.what,
                str(request.batch),
                f"{request.total.median_s:.3f}",
                phases,
                busy,
                "-" if memory is None else f"{memory.reserved / 2**30:.1f}",
            ]
        )
    header = ["request", "settings", "at a time", "s", "phases, s", "GPU busy in the loop, %"]
    return [
        *_opening(f"Requests, {results.environment.device}", path, results),
        "GiB in all: the most that torch reserved, with the weights and what earlier requests of "
        "the run left (buffers, graphs). A card with that and what its driver takes is large "
        "enough.",
        table([*header, "GiB in all"], rows),
    ]


def accuracy_sections(path: PurePath, results: AccuracyResults) -> list[str]:
    """One run of `mot-bench accuracy`."""
    branches = f"{results.branches} branch{'es' * (results.branches > 1)}"
    images = f"{results.batch} image{'s' * (results.batch > 1)}"
    return [
        *_opening(f"Accuracy, {results.environment.device}", path, results),
        f'{results.height}x{results.width}, {branches}, {images}, "{results.prompt}". '
        + ACCURACY_KEY,
        table(ACCURACY_COLUMNS, [accuracy_cells(each) for each in results.variants]),
    ]


def accuracy_cells(variant: VariantResult) -> list[str]:
    """A line of the table; see `ACCURACY_COLUMNS`."""
    return [
        variant.weights,
        variant.attention,
        f"{variant.bytes / 2**30:.2f}",
        _distance(max(variant.velocities, key=lambda each: each.relative)),
        _distance(variant.guided),
        _distance(variant.logits),
        _distance(variant.attention_alone),
    ]


def _distance(found: Distance) -> str:
    return f"{found.cosine:.5f} ({found.relative:.1e})"


def _opening(
    title: str, path: PurePath, results: Run, more: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    model = results.subject
    quantization = "" if model.quantization == "none" else f", {model.quantization}"
    facts = environment_facts(results.environment) | {
        "model": f"{model.weights}, {model.parameters / 1e9:.2f} billion parameters, "
        f"{model.dtype}; weights {model.bytes / 2**30:.2f} GiB",
        **_quantization(model),
        "attention, graphs": f"{model.attention}, CUDA graphs {model.cuda_graphs}",
        "versions": f"bagel-mot {model.bagel_mot}, vLLM {model.vllm}",
        "protocol": results.protocol,
        **more,
        "result file": f"`{path.name}`",
    }
    parts = [
        f"## {title}{quantization}, commit {results.environment.commit[:7]}",
        table(["", ""], [[key, value] for key, value in facts.items()]),
        f"Repeat it with:\n\n```\n{results.command}\n```",
    ]
    if not results.complete:
        parts.append("**The run was cut off: cases are missing.**")
    return parts


def _quantization(model: Subject) -> dict[str, str]:
    """What is to be said of a model whose weights are in a format."""
    if model.quantization == "none":
        return {}
    loading = "" if model.loading is None else f", peak {model.loading / 2**30:.2f} GiB loading"
    return {"quantization": f"{model.quantization}{loading}"}


def _step_row(case: StepCase, provider: StepProvider, results: StepResults) -> list[str]:
    us = provider.timing.median_us
    baseline = next((each.timing.median_us for each in case.providers if each.baseline), None)
    images = "" if case.batch == 1 else f", {case.batch} images"
    activity, memory = provider.activity, provider.memory
    beyond = None if memory is None else (memory.reserved - results.subject.bytes) / 2**30
    return [
        f"{case.height}x{case.width}, {case.branches} branch{'es' * (case.branches > 1)}{images}",
        provider.name,
        f"{us / 1e3:.2f}",
        "-" if baseline is None else f"{us / baseline:.2f}",
        percent(100 * results.floor_us(case.work) / us),
        "-" if activity is None else f"{100 * activity.busy:.1f}",
        "-" if activity is None else f"{activity.launches:.0f}",
        "-" if beyond is None else f"{beyond:.2f}",
    ]
