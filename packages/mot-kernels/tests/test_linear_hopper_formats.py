"""`mot_linear` with an `ExpertWeight` and schedule "hopper": what it computes, when it may run.

8-bit weights are multiplied as they are; others are written out in 16 bits first. The product needs
a Hopper GPU; writing out and refusing are tested everywhere.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from test_linear_hopper import LONG_ROUTES, epilogue_for, need_hopper

from mot_kernels import (
    SILU_MUL,
    Epilogue,
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    QuantizedRows,
    RoutePlan,
    TileConfig,
    WeightScales,
    dequantize,
    dispatch,
    mot_linear,
    quantize_rows,
    quantize_weight,
    reference_formats,
)
from mot_kernels.dispatch import choose_path
from mot_kernels.formats import quantizes_activations, spread_scales
from mot_kernels.testing import ROUTES, Route, assert_close, looped_linear, poisoned
from mot_kernels.tuning.format_tiles import check_format_config, hopper_block_k

BLOCKS = Fp8W8A8(WeightScales.BLOCK)
NARROW: list[Format] = [Fp8W8A8(), Fp8W8A8(WeightScales.PER_TENSOR), BLOCKS, Int8W8A8()]
WIDE: list[Format] = [
    Int8W8A16(),
    Int4W4A16(128),
    Int4W4A16(64, symmetric=False),
    Int4W4A16(32, symmetric=False),
]


def configs(format: Format) -> list[TileConfig]:
    depth = hopper_block_k(format)
    wide = TileConfig(128, 256, depth, 8, 4, 4, "hopper")
    return [wide] if format == BLOCKS else [wide, TileConfig(128, 128, depth, 4, 4, 3, "hopper")]


def sizes(size: str, format: Format, epilogue: str) -> tuple[int, int]:
    """K, and weight rows: gate and up have whole blocks, where blocks have scales."""
    k, n = SIZES[size]
    return (k, n // 256 * 256) if format == BLOCKS and epilogue == "silu_mul" else (k, n)


def make_weight(
    format: Format, n: int, k: int, device: torch.device, experts: int = 2
) -> ExpertWeight:
    w = torch.randn(experts, n, k, device=device) * k**-0.5
    # Experts differ by a factor, small enough for float16 to hold what comes out.
    return quantize_weight(w * 2.0 ** torch.arange(experts, device=device)[:, None, None], format)


# --- writing out


@pytest.mark.parametrize("format", WIDE, ids=str)
def test_write_out(format: Format, device: torch.device) -> None:
    """Exactly; int8 without its scales."""
    from mot_kernels._triton.launch_formats import _write_out

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    if choose_path(device, dtype).path.value != "triton":
        pytest.skip("needs Triton's kernels: set TRITON_INTERPRET=1 or use a CUDA machine")
    torch.manual_seed(0)
    weight = make_weight(format, 37, 384, device)
    wanted = dequantize(weight)
    if isinstance(format, Int8W8A16):
        wanted = weight.data.float()
    for expert in range(2):
        wide = poisoned((37, 384), dtype, device)
        _write_out(wide, weight, expert)
        assert torch.equal(wide, wanted[expert].to(dtype))


# --- when it may run


@pytest.mark.parametrize("format", NARROW + WIDE, ids=str)
def test_check_config(format: Format) -> None:
    for config in configs(format):
        check_format_config(config, format)
    wrong = 192 - hopper_block_k(format)
    with pytest.raises(ValueError, match=f"block_k={wrong}; schedule 'hopper' has {192 - wrong}"):
        check_format_config(TileConfig(128, 256, wrong, 8, 4, 4, "hopper"), format)


def test_float32_rows_are_not_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the result would be rounded: e4m3fn of such rows is multiplied in fp32."""
    monkeypatch.setattr(dispatch, "is_nvidia", lambda device: True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    weight = quantize_weight(torch.randn(2, 512, 128), Fp8W8A8())
    out = torch.empty(4, 256).to(torch.float8_e4m3fn)
    whys = []
    for dtype in (torch.bfloat16, torch.float32):
        rows = quantize_rows(torch.randn(4, 128).to(dtype), Fp8W8A8())
        whys.append(
            dispatch.why_not_hopper_format(
                out, rows, weight, None, None, has_plan=True, rounds_groups=True
            )
        )
    assert whys == [None, "it multiplies rows of bfloat16 and float16, not torch.float32"]


def test_narrow_tiles_have_no_block_scales() -> None:
    """A program has gate rows and up rows, and products of 128 columns at a time."""
    wide, narrow = configs(Fp8W8A8())
    check_format_config(wide, BLOCKS)
    with pytest.raises(ValueError, match="block_n=128; schedule 'hopper' has 256 with format fp8"):
        check_format_config(narrow, BLOCKS)


# --- what it computes

# Many units a program, several steps; one unit cut into many parts, with FP8 sums that stay in the
# matrix unit and with longer ones that leave it; columns that end in a tile.
SIZES = {"wide": (128, 9216), "deep": (4096, 256), "deeper": (8192, 256), "ragged": (384, 1168)}


def check(
    name: str,
    x: torch.Tensor | QuantizedRows,
    seen: torch.Tensor,
    weight: ExpertWeight,
    plan: RoutePlan,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
) -> None:
    """With all tiles; `seen` (M, K) float64 is x as the format sees it."""
    wide, ids = dequantize(weight, torch.float64), plan.expert_ids
    wide_bias = None if bias is None else bias.double()
    truth = looped_linear(seen, wide, ids, bias=wide_bias, epilogue=epilogue)
    baseline = looped_linear(seen.to(x.dtype), wide.to(x.dtype), ids, bias=bias, epilogue=epilogue)
    for config in configs(weight.format):
        out = poisoned(tuple(truth.shape), x.dtype, seen.device)
        mot_linear(x, weight, plan, bias=bias, epilogue=epilogue, out=out, config=config)
        assert_close(f"{name} {config}", out, truth, plan, baseline)
        assert not plan.flags.any()


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("format", NARROW + WIDE, ids=str)
def test_mot_linear_hopper_formats(
    format: Format, epilogue: str, size: str, device: torch.device
) -> None:
    need_hopper(device)
    k, n = sizes(size, format, epilogue)
    dtype = torch.float16 if size == "ragged" else torch.bfloat16
    for route in (r for r in LONG_ROUTES if r.num_rows):
        torch.manual_seed(0)
        plan = route.plan(device)
        x = torch.randn(route.num_rows, k, device=device).to(dtype)
        weight = make_weight(format, n, k, device, route.num_experts)
        bias = None
        if not size.startswith("deep"):
            bias = torch.randn(route.num_experts, n, device=device).to(dtype)
        columns = n // 2 if epilogue == "silu_mul" else n
        residual = torch.randn(route.num_rows, columns, device=device).to(dtype)
        chosen = epilogue_for(epilogue, residual)
        seen = x.double()
        if quantizes_activations(format):
            rows = reference_formats.quantize_rows(x, format, plan)
            seen = rows.data.double() * rows.scales.double()[:, None]
        check(str(route), x, seen, weight, plan, bias, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("format", [Fp8W8A8(), BLOCKS], ids=str)
def test_hopper_groups_of_rows(
    format: Fp8W8A8, epilogue: str, size: str, device: torch.device
) -> None:
    """Each 128 columns of a row have a scale; those of a row differ by more than FP8's range."""
    need_hopper(device)
    k, n = sizes(size, format, epilogue)
    dtype = torch.float16 if size == "ragged" else torch.bfloat16
    for route in (r for r in LONG_ROUTES if r.num_rows):
        torch.manual_seed(0)
        plan = route.plan(device)
        x = torch.randn(route.num_rows, k, device=device)
        x = (x * torch.logspace(-3, 1, k, device=device)).to(dtype)
        weight = make_weight(format, n, k, device, route.num_experts)
        columns = n // 2 if epilogue == "silu_mul" else n
        residual = torch.randn(route.num_rows, columns, device=device).to(dtype)
        chosen = epilogue_for(epilogue, residual)
        rows = quantize_rows(x, Fp8W8A8(), group_size=128)
        if size == "deep":  # scales may lie row by row, too
            rows = QuantizedRows(rows.data, rows.scales.contiguous(), dtype)
        seen = rows.data.double() * spread_scales(rows.scales, k).double()
        check(str(route), rows, seen, weight, plan, None, chosen)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("rounded", ["int8", "rows", "groups", "blocks"])
@pytest.mark.parametrize("size", SIZES)
def test_hopper_rounds_groups(size: str, rounded: str, device: torch.device) -> None:
    """In the epilogue, or by a launch of its own where a program has half a group: the same."""
    need_hopper(device)
    format: Format = {"int8": Int8W8A8(), "blocks": BLOCKS}.get(rounded, Fp8W8A8())
    within = 128 if rounded in ("groups", "blocks") else None
    k, n = sizes(size, format, "silu_mul")
    dtype = torch.float16 if size == "ragged" else torch.bfloat16
    for route in (r for r in LONG_ROUTES if r.num_rows):
        torch.manual_seed(0)
        plan = route.plan(device)
        x = torch.randn(route.num_rows, k, device=device).to(dtype)
        rows = quantize_rows(x, format, group_size=within)
        weight = make_weight(format, n, k, device, route.num_experts)
        bias = torch.randn(route.num_experts, n, device=device).to(dtype)
        for config in configs(format):
            y = mot_linear(rows, weight, plan, bias=bias, epilogue=SILU_MUL, config=config)
            wanted = quantize_rows(y, Fp8W8A8(), group_size=128)
            for _ in range(2):  # and once more, replayed
                got = mot_linear(
                    rows, weight, plan, bias=bias, epilogue=SILU_MUL, config=config,
                    quantize=Fp8W8A8(), group_size=128,
                )  # fmt: skip
                assert got.dtype is dtype
                assert torch.equal(got.scales, wanted.scales), f"{route} {config}"
                assert torch.equal(got.data.view(torch.uint8), wanted.data.view(torch.uint8))
                assert not plan.flags.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(4096, 256), (128, 9216)], ids=["cut", "whole"])
