"""The page: from result files only, the same every time, and without torch."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
from samples import python_command, some_results

from mot_bench.report import report
from mot_bench.results import Results


def page(results: Results | None = None) -> str:
    return report([(Path("somewhere/results.json"), results or some_results())])


def test_report_is_deterministic(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    some_results().write(path)
    assert page() == page() == report([(path, Results.read(path))])


def test_report_table() -> None:
    lines = page().splitlines()
    header = (
        "| rows per expert | layer | mot | dense | loop | broken | absent | mot, % of ceiling |"
    )
    start = lines.index(header)
    assert lines[start + 2 : start + 5] == [
        "| 2 + 8 (1x8) | qkv 32→64 | 100.0 (1.00) | 100.0 (1.00) | 150.0* (1.50) | failed "
        "| unavailable | 0 |",
        "| 2 + 4,096 (1x4096) | qkv 32→64 | 100.0 (1.00) | 100.0 (1.00) | 150.0* (1.50) | failed "
        "| unavailable | 1 |",
        "| **geometric mean** |  | (1.00) | (1.00) | (1.50) | - | - | 0 |",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "## Some GPU, bfloat16",
        "```\nmot-bench kernels\n```",
        "| result file | `results.json` |",
        "### `mot_linear`",
        "`dense`: one expert (the baseline)",
        "- `broken` failed: wrong: y: expert 0",
        "- `absent` unavailable: torch is too old",
        "- \\* `loop`: no CUDA graph: it waits",
        "- qkv 32→64, 1x8: too little data to rotate, L2 is warm",
    ],
)
def test_report_says(text: str) -> None:
    assert text in page()


def test_report_of_a_run_that_was_cut_off() -> None:
    assert "cut off" not in page()
    assert "cut off" in page(dataclasses.replace(some_results(), complete=False))


def test_report_command(mot_bench: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "results.json", tmp_path / "docs" / "performance.md"
    some_results().write(source)
    answer = mot_bench("report", source, source, "--output", target)
    assert (answer.code, answer.out.strip()) == (0, str(target))
    assert target.read_text(encoding="utf-8").count("## Some GPU") == 2


def test_report_command_needs_no_torch(tmp_path: Path) -> None:
    source, target = tmp_path / "results.json", tmp_path / "page.md"
    some_results().write(source)
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'triton', 'mot_kernels']));"
        "from mot_bench.cli import main;"
        f"main(['report', {str(source)!r}, '--output', {str(target)!r}])"
    )
    done = subprocess.run(python_command(program), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert target.read_text(encoding="utf-8") == report([(source, some_results())])


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file or directory"), ("{}", "key 'schema' is None; expected 1")],
    ids=["no_file", "no_results"],
)
def test_report_command_refuses(
    text: str | None, message: str, mot_bench: Any, tmp_path: Path
) -> None:
    source = tmp_path / "results.json"
    if text is not None:
        source.write_text(text)
    answer = mot_bench("report", source, "--output", tmp_path / "page.md")
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not (tmp_path / "page.md").exists()
