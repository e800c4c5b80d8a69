"""`mot_linear` with schedule "few_rows": how K is cut, when it is taken, what it computes.

On small integers sums are exact in any order, so results must be equal bit for bit; on random data
`assert_close` judges the rounding. The interpreter runs float16; bfloat16, and the PTX that only
GPUs have, are for the tests marked `gpu`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    ExpertWeight,
    Format,
    Int4W4A16,
    Int8W8A16,
    RoutePlan,
    TileConfig,
    dequantize,
    mot_linear,
    quantize_weight,
    stack_bias,
)
from mot_kernels._triton import launch_few_rows
from mot_kernels._triton.launch_few_rows import cut
from mot_kernels._triton.launcher import LINEAR_PLACES
from mot_kernels.plan import MOST_PROGRAMS, tile_range
from mot_kernels.testing import Route, assert_close, looped_linear, poisoned
from mot_kernels.tuning.config import FEW_ROWS
from mot_kernels.tuning.lookup import Problem, find_config

# SiLU*mul of large numbers: exp(-gate); NumPy, as the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

CPU = torch.device("cpu")

FEW_ROUTES = [
    Route("one_und_row", 2, ((0, 1),)),
    Route("one_gen_row", 2, ((1, 1),)),
    Route("gen14_between", 2, ((0, 1), (1, 14), (0, 1))),
    Route("alternating", 2, ((0, 1), (1, 1)) * 16),
    Route("sixteen_und", 2, ((0, 16),)),
    Route("three_experts_one_empty", 3, ((2, 3), (0, 2), (2, 4))),
    Route("one_expert", 1, ((0, 5),)),
]

FORMATS: list[Format | None] = [
    None,
    Int8W8A16(),
    *(Int4W4A16(size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)),
]

few_routes = pytest.mark.parametrize("route", FEW_ROUTES, ids=str)
all_formats = pytest.mark.parametrize("format", FORMATS, ids=lambda f: str(f or "plain"))
epilogues = pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
kernels = pytest.mark.usefixtures("kernels", "poisoned_allocations")


# --- cutting


@pytest.mark.parametrize("steps", [1, 3, 28, 148])
@pytest.mark.parametrize("programs", [24, 396])
def test_cut(programs: int, steps: int) -> None:
    for units in range(1, 700):
        parts = cut(units, steps, programs, 512)
        assert parts >= 1
        if parts > 1:
            assert units * parts <= programs
            assert units <= 512
            assert steps // parts >= 2


def test_cut_keeps_programs_busy() -> None:
    assert cut(56, 28, 396, 512) == 7
    assert cut(56, 148, 396, 512) == 7
    assert cut(4, 148, 396, 512) == 16
    assert cut(592, 28, 396, 512) == 1
    assert cut(56, 28, 396, 55) == 1  # not as many counters
    assert cut(56, 28, 396, 0) == 1


# --- when it is taken


def problem(rows: int, dtype: torch.dtype, format: str | None = None) -> Problem:
    return Problem(4608, 3584, dtype, "none", (2, rows), format)


@pytest.mark.parametrize("format", [None, "int8_w8a16", "int4_w4a16_group32"])
def test_few_rows_is_the_default(format: str | None) -> None:
    few = find_config(problem(FEW_ROWS, torch.bfloat16, format), CPU)
    assert few.schedule == "few_rows" and few.block_m == 16
    more = find_config(problem(FEW_ROWS + 1, torch.bfloat16, format), CPU)
    assert more.schedule == "portable"


def test_few_rows_is_not_for_others() -> None:
    assert find_config(problem(1, torch.float32), CPU).schedule == "portable"
    assert find_config(problem(1, torch.bfloat16, "int8_w8a8"), CPU).schedule == "portable"
    assert find_config(problem(1, torch.float32, "int8_w8a16"), CPU).schedule == "portable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_m": 64}, r"block_m is 64; schedule 'few_rows' has \(16, 32\)"),
        ({"group_m": 8}, r"group_m is 8; schedule 'few_rows' has \(1,\)"),
    ],
    ids=["block_m", "group_m"],
)
def test_few_rows_config_values(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TileConfig(16, 64, 128, 1, 4, 4, "few_rows"), **changes)


@kernels
def test_few_rows_refuses_float32(device: torch.device) -> None:
    plan = FEW_ROUTES[0].plan(device)
    x, weight = torch.zeros(1, 64, device=device), torch.zeros(2, 32, 64, device=device)
    with pytest.raises(ValueError, match="'few_rows', but it multiplies bfloat16 and float16"):
        mot_linear(x, weight, plan, config=TileConfig(16, 32, 64, 1, schedule="few_rows"))


# --- what it computes


@dataclass(frozen=True)
class Inputs:
    """One product: rows, weights as the kernel gets them, and as float64."""

    x: torch.Tensor
    weight: torch.Tensor | ExpertWeight
    wide: torch.Tensor
    bias: torch.Tensor | None
    epilogue: Epilogue | None
    columns: int


def make_inputs(
    route: Route,
    n: int,
    k: int,
    format: Format | None,
    epilogue: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    biased: int | None = None,
) -> Inputs:
    """`biased`: the expert that has a bias."""
    experts = route.num_experts
    x = torch.randn(route.num_rows, k, device=device).to(dtype)
    w = torch.randn(experts, n, k, device=device) * k**-0.5
    w *= 8.0 ** torch.arange(experts, device=device)[:, None, None]
    weight = w.to(dtype) if format is None else quantize_weight(w, format)
    wide = dequantize(weight, torch.float64) if format is not None else weight.double()
    rows = [
        torch.randn(n, device=device).to(dtype) if e == biased else None for e in range(experts)
    ]
    columns = n // 2 if epilogue == "silu_mul" else n
    residual = torch.randn(route.num_rows, columns, device=device).to(dtype)
    chosen = {"none": None, "silu_mul": SILU_MUL, "add_residual": AddResidual(residual)}[epilogue]
    return Inputs(x, weight, wide, stack_bias(rows), chosen, columns)


def check(
    inputs: Inputs, plan: RoutePlan | None, labels: torch.Tensor, config: TileConfig | None = None
) -> None:
    """Judge the rounding; twice the same bits; no counter left."""
    x, bias, epilogue = inputs.x, inputs.bias, inputs.epilogue
    out = poisoned((x.shape[0], inputs.columns), x.dtype, x.device)
    options = {"bias": bias, "epilogue": epilogue, "config": config}
    mot_linear(x, inputs.weight, plan, out=out, **options)
    wide = None if bias is None else bias.double()
    truth = looped_linear(x.double(), inputs.wide, labels, bias=wide, epilogue=epilogue)
    baseline = looped_linear(x, inputs.wide.to(x.dtype), labels, bias=bias, epilogue=epilogue)
    assert_close("few rows", out, truth, plan, baseline)
    assert torch.equal(mot_linear(x, inputs.weight, plan, **options), out)
    assert plan is None or not plan.flags.any()


@kernels
@few_routes
@epilogues
def test_few_rows_routes(route: Route, epilogue: str, device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(route, 144, 512, None, epilogue, torch.float16, device, biased=0)
    plan = route.plan(device)
    check(inputs, plan, plan.expert_ids)


@kernels
@all_formats
@epilogues
def test_few_rows_formats(format: Format | None, epilogue: str, device: torch.device) -> None:
    torch.manual_seed(0)
    route = FEW_ROUTES[2]
    inputs = make_inputs(route, 80, 512, format, epilogue, torch.float16, device, biased=1)
    plan = route.plan(device)
    check(inputs, plan, plan.expert_ids)


@kernels
@pytest.mark.parametrize("rows", range(1, 17))
def test_few_rows_numbers_of_rows(rows: int, device: torch.device) -> None:
    torch.manual_seed(0)
    route = Route(f"rows{rows}", 2, ((1, rows),))
    inputs = make_inputs(route, 64, 256, Int8W8A16(), "none", torch.float16, device)
    plan = route.plan(device)
    check(inputs, plan, plan.expert_ids)


@kernels
@epilogues
@pytest.mark.parametrize("format", [None, Int8W8A16()], ids=["plain", "int8_w8a16"])
@pytest.mark.parametrize(("k", "n"), [(1, 2), (33, 50), (300, 66), (1000, 194)], ids=str)
def test_few_rows_sizes(
    k: int, n: int, format: Format | None, epilogue: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = FEW_ROUTES[2]
    inputs = make_inputs(route, n, k, format, epilogue, torch.float16, device)
    plan = route.plan(device)
    check(inputs, plan, plan.expert_ids)


@kernels
@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
@epilogues
def test_few_rows_without_plan(format: Format, epilogue: str, device: torch.device) -> None:
    torch.manual_seed(0)
    route = FEW_ROUTES[4]
    inputs = make_inputs(route, 48, 256, format, epilogue, torch.float16, device, biased=0)
    check(inputs, None, torch.zeros(route.num_rows, dtype=torch.int64, device=device))


@kernels
@pytest.mark.parametrize("multiprocessors", [1, 3, 8, 132])
def test_few_rows_parts_are_exact(
    multiprocessors: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Integers: the same bits however K is cut; more than a tile's rows, with a config."""
    monkeypatch.setattr(launch_few_rows, "_MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(launch_few_rows, "count_multiprocessors", lambda device: multiprocessors)
    torch.manual_seed(0)
    plan = Route("many", 2, ((0, 20), (1, 70), (0, 1))).plan(device)
    x = torch.randint(-2, 3, (plan.num_rows, 384), device=device).half()
    weight = torch.randint(-2, 3, (2, 96, 384), device=device).half()
    residual = torch.randint(-2, 3, (plan.num_rows, 96), device=device).half()
    wanted = looped_linear(x, weight, plan.expert_ids, epilogue=AddResidual(residual))
    for config in (
        TileConfig(16, 32, 64, 1, 4, 4, "few_rows"),
        TileConfig(32, 64, 32, 1, 4, 2, "few_rows"),
    ):
        out = residual.clone()
        mot_linear(x, weight, plan, epilogue=AddResidual(out), out=out, config=config)
        assert torch.equal(out, wanted)
        assert not plan.flags.any()


@kernels
@pytest.mark.parametrize("format", [Int8W8A16(), Int4W4A16(32), Int4W4A16(32, symmetric=False)])
def test_few_rows_without_columns(format: Format, device: torch.device) -> None:
    """No group of scales is there to be read; what is left is the bias."""
    weight = quantize_weight(torch.randn(2, 48, 0, device=device), format)
    plan = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2, device=device)
    x = torch.randn(3, 0, device=device, dtype=torch.float16)
    bias = torch.randn(2, 48, device=device, dtype=torch.float16)
    assert torch.equal(mot_linear(x, weight, plan, bias=bias), bias[[0, 1, 1]])


