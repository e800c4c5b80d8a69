"""The program around the commands: help, version, interrupts, what others print."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ASK, SMALL, succeed
from pictures import QUICK, assert_close_picture, opened

from bagel_mot import __version__
from bagel_mot.cli import main
from bagel_mot.cli_io import quiet_vllm
from bagel_mot.model_options import Place
from bagel_mot.pipeline import BagelPipeline

pytestmark = pytest.mark.usefixtures("working_folder")


def test_version() -> None:
    assert succeed("--version").stdout == f"bagel-mot {__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["edit"], ["ask"], ["inspect"]], ids=str)
def test_help(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of options are whole in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    result = succeed(*command, "--help")
    assert "Usage: bagel-mot" in result.stdout
    assert result.stderr == ""
    assert "…" not in result.stdout
    if command in (["generate"], ["edit"]):
        assert {"--negative-prompt", "--timestep-shift"} <= set(result.stdout.split())


@pytest.mark.parametrize(
    ("given", "level"),
    [(None, logging.ERROR), ("ERROR", logging.ERROR), ("INFO", logging.WARNING)],
    ids=str,
)
def test_vllm_is_quiet_unless_asked(
    given: str | None, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", given)
    logger = logging.getLogger("vllm")
    before = logger.level
    try:
        logger.setLevel(logging.WARNING)
        quiet_vllm()
        assert logger.level == level
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("level", "said"), [(None, ""), ("ERROR", ""), ("INFO", "advice\n")], ids=str
)
def test_vllm_says_nothing_unless_asked(
    level: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has given its logger a handler: what it says goes to stderr all the same."""
    if level is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    program = (
        "import logging; from bagel_mot.cli_io import quiet_vllm; quiet_vllm();"
        "logging.getLogger('vllm.triton').warning('advice')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == said


@pytest.mark.parametrize("rank", [None, "0", "1"], ids=str)
def test_interrupted(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once, by the process that the user has started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(Place, "load", interrupt)
    monkeypatch.setattr(sys, "argv", ["bagel-mot", *ASK])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 130
    assert capsys.readouterr().err == ("interrupted\n" if rank is None else "")


@pytest.mark.parametrize("rank", [None, "1"], ids=str)
def test_no_memory(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line: the error of a KV cache says what takes less."""

    def refuse(*_: object) -> None:
        raise MemoryError("no memory for 9 rows: fewer take less")

    left: list[int] = []
    monkeypatch.setattr("bagel_mot.cli.leave", left.append)
    monkeypatch.setattr(Place, "load", refuse)
    monkeypatch.setattr(sys, "argv", ["bagel-mot", *ASK])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1
    assert left == [1]
    assert capsys.readouterr().err == "error: no memory for 9 rows: fewer take less\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk() -> None:
    """One line, also where the answer is what has no room."""
    for command in (["--version"], ["inspect", "--model", "tiny"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "bagel_mot", *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        want = "error: the standard output cannot be written: No space left on device\n"
        assert (done.returncode, done.stderr) == (1, want)


@pytest.mark.parametrize(
    ("change", "want"),
    [("sys.stdout = None", ""), ("sys.stdout.reconfigure(encoding='latin-1')", "caf\u00e9 ?\n")],
    ids=["closed", "latin-1"],
)
def test_output_that_takes_less(change: str, want: str) -> None:
    """Closed by who started the command, or without the letters of an answer."""
    program = (
        f"import sys; {change}; import typer, bagel_mot.cli as cli;"
        "cli.app = lambda: typer.echo('caf\u00e9 \u732b'); cli.main()"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, encoding="latin-1")
    assert (done.returncode, done.stdout) == (0, want), done.stderr


def test_module(cpu: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m bagel_mot` as a shell sees it: none of vLLM's messages, no traces of a bar."""
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    command = [sys.executable, "-m", "bagel_mot", "generate", "a red fox", *SMALL]
    done = subprocess.run(
        [*command, "--seed", "5", "-o", "fox.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{Path.cwd() / 'fox.png'}\n"
    # An installation without vLLM's compiled operators is worth a word, which is mot-layers'.
    words = "vLLM's compiled operators are not installed"
    assert [line for line in done.stderr.splitlines() if not line.startswith(words)] == []
    # Not to the bit: another process may sum with another number of threads.
    want = cpu.generate("a red fox", height=64, width=64, settings=QUICK, seed=5)
    assert_close_picture(opened("fox.png"), want.image)
