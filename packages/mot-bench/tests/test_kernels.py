"""`mot-bench kernels` from the command line: tables, files, outside providers, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mot_bench import formats
from mot_bench.cases import Layer, LinearCase, Routing
from mot_bench.registry import Gate
from mot_bench.results import Results

PROVIDERS = '''
import torch
from mot_bench.linear import LinearProblem
from mot_bench.norms import NormProblem
from mot_bench.registry import Unavailable


def addressed(problem: LinearProblem):
    """Python loop over experts.

    More words.
    """
    rows = [problem.plan.rows_of(e).long() for e in range(problem.plan.num_experts)]

    def run(i):
        y = problem.x[i].new_empty(problem.case.routing.rows, problem.case.layer.n)
        for e, own in enumerate(rows):
            y[own] = problem.x[i][own] @ problem.weight[i][e].T
        return y

    return run


def unannotated(problem):
    return addressed(problem)


def forgets_und(problem: LinearProblem):
    run = addressed(problem)

    def wrong(i):
        y = run(i)
        y[problem.plan.rows_of(0).long()] = 0
        return y

    return wrong


def elsewhere(problem: LinearProblem):
    raise Unavailable("needs a GPU of next year")


def of_norms(problem: NormProblem):
    return lambda i: problem.x[i]


def of_nothing(problem: int):
    return None


mot = addressed
'''

TINY_RUN = ("kernels", "--branches", 1, "--image-tokens", 8, "--rounds", 2, "--dtype", "float32")
ONE_LAYER = (*TINY_RUN, "--shape", "32,16")


@pytest.fixture
def providers(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(PROVIDERS)
    return path


def only_results(folder: Path) -> Results:
    (path,) = folder.glob("*.json")
    return Results.read(path)


def timings(results: Results) -> dict[str, bool]:
    return {p.name: p.timing is not None for case in results.cases for p in case.providers}


def test_kernels_of_a_model(mot_bench: Any, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    answer = mot_bench(*TINY_RUN, "--model", model_folder, "--output", folder, "--plot")
    assert answer.code == 0, answer.err
    results = only_results(folder)
    assert results.complete
    assert [case.op for case in results.cases] == ["linear"] * 4 + ["rms_norm"] * 2 + [
        "qk_norm_rope"
    ]
    assert results.failures == []
    assert results.command == (
        f"mot-bench kernels --branches 1 --image-tokens 8 --rounds 2 --dtype float32 "
        f"--model {model_folder}"
    )
    (picture,) = folder.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    for text in ("linear: gate_up 32→96, silu_mul", "× baseline", "Geometric means"):
        assert text in answer.out
    assert str(picture) in answer.out
    assert "no GPU" in answer.err


def test_kernels_writes_what_it_shows(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*ONE_LAYER, "--output", tmp_path)
    results = only_results(tmp_path)
    for provider in results.cases[0].providers:
        assert provider.timing is not None
        assert f"{provider.timing.median_us:.1f}" in answer.out


@pytest.mark.parametrize("name", ["addressed", "unannotated"])
def test_outside_provider(name: str, mot_bench: Any, providers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    answer = mot_bench(*ONE_LAYER, "--provider", f"{providers}:{name}", "--output", folder)
    assert answer.code == 0, answer.err
    assert timings(only_results(folder))[name]
    if name == "addressed":
        assert "Python loop over experts." in answer.out
        assert "More words" not in answer.out


def test_wrong_provider_gets_no_time(mot_bench: Any, providers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    answer = mot_bench(*ONE_LAYER, "--provider", f"{providers}:forgets_und", "--output", folder)
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == ("mot-bench: failed, without a time: linear/forgets_und")
    (line,) = [line for line in answer.out.splitlines() if line.startswith("│ forgets_und")]
    assert "failed: wrong: y: expert 0 (2 of 10 rows)" in line
    # No number stands where the others have theirs.
    assert [cell.strip() for cell in line.split("│")[2:7]] == ["-"] * 5
    assert "forgets_und    │   0/1" in answer.out
    found = timings(only_results(folder))
    assert not found.pop("forgets_und")
    assert all(found.values())


def test_unavailable_provider_is_no_failure(
    mot_bench: Any, providers: Path, tmp_path: Path
) -> None:
    answer = mot_bench(*ONE_LAYER, "--provider", f"{providers}:elsewhere")
    assert answer.code == 0
    assert "unavailable: needs a GPU of next year" in answer.out


@pytest.mark.parametrize("name", ["fp8_w8a8_per_channel", "int8_w8a16", "int4_w4a16_group32"])
def test_formats(name: str, mot_bench: Any, tmp_path: Path) -> None:
    run = (*TINY_RUN, "--shape", "32,16", "--format", name)
    answer = mot_bench(*run, "--output", tmp_path)
    assert answer.code == 0, answer.err
    (case,) = only_results(tmp_path).cases
    assert (case.op, case.id.endswith(f"-{name}")) == ("linear_format", True)
    timed = {p.name: p.timing is not None for p in case.providers}
    assert timed["mot"]
    assert timed["plain"]
    (scaled,) = [p for p in case.providers if p.name == "scaled_mm"]
    if not name.startswith("fp8"):
        assert "it multiplies fp8_w8a8_per_channel" in scaled.why


def test_the_gate_judges_a_format_by_its_own_numbers() -> None:
    """What is measured agrees with the rounded numbers, and not with those before rounding."""
    case = LinearCase(Layer("tiny", 64, 32), Routing.packed([3, 20]), "float32", "int8_w8a8")
    problem = formats.make_problem(case, 1, torch.device("cpu"))
    ready = formats.mot(problem)
    Gate(problem).check(ready)
    plain = formats.plain(problem)
    with pytest.raises(AssertionError, match="expert"):
        Gate(problem).check(plain)


@pytest.mark.parametrize("command", [("kernels",), ("tune", "--output", "out")])
def test_unknown_format(command: tuple[str, ...], mot_bench: Any) -> None:
    answer = mot_bench(*command, "--shape", "32,16", "--format", "int9")
    assert answer.code == 2
    assert "--format is 'int9'; expected one of" in answer.err


def test_scattered_routing_replaces_steps(mot_bench: Any, tmp_path: Path) -> None:
    answer = mot_bench(*ONE_LAYER, "--und-share", "0.5,1", "--output", tmp_path)
    assert answer.code == 0
    counts = [case.counts for case in only_results(tmp_path).cases]
    assert [sum(each) for each in counts] == [10, 10]
    assert counts[1] == (10, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.py:f", "there is no Python file missing.py"),
        ("{file}", "expected FILE.py:FUNCTION"),
        ("{file}:nobody", "defines no function nobody"),
        (
            "{file}:of_nothing",
            "of_nothing must take one of LinearProblem, FormatProblem, NormProblem, QkProblem",
        ),
        ("{file}:of_norms", "it computes rms_norm; add --op rms_norm"),
        ("{file}:mot", "linear has a provider 'mot' already"),
        ("{folder}/broken.py:f", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
    ids=["no_file", "no_name", "no_function", "no_problem", "other_op", "name_taken", "broken"],
)
def test_provider_option_refuses(spec: str, message: str, mot_bench: Any, providers: Path) -> None:
    (providers.parent / "broken.py").write_text("1 / 0\n")
    spec = spec.format(file=providers, folder=providers.parent)
    answer = mot_bench(*ONE_LAYER, "--provider", spec)
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1


def test_results_survive_an_interruption(
    mot_bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mot_bench import kernels

    run_case = kernels.run_case
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return run_case(*args, **kwargs)

    monkeypatch.setattr(kernels, "run_case", interrupted)
    answer = mot_bench(*ONE_LAYER, "--shape", "16,32", "--output", tmp_path)
    assert answer.code == 130
    assert "mot-bench: interrupted" in answer.err
    results = only_results(tmp_path)
    assert (len(results.cases), results.complete) == (1, False)


def test_json_holds_measurements_only(mot_bench: Any, tmp_path: Path) -> None:
    """Rates and ratios are computed by who reads them, so they cannot disagree with the times."""
    mot_bench(*ONE_LAYER, "--output", tmp_path)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert set(content) == {
        *("schema", "kind", "command", "environment", "protocol", "ceilings", "complete", "cases")
    }
    assert set(content["cases"][0]["providers"][0]["timing"]) == {
        *("median_us", "p20_us", "p80_us", "samples", "method", "note")
    }
