"""`mot-bench report`: result files as a Markdown page. The same files give the same page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath

from mot_bench.results import (
    CaseResult,
    ProviderResult,
    Results,
    means,
    percent_of_ceiling,
    times_baseline,
)

_TITLES = {
    "linear": "`mot_linear`",
    "rms_norm": "`mot_rms_norm`",
    "qk_norm_rope": "`mot_qk_norm_rope`",
}


def report(runs: Sequence[tuple[PurePath, Results]]) -> str:
    """The page, in Markdown.

    Args:
        runs: result files, in the order to show them. Only their names are printed.
    """
    parts = [
        "# Performance",
        "Written by `mot-bench report` from result files; do not edit. Times are medians in "
        "microseconds. In brackets: the time relative to the baseline's (below 1.00 is faster "
        "than the baseline). % of ceiling: how much of the time would remain at the ceilings of "
        "computing and moving data that were measured in the same run.",
    ]
    for path, results in runs:
        parts += _run(path, results)
    return "\n\n".join(parts) + "\n"


def _run(path: PurePath, results: Results) -> list[str]:
    where, top = results.environment, results.ceilings
    facts = {
        "device": f"{where.device} (driver {where.driver}, CUDA {where.cuda})",
        "clocks": where.clocks,
        "software": f"torch {where.torch}, triton {where.triton}, Python {where.python}",
        "packages": f"mot-kernels {where.mot_kernels}, mot-bench {where.mot_bench}, commit "
        f"{where.commit}",
        "date": where.date,
        "protocol": results.protocol,
        "ceilings": f"{top.dtype} matmul {top.matmul_size}³ {top.matmul_tflops:.0f} TFLOP/s; copy "
        f"{top.copy_gbps:.0f} GB/s, read and written",
        "result file": f"`{path.name}`",
    }
    parts = [
        f"## {where.device}, {top.dtype}",
        _table(["", ""], [[key, value] for key, value in facts.items()]),
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
    cells = [_mean_cell(averages[name].times_baseline) for name in names]
    rows.append(["**geometric mean**", "", *cells, _percent(averages[ours].percent_of_ceiling)])
    key = "; ".join(
        f"`{name}`: {provider.label}" + (" (the baseline)" if provider.baseline else "")
        for name, provider in providers.items()
    )
    parts = [f"### {_TITLES.get(op, op)}", key + ".", _table(header, rows)]
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
    percent = None if timing is None else percent_of_ceiling(case, timing, results.ceilings)
    counts = " + ".join(f"{count:,}" for count in case.counts)
    return [f"{counts} ({case.routing})", case.shape, *cells, _percent(percent)]


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


def _mean_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"({ratio:.2f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
