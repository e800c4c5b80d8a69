"""`mot-bench report`: result files as a Markdown page. The same files give the same page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from mot_bench.markdown import environment_facts, percent, table
from mot_bench.model_results import AccuracyResults, E2eResults, StepResults
from mot_bench.parallel_results import ParallelResults
from mot_bench.report_model import (
    accuracy_sections,
    e2e_sections,
    parallel_sections,
    step_sections,
)
from mot_bench.results import (
    KIND,
    CaseResult,
    Mean,
    ProviderResult,
    Results,
    means,
    percent_of_ceiling,
    rate,
    times_baseline,
)

_TITLES = {
    "linear": "`mot_linear`",
    "linear_format": "`mot_linear`, weights in a number format",
    "rms_norm": "`mot_rms_norm`",
    "qk_norm_rope": "`mot_qk_norm_rope`",
    "mlp": "An MLP from its norm to its residual",
}


AnyResults = Results | StepResults | ParallelResults | E2eResults | AccuracyResults

# Commands whose results have no place on the page.
_OTHER_KINDS = ("quality", "serve")


class NotOnThePage(ValueError):
    """A result file of a command that the page says nothing about."""


def read(path: Path) -> AnyResults:
    """A result file of `mot-bench kernels`, `step`, `e2e` or `accuracy`.

    Raises:
        NotOnThePage: it is of another command.
        ValueError: it is none of these; the message names the file and the key.
        OSError: it cannot be read.
    """
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    except (ValueError, KeyError, TypeError):
        kind = KIND  # whose reader says what is wrong
    if kind in _OTHER_KINDS:
        raise NotOnThePage(
            f"{path} is of mot-bench {kind}; the page is about kernels, step, e2e and accuracy"
        )
    for known in (StepResults, ParallelResults, E2eResults, AccuracyResults):
        if kind == known.KIND:
            return known.read(path)
    return Results.read(path)


def report(runs: Sequence[tuple[PurePath, AnyResults]]) -> str:
    """The page, in Markdown.

    Args:
        runs: result files, in the order to show them. Only their names are printed.
    """
    parts = [
        "# Performance",
        "Written by `mot-bench report` from result files; do not edit. Times are medians. In "
        "tables of kernels they are microseconds, in brackets relative to the baseline's (below "
        "1.00 is faster than the baseline). % of ceiling: how much of the time would remain at "
        "the ceilings of computing and moving data that were measured in the same run (computing "
        "in 16 bits, so products in 8 bits may reach more than 100).",
    ]
    for path, results in runs:
        match results:
            case StepResults():
                parts += step_sections(path, results)
            case ParallelResults():
                parts += parallel_sections(path, results)
            case E2eResults():
                parts += e2e_sections(path, results)
            case AccuracyResults():
                parts += accuracy_sections(path, results)
            case _:
                parts += _run(path, results)
    return "\n\n".join(parts) + "\n"


def _run(path: PurePath, results: Results) -> list[str]:
    where, top = results.environment, results.ceilings
    facts = environment_facts(where) | {
        "protocol": results.protocol,
        "ceilings": f"{top.dtype} matmul {top.matmul_size}³ {rate(top.matmul_tflops)} TFLOP/s; "
        f"copy {rate(top.copy_gbps)} GB/s, read and written",
        "result file": f"`{path.name}`",
    }
    parts = [
        f"## {where.device}, {top.dtype}, commit {where.commit[:7]}",
        table(["", ""], [[key, value] for key, value in facts.items()]),
        f"Repeat it with:\n\n```\n{results.command}\n```",
    ]
    if not results.complete:
        parts.append("**The run was cut off: cases are missing.**")
    for op in dict.fromkeys(case.op for case in results.cases):
        parts += _operation(op, [case for case in results.cases if case.op == op], results)
    return parts


def _operation(op: str, cases: list[CaseResult], results: Results) -> list[str]:
    providers: dict[str, ProviderResult] = {}
    for case in cases:
        for provider in case.providers:
            providers.setdefault(provider.name, provider)
    names = list(providers)
    ours = names[0]
    header = ["rows per expert", "layer", *names, f"{ours}, % of ceiling"]
    rows = [_row(case, names, ours, results) for case in cases]
    averages = {mean.name: mean for mean in means(results) if mean.op == op}
    cells = [_mean_cell(averages[name]) for name in names]
    rows.append(["**geometric mean**", "", *cells, percent(averages[ours].percent_of_ceiling)])
    key = "; ".join(
        f"`{name}`: {provider.label}" + (" (the baseline)" if provider.baseline else "")
        for name, provider in providers.items()
    )
    parts = [f"### {_TITLES.get(op, op)}", key + ".", table(header, rows)]
    parts += _remarks(cases)
    return parts


def _row(case: CaseResult, names: Iterable[str], ours: str, results: Results) -> list[str]:
    found = {provider.name: provider for provider in case.providers}
    cells = []
    for name in names:
        provider = found.get(name)
        timing = None if provider is None else provider.timing
        if timing is None:
            cells.append("-" if provider is None else provider.status)
            continue
        ratio = times_baseline(case, timing)
        mark = "" if timing.method in ("graph", "clock") else "*"
        bracket = "" if ratio is None else f" ({ratio:.2f})"
        cells.append(f"{timing.median_us:.1f}{mark}{bracket}")
    timing = found[ours].timing if ours in found else None
    share = None if timing is None else percent_of_ceiling(case, timing, results.ceilings)
    counts = " + ".join(f"{count:,}" for count in case.counts)
    return [f"{counts} ({case.routing})", case.shape, *cells, percent(share)]


def _remarks(cases: list[CaseResult]) -> list[str]:
    """What the table cannot say, each remark once."""
    remarks: dict[str, None] = {}
    for case in cases:
        if not case.cold:
            remarks[f"{case.shape}, {case.routing}: too little data to rotate, L2 is warm"] = None
        for provider in case.providers:
            if provider.status != "timed":
                remarks[f"`{provider.name}` {provider.status}: {provider.why}"] = None
            elif provider.timing is not None and provider.timing.note:
                remarks[f"\\* `{provider.name}`: {provider.timing.note}"] = None
            if provider.status == "timed" and provider.why:
                remarks[f"`{provider.name}`: {provider.why}"] = None
    return ["\n".join(f"- {remark}" for remark in remarks)] if remarks else []


def _mean_cell(mean: Mean) -> str:
    """With how many cases it is of, if not of all."""
    if mean.times_baseline is None:
        return "-"
    some = f" {mean.compared} of {mean.of}" if mean.compared < mean.of else ""
    return f"({mean.times_baseline:.2f}){some}"
