"""Several ranks give what one gives: golden cases on processes of this machine, over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from golden_data import GOLDEN
from typer.testing import CliRunner

from bagel_mot.cli import app
from bagel_mot.config import BagelConfig
from bagel_mot.launch import TOO_LONG, run_ranks
from bagel_mot.model.sequence_parallel import SequenceParallel, chunk
from bagel_mot.model_options import run_on_ranks
from bagel_mot.parallel import ALONE, Parallel, ParallelConfig

WORKER = Path(__file__).with_name("parallel_worker.py")

# (ranks, ways): processes start but once for all ways of a number of ranks and a tensor parallel
# size. The blocks of a2 and b3 have 30 and 26 rows: 3 and 4 ranks do not divide them.
RUNS = [
    (2, ["2//1"]),
    (2, ["1/ulysses:2/1", "1/ring:2/1", "1/allgather:2/1", "1//2"]),
    (3, ["1/ring:3/1", "1/allgather:3/1", "1//3"]),
    (4, ["4//1"]),
    (4, ["2/ulysses:2/1", "2/ring:2/1", "2/allgather:2/1", "2//2"]),
    (4, ["1/ulysses:4/1", "1/ring:4/1", "1/ulysses:2,ring:2/1", "1/allgather:2/2"]),
]


@pytest.mark.parametrize(("ranks", "ways"), RUNS, ids=[f"{r}-{w[0]}" for r, w in RUNS])
def test_ranks_agree_with_recordings(
    ranks: int, ways: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """TP, SP, CFG parallel and products of them, each within the fp32 bound."""
    code = run_ranks([sys.executable, str(WORKER), "a2,b3", *ways], ranks)
    printed = capfd.readouterr()
    agreed = [line.removeprefix("agrees: ") for line in printed.out.splitlines()]
    assert code == 0 and agreed == ways, printed.out + printed.err


@pytest.mark.gpu
@pytest.mark.parametrize("ways", [RUNS[0][1], RUNS[1][1]], ids=lambda ways: ways[0])
def test_ranks_on_gpus(ways: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Over NCCL, captured in CUDA graphs; and the processes end, though graphs hold exchanges."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, torch sees {torch.cuda.device_count()}")
    command = [sys.executable, str(WORKER), "--gpus", "a2,b3", *ways]
    code = run_ranks(command, 2, seconds=180.0)
    printed = capfd.readouterr()
    agreed = [
        line.removeprefix("agrees: ")
        for line in printed.out.splitlines()
        if line.startswith("agrees: ")
    ]
    assert code == 0 and agreed == ways, printed.out + printed.err


def test_run_ranks_ends_all_when_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """A failing rank's error is shown, its code returned, the others ended."""
    script = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('rank one is unwell')\n"
        "time.sleep(600)"
    )
    before = time.monotonic()
    assert run_ranks([sys.executable, "-c", script], 3) == 1
    assert time.monotonic() - before < 30
    assert "rank 1 failed" in (error := capfd.readouterr().err) and "rank one is unwell" in error


def test_run_ranks_shows_all_that_fail_together(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0, which misses another, may be seen first; a rank that was killed is the cause."""
    script = (
        "import os, signal, sys\n"
        "rank = os.environ['RANK']\n"
        "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if rank == '2': sys.exit('rank two is unwell')\n"
        "sys.exit('connection closed')"
    )
    assert run_ranks([sys.executable, "-c", script], 3) == 128 + signal.SIGKILL
    error = capfd.readouterr().err
    assert "rank 1 failed (exit code 137)" in error and "rank two is unwell" in error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child")
def test_ranks_end_with_who_started_them(tmp_path: Path) -> None:
    """However that ended."""
    rank = (
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    starter = (
        "import sys; from bagel_mot.launch import run_ranks;"
        f"run_ranks([sys.executable, '-c', {rank!r}], 2)"
    )
    with subprocess.Popen([sys.executable, "-c", starter]) as process:
        wait_for(lambda: all(_text(tmp_path / each) for each in "01"))
        pids = [int(_text(tmp_path / each)) for each in "01"]
        process.kill()
    wait_for(lambda: not any(_is_running(pid) for pid in pids))


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _is_running(pid: int) -> bool:
    """Not if it is gone, or only waits to be noted by whom it was given to."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_run_ranks_kills_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagel_mot.launch.GRACE", 0.5)
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(1)\n"
        "if os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)"
    )
    before = time.monotonic()
    assert run_ranks([sys.executable, "-c", script], 2) == 128 + 9
    assert time.monotonic() - before < 30


