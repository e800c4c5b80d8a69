"""The command ask: its answer, whole and in pieces."""

from __future__ import annotations

import pytest
from command_line import ON_CPU, PORTRAIT, STREET, succeed, written
from pictures import opened

from bagel_mot.cli_io import Streamed
from bagel_mot.pipeline import BagelPipeline

pytestmark = pytest.mark.usefixtures("working_folder")


def test_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    """A growing text: what is written stays right, whatever comes."""
    told = Streamed(err=False)
    seen = []
    for text in ("a", "a \ufffd", "a 狐", "a 狐 <|im", "a 狐 <b> and so on", "a 狐 <b> and so on."):
        told(text)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", " ", "狐", " ", "<b> and so on", "."]
    told.finish("a 狐 <b> and so on.\ufffd")
    assert capsys.readouterr().out == "\ufffd\n"


def test_ask_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer comes in pieces, and whole."""
    pieces = []
    write = Streamed._write
    monkeypatch.setattr(
        Streamed, "_write", lambda self, text: (pieces.append(text), write(self, text))
    )
    result = succeed("ask", "What is this?", *ON_CPU, "--max-text-tokens", "9")
    assert len(pieces) > 5 and result.stdout == pieces[-1] + "\n"


@pytest.mark.parametrize("images", [[], [STREET], [STREET, PORTRAIT]], ids=len)
def test_ask(cpu: BagelPipeline, images: list[str]) -> None:
    """stdout holds the answer and nothing else."""
    given = [word for image in images for word in ("--image", image)]
    result = succeed("ask", "What is this?", *ON_CPU, *given, "--max-text-tokens", "9")
    pictures = [opened(image) for image in images]
    assert result.stdout == cpu.ask(pictures, "What is this?", max_text_tokens=9) + "\n"
    assert written() == []


def test_ask_think_and_sample(cpu: BagelPipeline) -> None:
    options = ["--think", "--temperature", "1.0", "--seed", "3", "--max-text-tokens", "9"]
    result = succeed("ask", "What is a fox?", *ON_CPU, *options)
    want = cpu.ask(None, "What is a fox?", think=True, temperature=1.0, seed=3, max_text_tokens=9)
    assert result.stdout == f"{want}\n"
