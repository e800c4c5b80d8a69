"""The cost model: known constants come out again, and what was measured counts first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bagel_mot.parallel import ParallelConfig
from bagel_mot.synthetic import BAGEL_7B
from samples import some_results

from mot_bench import modes
from mot_bench.cost import CostModel, Shape, fit, share, traffic
from mot_bench.errors import UsageError
from mot_bench.model_results import Subject
from mot_bench.parallel_page import modes_page
from mot_bench.parallel_results import ModeResult, ParallelCase, ParallelResults
from mot_bench.results import Timing

LLM = BAGEL_7B.llm
STEP = (20.0, 3e-4, 900.0)  # per row, per pair of rows, fixed
OVERHEAD = {
    "cfg": (1e-5, 200.0),
    "allgather": (4e-6, 20.0),
    "ulysses": (5e-6, 30.0),
    "ring": (2e-5, 40.0),
    "tp": (4e-6, 15.0),
}


def shaped(rows: int, branches: int, batch: int) -> Shape:
    """A shape as `Shape.of` makes it of the cases below."""
    return Shape(rows, branches, batch, (16 * 64, rows // 4))


SHAPES = (shaped(4098, 2, 1), shaped(4098, 3, 1), shaped(2050, 2, 1), shaped(4098, 2, 2))
TWO = "cfg:2;allgather:2;ulysses:2;ring:2;tp:2"


def truth(mode: ParallelConfig, shape: Shape) -> float:
    """Microseconds of a step in a world that is as the model says."""
    alone = sum(a * x for a, x in zip(STEP, shape.work, strict=True))
    us = STEP[-1] + (alone - STEP[-1]) * share(mode, shape)
    for kind, sent in traffic(mode, shape, LLM).items():
        per_byte, per_message = OVERHEAD[kind]
        us += sent.bytes * per_byte + sent.messages * per_message
    return us


def some_run(
    words: str = TWO, shapes: Sequence[Shape] = SHAPES, slower: float = 1.0
) -> ParallelResults:
    """Each mode with CUDA graphs, and without in twice the time."""
    cases = []
    for shape in shapes:
        found = []
        for mode in [modes.ALONE, *modes.parse(words)]:
            us = truth(mode, shape) * (1.0 if mode == modes.ALONE else slower)
            for graphs in (True, False):
                timing = Timing(us * (2 - graphs), us, us, 5, "stream")
                found.append(ModeResult(modes.name_of(mode), graphs, timing, 0.01, 0.0, ()))
        rows = shape.rows * shape.blocks
        cases.append(
            ParallelCase(
                16 * 64, shape.rows // 4, shape.branches, shape.batch, rows, 30, tuple(found)
            )
        )
    subject = Subject("random, 7b", 14_000_000_000, 1, "bfloat16", "default", "default", "0", "0")
    environment = some_results().environment
    return ParallelResults(
        1, "step-ranks", "x", environment, subject, "by hand", True, tuple(cases)
    )


@pytest.fixture(scope="module")
def model() -> CostModel:
    return CostModel([some_run()], LLM)


def test_constants_come_out_again(model: CostModel) -> None:
    assert model.step == pytest.approx(STEP, rel=1e-6)
    for kind, constants in OVERHEAD.items():
        assert model.overhead[kind] == pytest.approx(constants, rel=1e-4), kind


@pytest.mark.parametrize(
    "words", ["cfg:4", "allgather:4", "ulysses:2,ring:2", "tp:4", "cfg:2,tp:2", "cfg:2,ulysses:4"]
)
def test_what_was_not_measured_is_modelled(words: str, model: CostModel) -> None:
    (mode,) = modes.parse(words)
    for shape in (*SHAPES, shaped(1026, 2, 1)):
        assert model.measured(mode, shape) is None
        assert model.modelled(mode, shape) == pytest.approx(truth(mode, shape), rel=1e-6)


def test_more_gpus_are_never_slower_and_more_rows_never_faster(model: CostModel) -> None:
    for shape in SHAPES:
        times = [model.ranked(shape, gpus)[0][1] for gpus in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True)
    for words in TWO.split(";"):
        (mode,) = modes.parse(words)
        rows = [model.modelled(mode, shaped(rows, 2, 1)) for rows in (258, 1026, 4098)]
        assert None not in rows and rows == sorted(rows, key=float)


def test_measured_times_win(model: CostModel) -> None:
    """Where the world is not as the model says, its own times are reported."""
    other = CostModel([some_run("ring:2", SHAPES[:1]), some_run("tp:2", SHAPES[:2])], LLM)
    (ring,) = modes.parse("ring:2")
    slow = some_run("ring:2", SHAPES[1:2], slower=3.0)
    both = CostModel([some_run(), slow], LLM)
    assert both.measured(ring, SHAPES[1]) == pytest.approx(truth(ring, SHAPES[1]))  # the first run
    first = CostModel([slow, some_run()], LLM)
    assert first.repeated == both.repeated == {(modes.ALONE, SHAPES[1]), (ring, SHAPES[1])}
    assert not model.repeated
    (found,) = [us for mode, us, known in first.ranked(SHAPES[1], 2) if mode == ring and known]
    assert found == pytest.approx(3 * truth(ring, SHAPES[1]))
    assert first.modelled(ring, SHAPES[1]) < 0.9 * found  # type: ignore[operator]
    assert {"ring", "tp"} == set(other.overhead)
    assert other.modelled(modes.parse("cfg:2")[0], SHAPES[0]) is None


def test_one_case_is_enough_for_rates(model: CostModel) -> None:
    """Then one of the two constants is all there is, and the time is met."""
    one = CostModel([some_run(shapes=SHAPES[:1])], LLM)
    for mode in modes.parse(TWO):
        assert one.modelled(mode, SHAPES[0]) == pytest.approx(truth(mode, SHAPES[0]), rel=0.02)


def test_share_counts_the_fullest_rank() -> None:
    shape = shaped(4098, 3, 1)
    assert share(ParallelConfig(cfg=2), shape) == pytest.approx(2 / 3)
    assert share(ParallelConfig(ring=4), shape) == pytest.approx(1025 / 4098)
    assert share(ParallelConfig(tensor=2, cfg=3), shape) == pytest.approx(1 / 6)


def test_traffic() -> None:
    """Bytes that a rank of BAGEL-7B sends in a layer, by hand."""
    shape = shaped(4098, 2, 1)
    rows, layers = 4098, 28
    sent = traffic(ParallelConfig(allgather=2), shape, LLM)["allgather"]
    assert (sent.bytes, sent.messages) == (layers * rows * 2048, layers)
    sent = traffic(ParallelConfig(ulysses=2), shape, LLM)["ulysses"]
    assert (sent.bytes, sent.messages) == (layers * rows * (2 * 7168 + 2048) / 2, layers * 2)
    sent = traffic(ParallelConfig(ring=4), shape, LLM)["ring"]
    assert (sent.bytes, sent.messages) == (layers * 2 * 1025 * 2048 * 3, layers * 3)
    sent = traffic(ParallelConfig(tensor=2), shape, LLM)["tp"]
    assert (sent.bytes, sent.messages) == (layers * 2 * 8196 * 7168, layers * 2)
    assert traffic(modes.ALONE, shape, LLM) == {}


def test_products() -> None:
    """28 heads and 4 KV heads: 8 ranks of tensor parallelism or Ulysses are not possible."""
    names = {modes.name_of(mode) for mode in modes.products(8, 2, LLM)}
    assert {"ring:8", "allgather:8", "tp:4,cfg:2", "ulysses:4,ring:2"} <= names
    assert not names & {"tp:8", "ulysses:8", "cfg:8", "ulysses:2,allgather:4"}
    assert {modes.name_of(mode) for mode in modes.products(1, 2, LLM)} == {"1 rank"}


def test_fit_has_no_negative_coefficients() -> None:
    assert fit([[1.0, 1.0], [1.0, 2.0]], [3.0, 1.0]) == [pytest.approx(2.0), 0.0]
    assert fit([[1.0], [1.0]], [-1.0, -2.0]) == [0.0]
    assert fit([[1.0, 2.0], [2.0, 4.0]], [1.0, 2.0]) == [pytest.approx(1.0), 0.0]


def test_results_that_do_not_go_together() -> None:
    run = some_run()
    other = dataclasses.replace(
        run, environment=dataclasses.replace(run.environment, device="Another GPU")
    )
    with pytest.raises(UsageError, match=r"of 2 devices, models or .*; expected one: Another GPU"):
        CostModel([run, other], LLM)
    ways = (("dtype", "float16"), ("quantization", "fp8"), ("attention", "sdpa"))
    for key, value in (*ways, ("cuda_graphs", "off")):
        subject: Any = dataclasses.replace(run.subject, **{key: value})
        with pytest.raises(UsageError, match=f"random, 7b in .*{value}"):
            CostModel([run, dataclasses.replace(run, subject=subject)], LLM)
    longer = tuple(dataclasses.replace(case, prompt_tokens=50_000) for case in run.cases)
    with pytest.raises(UsageError, match="prompts of 50000 tokens"):
        CostModel([run, dataclasses.replace(run, cases=longer)], LLM)
    cases = tuple(dataclasses.replace(case, modes=case.modes[2:]) for case in run.cases)
    with pytest.raises(UsageError, match="no step of a single rank"):
        CostModel([dataclasses.replace(run, cases=cases)], LLM)


@pytest.mark.parametrize("in_turn", [1, -1])
def test_the_newest_time_counts(in_turn: int) -> None:
    old, new = some_run("cfg:2", SHAPES[:1]), some_run("cfg:2", SHAPES[:1], slower=0.5)
    later = dataclasses.replace(old.environment, date="2026-01-02T03:04:06Z")
    new = dataclasses.replace(new, environment=later)
    model = CostModel([old, new][::in_turn], LLM)
    (cfg,) = modes.parse("cfg:2")
    assert model.measured(cfg, SHAPES[0]) == truth(cfg, SHAPES[0]) / 2
    assert model.repeated == {(mode, SHAPES[0]) for mode in (modes.ALONE, cfg)}


def test_page_marks_what_is_modelled(tmp_path: Path, mot_bench: Any) -> None:
    source, target = tmp_path / "two.json", tmp_path / "parallel.md"
    some_run().write(source)
    answer = mot_bench("modes", str(source), "--gpus", "1,2,4", "--output", str(target))
    assert answer.code == 0, answer.err
    lines = target.read_text().splitlines()
    best, later = truth(ParallelConfig(cfg=2), SHAPES[0]), truth(modes.ALONE, SHAPES[0])
    title = "1024x1024, 2 branches"
    chosen = [line for line in lines if line.startswith(f"| {title} |")]
    assert chosen[0] == f"| {title} | 1 | `1 rank` | {later / 1e3:.1f} | 1.00 | - | - |"
    assert f"| 2 | `cfg:2` | {best / 1e3:.1f} | {later / best:.2f} |" in chosen[1]
    assert "| 4 | `allgather:2,cfg:2` | ≈ " in chosen[2]
    assert any(line.startswith(f"| {title} | `tp:2` |") and "| +0.0 |" in line for line in lines)
    assert any(line.startswith("| 1024x1024, 2 branches, 2 images | 2 |") for line in lines)
    assert (
        modes_page([(source, some_run())], CostModel([some_run()], LLM), [1, 2, 4]).splitlines()
        == lines
    )
    answer = mot_bench("modes", str(tmp_path / "none.json"), "--output", str(target))
    assert answer.code == 2 and "JSON is" in answer.err


def test_page_names_what_was_not_measured() -> None:
    """And recommends none of it, for its memory or otherwise."""
    path = Path("two.json")
    whole = modes_page([(path, some_run())], CostModel([some_run()], LLM), [2])
    assert "Not measured" not in whole and "tensor parallelism splits the weights" in whole
    some = some_run("cfg:2;allgather:2;ulysses:2")
    page = modes_page([(path, some)], CostModel([some], LLM), [2])
    assert "**Not measured, so not considered: `ring`, `tp`**" in page
    assert "tensor parallelism" not in page


def test_the_page_in_docs_is_what_its_results_give() -> None:
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "parallel.md").read_text()
    files = sorted((docs / "results").glob("*step-ranks-h200*.json"))
    if not files:
        assert "not measured yet" in page
        return
    runs = [(file, ParallelResults.read(file)) for file in files]
    model = CostModel([run for _, run in runs], LLM)
    assert page == modes_page(runs, model, [1, 2, 4, 8]), (
        "run: mot-bench modes docs/results/*step-ranks-h200*.json --output docs/parallel.md"
    )


def test_sizes_of_as_many_rows_are_told_apart() -> None:
    """1024x512 and 512x1024."""
    run = some_run("cfg:2", SHAPES[:1])
    (case,) = run.cases
    turned = dataclasses.replace(case, height=case.width, width=case.height)
    both = dataclasses.replace(run, cases=(case, turned))
    model = CostModel([both], LLM)
    page = modes_page([(Path("a.json"), both)], model, [2])
    assert f"| {case.height}x{case.width}, 2 branches | 2 |" in page
    assert f"| {case.width}x{case.height}, 2 branches | 2 |" in page
