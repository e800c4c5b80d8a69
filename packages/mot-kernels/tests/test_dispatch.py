"""Which path runs, and why: `choose_path`, `use_path`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from mot_kernels import (
    Choice,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    Path,
    RoutePlan,
    choose_path,
    dispatch,
    mot_linear,
    mot_qk_norm_rope,
    mot_rms_norm,
    reference,
    use_path,
)
from mot_kernels.dispatch import choose_format_path
from mot_kernels.testing import ROUTES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)


def test_interpreting_follows_the_environment() -> None:
    wanted = dispatch.has_triton() and os.environ.get("TRITON_INTERPRET") == "1"
    assert dispatch.interpreting() == wanted


def test_choose_path_here(dtype: torch.dtype, device: torch.device) -> None:
    """The whole suite relies on this: Triton wherever it can run."""
    kernels = dispatch.has_triton() and (device.type == "cuda" or dispatch.interpreting())
    choice = choose_path(device, dtype)
    assert choice.path is (Path.TRITON if kernels else Path.REFERENCE), choice.why


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_choose_path_gpu(half: torch.dtype) -> None:
    pytest.importorskip("triton")
    assert choose_path(CUDA, half) == Choice(Path.TRITON, "the tensors are on a GPU")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("device_type", ["cpu", "meta"])
def test_choose_path_no_gpu(device_type: str) -> None:
    pytest.importorskip("triton")
    choice = choose_path(torch.device(device_type), torch.float32)
    assert choice.path is Path.REFERENCE
    assert choice.why == f"Triton kernels do not run on device type '{device_type}'"


@pytest.mark.usefixtures("interpreted")
def test_choose_path_interpreter() -> None:
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.float16):
        choice = choose_path(CPU, dtype)
        assert choice == Choice(Path.TRITON, "TRITON_INTERPRET=1 runs the kernels on the CPU")
    choice = choose_path(CPU, torch.bfloat16)
    assert choice == Choice(Path.REFERENCE, "Triton's interpreter multiplies bfloat16 wrongly")
    assert choose_path(CUDA, torch.bfloat16).path is Path.TRITON
    assert choose_path(torch.device("meta"), torch.float32).path is Path.REFERENCE


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_choose_path_float64(device: torch.device) -> None:
    pytest.importorskip("triton")
    assert choose_path(device, torch.float64) == Choice(
        Path.REFERENCE, "no kernel computes float64"
    )


@pytest.mark.usefixtures("no_triton")
def test_choose_path_without_triton() -> None:
    choice = choose_path(CUDA, torch.float16)
    assert choice == Choice(Path.REFERENCE, "the package triton is not installed")


def test_choose_path_gradients() -> None:
    choice = choose_path(CUDA, torch.float16, needs_grad=True)
    assert choice.path is Path.REFERENCE
    assert choice.why == "an input requires grad and the kernels have no backward"


@pytest.fixture(params=[(8, 0), (8, 9), (9, 0), (12, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """An NVIDIA GPU to ask about."""
    monkeypatch.setattr(dispatch, "_capability", lambda device: request.param)
    monkeypatch.setattr(torch.version, "hip", None)
    return request.param


@pytest.mark.usefixtures("compiled")
def test_choose_format_path_gpu(capability: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    for format in (Int8W8A8(), Int8W8A16(), Int4W4A16()):
        choice = choose_format_path(format, CUDA, torch.bfloat16)
        assert choice == Choice(Path.TRITON, "the tensors are on a GPU")
    choice = choose_format_path(Fp8W8A8(), CUDA, torch.bfloat16)
    assert choice.path is Path.TRITON
    assert ("multiplies in float16" in choice.why) == (capability < (8, 9))


@pytest.mark.usefixtures("compiled", "capability")
def test_choose_format_path_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """gfx942 has another e4m3."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "in float16" in choose_format_path(Fp8W8A8(), CUDA, torch.bfloat16).why


@pytest.mark.usefixtures("compiled")
def test_choose_format_path_cpu() -> None:
    pytest.importorskip("triton")
    choice = choose_format_path(Int8W8A8(), CPU, torch.bfloat16)
    assert choice.path is Path.REFERENCE
    assert choice.why == (
        "plain PyTorch computes format int8_w8a8, rightly but slowly: Triton kernels do not run "
        "on device type 'cpu'"
    )


def test_use_path_of_a_word() -> None:
    said = r"path is 'reference'; expected Path.TRITON or Path.REFERENCE"
    with pytest.raises(TypeError, match=said), use_path("reference"):
        pytest.fail("a block that would run on any path")


def test_use_path_reference() -> None:
    with use_path(Path.REFERENCE):
        choice = choose_path(CUDA, torch.float16)
    assert choice == Choice(Path.REFERENCE, "use_path(Path.REFERENCE) is in force")


@pytest.mark.usefixtures("interpreted")
def test_use_path_triton() -> None:
    pytest.importorskip("triton")
    with use_path(Path.TRITON):
        assert choose_path(CPU, torch.float32).path is Path.TRITON


