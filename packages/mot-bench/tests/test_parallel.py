"""`mot-bench step` on several ranks: processes of this machine over gloo, and what they report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bagel_mot.launch import run_ranks
from bagel_mot.parallel import ParallelConfig
from rich.console import Console
from samples import some_run

from mot_bench import modes, parallel_run
from mot_bench.console import without
from mot_bench.errors import MeasurementError, UsageError
from mot_bench.exchange import ExchangeClock
from mot_bench.model_tables import parallel_table
from mot_bench.parallel_results import ParallelResults
from mot_bench.ranks import check_differences
from mot_bench.report import read, report
from mot_bench.results import Timing

# 48x48 is a block of 11 rows, which 2 ranks do not divide.
TINY_STEP = ("step", "--random", "tiny", "--device", "cpu", "--resolutions", "48x48")
MODES = ("cfg:2", "allgather:2", "ulysses:2", "tp:2")
ROWS = {
    "1 rank": [33],
    "cfg:2": [22, 11],
    "allgather:2": [18, 15],
    "ulysses:2": [18, 15],
    "tp:2": [33, 33],
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run of the command left behind."""

    code: object
    out: str
    results: ParallelResults


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every mode once: one set of processes for each tensor parallel size."""
    from mot_bench.cli import main

    folder = tmp_path_factory.mktemp("results")
    words = [*TINY_STEP, "--branches", "3", "--rounds", "2", "--modes", ";".join(MODES)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(SystemExit) as exit_,
    ):
        patch.setenv("OMP_NUM_THREADS", "1")
        main([*words, "--output", str(folder)])
    (path,) = folder.glob("step-ranks-*.json")
    assert str(path) in out.getvalue()
    return Run(exit_.value.code, out.getvalue(), ParallelResults.read(path))


def test_all_modes_ran(run: Run) -> None:
    assert run.code == 0 and run.results.complete
    (case,) = run.results.cases
    assert [mode.mode for mode in case.modes] == list(ROWS)
    assert (case.height, case.width, case.branches, case.rows) == (48, 48, 3, 33)
    assert run.results.command.startswith("mot-bench step --random tiny")
    assert "--modes 'cfg:2;allgather:2" in run.results.command
    assert "--part" not in run.results.command and "--output" not in run.results.command


@pytest.mark.parametrize("name", ROWS)
def test_mode(name: str, run: Run) -> None:
    """The single rank's velocities on every rank, the layout, and time for exchanges."""
    (mode,) = (each for each in run.results.cases[0].modes if each.mode == name)
    assert mode.difference is not None and mode.difference < 2e-6
    assert mode.between_ranks < 1e-6
    assert [use.rank for use in mode.ranks] == list(range(len(ROWS[name])))
    assert [use.rows for use in mode.ranks] == ROWS[name]
    assert not mode.cuda_graphs and mode.timing.median_us > 0
    for use in mode.ranks:
        share = use.exchange_share
        assert share is not None and use.memory is None and use.activity is None
        assert share == 0 if name == "1 rank" else 0 < share < 1


def test_only_tensor_parallel_ranks_split_the_weights(run: Run) -> None:
    weights = {mode.mode: mode.ranks[-1].weights for mode in run.results.cases[0].modes}
    whole = run.results.subject.bytes
    assert weights.pop("tp:2") < whole
    assert set(weights.values()) == {whole}


def test_table_says_what_was_found(run: Run) -> None:
    (case,) = run.results.cases
    assert "48x48, 3 branches, 1 image, 33 rows" in run.out
    for mode in case.modes:
        is_beside = mode.mode in ("cfg:2", "allgather:2", "ulysses:2")
        assert len(mode.alone) == (2 if is_beside else 0)
        (line,) = (line for line in run.out.splitlines() if f"│ {mode.mode} " in line)
        speed_up = case.speed_up(mode)
        assert speed_up is not None and speed_up > 0
        rows = sorted(set(ROWS[mode.mode]))
        for cell in (f"{mode.timing.median_us / 1e3:.2f}", f"{speed_up:.2f}", "off"):
            assert f" {cell} " in line
        assert f" {'-'.join(map(str, rows))} " in line
        assert f"{mode.difference:.1e}" in line


