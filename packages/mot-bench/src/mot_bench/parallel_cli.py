"""`mot-bench step` on several ranks: what its options mean, and which part this process takes.

A command that is to measure several ranks starts them, one set of processes after the other, and
prints what all have found. A process that is one of them (started with `--part`, or by torchrun)
measures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from bagel_mot.launch import leave
from bagel_mot.parallel import ParallelConfig, world_size_from_environment

from mot_bench import bagel, model_tables
from mot_bench import modes as words
from mot_bench.console import command_line, screen, without
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.parallel_results import ParallelResults
from mot_bench.parallel_run import RESULTS, VELOCITIES, run_parts
from mot_bench.ranks import Plan, run_modes

# Options of the command that starts ranks which do not concern them.
_NOT_FOR_RANKS = (
    *("--modes", "--tp", "--sp", "--cfg-parallel", "--nproc", "--output", "--timeout"),
)


def modes_of(
    choice: bagel.Choice,
    *,
    tp: int,
    sp: str | None,
    cfg_parallel: int,
    several: str | None,
    nproc: int | None,
) -> list[ParallelConfig]:
    """The modes that the options name, at least one.

    Args:
        choice: the model.
        tp, sp, cfg_parallel: one mode, as `bagel-mot generate` takes it.
        several: --modes.
        nproc: ranks to start, None for torchrun's or what the modes need.

    Raises:
        UsageError: they make no sense, or do not fit the model or the number of ranks.
    """
    started = world_size_from_environment()
    if several is not None and (tp != 1 or sp is not None or cfg_parallel != 1):
        raise UsageError("--modes and --tp, --sp, --cfg-parallel name modes; give one or the other")
    if nproc is not None and nproc < 1:
        raise UsageError(f"--nproc is {nproc}; expected at least 1")
    if nproc is not None and started > 1:
        raise UsageError(f"--nproc is {nproc}, but {started} ranks have been started already")
    if several is None:
        try:
            modes = [ParallelConfig.parse(tp, sp, cfg_parallel)]
        except ValueError as error:
            raise UsageError(str(error)) from error
        ranks: int | None = nproc or started
    else:
        modes = words.parse(several)
        ranks = nproc or (started if started > 1 else None)
    words.check(modes, bagel.config_of(choice).llm, ranks)
    if started > 1 and len(words.groups(modes)) > 1:
        raise UsageError(
            f"--modes is {several!r}: processes keep one tensor parallel size; without torchrun, "
            "mot-bench starts new ones for each"
        )
    return modes


def is_rank(part: Path | None) -> bool:
    """Whether this process is one of several ranks, or the single one they are compared to."""
    return part is not None or world_size_from_environment() > 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def start_ranks(
    arguments: Sequence[str],
    modes: Sequence[ParallelConfig],
    device: torch.device,
    folder: Path | None,
    seconds: float | None,
    cases: int,
) -> None:
    """Measure a single rank and every mode in processes of their own; print and write.

    Args:
        arguments: of the command.
        modes: to measure.
        device: where to.
        folder: for the results.
        seconds: that a set of processes may take.
        cases: that each mode is to be measured on.

    Raises:
        UsageError: there are not enough GPUs.
        MeasurementError: some processes failed. What the others found is there all the same.
    """
    most = max(modes, key=lambda mode: mode.world_size)
    if device.type == "cuda" and most.world_size > torch.cuda.device_count():
        raise UsageError(
            f"{words.name_of(most)} needs {most.world_size} GPUs; torch sees "
            f"{torch.cuda.device_count()}"
        )
    results, failed = run_parts(
        without(arguments, *_NOT_FOR_RANKS),
        modes,
        command=command_line(arguments),
        cases=cases,
        say=_say,
        on_part=lambda so_far: _write(so_far, folder),
        seconds=seconds,
    )
    if results is not None:
        _show(results, folder)
    if failed:
        raise MeasurementError(f"failed, see above: {'; '.join(failed)}")


def measure_as_rank(
    choice: bagel.Choice,
    device: torch.device,
    modes: Sequence[ParallelConfig],
    plan: Plan,
    *,
    arguments: Sequence[str],
    part: Path | None,
    folder: Path | None,
) -> None:
    """Measure as one of the ranks; the first one writes to `part`, or prints and writes.

    If one of several ranks fails, its process ends at once: leaving in good order would wait for
    exchanges that the others never join, and who started the ranks for this one to end.
    """
    try:
        _measure_as_rank(choice, device, modes, plan, arguments, part, folder)
    except Exception as error:
        if world_size_from_environment() > 1:
            is_told = isinstance(error, MeasurementError | UsageError)
            if is_told:
                _say(str(error))
            leave(2 if isinstance(error, UsageError) else 1, None if is_told else error)
        raise


def _measure_as_rank(
    choice: bagel.Choice,
    device: torch.device,
    modes: Sequence[ParallelConfig],
    plan: Plan,
    arguments: Sequence[str],
    part: Path | None,
    folder: Path | None,
) -> None:
    pipeline = bagel.load(choice, device, modes[0])
    for height, width in plan.sizes:
        bagel.check_size(pipeline.config, "--resolutions", height, width)

    def note(results: ParallelResults, line: str) -> None:
        if is_first():
            _say(line)
            if part is not None:
                results.write(part / RESULTS)

    results = run_modes(
        pipeline,
        bagel.subject(choice, pipeline),
        modes,
        plan,
        command=command_line(arguments),
        velocities=None if part is None else part / VELOCITIES,
        on_case=note,
    )
    if not is_first():
        return
    if part is not None:
        results.write(part / RESULTS)
    else:
        _show(results, folder)


def _show(results: ParallelResults, folder: Path | None) -> None:
    console = screen()
    console.print(model_tables.parallel_heading(results), highlight=False, markup=False)
    for case in results.cases:
        console.print(model_tables.parallel_table(case))
    _write(results, folder)
    if folder is not None:
        typer.echo(folder / results.file_name())


def _write(results: ParallelResults, folder: Path | None) -> None:
    if folder is not None:
        results.write(folder / results.file_name())


def _say(line: str) -> None:
    typer.echo(f"mot-bench: {line}", err=True)