def test_run_ranks_ends_what_takes_too_long(capfd: pytest.CaptureFixture[str]) -> None:
    script = "import os, time\nif os.environ['RANK'] == '1': time.sleep(600)"
    before = time.monotonic()
    assert run_ranks([sys.executable, "-c", script], 2, seconds=1.0) == TOO_LONG
    assert time.monotonic() - before < 30
    assert "ranks [1] are not done after 1 s" in capfd.readouterr().err


@pytest.mark.parametrize("when", ["waiting", "ending"])
def test_run_ranks_ends_all_on_sigterm(tmp_path: Path, when: str) -> None:
    """Who stops the launcher stops its ranks, also those that it is ending already."""
    rank = (
        "import os, pathlib, signal, sys, time\n"
        "if os.environ['RANK'] == '1': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "own = pathlib.Path(sys.argv[1], os.environ['RANK'])\n"
        "own.with_suffix('.part').write_text(str(os.getpid()))\n"
        "own.with_suffix('.part').rename(own)\n"
        f"if {when!r} == 'ending' and os.environ['RANK'] == '0':\n"
        "    while not own.with_name('1').exists(): time.sleep(0.05)\n"
        "    sys.exit(1)\n"
        "time.sleep(600)"
    )
    script = (
        "import sys\n"
        "from bagel_mot import launch\n"
        f"launch.GRACE = {60 if when == 'ending' else 0.5}\n"
        f"launch.run_ranks([sys.executable, '-c', {rank!r}, {str(tmp_path)!r}], 2)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script])
    files = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.05)
    if when == "ending":
        time.sleep(2)  # rank 0 has failed by then, and rank 1 does not listen
    launcher.terminate()
    assert launcher.wait(30) == 128 + 15
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("is_searched", [False, True])
def test_ranks_look_for_modules_where_who_starts_them_does(
    is_searched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` looks in the working folder first, the script `bagel-mot` does not."""
    (tmp_path / "calendar.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    elsewhere = [place for place in sys.path if place not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", [str(tmp_path)] * is_searched + elsewhere)
    code = run_ranks([sys.executable, "-m", "calendar", "2026"], 1)
    assert code == (7 if is_searched else 0)


def test_run_ranks_gives_sigterm_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_ranks([sys.executable, "-c", ""], 2) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mistake", ["user's", "ours"])
def test_a_failing_rank_leaves_at_once(mistake: str, ranks: int) -> None:
    """One of several does not end in good order, where it could wait for the others for ever."""
    script = (
        "import atexit, sys\n"
        "import bagel_mot.cli\n"
        "atexit.register(print, 'in good order')\n"
        "sys.argv = ['bagel-mot', 'demo', '--output', 'demo.jpg']\n"
    )
    if mistake == "ours":
        script += "bagel_mot.demo.output_files = lambda *_: 1 / 0\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}bagel_mot.cli.main()"],
        env=os.environ | {"WORLD_SIZE": str(ranks), "RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ("in good order\n" if ranks == 1 else ""), done.stderr
    if mistake == "ours":
        assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    else:
        assert done.returncode == 2 and "error: --output demo.jpg: expected" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tp", "3", "--nproc", "3"), "tensor parallel size 3 does not divide"),
        (("--sp", "ulysses:3", "--nproc", "3"), "Ulysses size 3"),
        (("--sp", "rings:2", "--nproc", "2"), "expected KIND:SIZE"),
        (("--sp", "allgather:2,ring:2", "--nproc", "4"), "all-gather KV is used alone"),
        (("--tp", "2"), "needs 2 processes, but there are 1"),
        (("--cfg-parallel", "0"), "cfg parallel size is 0"),
        (("--cfg-parallel", "4", "--nproc", "4"), "cfg parallel size is 4; guidance compares at"),
        (("--nproc", "0"), "expected at least 1"),
    ],
)
def test_mismatched_sizes_are_refused_before_loading(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bagel_mot.checkpoint.load_checkpoint", lambda *_: pytest.fail("loaded"))
    command = ["generate", "a fox", *words]
    command += ["--model", str(GOLDEN.checkpoint), "--output", str(tmp_path / "x.png")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2, done.output
    assert message in done.stderr.replace("\n", " ") and not list(tmp_path.iterdir())


def test_what_can_be_read_once_is_no_input_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe, which whoever starts the ranks has read."""
    read, write = os.pipe()
    words = ["generate", "--nproc", "2", "--prompts", f"/dev/fd/{read}"]
    monkeypatch.setattr(sys, "argv", ["bagel-mot", *words])
    monkeypatch.setattr("bagel_mot.launch.run_ranks", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match=rf"/dev/fd/{read} can be read once, but every rank of"):
        run_on_ranks(2)
    os.close(read), os.close(write)


def test_command_line_starts_its_ranks(tmp_path: Path) -> None:
    output = tmp_path / "fox.png"
    command = [sys.executable, "-m", "bagel_mot", "generate", "a fox", "--nproc", "2"]
    command += ["--cfg-parallel", "2", "--model", str(GOLDEN.checkpoint), "--output", str(output)]
    command += ["--height", "64", "--width", "64", "--num-timesteps", "3", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(output)] and output.exists()


@pytest.mark.parametrize(
    ("backends", "why"),
    [
        ({}, ""),
        ({"peers": "cpu:gloo,cuda:nccl"}, ""),
        ({"peers": "cuda:ucc"}, "CFG and sequence parallel group's backend for GPUs is ucc"),
        ({"ring": "cpu:gloo"}, "the ring group's backend for GPUs is none, and only NCCL's"),
        ({"tp": "cuda:gloo"}, "the tensor parallel group's backend for GPUs is gloo"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_only_nccl_is_captured(
    backends: dict[str, str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups are strings here, which is all that is asked of them."""

    class Tp:
        device_group = "tp"

    monkeypatch.setattr("bagel_mot.parallel.get_tp_group", Tp)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends.get(group, "cuda:nccl"))
    sp: Any = SequenceParallel(4, 0, "sp", "ulysses", "ring")  # type: ignore[arg-type]
    peers: Any = "peers"
    ranks = Parallel(ParallelConfig(tensor=2, ulysses=2, ring=2), 0, sp, 0, peers)
    assert set(ranks.groups().values()) == {"tp", "sp", "ulysses", "ring", "peers"}
    found = ranks.why_not_captured()
    assert (why in found) if why else found == ""


def test_what_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    peers: Any = "peers"
    ranks = Parallel(ParallelConfig(cfg=2), 0, None, 0, peers)
    for value, why in (("0", False), ("1", True)):
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", value)
        assert bool(ranks.why_not_captured()) == why
        assert ALONE.why_not_captured() == ""


def test_ranks_capture_together(capfd: pytest.CaptureFixture[str]) -> None:
    """Images of growing size and guidance, with capture feigned: all ranks capture at one call."""
    code = run_ranks([sys.executable, str(WORKER.with_name("capture_worker.py"))], 2)
    printed = capfd.readouterr()
    assert code == 0 and "together" in printed.out, printed.out + printed.err


@pytest.mark.parametrize("rows", [1, 2, 5, 18, 30, 4098])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_chunk(rows: int, parts: int) -> None:
    """Chunks cover the rows once, in order, and differ in size only at the end."""
    chunks = [chunk(rows, parts, i) for i in range(parts)]
    assert [row for part in chunks for row in part] == list(range(rows))
    assert all(len(part) == len(chunks[0]) for part in chunks[:-1] if part.stop < rows)


def test_7b_sizes() -> None:
    """Heads of the released model: what goes and what does not."""
    llm = BagelConfig.from_folder(GOLDEN.checkpoint).llm.model_copy(
        update={"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
    )
    for words in ((4, None, 1), (1, "ulysses:4", 1), (2, "ulysses:2,ring:2", 2)):
        sizes = ParallelConfig.parse(*words)
        sizes.check(llm, sizes.world_size)
    for words in ((8, None, 1), (1, "ulysses:8", 1)):
        sizes = ParallelConfig.parse(*words)
        with pytest.raises(ValueError, match="28 attention heads"):
            sizes.check(llm, sizes.world_size)