def test_speed_up_is_over_what_ran_in_the_same_rounds() -> None:
    def times(*milliseconds: float) -> tuple[Timing, ...]:
        return tuple(Timing(1e3 * ms, 1.0, 1.0, 1, "stream") for ms in milliseconds)

    (case,) = some_run("1 rank", "cfg:2", "ring:2", "tp:2").cases  # 1, 2, 4 and 8 ms
    assert case.alone_us() == 1e3
    assert [case.speed_up(mode) for mode in case.modes] == [1, 1 / 2, 1 / 4, 1 / 8]
    alone, cfg, ring, tp = case.modes
    cfg = dataclasses.replace(cfg, alone=times(3.0, 5.0))
    ring = dataclasses.replace(ring, alone=times(7.0, 9.0))
    case = dataclasses.replace(case, modes=(alone, cfg, ring, tp))
    assert case.alone_us() == 6e3
    assert [case.speed_up(mode) for mode in case.modes] == [1, 4 / 2, 8 / 4, 6 / 8]


def test_ranks_that_were_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As torchrun starts them: the first one prints and writes; each is checked against itself."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*TINY_STEP, "--branches", "2", "--rounds", "1", "--sp", "ring:2"]
    python = [sys.executable, "-m", "mot_bench"]
    code = run_ranks([*python, *words, "--output", str(tmp_path)], 2)
    printed = capfd.readouterr()
    assert code == 0, printed.err
    (path,) = tmp_path.glob("*.json")
    results = ParallelResults.read(path)
    (mode,) = results.cases[0].modes
    assert results.complete and mode.mode == "ring:2"
    assert mode.difference is not None and mode.difference < 1e-6 and len(mode.alone) == 2
    assert mode.between_ranks < 1e-6 and [use.rows for use in mode.ranks] == [12, 10]
    assert "│ ring:2 " in printed.out and str(path) in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--modes", "cfg:2;fast:2"), "'fast:2' is no mode; expected KIND:SIZE with KIND one of"),
        (("--modes", "cfg:two"), "'cfg:two' is no mode"),
        (("--modes", "cfg:0"), "cfg parallel size is 0; expected >= 1"),
        (("--modes", "allgather:2,ring:2"), "all-gather KV is used alone"),
        (("--modes", "tp:3"), "tensor parallel size 3 does not divide the 4 attention heads"),
        (("--modes", "cfg:2", "--tp", "2"), "give one or the other"),
        (("--modes", "cfg:3", "--nproc", "2"), "needs 3 processes, but there are 2"),
        (("--sp", "rings:2"), "expected KIND:SIZE with KIND one of ulysses"),
        (("--tp", "2"), "needs 2 processes, but there are 1"),
        (("--cfg-parallel", "2", "--nproc", "3"), "needs 2 processes, but there are 3"),
        (("--nproc", "0"), "--nproc is 0; expected at least 1"),
        (("--modes", "cfg:2", "--provider", "gather-scatter"), "measures one rank"),
        (("--modes", "cfg:2", "--resolutions", "64x40"), "--resolutions is '64x40'"),
        (("--device", "gpu"), "--device is 'gpu'; expected one of cuda, cpu"),
        (("--device", "cuda"), "--device is 'cuda', but torch sees no GPU"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(
    arguments: tuple[str, ...], message: str, mot_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_run, "run_ranks", lambda *_, **__: pytest.fail("started"))
    answer = mot_bench(*TINY_STEP, *arguments)
    assert answer.code == 2, answer.err
    assert message in answer.err and answer.out == ""


def test_torchrun_ranks_keep_their_size(mot_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = mot_bench(*TINY_STEP, "--modes", "cfg:2;tp:2")
    assert answer.code == 2 and "processes keep one tensor parallel size" in answer.err
    answer = mot_bench(*TINY_STEP, "--cfg-parallel", "2", "--nproc", "2")
    assert answer.code == 2 and "2 ranks have been started already" in answer.err


def test_modes() -> None:
    found = modes.parse("cfg:2; ulysses:2,ring:2;tp:2;cfg:2;cfg:1")
    assert found == [
        ParallelConfig(cfg=2),
        ParallelConfig(ulysses=2, ring=2),
        ParallelConfig(tensor=2),
        modes.ALONE,
    ]
    assert [modes.name_of(mode) for mode in found] == [
        *("cfg:2", "ulysses:2,ring:2", "tp:2", "1 rank")
    ]
    assert modes.parse(modes.written(found[:3])) == found[:3]
    every = modes.parse("cfg:2;tp:2;ring:2;cfg:4")
    assert modes.groups(every) == [[every[0], every[2]], [every[1]], [every[3]]]
    with pytest.raises(UsageError, match="is no mode"):
        modes.parse("")


def test_arguments_of_the_ranks() -> None:
    words = ["step", "--tp", "2", "--output=x", "--batch", "2", "--sp", "--sp", "--tps"]
    assert without(words, "--tp", "--output", "--sp") == ["step", "--batch", "2", "--tps"]


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([[0.0, 0.0], [2e-4, None]], "rank 1 differ from those of rank 0 by 0.0002"),
        ([[0.0, 2e-4], [0.0, 0.0]], "rank 0 differ from those of a single rank by 0.0002"),
        ([[0.0, 0.0], [0.0, float("nan")]], "rank 1 differ from those of a single rank by nan"),
    ],
)
def test_wrong_velocities(everyone: list[list[float | None]], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        check_differences("cfg:2", everyone, torch.float32)


def test_rounding_is_accepted() -> None:
    check_differences("cfg:2", [[0.0, 1e-5], [1e-6, None]], torch.float32)
    check_differences("cfg:2", [[0.0, 1e-2]], torch.bfloat16)


def test_table_of_a_gpu() -> None:
    (case,) = some_run("1 rank", "cfg:2").cases
    console = Console(width=150, file=io.StringIO())
    console.print(parallel_table(case))
    line = console.file.getvalue().splitlines()[-2]
    for cell in ("off", "2.00", "0.50", "10.0-25.0", "3.00", "7-9", "1.0e-06"):
        assert f" {cell} " in line


def test_report_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    some_run("1 rank", "cfg:2").write(path)
    lines = report([(path, read(path))]).splitlines()
    assert "## Denoising step on several GPUs, Some GPU, commit abc" in lines
    cells = "on | 1.00 | 1.00 | 1.00 | 25.0 | 3.00 | 9 | 1.0e-06 |"
    assert f"| 64x48, 2 branches | 1 rank | {cells}" in lines
    cells = "off | 2.00 | 0.50 | 1.00 | 10.0-25.0 | 3.00 | 7-9 | 1.0e-06 |"
    assert f"| 64x48, 2 branches | cfg:2 | {cells}" in lines


def test_a_rank_that_fails_ends_at_once(
    mot_bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise MeasurementError("the velocities are wrong")

    codes: list[int] = []
    monkeypatch.setattr("mot_bench.bagel.load", fail)
    monkeypatch.setattr("mot_bench.parallel_cli.os._exit", codes.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = mot_bench(*TINY_STEP, "--modes", "cfg:2", "--part", str(tmp_path))
    assert codes == [1] and "the velocities are wrong" in answer.err


def test_cases_of_parts_are_joined() -> None:
    """Whichever part has measured them, with a single rank first."""
    parts = [some_run("cfg:2"), some_run("tp:2"), some_run("1 rank")]
    (case,) = parts[0].joined(parts[1:]).cases
    assert [mode.mode for mode in case.modes] == ["1 rank", "cfg:2", "tp:2"]
    none = dataclasses.replace(parts[0], cases=())
    assert none.joined(parts[1:]).cases[0].modes == parts[0].joined(parts[1:]).cases[0].modes[::2]


def test_exchange_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and waiting are timed, an exchange inside another one only once."""

    class Work:
        def wait(self) -> None:
            time.sleep(0.02)

    def all_to_all(*_: Any) -> None:
        time.sleep(0.01)
        dist.all_gather_into_tensor(None, None)

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *_: time.sleep(0.01))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda _: [Work(), Work()])
    before = dist.all_to_all_single
    clock = ExchangeClock()
    with clock.running():
        dist.all_to_all_single(None, None)
        for work in dist.batch_isend_irecv([]):
            work.wait()
        time.sleep(0.2)
    assert dist.all_to_all_single is before
    assert clock.calls == 2
    assert 0.06 <= clock.seconds < 0.2


def test_exchange_clock_misses_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "batch_isend_irecv")
    with (
        pytest.raises(MeasurementError, match="has no batch_isend_irecv"),
        ExchangeClock().running(),
    ):
        pass
