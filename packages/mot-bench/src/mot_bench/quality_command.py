"""`mot-bench quality`: loads the model, shows the report, writes the files."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mot_bench.errors import MeasurementError, UsageError
from mot_bench.files import write_json

if TYPE_CHECKING:
    from mot_bench.quality import Quality


def run_quality(
    model: str,
    *,
    samples: int,
    seed: int,
    settings: dict[str, str],
    device: str | None,
    dtype: str | None,
    folder: Path | None,
    command: str,
    screen: Console,
) -> None:
    """Measure, print a table, and with a folder write `quality.json` and two PNGs there."""
    try:
        from bagel_mot import BagelPipeline, ImageSettings

        from mot_bench.environment import environment
        from mot_bench.quality import TARGETS, contact_sheet, measure
    except ImportError as error:
        raise MeasurementError(
            f"bagel-mot cannot be imported ({error}); pip install 'mot-bench[bagel]'"
        ) from error
    import torch

    if dtype is None:
        on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
        dtype = "bfloat16" if on_gpu else "float32"
    try:
        ImageSettings.model_validate(settings)  # an unknown one is an error before loading
        pipeline = BagelPipeline.from_pretrained(model, device=device, dtype=dtype)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    began = time.monotonic()
    kinds = len([name for name in TARGETS if name.startswith("questions")])
    columns = (TextColumn("grading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=samples * (2 + kinds))
        measured = measure(
            pipeline,
            samples=samples,
            seed=seed,
            settings=settings,
            on_sample=lambda count: bar.advance(task, count),
        )
    seconds = time.monotonic() - began
    where = environment(pipeline.model.device)
    screen.print(f"{where.device}, {dtype}, torch {where.torch}, {seconds:.0f} s", highlight=False)
    screen.print(quality_table(measured))
    if folder is None:
        return
    write_json(
        folder / "quality.json",
        {
            "command": command,
            "environment": asdict(where),
            "dtype": dtype,
            "samples": samples,
            "seed": seed,
            "settings": settings,
            "seconds": round(seconds, 1),
            **measured.to_json(),
        },
    )
    screen.print(str(folder / "quality.json"), highlight=False)
    for name, pictures in (("images", 1), ("edits", 2)):
        entries = [entry for _, entry in measured.pictures if len(entry) == pictures]
        file = folder / f"{name}.png"
        contact_sheet(entries[:64]).save(file)
        screen.print(str(file), highlight=False)


def quality_table(measured: Quality) -> Table:
    """One line for each task, then the points that were graded."""
    table = Table()
    for header in ("task", "right", "of", "%", "target %", "points"):
        table.add_column(header, justify="left" if header in ("task", "points") else "right")
    for task in measured.tasks:
        points = ", ".join(
            f"{name} {right}/{asked}" for name, (asked, right) in task.points.items()
        )
        target = "" if task.target is None else f"{task.target:.0f}"
        style = "red" if task.target is not None and task.percent < task.target else None
        table.add_row(
            task.task,
            str(task.right),
            str(task.samples),
            f"{task.percent:.1f}",
            target,
            points,
            style=style,
        )
    return table