@kernels
def test_few_rows_strides(device: torch.device) -> None:
    """Parts of larger tensors, K not contiguous either."""
    torch.manual_seed(0)
    plan = FEW_ROUTES[2].plan(device)
    x = torch.randint(-2, 3, (2 * 256, plan.num_rows), device=device).half()[::2].T
    weight = torch.randint(-2, 3, (4, 256, 40), device=device).half()[::2].mT
    bias = torch.randint(-9, 10, (2, 80), device=device).half()[:, ::2]
    buffer = poisoned((plan.num_rows, 80), torch.float16, device)
    mot_linear(x, weight, plan, bias=bias, out=buffer[:, ::2])
    wanted = looped_linear(x, weight, plan.expert_ids, bias=bias)
    assert torch.equal(buffer[:, ::2], wanted)
    assert buffer[:, 1::2].isnan().all()


@kernels
@pytest.mark.parametrize("apart", ["x", "weight"])
def test_few_rows_k_stride_past_int32(apart: str, device: torch.device) -> None:
    """The last part starts past 2^31 elements. Of the 6 GB asked for, few pages are touched."""
    torch.manual_seed(0)
    plan, k = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2, device=device), 4096
    x = torch.randint(-2, 3, (3, k), device=device).half()
    x *= torch.arange(k, device=device) % 64 == 0  # few terms: the sums stay exact
    weight = torch.randint(-2, 3, (2, 32, k), device=device).half()
    wanted = looped_linear(x, weight, plan.expert_ids)
    stride = 2**31 // (k * 3 // 4)
    far = torch.empty(k * stride, dtype=torch.float16, device=device)
    if apart == "x":
        x = far.as_strided(x.shape, (1, stride)).copy_(x)
    else:
        weight = far.as_strided(weight.shape, (32, 1, stride)).copy_(weight)
    config = TileConfig(16, 32, 64, 1, 4, 4, "few_rows")
    assert torch.equal(mot_linear(x, weight, plan, config=config), wanted)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("format", [None, Int4W4A16(32)], ids=lambda f: str(f or "plain"))
