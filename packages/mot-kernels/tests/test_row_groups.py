"""FP8 rows with a scale for each 128 columns: made, multiplied, and made in passing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_rows import assert_same_bits

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    ExpertWeight,
    Fp8W8A8,
    Int8W8A8,
    QuantizedRows,
    RoutePlan,
    WeightScales,
    dequantize,
    mot_linear,
    mot_rms_norm,
    quantize_rows,
    quantize_weight,
    reference_formats,
)
from mot_kernels.formats import spread_scales
from mot_kernels.testing import Route, assert_close, linear_in_order, looped_linear

pytestmark = [
    pytest.mark.usefixtures("poisoned_allocations"),
    # SiLU of large numbers: exp(-gate); NumPy, as the interpreter, warns.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

FP8 = Fp8W8A8()
FEW = Route("few", 2, ((0, 1), (1, 16), (0, 1), (1, 3)))
WEIGHTS = [Fp8W8A8(scales) for scales in WeightScales]


def uneven(rows: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Columns that differ by more than e4m3 can hold beside each other."""
    torch.manual_seed(0)
    x = torch.randn(rows, k, device=device) * torch.logspace(-4, 1, k, device=device)
    return x.to(dtype)


@pytest.mark.parametrize("k", [1, 128, 130, 4096, 4500, 9001])
def test_quantize_rows_in_groups(k: int, dtype: torch.dtype, device: torch.device) -> None:
    x = uneven(5, k, dtype, device)
    x[3] = 0.0
    rows = quantize_rows(x, FP8, group_size=128)
    assert rows.group_size == 128 and rows.scales.shape == (5, -(-k // 128))
    assert_same_bits(rows, reference_formats.quantize_rows(x.cpu(), FP8, group_size=128))
    groups = F.pad(x.float(), (0, -k % 128)).unflatten(1, (-1, 128)).abs().amax(2)
    wanted = groups.cpu() / 448
    wanted[3] = rows.scales[3].cpu()
    assert torch.equal(rows.scales.cpu(), wanted) and (rows.scales > 0).all()
    # Every group as well as a row of its own.
    for start in range(0, k, 128):
        own = quantize_rows(x[:, start : start + 128], FP8)
        assert torch.equal(
            own.data.view(torch.uint8), rows.data[:, start:][:, :128].view(torch.uint8)
        )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad: float, device: torch.device) -> None:
    x = torch.ones(2, 300, device=device)
    x[0, 130] = bad
    rows = quantize_rows(x, FP8, group_size=128)
    assert rows.scales.isfinite().tolist() == [[True, False, True], [True, True, True]]
    assert (rows.float()[0, :128] == 1).all() and (rows.float()[0, 256:] == 1).all()


def test_groups_lose_less(device: torch.device) -> None:
    x = uneven(8, 1024, torch.float32, device)

    def error(rows: QuantizedRows) -> torch.Tensor:
        """Of the smallest columns."""
        return (rows.float() - x)[:, :128].norm() / x[:, :128].norm()

    assert error(quantize_rows(x, FP8, group_size=128)) < 0.03 < error(quantize_rows(x, FP8)) / 2


@pytest.mark.parametrize("format", WEIGHTS, ids=str)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("route", [FEW, None], ids=str)
def test_product(
    route: Route | None,
    epilogue: str,
    format: Fp8W8A8,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    plan = None if route is None else route.plan(device)
    m, k, n = 17 if route is None else route.num_rows, 140, 48
    x = uneven(m, k, dtype, device)
    weight = quantize_weight(torch.randn(2, n, k, device=device), format)
    bias = torch.randn(2, n, device=device).to(dtype)
    residual = torch.randn(m, n, device=device).to(dtype)
    chosen = {"none": None, "silu_mul": SILU_MUL, "add_residual": AddResidual(residual)}[epilogue]
    rows = quantize_rows(x, FP8, group_size=128)
    y = mot_linear(rows, weight, plan, bias=bias, epilogue=chosen)
    assert y.dtype is dtype
    seen = rows.data.double() * spread_scales(rows.scales, k).double()
    wide = dequantize(weight, torch.float64)
    labels = torch.zeros(m, dtype=torch.int64) if plan is None else plan.expert_ids.cpu().long()
    labels = labels.to(device)
    truth = looped_linear(seen, wide, labels, bias=bias.double(), epilogue=chosen)
    baseline = looped_linear(
        seen.to(dtype),
        wide.to(dtype),
        labels,
        bias=bias,
        epilogue=chosen,
        linear=linear_in_order if dtype is torch.float32 else F.linear,
    )
    assert_close("mot_linear of groups", y, truth, plan, baseline)


@pytest.mark.parametrize("epilogue", [None, SILU_MUL], ids=["none", "silu_mul"])
@pytest.mark.parametrize("planned", [False, True], ids=["no_plan", "plan"])
@pytest.mark.parametrize("stored", ["fp8", "int8", "plain"])
def test_results_in_groups(
    stored: str, planned: bool, epilogue: Epilogue | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Whatever the weight is: the bits of two calls; the second time by what the first kept."""
    plan = FEW.plan(device) if planned else None
    x = uneven(FEW.num_rows, 32, dtype, device)
    w = torch.randn(2, 264, 32, device=device)
    weight: ExpertWeight | torch.Tensor = w.to(dtype)
    if stored != "plain":
        weight = quantize_weight(w, FP8 if stored == "fp8" else Int8W8A8())
    y = mot_linear(x, weight, plan, epilogue=epilogue)
    wanted = quantize_rows(y, FP8, group_size=128)
    for _ in range(2):
        rows = mot_linear(
            x,
            weight,
            plan,
            epilogue=epilogue,
            quantize=FP8,
            group_size=128,
        )
        assert rows.dtype is dtype
        assert_same_bits(rows, wanted)


def test_no_rows(device: torch.device) -> None:
    weight = quantize_weight(torch.randn(2, 512, 128, device=device), FP8)
    plan = RoutePlan.from_runs([], num_experts=2, device=device)
    rows = quantize_rows(torch.empty(0, 128, device=device), FP8, group_size=128)
    assert rows.scales.shape == (0, 1)
    out = mot_linear(rows, weight, plan, epilogue=SILU_MUL, quantize=FP8, group_size=128)
    assert out.shape == (0, 256) and out.scales.shape == (0, 2)


def errors() -> list[tuple[type[Exception], Callable[[], object], str]]:
    x = torch.randn(4, 256)
    fp8, int8 = (quantize_weight(torch.randn(2, 8, 256), f) for f in (FP8, Int8W8A8()))
    rows = quantize_rows(x, FP8, group_size=128)
    one = torch.ones(1)
    return [
        (
            ValueError,
            lambda: quantize_rows(x, FP8, group_size=64),
            "group_size is 64; it can be 128",
        ),
        (
            ValueError,
            lambda: quantize_rows(x, Int8W8A8(), group_size=128),
            "the format is int8_w8a8, whose rows have one scale",
        ),
        (
            ValueError,
            lambda: quantize_rows(x, FP8, activation_scale=one, group_size=128),
            "activation_scale is given, too; groups find their own",
        ),
        (
            ValueError,
            lambda: mot_linear(x, fp8, group_size=128),  # type: ignore[call-overload]
            "group_size is given, but quantize is not",
        ),
        (
            ValueError,
            lambda: mot_linear(x, fp8, quantize=Int8W8A8(), group_size=128),
            "the format is int8_w8a8",
        ),
        (TypeError, lambda: mot_linear(rows, int8), "x is QuantizedRows of torch.float8_e4m3fn"),
        (
            TypeError,
            lambda: QuantizedRows(torch.zeros(4, 256, dtype=torch.int8), torch.ones(4, 2), x.dtype),
            "data is torch.int8; only float8_e4m3fn rows have such",
        ),
        (
            ValueError,
            lambda: QuantizedRows(rows.data, torch.ones(4, 3), x.dtype),
            r"scales \(4, 3\); expected \(M, K\) and \(M,\), or \(M, ceil\(K / 128\)\)",
        ),
        (
            TypeError,
            lambda: mot_rms_norm(x, torch.ones(1, 256), quantize=FP8, group_size=128),  # type: ignore[call-overload]
            "group_size",
        ),
    ]


@pytest.mark.parametrize("which", range(len(errors())))
def test_errors(which: int) -> None:
    error, call, message = errors()[which]
    with pytest.raises(error, match=message):
        call()
