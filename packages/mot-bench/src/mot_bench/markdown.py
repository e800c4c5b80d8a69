"""Pieces of Markdown pages that reports share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mot_bench.results import Environment


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; vertical bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def percent(value: float | None) -> str:
    """Without decimals; "-" for None."""
    return "-" if value is None else f"{value:.0f}"


def environment_facts(where: Environment) -> dict[str, str]:
    """What to know of where a run was made."""
    return {
        "device": f"{where.device} (driver {where.driver}, CUDA {where.cuda})",
        "clocks": where.clocks,
        "software": f"torch {where.torch}, triton {where.triton}, Python {where.python}",
        "packages": f"mot-kernels {where.mot_kernels}, mot-bench {where.mot_bench}, commit "
        f"{where.commit}",
        "date": where.date,
    }
