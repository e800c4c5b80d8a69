"""Operations, their providers, and the gate a provider passes before it is timed.

An operation is measured on several providers: functions that prepare one way to compute it.
One of them is the baseline that the others are compared to. A provider that computes the
operation must first agree with the truth; one that fails gets no time.
"""

from __future__ import annotations

import importlib.util
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from mot_kernels import RoutePlan
from mot_kernels.testing import assert_close

from mot_bench.cases import Case
from mot_bench.protocol import Variant, first_line

# The gate compares this many elements at a time: it computes in float64, with temporaries.
_GATE_ELEMENTS = 1 << 26

Outputs = tuple[torch.Tensor, ...]


class Problem(Protocol):
    """One case with its inputs on a device, several sets of them."""

    @property
    def plan(self) -> RoutePlan: ...

    @property
    def sets(self) -> int: ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""

    def truth(self, index: int) -> Outputs:
        """The outputs for one input set, in a dtype much finer than the inputs'."""

    def own(self, index: int) -> Outputs:
        """The outputs as torch computes them in the inputs' dtype, expert by expert."""


class Unavailable(Exception):
    """Raised by a provider that cannot run a problem here; the message says why."""


@dataclass(frozen=True)
class Ready:
    """A provider's answer: what is timed, and how to read its output.

    Attributes:
        run: takes the index of an input set; this is timed.
        in_row_order: puts an output into row order, for the gate; not timed.
        note: a remark for the table.
    """

    run: Variant
    in_row_order: Callable[[torch.Tensor], torch.Tensor] = lambda output: output
    note: str = ""