def test_few_rows_compiled(format: Format | None, device: torch.device) -> None:
    """Twice in one compiled graph: the second launch finds the counters at zero."""
    torch.manual_seed(0)
    route = FEW_ROUTES[2]
    inputs = make_inputs(route, 64, 512, format, "silu_mul", torch.float16, device)
    plan = route.plan(device)

    def twice(x: torch.Tensor) -> torch.Tensor:
        y = mot_linear(x, inputs.weight, plan, epilogue=SILU_MUL)
        return y + mot_linear(x, inputs.weight, plan, epilogue=SILU_MUL)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.x), twice(inputs.x))
    assert not plan.flags.any()


@kernels
def test_few_rows_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Sums are left by as many programs as run side by side, however large the weight is."""
    monkeypatch.setattr(launch_few_rows, "_MULTIPROCESSORS", 132)
    calls = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda **arguments: calls.append((grid, arguments))

    monkeypatch.setattr(launch_few_rows, "_mot_linear_few_rows_kernel", Recorder())
    monkeypatch.setattr(launch_few_rows, "count_multiprocessors", lambda device: 132)
    meta, plan = torch.device("meta"), FEW_ROUTES[2].plan()
    config = TileConfig(16, 64, 128, 1, 4, 4, "few_rows")
    for n, k in ((64, 18_944), (3584, 3584), (12_000, 3584), (152_064, 3584)):
        options = {"dtype": torch.float16, "device": meta}
        launch_few_rows.launch_linear_few_rows(
            torch.empty(16, n, **options),
            torch.empty(16, k, **options),
            torch.empty(2, n, k, **options),
            None,
            None,
            plan.row_ids,
            plan.tiles,
            plan.flags,
            tile_range(plan.flat_offsets, 16, 2),
            0,
            config,
            LINEAR_PLACES,
        )
        (programs,), arguments = calls.pop()
        partials = arguments["partials_ptr"]
        is_cut = arguments["PARTS"] > 1
        assert (partials is not None) == (arguments["counters_ptr"] is not None) == is_cut
        if partials is not None:
            assert programs <= 3 * 132
            assert programs // arguments["PARTS"] <= 2 * MOST_PROGRAMS
            assert partials.shape == (programs // arguments["PARTS"], arguments["PARTS"], 16, 64)


# --- on a GPU

BAGEL = {
    "qkv": (3584, 4608, "none"),
    "o": (3584, 3584, "add_residual"),
    "gate_up": (3584, 37_888, "silu_mul"),
    "down": (18_944, 3584, "add_residual"),
}


@pytest.mark.gpu
@kernels
@few_routes
@all_formats
def test_few_rows_bfloat16(route: Route, format: Format | None, device: torch.device) -> None:
    torch.manual_seed(0)
    for epilogue in ("none", "silu_mul", "add_residual"):
        inputs = make_inputs(route, 208, 1024, format, epilogue, torch.bfloat16, device, biased=0)
        plan = route.plan(device)
        check(inputs, plan, plan.expert_ids)


@pytest.mark.gpu
@kernels
@pytest.mark.parametrize("layer", BAGEL)
@pytest.mark.parametrize(
    "format", [None, Int8W8A16(), Int4W4A16(128), Int4W4A16(32, False)], ids=str
)
def test_few_rows_bagel(layer: str, format: Format | None, device: torch.device) -> None:
    torch.manual_seed(0)
    k, n, epilogue = BAGEL[layer]
    biased = 0 if layer == "qkv" else None
    for route in (FEW_ROUTES[0], FEW_ROUTES[2], FEW_ROUTES[4]):
        inputs = make_inputs(route, n, k, format, epilogue, torch.bfloat16, device, biased=biased)
        plan = route.plan(device)
        check(inputs, plan, plan.expert_ids)


@pytest.mark.gpu
@kernels
def test_few_rows_in_a_graph(device: torch.device) -> None:
    """Replays give the bits of the first run, whichever part comes last."""
    torch.manual_seed(0)
    route = FEW_ROUTES[2]
    inputs = make_inputs(route, 512, 4096, None, "none", torch.bfloat16, device)
    plan = route.plan(device)
    wanted = mot_linear(inputs.x, inputs.weight, plan)
    out = poisoned(tuple(wanted.shape), torch.bfloat16, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            mot_linear(inputs.x, inputs.weight, plan, out=out)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)
    assert not plan.flags.any()
