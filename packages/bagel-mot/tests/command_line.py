"""Commands as the tests give them, and what they print and write into the working folder.

Tests of them use the fixture `working_folder`.
"""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import Result
from golden_data import GOLDEN
from PIL import Image
from typer.testing import CliRunner

from bagel_mot.cli import app

CHECKPOINT = str(GOLDEN.checkpoint)
STREET = str(GOLDEN.folder / "images" / "street.png")
PORTRAIT = str(GOLDEN.folder / "images" / "portrait.png")
ON_CPU = ["--model", CHECKPOINT, "--device", "cpu"]
SMALL = [*ON_CPU, "--height", "64", "--width", "64", "--num-timesteps", "3"]
ASK = ["ask", "What is this?", *ON_CPU]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="bagel-mot")


def succeed(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result) -> str:
    """Check that a command refused: exit code 2, a message, nothing else; the message."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert written() == []
    return said(result)


def said(result: Result) -> str:
    """What stands on stderr, without the box and the line breaks around it."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def written() -> list[str]:
    """Everything in the working folder."""
    return sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*"))


def metadata(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return dict(image.text)  # type: ignore[attr-defined]
