"""Activations in 8 bits: `quantize_rows`, and the operations that round their results.

Kernels and PyTorch must agree in every bit, so there are no tolerances here. What the numbers are
worth in a product is tested in test_linear_formats.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    QuantizedRows,
    RoutePlan,
    WeightScales,
    mot_linear,
    mot_rms_norm,
    quantize_rows,
    quantize_weight,
    reference_formats,
)
from mot_kernels.testing import ROUTES

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

rounding_formats = pytest.mark.parametrize("format", [Fp8W8A8(), Int8W8A8()], ids=str)
scalings = pytest.mark.parametrize("static", [False, True], ids=["per_token", "static"])

# NumPy, as the interpreter, warns of inf / inf.
interprets_infinities = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def assert_same_bits(actual: QuantizedRows, wanted: QuantizedRows) -> None:
    assert actual.dtype is wanted.dtype and actual.data.dtype is wanted.data.dtype
    assert torch.equal(actual.scales.cpu(), wanted.scales.cpu())
    ours, theirs = (rows.data.view(torch.uint8).cpu() for rows in (actual, wanted))
    different = ours != theirs
    assert not different.any(), (
        f"{int(different.sum())} of {ours.numel()} elements, first at "
        f"{different.nonzero()[0].tolist()}: {ours[different][0]}, not {theirs[different][0]}"
    )


def on_cpu(
    x: torch.Tensor,
    format: Format,
    plan: RoutePlan | None = None,
    activation_scale: torch.Tensor | None = None,
) -> QuantizedRows:
    """The twin, where nothing is fused or approximated."""
    return reference_formats.quantize_rows(
        x.cpu(),
        format,
        None if plan is None else plan.to("cpu"),
        activation_scale=None if activation_scale is None else activation_scale.cpu(),
    )


# --- quantize_rows


@rounding_formats
def test_quantize_rows_per_token(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = (torch.randn(20, 96) * torch.logspace(-2, 2, 20)[:, None]).to(device, dtype)
    x[4] = 0.0
    rows = quantize_rows(x, format)
    assert rows.scales.shape == (20,) and rows.dtype is dtype
    wide, scales = x.double(), rows.scales.double()[:, None]
    largest = 448 if isinstance(format, Fp8W8A8) else 127
    wanted = (x.float().abs().amax(1).cpu() / largest).to(device)
    wanted[4] = rows.scales[4]
    assert torch.equal(rows.scales, wanted) and rows.scales[4] > 0
    step = scales / 2
    if isinstance(format, Fp8W8A8):
        step = torch.maximum(wide.abs() * 2**-4, scales * 2**-10)
    error = (rows.data.double() * scales - wide).abs()
    # The quotient, up to 448 steps, is rounded to fp32 first.
    assert (error <= step * (1 + 2**-14)).all()
    assert (rows.data[4].float() == 0).all()


@interprets_infinities
@rounding_formats
@scalings
def test_quantize_rows_wide(
    format: Format, static: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows that are read in pieces; the largest element may be in any, NaN too."""
    torch.manual_seed(0)
    x = torch.randn(4, 9001, device=device).to(dtype)
    for row, place in enumerate((0, 4096, 9000)):
        x[row, place] = -50.0
    plan = RoutePlan.from_labels(torch.tensor([1, 0, 0, 1], device=device), 2)
    scale = torch.tensor([0.1, 0.2], device=device) if static else None
    assert_same_bits(
        quantize_rows(x, format, plan, activation_scale=scale), on_cpu(x, format, plan, scale)
    )
    x[2, 5000] = float("nan")
    if not static:
        assert quantize_rows(x, format).scales.isnan().tolist() == [False, False, True, False]


@rounding_formats
def test_quantize_rows_static_saturates(format: Format, device: torch.device) -> None:
    x = torch.tensor([[1.0, -0.25, 1e6, -1e6], [3.0, 0.0, 2.0, -2.0]], device=device)
    rows = quantize_rows(x, format, activation_scale=torch.tensor([0.25], device=device))
    largest = 448.0 if isinstance(format, Fp8W8A8) else 127.0
    assert rows.scales.tolist() == [0.25, 0.25]
    assert rows.data.float().tolist() == [[4.0, -1.0, largest, -largest], [12.0, 0.0, 8.0, -8.0]]
    plan = RoutePlan.from_labels(torch.tensor([1, 0], device=device), 2)
    each = quantize_rows(x, format, plan, activation_scale=torch.tensor([0.5, 0.25], device=device))
    assert each.scales.tolist() == [0.25, 0.5]
    assert each.data[1].float().tolist() == [6.0, 0.0, 4.0, -4.0]


