"""Who observes operators gets to see them; only where nobody does is the dispatcher left out."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mot_kernels import RoutePlan, dispatch, mot_linear, mot_rms_norm, ops, quantize_rows
from mot_kernels.formats import Int8W8A8
from mot_kernels.replay import Replays, is_unobserved, metadata

PLAN = RoutePlan.from_runs([(0, 2), (1, 3)], num_experts=2)
X, WEIGHT, GAMMA = torch.ones(5, 8), torch.ones(2, 4, 8), torch.ones(2, 8)

OPERATIONS: dict[str, Callable[[torch.Tensor], object]] = {
    "linear_": lambda x: mot_linear(x, WEIGHT, PLAN),
    "rms_norm_": lambda x: mot_rms_norm(x, GAMMA, PLAN),
    "quantize_rows_": lambda x: quantize_rows(x, Int8W8A8(), PLAN),
}


class Operators(TorchDispatchMode):
    """Writes down the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Does nothing of its own; but it could."""


@contextmanager
def profiled() -> Iterator[None]:
    with torch.autograd.profiler.profile(use_kineto=False):
        yield


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, torch.nn.Buffer])
def test_is_unobserved(kind: Any) -> None:
    t = X if kind is torch.Tensor else kind(X)
    assert is_unobserved(t, None)


@pytest.mark.parametrize(
    "observer",
    [Operators, BaseTorchFunctionMode, FakeTensorMode, profiled],
    ids=["dispatch_mode", "function_mode", "fake_mode", "profiler"],
)
def test_is_observed_inside(observer: Callable[[], Any]) -> None:
    with observer():
        assert not is_unobserved(X)
    assert is_unobserved(X)


def test_is_observed_by_transforms_tracers_and_tensors() -> None:
    answers: list[bool] = []

    def asked(x: torch.Tensor) -> torch.Tensor:
        answers.append(is_unobserved(x))
        return x.sum()

    torch.func.grad(asked)(X)
    torch.func.vmap(asked)(X)
    torch.jit.trace(asked, X, check_trace=False)
    asked(X.as_subclass(Subclass))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    asked(fake)
    assert answers == [False] * 5


def test_is_observed_by_the_compiler() -> None:
    def asked(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if is_unobserved(x) else x

    compiled = torch.compile(asked, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), X)


@pytest.mark.parametrize("name", OPERATIONS)
def test_modes_see_the_operator(name: str) -> None:
    OPERATIONS[name](X)  # so that there might be something to do again
    with Operators() as mode:
        OPERATIONS[name](X)
    assert f"mot.{name}.default" in mode.seen


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_profiler_sees_the_operator(name: str) -> None:
    OPERATIONS[name](X)
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        OPERATIONS[name](X)
    assert f"mot::{name}" in {event.name for event in profile.function_events}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nobody_costs_no_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, name, None)
    OPERATIONS[name](X)
    with pytest.raises(TypeError, match="not callable"), BaseTorchFunctionMode():
        OPERATIONS[name](X)


def test_replays_run() -> None:
    """What was kept is done, unless it says that it cannot."""
    replays, done, answers = Replays(), [], [True, False]

    def again(*tensors: torch.Tensor | None) -> bool:
        done.append("asked")
        return answers.pop(0)

    def implementation(*arguments: object) -> Callable[[], Callable[..., bool]]:
        done.append(arguments)
        return lambda: again

    for _ in range(3):
        replays.run("key", implementation, (X,), 1)
    assert done == [(X, 1), "asked", "asked", (X, 1)]
    assert replays == {"key": again}


def test_copies_start_without() -> None:
    plan = RoutePlan.from_runs([(0, 2), (1, 3)], num_experts=2)
    plan.replays.keep("key", lambda: lambda: True)
    for copied in (
        copy.deepcopy(plan),
        pickle.loads(pickle.dumps(plan)),
        dataclasses.replace(plan),
    ):
        assert copied.replays == {} and type(copied.replays) is Replays
        assert copied.flat_offsets == plan.flat_offsets
    assert plan.replays


def test_metadata() -> None:
    half = X.half()
    assert metadata(X, None) == metadata(torch.zeros(5, 8), None)
    others = [X[:4], X.T.contiguous().T, half, X.to("meta"), None]
    assert all(metadata(other, None) != metadata(X, None) for other in others)
    assert metadata(None, X) != metadata(X, None)


@pytest.mark.skipif(not dispatch.interpreting(), reason="test_launcher.py runs by itself here")
def test_launcher_without_the_interpreter() -> None:
    """In the interpreter test_launcher.py skips itself: then in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).with_name("test_launcher.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout
