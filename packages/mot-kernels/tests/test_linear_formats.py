"""`mot_linear` with an `ExpertWeight`, in each format.

INT8 W8A8 is judged against integers: exact, but for the scales' float32 products and the final
rounding. Every format is judged against float64 arithmetic on the very numbers the format keeps (so
rounding to the format is no error here; `test_formats.py` bounds that), each expert by itself, by
the error that torch's own product of those numbers makes in the output's dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    Path,
    QuantizedRows,
    RoutePlan,
    TileConfig,
    WeightScales,
    dequantize,
    dispatch,
    mot_linear,
    quantize_weight,
    reference_formats,
    stack_bias,
    use_path,
)
from mot_kernels.formats import DATA_DTYPES, quantizes_activations, scales_shape
from mot_kernels.testing import (
    ROUTES,
    Route,
    assert_close,
    linear_in_order,
    looped_linear,
    poisoned,
)
from mot_kernels.tuning.format_tiles import hopper_block_k

pytestmark = [
    pytest.mark.usefixtures("poisoned_allocations"),
    # SiLU*mul of large numbers: exp(-gate), or y in float16; NumPy, as the interpreter, warns.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

FORMATS: list[Format] = [
    *(Fp8W8A8(scales) for scales in WeightScales),
    Int8W8A8(),
    Int8W8A16(),
    Int4W4A16(32),
    Int4W4A16(128, symmetric=False),
]

all_formats = pytest.mark.parametrize("format", FORMATS, ids=str)
rounding_formats = pytest.mark.parametrize("format", [Fp8W8A8(), Int8W8A8()], ids=str)
epilogues = pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])


def make_weight(
    experts: int, n: int, k: int, format: Format, device: torch.device, *, static: bool = False
) -> ExpertWeight:
    """Experts whose weights, and with them scales, are a factor of 8 apart."""
    w = torch.randn(experts, n, k, device=device)
    w *= 8.0 ** torch.arange(experts, device=device)[:, None, None]
    scale = None
    if static:
        scale = 0.02 * 1.5 ** torch.arange(experts, dtype=torch.float32, device=device)
    return quantize_weight(w, format, activation_scale=scale)


def labels_of(route: Route, device: torch.device) -> torch.Tensor:
    return torch.tensor(route.labels, dtype=torch.int64, device=device)


def as_the_format_sees(x: torch.Tensor, weight: ExpertWeight, labels: torch.Tensor) -> torch.Tensor:
    """The activations that are multiplied, (M, K) float64."""
    if not quantizes_activations(weight.format):
        return x.double()
    rows = quantized(x, weight, labels)
    return rows.data.double() * rows.scales.double()[:, None]


def quantized(x: torch.Tensor, weight: ExpertWeight, labels: torch.Tensor) -> QuantizedRows:
    plan = RoutePlan.from_labels(labels, weight.shape[0])
    return reference_formats.quantize_rows(
        x, weight.format, plan, activation_scale=weight.activation_scale
    )


def check(
    x: torch.Tensor,
    weight: ExpertWeight,
    plan: RoutePlan | None,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
    config: TileConfig | None = None,
) -> None:
    y = mot_linear(x, weight, plan, bias=bias, epilogue=epilogue, config=config)
    assert y.dtype is x.dtype
    seen, wide = as_the_format_sees(x, weight, labels), dequantize(weight, torch.float64)
    truth = looped_linear(
        seen, wide, labels, bias=None if bias is None else bias.double(), epilogue=epilogue
    )
    baseline = looped_linear(
        seen.to(x.dtype),
        wide.to(x.dtype),
        labels,
        bias=bias,
        epilogue=epilogue,
        linear=linear_in_order if x.dtype is torch.float32 else F.linear,
    )
    assert_close(f"mot_linear {weight.format}", y, truth, plan, baseline)


def make_epilogue(name: str, residual: torch.Tensor) -> Epilogue | None:
    return {"none": None, "silu_mul": SILU_MUL, "add_residual": AddResidual(residual)}[name]


@all_formats
@pytest.mark.parametrize(
    ("epilogue", "which"),
    [("none", "first_bias"), ("silu_mul", "last_bias"), ("add_residual", "no_bias")],
)
def test_formats(
    format: Format, epilogue: str, which: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    x = torch.randn(route.num_rows, 256, device=device).to(dtype)
    weight = make_weight(3, 144, 256, format, device)
    has = {"no_bias": -1, "first_bias": 0, "last_bias": 2}[which]
    rows = [torch.randn(144, device=device).to(dtype) * 50 if e == has else None for e in range(3)]
    residual = torch.randn(route.num_rows, 144, device=device).to(dtype) * 50
    check(
        x,
        weight,
        route.plan(device),
        labels_of(route, device),
        bias=stack_bias(rows),
        epilogue=make_epilogue(epilogue, residual),
    )


@pytest.mark.parametrize("format", [Fp8W8A8(), Int4W4A16(32)], ids=str)
@pytest.mark.parametrize("route", ROUTES.values(), ids=str)
def test_formats_routes(format: Format, route: Route, device: torch.device) -> None:
    """One format of each kernel, one dtype: the routing is not about them."""
    torch.manual_seed(0)
    x = torch.randn(route.num_rows, 64, device=device).half()
    weight = make_weight(route.num_experts, 48, 64, format, device)
    check(x, weight, route.plan(device), labels_of(route, device), epilogue=SILU_MUL)


@rounding_formats
def test_formats_static_scale(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    """Each expert has its own activation scale, too small for some rows: they saturate."""
    torch.manual_seed(0)
    route = ROUTES["scattered"]
    x = torch.randn(route.num_rows, 64, device=device).to(dtype)
    x[::7] *= 10
    weight = make_weight(2, 48, 64, format, device, static=True)
    labels = labels_of(route, device)
    check(x, weight, route.plan(device), labels)
    data = quantized(x, weight, labels).data
    assert (data.float().abs() == (448 if isinstance(format, Fp8W8A8) else 127)).any()


@all_formats
@epilogues
def test_formats_without_plan(
    format: Format, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 128, device=device).to(dtype)
    weight = make_weight(2, 40, 128, format, device, static=quantizes_activations(format))
    bias = torch.randn(2, 40, device=device).to(dtype)
    residual = torch.randn(5, 40, device=device).to(dtype)
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    check(x, weight, None, labels, bias=bias, epilogue=make_epilogue(epilogue, residual))


@pytest.mark.parametrize("format", [f for f in FORMATS if not isinstance(f, Int4W4A16)], ids=str)
@pytest.mark.parametrize(("k", "n"), [(17, 2), (33, 50), (130, 258)], ids=str)
def test_formats_sizes(
    format: Format, k: int, n: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES["gen17"]
    x = torch.randn(route.num_rows, k, device=device).to(dtype)
    weight = make_weight(2, n, k, format, device)
    check(x, weight, route.plan(device), labels_of(route, device))


@pytest.mark.parametrize("format", [f for f in FORMATS if not isinstance(f, Int4W4A16)], ids=str)
def test_formats_one_column(format: Format, device: torch.device) -> None:
    """K = 1: no sum, only the two scales, and each of their float32 products rounds once."""
    torch.manual_seed(0)
    route = ROUTES["gen17"]
    x = torch.randn(route.num_rows, 1, device=device)
    weight = make_weight(2, 2, 1, format, device)
    labels = labels_of(route, device)
    seen = as_the_format_sees(x, weight, labels)
    truth = looped_linear(seen, dequantize(weight, torch.float64), labels)
    y = mot_linear(x, weight, route.plan(device))
    assert ((y - truth).abs() <= truth.abs() * 4 * 2**-24).all()


@all_formats
def test_formats_zero_rows(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    """A row of zeros, and an expert of zeros, give exactly the bias."""
    torch.manual_seed(0)
    route = ROUTES["first_and_last_row"]
    x = torch.randn(route.num_rows, 128, device=device).to(dtype)
    x[7] = 0.0
    w = torch.randn(2, 30, 128, device=device)
    w[0] = 0.0
    bias = torch.randn(2, 30, device=device).to(dtype)
    y = mot_linear(x, quantize_weight(w, format), route.plan(device), bias=bias)
    assert torch.equal(y[7], bias[1])
    assert torch.equal(y[0], bias[0]) and torch.equal(y[-1], bias[0])


@all_formats
def test_formats_no_columns(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    weight = quantize_weight(torch.randn(2, 0, 128, device=device), format)
    plan = ROUTES["first_and_last_row"].plan(device)
    x = torch.randn(plan.num_rows, 128, device=device).to(dtype)
    assert mot_linear(x, weight, plan).shape == (plan.num_rows, 0)
    assert mot_linear(x[:5], weight).shape == (5, 0)


def test_quantize_weight_no_columns() -> None:
    weight = quantize_weight(torch.randn(2, 0, 64), Fp8W8A8(WeightScales.PER_TENSOR))
    assert weight.shape == (2, 0, 64)


# --- INT8 W8A8: exact


def exact_int8(x: torch.Tensor, weight: ExpertWeight, labels: torch.Tensor) -> torch.Tensor:
    """int64 sums, scales in float64."""
    rows = quantized(x, weight, labels)
    y = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float64, device=x.device)
    for e in range(weight.shape[0]):
        # Not a matrix product: CUDA has none for int64.
        sums = (rows.data[labels == e].long()[:, None] * weight.data[e].long()).sum(-1)
        y[labels == e] = sums.double() * weight.scales[e].double()
    return y * rows.scales.double()[:, None]


@pytest.mark.parametrize("static", [False, True], ids=["per_token", "static"])
def test_int8_w8a8_is_exact(static: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Half a step of the output, and 2^-24 each for sum, two scales: nothing else."""
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    # All of one sign: sums beyond 2^24, where float32 accumulation would lose bits.
    x = (torch.rand(route.num_rows, 4096, device=device) + 0.5).to(dtype)
    w = torch.rand(3, 20, 4096, device=device) + 0.5
    w[:, ::3] -= 1.0  # and some rows that cancel
    scales = torch.tensor([0.012, 0.02, 0.01], device=device) if static else None
    weight = quantize_weight(w, Int8W8A8(), activation_scale=scales)
    truth = exact_int8(x, weight, labels_of(route, device))
    y = mot_linear(x, weight, route.plan(device)).double()
    half_step = torch.finfo(dtype).eps / 2
    allowed = 3 * 2**-24 + (0 if dtype is torch.float32 else half_step)
    assert ((y - truth).abs() <= truth.abs() * allowed * (1 + 1e-3)).all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 1), (16, 8, 8), (17, 5, 33), (40, 24, 20_000)])
