"""Shared by all tests: where they run, in which dtypes, and on which path.

Three ways to run the suite: plain (reference path on the CPU), `TRITON_INTERPRET=1` (the kernels
on the CPU), and on a CUDA machine (the kernels, and the tests marked `gpu`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

# The tensors are small: more threads only wait for each other, and for other test workers. NumPy
# (Triton's interpreter) reads this when it is imported; torch is told below.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
import torch

from mot_kernels import Path, dispatch, use_path

HAS_CUDA = torch.cuda.is_available()
HAS_KERNELS = dispatch.has_triton() and (HAS_CUDA or dispatch.interpreting())

# Triton's interpreter cannot multiply bfloat16: there mot_kernels takes the reference.
DTYPES = [torch.float32, torch.float16]
if HAS_CUDA or not HAS_KERNELS:
    DTYPES.append(torch.bfloat16)


torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test with a `dtype` argument runs in all dtypes of this machine."""
    if "dtype" in metafunc.fixturenames:
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        metafunc.parametrize("dtype", DTYPES, ids=names)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device the kernels run on, or else the CPU."""
    return torch.device("cuda", 0) if HAS_CUDA else torch.device("cpu")


@pytest.fixture
def kernels() -> Iterator[None]:
    """Insist on the Triton path, or skip."""
    if not HAS_KERNELS:
        pytest.skip("needs Triton's kernels: set TRITON_INTERPRET=1 or use a CUDA machine")
    with use_path(Path.TRITON):
        yield


@pytest.fixture
def best_path() -> Iterator[None]:
    """Insist on the Triton path where there is one; the reference is tested elsewhere."""
    if HAS_KERNELS:
        with use_path(Path.TRITON):
            yield
    else:
        yield


@pytest.fixture
def free_path(best_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a call chooses, also in a file that insists on `best_path`: gradients need it."""
    monkeypatch.setattr(dispatch, "_forced", None)


@pytest.fixture
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs the operations allocate hold NaN until they are written."""
    # It looks torch's functions up when it is imported: later it would not know torch's own.
    importlib.import_module("torch._dynamo")
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            t = make(*args, **options)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(empty_like))
