"""The part of `mot-bench report` about steps and requests: their sections and tables."""

from __future__ import annotations

from pathlib import PurePath

from mot_bench.markdown import environment_facts, percent, table
from mot_bench.model_results import (
    E2eResults,
    Run,
    StepCase,
    StepProvider,
    StepResults,
    Subject,
)


def step_sections(path: PurePath, results: StepResults) -> list[str]:
    """One run of `mot-bench step`."""
    rates = {rate.name: rate.tflops for rate in results.attention if rate.tflops}
    top = results.ceilings
    attention = ", ".join(f"{name} {tflops:.0f} TFLOP/s" for name, tflops in rates.items())
    facts = {
        "ceilings": f"{top.dtype} matmul {top.matmul_tflops:.0f} TFLOP/s, copy "
        f"{top.copy_gbps:.0f} GB/s; attention {attention or '-'}",
    }
    rows = [
        _step_row(case, provider, results) for case in results.cases for provider in case.providers
    ]
    header = ["step", "provider", "ms", "× baseline", "% of floor", "GPU busy, %", "launches"]
    return [
        *_opening(f"Denoising step, {results.environment.device}", path, results, facts),
        "The floor is the time of dense unquantized matmuls, the fastest attention and moving each "
        "activation once at the ceilings of the run. Memory is what torch reserved beyond the "
        "weights.",
        table([*header, "GiB"], rows),
    ]


def e2e_sections(path: PurePath, results: E2eResults) -> list[str]:
    """One run of `mot-bench e2e`."""
    rows = []
    for request in results.requests:
        phases = ", ".join(f"{phase.name} {phase.median_s:.3f}" for phase in request.phases)
        busy = "-" if request.loop is None else percent(100 * request.loop.busy)
        total = f"{request.total.median_s:.3f}"
        rows.append([request.name, request.what, str(request.batch), total, phases, busy])
    header = ["request", "settings", "at a time", "s", "phases, s", "GPU busy in the loop, %"]
    return [
        *_opening(f"Requests, {results.environment.device}", path, results, {}),
        table(header, rows),
    ]


def _opening(title: str, path: PurePath, results: Run, more: dict[str, str]) -> list[str]:
    model = results.subject
    facts = environment_facts(results.environment) | {
        "model": f"{model.weights}, {model.parameters / 1e9:.2f} billion parameters, {model.dtype}",
        **_quantization(model),
        "attention, graphs": f"{model.attention}, CUDA graphs {model.cuda_graphs}",
        "versions": f"bagel-mot {model.bagel_mot}, vLLM {model.vllm}",
        "protocol": results.protocol,
        **more,
        "result file": f"`{path.name}`",
    }
    parts = [
        f"## {title}",
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
    return {"quantization": f"{model.quantization}, weights {model.bytes / 2**30:.2f} GiB{loading}"}


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
