"""The gate: right providers pass it, wrong ones do not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mot_kernels import mot_linear
from samples import TINY, linear_case

from mot_bench.cases import Case, Routing, select
from mot_bench.kernels import run_case, with_providers
from mot_bench.linear import LinearProblem, make_problem
from mot_bench.operations import OPERATIONS
from mot_bench.registry import Gate, Operation, Provider, Ready, Unavailable, verdict

CPU = torch.device("cpu")

ROUTES = (
    Routing.generation(1, 20),
    Routing.scattered(30, 0.3),
    Routing.scattered(5, 1.0),
    Routing.packed((0, 6)),
)
OPS = ("linear", "rms_norm", "qk_norm_rope")
CASES = select(OPS, TINY.layers(), TINY, ROUTES, "bfloat16")
CASES += select(OPS, TINY.layers(), TINY, ROUTES[:1], "float32")
CASES += select(("linear",), TINY.layers(), TINY, ROUTES, "bfloat16", "int8_w8a8")
for _format in (None, "fp8_w8a8_per_channel", "int8_w8a8", "int8_w8a16"):
    CASES += select(("mlp",), TINY.layers(), TINY, ROUTES, "bfloat16", _format)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_own_providers_pass(case: Case) -> None:
    operation = OPERATIONS[case.op]
    result = run_case(case, operation, rounds=1, device=CPU)
    assert [p.name for p in result.providers] == list(operation.providers)
    for provider in result.providers:
        if provider.name == "scaled_mm":  # of FP8 alone
            assert provider.status == "unavailable"
            continue
        assert provider.status == "timed", provider.why
        assert provider.timing is not None


def test_each_operation_has_one_baseline() -> None:
    for operation in OPERATIONS.values():
        assert sum(provider.baseline for provider in operation.providers.values()) == 1


def right(problem: LinearProblem, index: int) -> torch.Tensor:
    return mot_linear(problem.x[index], problem.weight[index], problem.plan)


def und_rows_zero(problem: LinearProblem, index: int) -> torch.Tensor:
    y = right(problem, index)
    y[problem.plan.rows_of(0).long()] = 0
    return y


def gen_rows_forgotten(problem: LinearProblem, index: int) -> torch.Tensor:
    y = torch.empty_like(right(problem, index)).fill_(float("nan"))
    own = problem.plan.rows_of(0).long()
    y[own] = right(problem, index)[own]
    return y


def experts_swapped(problem: LinearProblem, index: int) -> torch.Tensor:
    return mot_linear(problem.x[index], problem.weight[index].flip(0), problem.plan)


def slightly_scaled(problem: LinearProblem, index: int) -> torch.Tensor:
    return right(problem, index) * 1.001


def always_the_first_set(problem: LinearProblem, index: int) -> torch.Tensor:
    return right(problem, 0)


def transposed(problem: LinearProblem, index: int) -> torch.Tensor:
    return right(problem, index).t()


def nothing(problem: LinearProblem, index: int) -> None:
    return None


def raising(problem: LinearProblem, index: int) -> torch.Tensor:
    raise RuntimeError("out of luck\nand more")


WRONG = {
    und_rows_zero: r"wrong: y: expert 0 \(2 of 300 rows\)",
    gen_rows_forgotten: r"wrong: y: expert 1 \(298 of 300 rows\)",
    experts_swapped: "wrong: y: expert 0",
    slightly_scaled: "wrong: y: expert 0",
    always_the_first_set: "wrong: y: expert 0",
    transposed: r"wrong: y has shape \(16, 300\); expected \(300, 16\)",
    nothing: "wrong: returned NoneType; expected tensors: y",
    raising: "raised RuntimeError: out of luck$",
}


@pytest.mark.parametrize("how", WRONG, ids=lambda how: how.__name__)
def test_gate_refuses(how: Callable[[LinearProblem, int], object]) -> None:
    problem = make_problem(linear_case(rows=(2, 298)), 2, CPU)
    provider = Provider(how.__name__, "", lambda problem: lambda index: how(problem, index))
    answer = verdict(Gate(problem), provider, problem)
    assert isinstance(answer, str)
    assert re.search(WRONG[how], answer), answer
    assert "\n" not in answer


def test_gate_puts_sorted_rows_back() -> None:
    problem = make_problem(linear_case(), 2, CPU)
    order = problem.plan.row_ids.long()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    gate = Gate(problem)
    gate.check(Ready(lambda index: right(problem, index)[order], lambda y: y[back]))
    with pytest.raises(AssertionError, match="expert 0"):
        gate.check(Ready(lambda index: right(problem, index)[order]))


def test_gate_compares_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mot_bench.registry._GATE_ELEMENTS", 30)  # 10 rows: 3 columns a part
    problem = make_problem(replace(linear_case(), dtype="bfloat16"), 2, CPU)

    def last_column_wrong(index: int) -> torch.Tensor:
        y = right(problem, index)
        y[:, -1] += 1
        return y

    gate = Gate(problem)
    gate.check(Ready(lambda index: right(problem, index)))
    with pytest.raises(AssertionError, match="expert 0"):
        gate.check(Ready(last_column_wrong))


def test_a_wrong_provider_has_no_time_and_spares_the_others() -> None:
    linear = OPERATIONS["linear"]
    wrong = Provider("wrong", "", lambda problem: lambda index: und_rows_zero(problem, index))

    def absent(problem: object) -> Ready:
        raise Unavailable("needs another GPU")

    registry = with_providers(
        OPERATIONS.values(), [(linear, wrong), (linear, Provider("absent", "", absent))]
    )
    result = run_case(linear_case(), registry["linear"], rounds=1, device=CPU)
    found = {provider.name: provider for provider in result.providers}
    assert (found["wrong"].status, found["wrong"].timing) == ("failed", None)
    assert (found["absent"].status, found["absent"].why) == ("unavailable", "needs another GPU")
    assert found["mot"].timing is not None
    assert "wrong" not in linear.providers, "the registry itself must not change"


def test_provider_names_and_baselines_are_unique() -> None:
    operation = Operation("op", object, make_problem)
    operation.add(Provider("a", "", lambda problem: None, baseline=True))  # type: ignore[arg-type, return-value]
    for again, message in (("a", "provider 'a' already"), ("b", "baseline already")):
        with pytest.raises(ValueError, match=message):
            operation.add(Provider(again, "", lambda problem: None, baseline=True))  # type: ignore[arg-type, return-value]


def test_in_place_residuals_start_fresh() -> None:
    """Providers that add in place must not see what timing or a rival left behind."""
    case = linear_case(epilogue="add_residual")
    problem = make_problem(case, 2, CPU)
    before = [each.clone() for each in problem.residual or []]
    gate = Gate(problem)
    for _, provider in itertools.chain(*[OPERATIONS["linear"].providers.items()] * 2):
        assert isinstance(verdict(gate, provider, problem), Ready)
    for now, then in zip(problem.residual or [], before, strict=True):
        assert torch.equal(now, then)
