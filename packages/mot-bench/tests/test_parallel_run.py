"""Sets of processes one after the other: what is kept and what begins anew when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from samples import some_run

from mot_bench import modes, parallel_run
from mot_bench.parallel_results import ParallelResults


def asked_of(command: Sequence[str]) -> tuple[str, Path]:
    """The modes that processes are started for, and where their results go."""
    words = list(command)
    named = words[words.index("--modes") + 1] if "--modes" in words else "1 rank"
    return named, Path(words[words.index("--part") + 1], parallel_run.RESULTS)


def run_parts(
    asked: str, *, cases: int = 1, **options: Any
) -> tuple[ParallelResults | None, list[str]]:
    """What is found of these modes, and which sets of processes failed."""
    return parallel_run.run_parts(
        ["step"], modes.parse(asked), command="", cases=cases, say=lambda line: None, **options
    )


def test_a_mode_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, list[str]]] = []

    def run_ranks(command: Sequence[str], ranks: int, *, seconds: float | None) -> int:
        assert seconds == 60.0
        named, file = asked_of(command)
        calls.append((ranks, list(command)[3:]))
        some_run(named.partition(";")[0]).write(file)
        return 1 if "ring" in named else 0

    monkeypatch.setattr(parallel_run, "run_ranks", run_ranks)
    seen: list[ParallelResults] = []
    results, failed = parallel_run.run_parts(
        ["step", "--rounds", "2"],
        modes.parse("cfg:2;tp:2;ring:2"),
        command="mot-bench step",
        cases=1,
        say=lambda line: None,
        on_part=seen.append,
        seconds=60.0,
    )
    # A single rank before those that split the weights: only they are checked against it.
    assert [ranks for ranks, _ in calls] == [2, 1, 2]
    assert all(words[:3] == ["step", "--rounds", "2"] for _, words in calls)
    assert failed == ["cfg:2; ring:2"]
    assert results is not None and not results.complete and results.command == "mot-bench step"
    assert [mode.mode for mode in results.cases[0].modes] == ["1 rank", "cfg:2", "tp:2"]
    assert [len(each.cases[0].modes) for each in seen] == [1, 2, 3]


def test_modes_after_one_that_fails_get_new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three hangs: what the first found is kept, the third starts anew."""
    started: list[str] = []

    def run_ranks(command: Sequence[str], ranks: int, *, seconds: float | None) -> int:
        named, file = asked_of(command)
        started.append(named)
        some_run(named.partition(";")[0]).write(file)
        return 124 if "allgather" in named else 0

    monkeypatch.setattr(parallel_run, "run_ranks", run_ranks)
    results, failed = run_parts("cfg:2;allgather:2;ulysses:2")
    assert started == ["cfg:2;allgather:2;ulysses:2", "ulysses:2", "1 rank"]
    assert failed == ["cfg:2; allgather:2"]
    assert results is not None and not results.complete
    assert [mode.mode for mode in results.cases[0].modes] == ["1 rank", "cfg:2", "ulysses:2"]


def test_what_was_found_is_kept_when_the_command_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the second set of processes runs."""

    def run_ranks(command: Sequence[str], ranks: int, *, seconds: float | None) -> int:
        named, file = asked_of(command)
        some_run(named.partition(";")[0]).write(file)
        if ranks == 1:
            raise SystemExit(143)
        return 0

    monkeypatch.setattr(parallel_run, "run_ranks", run_ranks)
    seen: list[ParallelResults] = []
    with pytest.raises(SystemExit):
        run_parts("cfg:2;ring:2", on_part=seen.append)
    assert [mode.mode for mode in seen[-1].cases[0].modes] == ["1 rank", "cfg:2"]
    assert not seen[-1].complete


def test_without_a_single_rank_split_weights_are_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel_run, "run_ranks", lambda *_, **__: 3)
    results, failed = run_parts("tp:2;cfg:2")
    assert results is None and failed == ["cfg:2", "1 rank"]


@pytest.mark.parametrize("found", [0, 1])
def test_modes_after_one_that_fails_early_get_new_processes(
    found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mode fails in the first or the second of two cases."""
    started: list[str] = []

    def run_ranks(command: Sequence[str], ranks: int, *, seconds: float | None) -> int:
        named, file = asked_of(command)
        started.append(named)
        if named.startswith("cfg") and found == 0:
            return 1
        some_run(named.partition(";")[0]).write(file)
        return 1 if named.startswith("cfg") else 0

    monkeypatch.setattr(parallel_run, "run_ranks", run_ranks)
    _, failed = run_parts("cfg:2;allgather:2;ulysses:2", cases=2)
    assert started == ["cfg:2;allgather:2;ulysses:2", "allgather:2;ulysses:2", "1 rank"]
    assert failed == ["cfg:2"]
