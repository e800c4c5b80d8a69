"""`mot-bench quality`: loads the model, shows the report, writes the files."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mot_bench import options
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.files import write_bytes, write_json
from mot_bench.model_options import NOTHING_TO_KEEP

if TYPE_CHECKING:
    from mot_bench.quality import Quality

_RESULTS = "quality.json"
# Pictures of a contact sheet's entries, by its name.
_SHEETS = {"images.png": 1, "edits.png": 2}


def run_quality(
    model: str,
    *,
    samples: int,
    seed: int,
    settings: dict[str, str],
    device: str | None,
    dtype: str | None,
    attention: str | None,
    quantization: str | None,
    keep: str,
    folder: Path | None,
    command: str,
    screen: Console,
) -> None:
    """Measure, print a table, and with a folder write `quality.json` and two PNGs there."""
    try:
        from bagel_mot.cli_io import quiet_vllm

        quiet_vllm()
        from bagel_mot import BagelPipeline
        from bagel_mot.loading import usual_dtype
        from bagel_mot.quantization import Quantization
        from bagel_mot.tiny import model_folder as folder_of

        from mot_bench.bagel import Choice, subject
        from mot_bench.environment import environment
        from mot_bench.quality import TARGETS, contact_sheet, measure
    except ImportError as error:
        raise MeasurementError(
            f"bagel-mot cannot be imported ({error}); pip install 'mot-bench[bagel]'"
        ) from error
    changes = _image_settings(settings)  # a wrong one is an error before loading
    if keep and quantization is None:
        raise UsageError(NOTHING_TO_KEEP.format(keep))
    if folder is not None:
        for file in (folder / name for name in (_RESULTS, *_SHEETS)):
            if file.exists():
                raise UsageError(f"--output {folder}: {file} exists; choose another folder")
    try:
        dtype = dtype or usual_dtype(device)
        pipeline = BagelPipeline.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            quantization=None if quantization is None else Quantization.parse(quantization, keep),
        )
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
            settings=changes,
            on_sample=lambda count: bar.advance(task, count),
        )
    seconds = time.monotonic() - began
    where = environment(pipeline.model.device)
    facts = subject(
        Choice(folder_of(model), "", dtype, quantization=quantization, keep=keep), pipeline
    )
    screen.print(
        f"{where.device}, {dtype}, quantization {facts.quantization}, attention "
        f"{facts.attention}, torch {where.torch}, {seconds:.0f} s",
        highlight=False,
    )
    screen.print(quality_table(measured))
    if folder is None:
        return
    write_json(
        folder / _RESULTS,
        {
            "schema": 1,
            "kind": "quality",
            "command": command,
            "environment": asdict(where),
            "dtype": dtype,
            "subject": asdict(facts),
            "samples": samples,
            "seed": seed,
            "settings": settings,
            "seconds": round(seconds, 1),
            **measured.to_json(),
        },
    )
    screen.print(str(folder / _RESULTS), highlight=False)
    for name, pictures in _SHEETS.items():
        entries = [entry for _, entry in measured.pictures if len(entry) == pictures]
        file = folder / name
        sheet = io.BytesIO()
        contact_sheet(entries[:64]).save(sheet, "png")
        write_bytes(file, sheet.getvalue())
        screen.print(str(file), highlight=False)


def _image_settings(texts: Mapping[str, str]) -> dict[str, Any]:
    """What `ImageSettings` is to be changed to: values as JSON, 0,1 or a word.

    Raises:
        UsageError: a name or a value is wrong.
    """
    from bagel_mot import ImageSettings
    from pydantic import ValidationError

    for name in texts:
        options.one_of("--set", name, tuple(ImageSettings.model_fields))
    values = {name: _value(text) for name, text in texts.items()}
    try:
        ImageSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        # A check of its own says it all; what pydantic checks knows no option.
        own = problem.get("ctx", {}).get("error")
        name = str(problem["loc"][0]) if problem["loc"] else ""
        said = f"{name} is {texts.get(name)!r}: {problem['msg']}" if own is None else own
        raise UsageError(f"--set: {said}") from error
    return values


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.split(",") if "," in text else text


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
