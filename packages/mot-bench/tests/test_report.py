"""The page: from result files only, the same every time, and without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from samples import python_command, some_results

from mot_bench.model_results import (
    AccuracyResults,
    Activity,
    AttentionRate,
    Distance,
    E2eResults,
    Memory,
    Phase,
    RequestResult,
    StepCase,
    StepProvider,
    StepResults,
    Subject,
    VariantResult,
    Work,
)
from mot_bench.report import read, report
from mot_bench.results import Results, Timing, rate

SUBJECT = Subject("random, 7b", 14_000_000_000, 28 * 2**30, "bfloat16", "fa3", "on", "0.1", "0.26")
BUSY = Activity(200.0, 3.0, 99.0, 100.0, 0.0, ())
HEAD = {"schema": 1, "subject": SUBJECT, "protocol": "by hand", "complete": True}


def some_steps() -> StepResults:
    """A step that takes twice its floor, and a baseline that takes four times."""
    kernels = some_results()
    matmul, copy = kernels.ceilings.matmul_tflops, kernels.ceilings.copy_gbps
    # Each part of the floor takes 100 us.
    work = Work(matmul * 1e8, 50 * 1e8, copy * 1e5)
    memory = Memory(29 * 2**30, 30 * 2**30)
    ours, theirs = (Timing(us, us, us, 5, "stream") for us in (600.0, 1200.0))
    providers = (
        StepProvider("mot", False, ours, memory, BUSY, 0.0),
        StepProvider("other", True, theirs, None, None, 0.01),
    )
    return StepResults(
        kind="step",
        command="mot-bench step --branches 2",
        environment=kernels.environment,
        ceilings=kernels.ceilings,
        attention=(AttentionRate("slow", 40.0, ""), AttentionRate("fast", 50.0, "")),
        cases=(StepCase(1024, 512, 2, 1, 4100, 30, work, providers),),
        **HEAD,
    )


def some_requests() -> E2eResults:
    phases = (Phase("prefill", 0.25, 0.2, 0.3), Phase("denoise", 1.5, 1.4, 1.6))
    total = Phase("total", 1.75, 1.6, 1.9)
    memory = Memory(29 * 2**30, 31 * 2**30)
    request = RequestResult("image", "50 timesteps", 1, 49, 32, 9.0, phases, total, memory, BUSY)
    cpu = dataclasses.replace(request, name="edit", memory=None, loop=None)
    return E2eResults(
        kind="e2e",
        command="mot-bench e2e",
        environment=some_results().environment,
        requests=(request, cpu),
        **HEAD,
    )


def some_accuracy() -> AccuracyResults:
    """Two branches, of which the second is off by more."""
    none, near, far = Distance(1.0, 0.0), Distance(0.99987, 0.016), Distance(0.99871, 0.051)
    plain = VariantResult("none", "fa3", 27 * 2**30, (none, none), none, none, none)
    other = VariantResult("fp8", "fa3", 15 * 2**30, (near, far), far, near, none)
    return AccuracyResults(
        kind="accuracy",
        command="mot-bench accuracy --quantization fp8",
        environment=some_results().environment,
        height=1024,
        width=512,
        branches=2,
        batch=1,
        prompt="a red fox",
        variants=(plain, other),
        **HEAD,
    )


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
        "## Some GPU, bfloat16, commit abc",
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


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.0123"), (0.5, "0.5"), (40.0, "40"), (793.4, "793"), (4217.4, "4217")],
)
def test_rates_of_slow_and_fast_devices(value: float, text: str) -> None:
    """A CPU's half a TFLOP/s is not 0."""
    assert rate(value) == text
    slow = dataclasses.replace(some_results().ceilings, matmul_tflops=value)
    assert f"matmul 8192³ {text} TFLOP/s" in page(
        dataclasses.replace(some_results(), ceilings=slow)
    )


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


@pytest.mark.parametrize("command", ["report", "modes"])
def test_page_commands_keep_results(command: str, mot_bench: Any, tmp_path: Path) -> None:
    """`--output results/*.json` would take the first for the page."""
    source = tmp_path / "results.json"
    some_results().write(source)
    before = source.read_bytes()
    answer = mot_bench(command, "--output", source, source)
    assert answer.code == 2
    assert "which looks like results; give FILE.md" in answer.err
    assert source.read_bytes() == before


@pytest.mark.parametrize("kind", ["quality", "serve"])
def test_report_command_leaves_other_results_out(kind: str, mot_bench: Any, tmp_path: Path) -> None:
    """`results/*.json` names whatever commands have written there."""
    source, other, target = (tmp_path / name for name in ("a.json", "other.json", "page.md"))
    some_results().write(source)
    other.write_text(json.dumps({"schema": 1, "kind": kind}))
    answer = mot_bench("report", other, source, "--output", target)
    assert answer.code == 0, answer.err
    assert f"mot-bench: left out: {other} is of mot-bench {kind}" in answer.err
    assert target.read_text(encoding="utf-8") == report([(source, some_results())])
    target.unlink()
    answer = mot_bench("report", other, "--output", target)
    assert answer.code == 2 and not target.exists()
    assert "JSON names no results of kernels, step, e2e or accuracy" in answer.err


@pytest.mark.parametrize("make", [some_steps, some_requests, some_accuracy])
def test_report_reads_every_kind(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    make().write(path)
    found = read(path)
    assert found == make()
    assert report([(path, found)]) == report([(path, make())])


@pytest.mark.parametrize("content", ["[]", '{"kind": "serve"}', "no JSON"])
def test_report_refuses_other_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json"):
        read(path)


def test_report_of_whole_models() -> None:
    runs = [(Path("a/step.json"), some_steps()), (Path("e2e.json"), some_requests())]
    lines = report([*runs, (Path("accuracy.json"), some_accuracy())]).splitlines()
    for line in (
        "## Denoising step, Some GPU, commit abc",
        "| model | random, 7b, 14.00 billion parameters, bfloat16; weights 28.00 GiB |",
        "mot-bench step --branches 2",
        "| 1024x512, 2 branches | mot | 0.60 | 0.50 | 50 | 99.0 | 3 | 2.00 |",
        "| 1024x512, 2 branches | other | 1.20 | 1.00 | 25 | - | - | - |",
        "## Requests, Some GPU, commit abc",
        "| image | 50 timesteps | 1 | 1.750 | prefill 0.250, denoise 1.500 | 99 | 31.0 |",
        "| edit | 50 timesteps | 1 | 1.750 | prefill 0.250, denoise 1.500 | - | - |",
        "## Accuracy, Some GPU, commit abc",
        "| none | fa3 | 27.00" + 4 * " | 1.00000 (0.0e+00)" + " |",
        "| fp8 | fa3 | 15.00 | 0.99871 (5.1e-02) | 0.99871 (5.1e-02) | 0.99987 (1.6e-02) "
        "| 1.00000 (0.0e+00) |",
    ):
        assert line in lines
    assert any("attention slow 40 TFLOP/s, fast 50 TFLOP/s" in line for line in lines)


def test_the_page_in_docs_is_what_its_results_give() -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = report([(file, read(file)) for file in sorted((docs / "results").glob("*.json"))])
    assert page == (docs / "performance.md").read_text(), (
        "run: mot-bench report docs/results/*.json --output docs/performance.md"
    )