def test_exact_int8_product(m: int, n: int, k: int, device: torch.device) -> None:
    torch.manual_seed(0)
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    a[0], b[0] = 127, -128  # the largest sum there is
    wanted = (a.long()[:, None] * b.long()).sum(-1)
    assert torch.equal(reference_formats.exact_int8_product(a, b), wanted.float())


# --- rounding, outputs, paths


def integer_weight(format: Format, device: torch.device) -> ExpertWeight:
    """(2, 40, 128): small integers with powers of two as scales, so sums are exact in any order."""
    shape = (2, 40, 128)
    data = torch.randint(-7, 8, shape, device=device).to(DATA_DTYPES[type(format)])
    zeros = None
    if isinstance(format, Int4W4A16):
        data = torch.randint(0, 256, (2, 40, 64), device=device).to(torch.uint8)
        if not format.symmetric:
            zeros = torch.randint(0, 16, scales_shape(format, shape), device=device)
    scales = 2.0 ** torch.randint(-3, 1, scales_shape(format, shape), device=device)
    static = torch.tensor([1.0, 2.0], device=device) if quantizes_activations(format) else None
    return ExpertWeight(
        data, scales, format, None if zeros is None else zeros.to(torch.uint8), static
    )


@all_formats
@pytest.mark.parametrize("epilogue", ["none", "add_residual"])
def test_formats_round_once(
    format: Format, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Of integers y is the exact number, rounded to the nearest, whatever the order of sums."""
    torch.manual_seed(0)
    route = ROUTES["first_and_last_row"]
    x = torch.randint(-3, 4, (route.num_rows, 128), device=device).to(dtype) * 2
    weight = integer_weight(format, device)
    bias = torch.randint(-999, 1000, (2, 40), device=device).to(dtype)
    residual = (torch.randint(-999, 1000, (route.num_rows, 40), device=device) / 8).to(dtype)
    step = make_epilogue(epilogue, residual)
    plan, labels = route.plan(device), labels_of(route, device)
    y = mot_linear(x, weight, plan, bias=bias, epilogue=step)
    wide = dequantize(weight, torch.float64)
    exact = looped_linear(x.double(), wide, labels, bias=bias.double(), epilogue=step)
    assert torch.equal(y, exact.to(dtype))


@all_formats
def test_formats_out(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    """`out` may be strided, and may be the residual."""
    torch.manual_seed(0)
    route = ROUTES["first_and_last_row"]
    plan = route.plan(device)
    x = torch.randn(route.num_rows, 128, device=device).to(dtype)
    weight = make_weight(2, 40, 128, format, device)
    residual = torch.randn(route.num_rows, 40, device=device).to(dtype)
    wanted = mot_linear(x, weight, plan, epilogue=AddResidual(residual))
    buffer = poisoned((route.num_rows, 80), dtype, device)
    out = buffer[:, ::2]
    assert mot_linear(x, weight, plan, epilogue=AddResidual(residual), out=out) is out
    assert torch.equal(out, wanted) and buffer[:, 1::2].isnan().all()
    for routing in (plan, None):
        own = residual.clone()
        apart = mot_linear(x, weight, routing, epilogue=AddResidual(residual))
        mot_linear(x, weight, routing, epilogue=AddResidual(own), out=own)
        assert torch.equal(own, apart)


def test_formats_chunked_columns(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 256, device=device)
    for format in FORMATS:
        weight = make_weight(1, 300, 256, format, device)
        with use_path(Path.REFERENCE):
            whole = mot_linear(x, weight)
        with use_path(Path.REFERENCE), monkeypatch.context() as patch:
            few = [slice(0, 128), slice(128, 256), slice(256, 300)]
            patch.setattr(reference_formats, "row_chunks", lambda n, k, few=few: few)
            torch.testing.assert_close(mot_linear(x, weight), whole, rtol=1e-5, atol=1e-4)


def test_formats_strides(device: torch.device) -> None:
    """Parts of larger tensors: everything but the rows of data may have any strides."""
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    x = torch.randn(route.num_rows, 256, device=device).half()
    for format in (Fp8W8A8(WeightScales.BLOCK), Int8W8A16(), Int4W4A16(64, symmetric=False)):
        weight = make_weight(3, 144, 256, format, device)

        def spread(t: torch.Tensor) -> torch.Tensor:
            wide = t.new_zeros([2 * size for size in t.shape])
            view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
            view.copy_(t)
            return view

        padded = weight.data.new_zeros(3, 150, weight.data.shape[2] + 16)
        data = padded[:, :144, : weight.data.shape[2]]
        data.copy_(weight.data)
        zeros = None if weight.zero_points is None else spread(weight.zero_points)
        apart = ExpertWeight(data, spread(weight.scales), format, zeros)
        plan = route.plan(device)
        bias = torch.randn(3, 144, device=device).half()
        y = mot_linear(spread(x), apart, plan, bias=spread(bias), epilogue=SILU_MUL)
        assert torch.equal(y, mot_linear(x, weight, plan, bias=bias, epilogue=SILU_MUL))


@pytest.mark.parametrize("format", [Fp8W8A8(), Fp8W8A8(WeightScales.BLOCK), Int8W8A16()], ids=str)
def test_formats_dirty_padding(format: Format, device: torch.device) -> None:
    """What lies behind the K of a row is not read, or does not count: NaN."""
    torch.manual_seed(0)
    route = ROUTES["gen17"]
    plan = route.plan(device)
    weight = make_weight(2, 20, 33, format, device)
    data = torch.full((2, 20, 64), 0x7F, dtype=torch.uint8, device=device)  # NaN as e4m3fn
    padded = data.view(weight.data.dtype)[:, :, :33]
    padded.copy_(weight.data)
    apart = ExpertWeight(padded, weight.scales, format)
    x = poisoned((route.num_rows, 64), torch.float16, device)[:, :33]
    x.copy_(torch.randn(x.shape))
    rows: torch.Tensor | QuantizedRows = x
    if quantizes_activations(format):
        clean = reference_formats.quantize_rows(x, format)
        wide = torch.full((route.num_rows, 64), 0x7F, dtype=torch.uint8, device=device)
        wide.view(clean.data.dtype)[:, :33].copy_(clean.data)
        rows = QuantizedRows(wide.view(clean.data.dtype)[:, :33], clean.scales, x.dtype)
    y = mot_linear(rows, apart, plan)
    assert torch.equal(y, mot_linear(x.contiguous(), weight, plan))
    assert not y.isnan().any()


@pytest.mark.usefixtures("kernels")
@all_formats
def test_formats_config(format: Format, device: torch.device) -> None:
    """Tiles of the caller's: small ones, several steps to a scale where scales vary along K."""
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    x = torch.randn(route.num_rows, 256, device=device).half()
    weight = make_weight(3, 48, 256, format, device)
    plan = route.plan(device)
    for config in (TileConfig(16, 16, 32, 2, 1, 2), TileConfig(64, 32, 32, 1, 4, 1)):
        check(x, weight, plan, labels_of(route, device), config=config)
    with pytest.raises(ValueError, match=r"block_k=16; with format \w+ it can be 32\.\."):
        mot_linear(x, weight, plan, config=TileConfig(16, 16, 16))
    wrong = TileConfig(128, 128, 192 - hopper_block_k(format), schedule="hopper")
    with pytest.raises(ValueError, match="schedule 'hopper'"):
        mot_linear(x, weight, plan, config=wrong)
    if isinstance(format, Int4W4A16 | Fp8W8A8):
        with pytest.raises(ValueError, match=r"block_k=256; .* it can be 32\.\.\d+"):
            mot_linear(x, weight, plan, config=TileConfig(16, 16, 256))


def test_formats_say_once_that_plain_pytorch_is_slow(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    dispatch.warn_once.cache_clear()
    weight = make_weight(1, 8, 32, Int8W8A16(), device)
    with use_path(Path.REFERENCE), caplog.at_level(logging.WARNING, logger="mot_kernels"):
        for _ in range(3):
            mot_linear(torch.randn(2, 32, device=device), weight)
    assert [r.getMessage() for r in caplog.records] == [
        "mot_linear: plain PyTorch computes format int8_w8a16, rightly but slowly: "
        "use_path(Path.REFERENCE) is in force"
    ]


@pytest.mark.usefixtures("kernels")
def test_formats_say_once_that_there_are_no_fp8_units(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    if dispatch.has_fp8_units(device):
        pytest.skip("this GPU has FP8 units")
    dispatch.warn_once.cache_clear()
    weight = make_weight(1, 8, 32, Fp8W8A8(), device)
    with caplog.at_level(logging.WARNING, logger="mot_kernels"):
        for _ in range(3):
            mot_linear(torch.randn(2, 32, device=device), weight)
    (record,) = caplog.records
    assert "the kernel of format fp8_w8a8_per_channel multiplies in float16" in record.getMessage()


def shapes_and_errors() -> Sequence[tuple[type[Exception], dict[str, object], str]]:
    return [
        (ValueError, {"x": torch.randn(4, 64)}, r"so K=32, but x has K=64"),
        (TypeError, {"x": torch.randn(4, 32).double()}, "x has dtype torch.float64"),
        (ValueError, {"bias": torch.randn(1, 8)}, r"bias has shape \(1, 8\); expected \(2, 8\)"),
        (TypeError, {"bias": torch.randn(2, 8).half()}, "bias has dtype torch.float16 but x"),
        (ValueError, {"x": torch.randn(4, 32, requires_grad=True)}, "has no backward"),
        (ValueError, {"out": torch.empty(4, 9)}, r"out has shape \(4, 9\); expected \(4, 8\)"),
        (
            ValueError,
            {"plan": RoutePlan.from_runs([(0, 4)], num_experts=3)},
            "plan has 3 experts but weight has 2",
        ),
    ]


@pytest.mark.parametrize(("error", "change", "message"), shapes_and_errors())
def test_formats_errors(error: type[Exception], change: dict[str, object], message: str) -> None:
    weight = make_weight(2, 8, 32, Int4W4A16(32), torch.device("cpu"))
    arguments = {"x": torch.randn(4, 32), "weight": weight} | change
    with pytest.raises(error, match=message):
        mot_linear(**arguments)


def test_formats_device_error() -> None:
    weight = make_weight(2, 8, 32, Int8W8A8(), torch.device("cpu")).to("meta")
    with pytest.raises(ValueError, match="weight is on meta but x is on cpu"):
        mot_linear(torch.randn(4, 32), weight)


def test_formats_against_the_unrounded_weight(device: torch.device) -> None:
    """Formats are worth having: errors of a whole product, relative, on normal numbers.

    FP8 rounds both sides by up to 2^-4 / sqrt(3) or so, INT8 and INT4 by scale / sqrt(12).
    """
    torch.manual_seed(0)
    x, w = torch.randn(64, 512, device=device), torch.randn(1, 64, 512, device=device)
    wanted = F.linear(x, w[0])
    most = {Fp8W8A8: 0.045, Int8W8A8: 0.015, Int8W8A16: 0.01, Int4W4A16: 0.14}
    for format in FORMATS:
        y = mot_linear(x, quantize_weight(w, format))
        assert (y - wanted).norm() / wanted.norm() < most[type(format)], str(format)


@pytest.mark.parametrize("format", [Int8W8A16(), Int4W4A16(32), Int8W8A8()], ids=str)
def test_linear_format_on_meta(format: Format) -> None:
    """Shapes without numbers, routed as well."""
    weight = quantize_weight(torch.randn(2, 6, 32), format).to("meta")
    plan = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2).to("meta")
    y = mot_linear(torch.randn(3, 32, device="meta"), weight, plan)
    assert y.shape == (3, 6) and y.is_meta
