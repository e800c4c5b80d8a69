"""The commands that write pages from results: `mot-bench report` and `modes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mot_bench import options
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.model_options import NO_MODEL

_MOST_GPUS = 16


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="JSON", help="Results of kernels, step, e2e and accuracy."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.md", help="The page to write.")],
) -> None:
    """Write a Markdown page from result files; those of quality and serve are left out."""
    from mot_bench.files import write_text
    from mot_bench.report import NotOnThePage, read
    from mot_bench.report import report as page

    options.page_file(output)
    runs = []
    for path in files:
        try:
            runs.append((path, read(path)))
        except OSError as error:
            raise UsageError(f"JSON is {str(path)!r}: {error.strerror}") from error
        except NotOnThePage as error:  # `results/*.json` names it, too
            typer.echo(f"mot-bench: left out: {error}", err=True)
        except ValueError as error:
            raise UsageError(f"JSON is {str(path)!r}: {error}") from error
    if not runs:
        raise UsageError("JSON names no results of kernels, step, e2e or accuracy")
    write_text(output, page(runs))
    typer.echo(output)


def modes(
    files: Annotated[
        list[Path], typer.Argument(metavar="JSON", help="Results of step on several ranks.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.md", help="The page to write.")],
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to choose for.")] = "1,2,4,8",
) -> None:
    """Write which mode to choose, by what was measured and by a model that it calibrates."""
    counts = options.integers("--gpus", gpus, least=1, example="1,2,4,8")
    if max(counts) > _MOST_GPUS:
        raise UsageError(f"--gpus is {gpus!r}; expected at most {_MOST_GPUS}, those of one machine")
    options.page_file(output)

    from mot_bench.files import write_text
    from mot_bench.parallel_results import ParallelResults

    try:
        from bagel_mot.cli_io import quiet_vllm

        quiet_vllm()
        from bagel_mot.config import BagelConfig
        from bagel_mot.synthetic import SIZES as MODELS

        from mot_bench.bagel import SHIPPED
        from mot_bench.cost import CostModel
        from mot_bench.parallel_page import modes_page
    except ImportError as error:
        raise MeasurementError(NO_MODEL.format(error)) from error

    runs = []
    for path in files:
        try:
            runs.append((path, ParallelResults.read(path)))
        except (OSError, ValueError) as error:
            raise UsageError(f"JSON is {str(path)!r}: {error}") from error
    size = runs[0][1].subject.weights.removeprefix("random, ")
    if size == SHIPPED:
        sizes = BagelConfig.from_folder(options.model_folder(Path("tiny")))
    else:  # whoever trained it, a checkpoint of BAGEL has these sizes
        sizes = MODELS.get(size, MODELS["7b"])
    model = CostModel([run for _, run in runs], sizes.llm)
    if model.repeated:
        many = len(model.repeated)
        line = f"{many} times were measured in more than one file, of which the newest counts"
        typer.echo(f"mot-bench: {line}", err=True)
    write_text(output, modes_page(runs, model, counts))
    typer.echo(output)