@pytest.mark.usefixtures("compiled")
def test_use_path_triton_where_it_cannot_run() -> None:
    pytest.importorskip("triton")
    with use_path(Path.TRITON):
        with pytest.raises(ValueError, match=r"^use_path\(Path\.TRITON\) is in force, but Triton "):
            choose_path(CPU, torch.float32)
        with pytest.raises(ValueError, match="is in force, but an input requires grad"):
            choose_path(CUDA, torch.float32, needs_grad=True)


@pytest.mark.usefixtures("no_triton")
def test_use_path_triton_without_triton() -> None:
    message = "is in force, but the package triton is not installed"
    with use_path(Path.TRITON), pytest.raises(ValueError, match=message):
        choose_path(CUDA, torch.float32)


@pytest.mark.usefixtures("interpreted")
def test_use_path_nests_and_ends() -> None:
    pytest.importorskip("triton")
    free = choose_path(CPU, torch.float32)
    with use_path(Path.TRITON):
        with use_path(Path.REFERENCE):
            assert choose_path(CPU, torch.float32).path is Path.REFERENCE
        assert choose_path(CPU, torch.float32).path is Path.TRITON
    with pytest.raises(KeyError), use_path(Path.REFERENCE):
        raise KeyError
    assert choose_path(CPU, torch.float32) == free


def test_use_path_reaches_the_operations(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    route = ROUTES["scattered"]
    x = torch.randn(route.num_rows, 72).to(device, dtype)
    weight = torch.randn(2, 144, 72).to(device, dtype)
    plan = route.plan(device)
    with use_path(Path.REFERENCE):
        y = mot_linear(x, weight, plan)
    assert torch.equal(y, reference.mot_linear(x, weight, plan))


PLAN = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2)
DIFFERENTIABLE: dict[str, Callable[[torch.Tensor], object]] = {
    "linear": lambda x: mot_linear(x, torch.ones(2, 8, 32), PLAN),
    "linear-without_plan": lambda x: mot_linear(x, torch.ones(2, 8, 32)),
    "rms_norm": lambda x: mot_rms_norm(x, torch.ones(2, 32), PLAN),
    "qk_norm_rope": lambda x: mot_qk_norm_rope(
        x,
        *torch.ones(2, 2, 4),
        torch.ones(9, 4),
        torch.arange(3),
        PLAN,
        num_heads=4,
        num_kv_heads=2,
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_use_path_triton_refuses_gradients(name: str) -> None:
    """Kernels have no backward: never the reference in their place, where they are forced."""
    call, x = DIFFERENTIABLE[name], torch.ones(3, 32, requires_grad=True)
    message = r"use_path\(Path\.TRITON\) is in force, but an input requires grad"
    with use_path(Path.TRITON), pytest.raises(ValueError, match=message):
        call(x)
    call(x)
    with use_path(Path.REFERENCE):
        call(x)


def test_gradients_in_a_compiled_graph() -> None:
    """Asking for the path breaks no graph."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return mot_linear(mot_rms_norm(x, torch.ones(2, 32), PLAN), torch.ones(2, 8, 32))

    x = torch.ones(3, 32, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), loss(x))


def test_bfloat16_under_the_interpreter_takes_the_reference() -> None:
    if not dispatch.interpreting():
        pytest.skip("needs TRITON_INTERPRET=1")
    torch.manual_seed(0)
    route = ROUTES["scattered"]
    x, weight = torch.randn(route.num_rows, 72).bfloat16(), torch.randn(2, 144, 72).bfloat16()
    plan = route.plan()
    assert torch.equal(mot_linear(x, weight, plan), reference.mot_linear(x, weight, plan))


@pytest.fixture
def fresh_warnings() -> Iterator[None]:
    dispatch.warn_once.cache_clear()
    yield
    dispatch.warn_once.cache_clear()


@pytest.mark.usefixtures("fresh_warnings")
def test_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    for message in ("first", "first", "second", "first"):
        dispatch.warn_once(message)
    expected = [("mot_kernels", logging.WARNING, m) for m in ("first", "second")]
    assert caplog.record_tuples == expected


@pytest.mark.parametrize(
    ("rows", "precision", "capability", "says"),
    [
        (256, torch.bfloat16, (9, 0), True),
        (255, torch.bfloat16, (9, 0), False),
        (256, torch.float32, (9, 0), False),  # that schedule is for 16 bits
        (256, torch.bfloat16, (8, 0), False),
    ],
)
def test_what_misses_the_hopper_kernel_is_told_once(
    rows: int,
    precision: torch.dtype,
    capability: tuple[int, int],
    says: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "is_nvidia", lambda device: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_hopper_error", lambda: None)
    dispatch.warn_once.cache_clear()
    for _ in range(2):
        dispatch.warn_portable("fp8", torch.empty(1, 64, dtype=precision), (0, rows), "K is odd")
    assert [record.getMessage() for record in caplog.records] == [
        "mot_linear, weights in fp8: the portable kernel runs, which is slower on this GPU than "
        "schedule 'hopper', because K is odd"
    ] * says
