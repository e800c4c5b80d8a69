"""`mot-bench step` in several modes: one set of processes after the other, one result.

vLLM's process groups cannot be made twice in a process, so every tensor parallel size and number
of ranks has processes of its own. A single rank runs before those that split the weights, which are
checked against it. Others are checked against what each of their ranks makes by itself, so they
come first: they are what was asked for, if time runs out.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bagel_mot.launch import run_ranks
from bagel_mot.parallel import ParallelConfig

from mot_bench import modes as words
from mot_bench.parallel_results import ParallelResults

# In the folder that the sets of processes share.
RESULTS, VELOCITIES = "part.json", "velocities.pt"


def run_parts(
    arguments: Sequence[str],
    modes: Sequence[ParallelConfig],
    *,
    command: str,
    cases: int,
    say: Callable[[str], None],
    on_part: Callable[[ParallelResults], None] = lambda results: None,
    seconds: float | None = None,
) -> tuple[ParallelResults | None, list[str]]:
    """Measure every mode, and a single rank.

    Args:
        arguments: of `mot-bench`, without those that name modes, ranks or files.
        modes: to measure.
        command: kept in the results.
        cases: that each mode is to be measured on.
        say: called with what begins.
        on_part: called with all results so far after each set of processes.
        seconds: that a set of processes may take; None for as long as it takes.

    Returns:
        The results, of all cases that could be measured, and the modes whose processes failed;
        what went wrong, they have written to stderr. Without a single rank modes that split the
        weights are not measured. Modes that were still to come in processes that failed get new
        ones.
    """
    waiting = words.groups(mode for mode in modes if mode != words.ALONE and mode.tensor == 1)
    waiting += [[words.ALONE], *words.groups(mode for mode in modes if mode.tensor > 1)]
    results: ParallelResults | None = None
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mot-bench-") as folder:
        while waiting:
            part = waiting.pop(0)
            alone = part == [words.ALONE]
            named = [] if alone else ["--modes", words.written(part)]
            name = "; ".join(map(words.name_of, part))
            say(f"starting {name}")
            file = Path(folder, RESULTS)
            file.unlink(missing_ok=True)
            python = [sys.executable, "-m", "mot_bench"]
            found: ParallelResults | None = None
            try:
                code = run_ranks(
                    [*python, *arguments, *named, "--part", folder],
                    part[0].world_size,
                    seconds=seconds,
                )
            finally:  # also if this process is told to end
                if file.exists():
                    found = ParallelResults.read(file)
                    results = found if results is None else results.joined([found])
                if results is not None:
                    results = dataclasses.replace(results, command=command, complete=False)
                    on_part(results)
            if code or found is None:
                begun, to_come = _split_where_it_failed(part, found, cases)
                failed.append("; ".join(map(words.name_of, begun)))
                if to_come:
                    waiting.insert(0, to_come)
                if alone:
                    break
    if results is not None:
        results = dataclasses.replace(results, complete=not failed)
    return results, failed


def _split_where_it_failed(
    part: Sequence[ParallelConfig], found: ParallelResults | None, cases: int
) -> tuple[list[ParallelConfig], list[ParallelConfig]]:
    """The modes of processes that failed, up to the one they failed in, and those after it.

    Args:
        part: in the order in which they are measured, each on all cases.
        found: what the processes left behind.
        cases: the number of cases.
    """
    for i, mode in enumerate(part):
        name = words.name_of(mode)
        results = () if found is None else found.cases
        if sum(any(each.mode == name for each in case.modes) for case in results) < cases:
            return list(part[: i + 1]), list(part[i + 1 :])
    return list(part), []
