"""Results as tables in a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from mot_bench.results import (
    CaseResult,
    Ceilings,
    Mean,
    ProviderResult,
    Results,
    gbps,
    percent_of_ceiling,
    rate,
    tflops,
    times_baseline,
)


def case_table(case: CaseResult, ceilings: Ceilings) -> Table:
    """All providers on one case."""
    rows = " + ".join(f"{count:,}" for count in case.counts)
    warm = "" if case.cold else ", L2 is warm: too little data to rotate"
    table = Table(
        title=f"{case.op}: {case.shape}, {case.routing}, rows {rows}, {case.dtype}{warm}",
        title_justify="left",
        title_style="bold",
    )
    unit = "TFLOP/s" if case.flops else "GB/s"
    table.add_column("provider", no_wrap=True)
    for header in ("µs", "20-80 %", unit, "% of ceiling", "× baseline"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for provider in case.providers:
        table.add_row(*_cells(case, provider, ceilings))
    return table


def _cells(case: CaseResult, provider: ProviderResult, ceilings: Ceilings) -> list[str | Text]:
    timing = provider.timing
    label = f"{provider.name} (baseline)" if provider.baseline else provider.name
    if timing is None:
        style = "red" if provider.status == "failed" else "dim"
        return [label, *["-"] * 5, Text(f"{provider.status}: {provider.why}", style=style)]
    ratio = times_baseline(case, timing)
    return [
        label,
        f"{timing.median_us:.1f}",
        f"{timing.p20_us:.1f}-{timing.p80_us:.1f}",
        rate(tflops(case, timing) if case.flops else gbps(case, timing)),
        f"{percent_of_ceiling(case, timing, ceilings):.0f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "; ".join(part for part in (provider.label, provider.why, timing.note) if part),
    ]


def means_table(means: list[Mean]) -> Table:
    """Geometric means over all cases."""
    table = Table(title="Geometric means", title_justify="left", title_style="bold")
    table.add_column("operation", no_wrap=True)
    table.add_column("provider", no_wrap=True)
    for header in ("cases", "% of ceiling", "× baseline"):
        table.add_column(header, justify="right", no_wrap=True)
    for mean in means:
        table.add_row(
            mean.op,
            mean.name,
            f"{mean.cases}/{mean.of}",
            "-" if mean.percent_of_ceiling is None else f"{mean.percent_of_ceiling:.0f}",
            "-" if mean.times_baseline is None else _ratio_of(mean),
        )
    return table


def _ratio_of(mean: Mean) -> str:
    some = f" ({mean.compared}/{mean.of})" if mean.compared < mean.cases else ""
    return f"{mean.times_baseline:.3f}{some}"


def heading(results: Results) -> str:
    """Where the run took place and what its ceilings are."""
    where, top = results.environment, results.ceilings
    return (
        f"{where.device}, torch {where.torch}, triton {where.triton}, commit {where.commit}\n"
        f"ceilings in this run: {top.dtype} matmul {rate(top.matmul_tflops)} TFLOP/s, copy "
        f"{rate(top.copy_gbps)} GB/s\n"
        "× baseline is time: below 1 is faster than the baseline."
    )