def test_int8_is_exact(k: int, n: int, device: torch.device) -> None:
    """Also where programs trade sums: they trade integers."""
    need_hopper(device)
    torch.manual_seed(0)
    plan = ROUTES["three_branches"].plan(device)
    x = torch.randn(plan.num_rows, k, device=device).bfloat16()
    weight = make_weight(Int8W8A8(), n, k, device)
    rows = reference_formats.quantize_rows(x, Int8W8A8(), plan)
    labels = plan.expert_ids.long()
    sums = torch.stack([rows.data.double() @ w.double().T for w in weight.data])
    exact = sums[labels, torch.arange(plan.num_rows, device=device)]
    wanted = exact.float() * weight.scales[labels] * rows.scales[:, None]
    for config in configs(Int8W8A8()):
        y = mot_linear(x, weight, plan, config=config)
        assert torch.equal(y, wanted.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("format", NARROW + WIDE, ids=str)
def test_hopper_formats_captured(format: Format, device: torch.device) -> None:
    """Replays give the bits of the first run."""
    need_hopper(device)
    torch.manual_seed(0)
    route: Route = ROUTES["three_branches"]
    plan = route.plan(device)
    x = torch.randn(plan.num_rows, 4096, device=device).bfloat16()
    weight = make_weight(format, 512, 4096, device)
    config = configs(format)[0]
    wanted = mot_linear(x, weight, plan, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mot_linear(x, weight, plan, config=config)
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)