def test_int8_rounds_half_to_even(device: torch.device) -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], device=device)
    rows = quantize_rows(x, Int8W8A8(), activation_scale=torch.tensor([1.0], device=device))
    assert rows.data.tolist() == [[0, 2, 2, 0, -2, 126]]


@interprets_infinities
@rounding_formats
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_quantize_rows_keeps_what_is_not_finite(
    format: Format, bad: float, device: torch.device
) -> None:
    x = torch.ones(2, 8, device=device)
    x[0, 3] = bad
    rows = quantize_rows(x, format)
    assert not rows.scales[0].isfinite() and rows.scales[1].isfinite()
    assert (rows.float()[1] == 1).all()


@interprets_infinities
def test_quantize_rows_fp8_rounds_every_number(device: torch.device) -> None:
    """All of float16: normal and subnormal e4m3 numbers, ties, saturation, infinities, NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x.view(64, 1024).to(device)
    scale = torch.ones(1, device=device)
    rows = quantize_rows(x, Fp8W8A8(), activation_scale=scale)
    wanted = on_cpu(x, Fp8W8A8(), None, scale)
    nan = wanted.data.float().isnan()
    assert torch.equal(rows.data.cpu().float().isnan(), nan)
    ours, theirs = (r.data.cpu().view(torch.uint8)[~nan] for r in (rows, wanted))
    assert torch.equal(ours, theirs)


def test_quantize_rows_k_stride_past_int32(device: torch.device) -> None:
    """The last k is past 2^31 elements. Of the 4 GB that are asked for, few pages are touched."""
    torch.manual_seed(0)
    k, stride = 8192 + 64, 2**31 // 8192
    x = torch.randn(3, k, device=device).half()
    far = torch.empty(k * stride, dtype=torch.float16, device=device)
    apart = far.as_strided(x.shape, (1, stride)).copy_(x)
    assert_same_bits(quantize_rows(apart, Int8W8A8()), quantize_rows(x, Int8W8A8()))


@rounding_formats
@scalings
@pytest.mark.parametrize("k", [0, 1, 17, 300])
def test_quantize_rows_bits(
    format: Format, static: bool, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Numbers of any size, strided rows, three experts."""
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    plan = route.plan(device)
    x = torch.randn(2 * route.num_rows, 2 * k) * torch.logspace(-6, 3, 2 * k)
    x = x.to(device, dtype)[::2, ::2]
    x[4] = 0.0
    scale = torch.tensor([0.5, 9.0, 0.5, 7.0, 0.25], device=device)[::2] if static else None
    rows = quantize_rows(x, format, plan, activation_scale=scale)
    assert_same_bits(rows, on_cpu(x, format, plan, scale))


@rounding_formats
def test_quantize_rows_no_rows(format: Format, device: torch.device) -> None:
    rows = quantize_rows(torch.randn(0, 8, device=device), format)
    assert rows.shape == (0, 8) and rows.scales.shape == (0,)


# --- fused into the norm


