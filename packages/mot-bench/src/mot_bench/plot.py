"""Results as a picture: each provider's time relative to the baseline's, per case."""

from __future__ import annotations

import io
from pathlib import Path

from mot_bench.files import write_bytes
from mot_bench.results import CaseResult, Results, times_baseline

_BAR = 0.8  # of the room a case has


def plot_kernels(results: Results, path: Path) -> None:
    """Write a PNG with one panel per operation."""
    # The object interface: pyplot would pick a backend and keep state for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(case.op for case in results.cases))
    groups = [[case for case in results.cases if case.op == op] for op in operations]
    longest = max(len(group) for group in groups)
    figure = Figure(figsize=(max(8.0, 1.1 * longest), 3.8 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, op, group in zip(panels, operations, groups, strict=True):
        _draw(panel, op, group)
    where = results.environment
    figure.suptitle(f"{where.device}, {results.ceilings.dtype}, commit {where.commit}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_bytes(path, picture.getvalue())


def _draw(panel: object, op: str, cases: list[CaseResult]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    names = list(dict.fromkeys(p.name for case in cases for p in case.providers if p.timing))
    width = _BAR / max(len(names), 1)
    for place, name in enumerate(names):
        positions, heights = [], []
        for index, case in enumerate(cases):
            timing = next((p.timing for p in case.providers if p.name == name), None)
            ratio = None if timing is None else times_baseline(case, timing)
            if ratio is not None:
                positions.append(index - _BAR / 2 + width * (place + 0.5))
                heights.append(ratio)
        panel.bar(positions, heights, width=width, label=name)
    panel.axhline(1.0, color="black", linewidth=0.8)
    names_of_cases = ["\n".join([*case.shape.split(", "), case.routing]) for case in cases]
    panel.set_xticks(range(len(cases)), names_of_cases, fontsize=7)
    panel.set_ylabel("time / baseline")
    panel.set_title(f"{op}: lower is faster")
    panel.legend(fontsize=7)