Build = Callable[[Any], Ready | Variant]


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Attributes:
        name: unique within the operation.
        label: what it is, in a few words.
        build: takes the problem, does what is not to be timed, returns what is.
        baseline: whether the others are compared to it.
        exempt: why the gate does not apply (it computes something else); empty if it does.
    """

    name: str
    label: str
    build: Build
    baseline: bool = False
    exempt: str = ""

    def prepare(self, problem: Problem) -> Ready:
        """Call `build` and accept a bare callable."""
        answer = self.build(problem)
        return answer if isinstance(answer, Ready) else Ready(answer)


@dataclass
class Operation:
    """An operation that is measured.

    Attributes:
        name: of the operation.
        problem_type: what its providers take.
        make: builds a problem from a case, a number of input sets and a device.
        providers: by name, in table order.
    """

    name: str
    problem_type: type
    make: Callable[[Any, int, torch.device], Problem]
    providers: dict[str, Provider] = field(default_factory=dict)

    def provider(
        self, name: str, *, label: str, baseline: bool = False, exempt: str = ""
    ) -> Callable[[Build], Build]:
        """Register the decorated function as a provider."""

        def register(build: Build) -> Build:
            self.add(Provider(name, label, build, baseline, exempt))
            return build

        return register

    def add(self, provider: Provider) -> None:
        """Register a provider.

        Raises:
            ValueError: the name is taken, or there is a baseline already.
        """
        if provider.name in self.providers:
            raise ValueError(f"{self.name} has a provider {provider.name!r} already; rename yours")
        if provider.baseline and any(p.baseline for p in self.providers.values()):
            raise ValueError(f"{self.name} has a baseline already")
        self.providers[provider.name] = provider

    def problem(self, case: Case, sets: int, device: torch.device) -> Problem:
        """The inputs of a case."""
        return self.make(case, sets, device)


class Gate:
    """Truth and tolerance of one problem, computed once for all its providers."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        # The last set: a provider that keeps answering for the first one is wrong, too.
        self._index = problem.sets - 1
        self._truth = problem.truth(self._index)
        self._own = problem.own(self._index)

    def check(self, ready: Ready) -> None:
        """Run once and compare.

        Raises:
            AssertionError: the result is wrong; the message says which expert's rows and how far.
            Exception: whatever the provider raises.
        """
        self._poison()
        output = ready.run(self._index)
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        if not isinstance(outputs, Sequence) or len(outputs) != len(self._truth):
            expected = " and ".join(self._problem.outputs)
            raise AssertionError(f"returned {type(output).__name__}; expected tensors: {expected}")
        for name, actual, truth, own in zip(
            self._problem.outputs, outputs, self._truth, self._own, strict=True
        ):
            actual = ready.in_row_order(actual)
            if actual.shape != truth.shape:
                raise AssertionError(
                    f"{name} has shape {tuple(actual.shape)}; expected {tuple(truth.shape)}"
                )
            step = max(_GATE_ELEMENTS // max(len(truth), 1), 1)
            for parts in zip(
                *(t.flatten(1).split(step, dim=1) for t in (actual, truth, own)), strict=True
            ):
                assert_close(name, parts[0], parts[1], self._problem.plan, parts[2])

    def _poison(self) -> None:
        """Leave NaN in the memory that the provider's outputs will probably get.

        The allocator would otherwise hand it the previous provider's right answer, and rows it
        forgets to write would look right.
        """
        held = [torch.full_like(own, float("nan")) for own in self._own]
        del held


def verdict(gate: Gate | None, provider: Provider, problem: Problem) -> Ready | str:
    """The provider ready to be timed, or in one line why it fails the gate.

    Raises:
        Unavailable: it cannot run here.
    """
    try:
        ready = provider.prepare(problem)
        if provider.exempt or gate is None:
            ready.run(0)
        else:
            gate.check(ready)
    except Unavailable:
        raise
    except AssertionError as error:
        return "wrong: " + (str(error).splitlines() or ["an assertion failed"])[0]
    except Exception as error:  # one broken provider must not take the others' times away
        return f"raised {first_line(error)}"
    exempt = f"not gated: {provider.exempt}" if provider.exempt else ""
    note = "; ".join(part for part in (exempt, ready.note) if part)
    return replace(ready, note=note)


def load_provider(
    spec: str, operations: Sequence[Operation], default: str
) -> tuple[Operation, Provider]:
    """The provider that `path/to/file.py:function` names, and the operation it belongs to.

    The function takes the problem and returns what is timed: a callable that takes the index of
    an input set and returns the output (or a `Ready`). For example, in mine.py::

        import torch
        from mot_bench.linear import LinearProblem

        def addressed(problem: LinearProblem):
            rows = [problem.plan.rows_of(e).long() for e in range(problem.plan.num_experts)]

            def run(i):
                y = problem.x[i].new_empty(problem.case.routing.rows, problem.case.layer.n)
                for e, own in enumerate(rows):
                    y[own] = problem.x[i][own] @ problem.weight[i][e].T
                return y

            return run

    is measured by `mot-bench kernels --shape 3584,3584 --provider mine.py:addressed`. The
    annotation of its argument says the operation; without one it is `default`. It is
    gated like every other provider; where it cannot run it raises `mot_bench.registry.Unavailable`.

    Raises:
        ValueError: there is no such file or function, or the annotation is none of the problems.
    """
    path_text, separator, name = spec.rpartition(":")
    path = Path(path_text)
    if not separator or not name.isidentifier():
        raise ValueError("expected FILE.py:FUNCTION")
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"there is no Python file {path}")
    function = getattr(_load(path), name, None)
    if not callable(function):
        raise ValueError(f"{path} defines no function {name}")
    try:
        hints = [kind for key, kind in typing.get_type_hints(function).items() if key != "return"]
    except NameError as error:
        raise ValueError(f"{path}: an annotation of {name} is not defined ({error})") from error
    for operation in operations:
        if operation.problem_type in hints or (not hints and operation.name == default):
            return operation, Provider(name, (function.__doc__ or name).splitlines()[0], function)
    types = ", ".join(operation.problem_type.__name__ for operation in operations)
    raise ValueError(f"{name} must take one of {types}, not {hints[0]}")


def _load(path: Path) -> Any:
    name = f"mot_bench_provider_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {first_line(error)}") from error
    return module