@rounding_formats
@scalings
@pytest.mark.parametrize("residual", [False, True], ids=["x", "residual"])
@pytest.mark.parametrize("planned", [False, True], ids=["no_plan", "plan"])
def test_mot_rms_norm_quantize(
    format: Format,
    static: bool,
    residual: bool,
    planned: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """The bits of two passes."""
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    plan = route.plan(device) if planned else None
    x, added = torch.randn(2, route.num_rows, 72, device=device).to(dtype)
    weight = torch.randn(3, 72, device=device).to(dtype)
    scale = torch.tensor([0.004, 0.02, 0.01], device=device) if static else None
    arguments = {"plan": plan, "residual": added if residual else None}
    apart = mot_rms_norm(x, weight, **arguments)
    fused = mot_rms_norm(x, weight, **arguments, quantize=format, activation_scale=scale)
    if residual:
        (y, summed), (rows, fused_sum) = apart, fused
        assert torch.equal(fused_sum, summed)
    else:
        y, rows = apart, fused
    assert isinstance(rows, QuantizedRows)
    assert_same_bits(rows, on_cpu(y, format, plan, scale))


# --- fused into the linear


def make_linear(
    format: Format | None, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | ExpertWeight, RoutePlan]:
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    x = torch.randn(route.num_rows, 64, device=device).to(dtype)
    w = torch.randn(3, 40, 64, device=device)
    weight = w.to(dtype) if format is None else quantize_weight(w, format)
    return x, weight, route.plan(device)


@rounding_formats
@scalings
@pytest.mark.parametrize(
    "weight_format", [None, Fp8W8A8(WeightScales.BLOCK), Int8W8A8(), Int4W4A16(32)], ids=str
)
def test_mot_linear_quantize(
    format: Format, static: bool, weight_format: Format | None, device: torch.device
) -> None:
    """The bits of two passes, also where the weight's format is another, or none."""
    x, weight, plan = make_linear(weight_format, torch.float16, device)
    scale = torch.tensor([0.05, 0.2, 0.1], device=device) if static else None
    y = mot_linear(x, weight, plan, epilogue=SILU_MUL)
    rows = mot_linear(x, weight, plan, epilogue=SILU_MUL, quantize=format, activation_scale=scale)
    assert_same_bits(rows, on_cpu(y, format, plan, scale))


@rounding_formats
def test_mot_linear_quantize_without_plan(
    format: Format, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, _ = make_linear(format, dtype, device)
    residual = torch.randn(x.shape[0], 40, device=device).to(dtype)
    scale = torch.tensor([0.05, 0.2, 0.1], device=device)
    step = AddResidual(residual)
    y = mot_linear(x, weight, epilogue=step)
    rows = mot_linear(x, weight, epilogue=step, quantize=format, activation_scale=scale)
    assert_same_bits(rows, on_cpu(y, format, None, scale))


@rounding_formats
@scalings
@pytest.mark.parametrize("planned", [False, True], ids=["no_plan", "plan"])
def test_mot_linear_of_quantized_rows(
    format: Format, static: bool, planned: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows rounded beforehand give the bits of rows rounded on the way."""
    x, weight, plan = make_linear(format, dtype, device)
    assert isinstance(weight, ExpertWeight)
    scale = torch.tensor([0.02, 0.04, 0.03], device=device) if static else None
    weight = ExpertWeight(weight.data, weight.scales, format, None, scale)
    routing = plan if planned else None
    rows = quantize_rows(x, format, routing, activation_scale=scale)
    y = mot_linear(rows, weight, routing)
    assert y.dtype is dtype and torch.equal(y, mot_linear(x, weight, routing))


def test_mot_linear_reads_every_e4m3_number(device: torch.device) -> None:
    """Times 1: all 256 codes come out as PyTorch reads them."""
    codes = torch.zeros(256, 32, dtype=torch.uint8, device=device)
    codes[:, 5] = torch.arange(256)
    rows = QuantizedRows(
        codes.view(torch.float8_e4m3fn), torch.ones(256, device=device), torch.float32
    )
    ones = torch.ones(1, 3, 32, device=device).to(torch.float8_e4m3fn)
    weight = ExpertWeight(ones, torch.ones(1, 3, device=device), Fp8W8A8())
    y = mot_linear(rows, weight)
    wanted = rows.data[:, 5].float()
    torch.testing.assert_close(y[:, 1], wanted, rtol=0, atol=0, equal_nan=True)


# --- errors


def rows_of(dtype: torch.dtype, m: int = 4, k: int = 32) -> QuantizedRows:
    return QuantizedRows(torch.zeros(m, k).to(dtype), torch.ones(m), torch.float32)


def test_quantized_rows_errors() -> None:
    data, scales = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    cases: list[tuple[type[Exception], tuple[object, ...], str]] = [
        (TypeError, (data.float(), scales, torch.float32), "data has dtype torch.float32"),
        (TypeError, (data, scales.half(), torch.float32), "scales has dtype torch.float16"),
        (TypeError, (data, scales, torch.float64), "dtype is torch.float64; rows were"),
        (ValueError, (data, scales[:3], torch.float32), r"\(4, 8\) and scales \(3,\); expected"),
        (ValueError, (data.T, torch.ones(8), torch.float32), r"data has strides \(1, 8\)"),
        (ValueError, (data, scales.to("meta"), torch.float32), "scales are on meta, data on cpu"),
    ]
    for error, arguments, message in cases:
        with pytest.raises(error, match=message):
            QuantizedRows(*arguments)  # type: ignore[arg-type]


def errors() -> list[tuple[type[Exception], Callable[[], object], str]]:
    x = torch.randn(4, 32)
    int8, int4 = (quantize_weight(torch.randn(2, 8, 32), f) for f in (Int8W8A8(), Int4W4A16(32)))
    fp8, gamma = Fp8W8A8(), torch.ones(2, 32)
    two = torch.ones(2)
    return [
        (TypeError, lambda: quantize_rows(x, Int8W8A16()), "keeps activations as they are"),
        (TypeError, lambda: quantize_rows(x, "fp8"), "format is 'fp8'; expected"),  # type: ignore[arg-type]
        (TypeError, lambda: quantize_rows(x.double(), fp8), "x has dtype torch.float64"),
        (ValueError, lambda: quantize_rows(x[0], fp8), r"x has shape \(32,\); expected \(M, K\)"),
        (
            ValueError,
            lambda: quantize_rows(x.requires_grad_(), fp8),
            "requires grad, but rounding has no backward",
        ),
        *(
            (
                ValueError,
                partial(quantize_rows, x, fp8, activation_scale=scale),
                rf"activation_scale has shape {shape}; expected \({max(scale.numel(), 1)},\)",
            )
            for scale, shape in ((torch.tensor(0.1), r"\(\)"), (torch.empty(0), r"\(0,\)"))
        ),
        (
            ValueError,
            lambda: mot_linear(x, torch.ones(2, 8, 32, requires_grad=True), quantize=fp8),
            "an input requires grad, but quantize rounds the result",
        ),
        (
            ValueError,
            lambda: quantize_rows(x, fp8, RoutePlan.from_runs([(0, 3)], num_experts=2)),
            "plan routes 3 rows but x has 4",
        ),
        (TypeError, lambda: quantize_rows(x, fp8, torch.zeros(4)), "plan is a Tensor"),  # type: ignore[arg-type]
        (
            ValueError,
            lambda: mot_linear(x, int8, activation_scale=two),
            "activation_scale is given, but quantize is not",
        ),
        (
            ValueError,
            lambda: mot_linear(x, int8, quantize=fp8, activation_scale=torch.ones(3)),
            r"activation_scale has shape \(3,\); expected \(2,\)",
        ),
        (
            ValueError,
            lambda: mot_linear(x, int8, out=torch.empty(4, 8), quantize=fp8),  # type: ignore[call-overload]
            "out is given along with quantize",
        ),
        (TypeError, lambda: mot_linear(x, int8, quantize=Int8W8A16()), "keeps activations"),
        (
            TypeError,
            lambda: mot_linear(rows_of(torch.int8), int4),
            "x is QuantizedRows of torch.int8, but weight has format int4_w4a16_group32",
        ),
        (
            TypeError,
            lambda: mot_linear(rows_of(torch.float8_e4m3fn), int8),
            "x is QuantizedRows of torch.float8_e4m3fn, but weight has format int8_w8a8",
        ),
        (
            TypeError,
            lambda: mot_linear(rows_of(torch.int8), torch.randn(2, 8, 32)),
            "x is QuantizedRows of torch.int8, but weight has format torch.float32",
        ),
        (
            ValueError,
            lambda: mot_rms_norm(x, gamma, activation_scale=two),
            "activation_scale is given, but quantize is not",
        ),
        (
            TypeError,
            lambda: mot_rms_norm(x, gamma, quantize=fp8, activation_scale=two.half()),
            "activation_scale has dtype torch.float16; expected torch.float32",
        ),
        (
            ValueError,
            lambda: mot_rms_norm(x, gamma.requires_grad_(), quantize=fp8),
            "quantize has no backward",
        ),
    ]


@pytest.mark.parametrize("which", range(len(errors())))
def test_errors(which: int) -> None:
    error, call, message = errors()[which]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("format", [Int8W8A8(), Fp8W8A8()], ids=str)
def test_static_scales_of_no_columns(format: Format, device: torch.device) -> None:
    """A product without columns has the scales that rounding it by itself would give."""
    weight = quantize_weight(torch.randn(2, 0, 64, device=device), format)
    plan = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2, device=device)
    static = torch.tensor([0.5, 0.25], device=device)
    x = torch.randn(3, 64, device=device, dtype=torch.float16)
    rows = mot_linear(x, weight, plan, quantize=format, activation_scale=static)
    assert rows.data.shape == (3, 0)
    assert rows.scales.flatten().tolist() == [0.5, 0.25, 0.25]


def test_forward_mode_is_named() -> None:
    weight = quantize_weight(torch.randn(1, 4, 32), Int8W8A16())
    with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode AD is on here"):
        mot_linear(torch.randn(2, 32), weight)
