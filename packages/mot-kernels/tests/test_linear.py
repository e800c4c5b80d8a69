"""`mot_linear` against one masked linear per expert.

Two judges. On small integers every sum is exact in any order, so results must be equal bit for
bit, whatever the route, strides or tiles: that finds a single wrong element. On random data
`assert_close` judges the rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    Fp8W8A8,
    TileConfig,
    mot_linear,
    quantize_weight,
    reference,
    stack_bias,
)
from mot_kernels.plan import TILE_ROWS
from mot_kernels.testing import (
    ROUTES,
    Route,
    assert_close,
    linear_in_order,
    looped_linear,
    poisoned,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations")

all_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=str)
epilogues = pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])

# |x| <= 2, |w| <= 2, K = 40: sums stay below 256, which bfloat16 still holds exactly.
INTEGER_K = 40


def integers(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randint(-2, 3, shape).to(device, dtype)


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


def labels_of(route: Route, device: torch.device) -> torch.Tensor:
    return torch.tensor(route.labels, dtype=torch.int64, device=device)


def bias_for(
    which: str, make: Callable[..., torch.Tensor], experts: int, n: int, **options: object
) -> torch.Tensor | None:
    """`which` experts have a bias: "none", "first", "last" or "all"."""
    has = {"none": [], "first": [0], "last": [experts - 1], "all": range(experts)}[which]
    return stack_bias([make(n, **options) if e in has else None for e in range(experts)])


def make_epilogue(name: str, residual: torch.Tensor) -> Epilogue | None:
    return {"none": None, "silu_mul": SILU_MUL, "add_residual": AddResidual(residual)}[name]


def exact(
    x: torch.Tensor, weight: torch.Tensor, route: Route, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The result for integer inputs, which every dtype holds exactly."""
    wide = None if bias is None else bias.double()
    y = looped_linear(x.double(), weight.double(), labels_of(route, x.device), bias=wide)
    assert y.numel() == 0 or y.abs().max() <= 256
    return y.to(x.dtype)


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    route: Route,
    *,
    bias: torch.Tensor | None,
    epilogue: Epilogue | None,
) -> None:
    """Run `mot_linear` and judge its rounding."""
    plan = route.plan(x.device)
    y = mot_linear(x, weight, plan, bias=bias, epilogue=epilogue)
    labels = labels_of(route, x.device)
    wide = {"bias": None if bias is None else bias.double(), "epilogue": epilogue}
    truth = looped_linear(x.double(), weight.double(), labels, **wide)
    linear = linear_in_order if x.dtype is torch.float32 else F.linear
    baseline = looped_linear(x, weight, labels, bias=bias, epilogue=epilogue, linear=linear)
    assert_close("mot_linear", y, truth, plan, baseline)


# --- the grid
#
# Pruned: a route decides which rows a tile holds, bias and epilogue what happens to an
# accumulator; the two meet only in `expert`. So every route runs with every epilogue under one
# bias (the first expert's only: a wrong expert shows), every bias with every epilogue on one
# route, and odd sizes on one route. That is 60 + 12 + 12 cases in each dtype, not the product's
# 20 x 4 x 3 x 4 = 960.


@pytest.mark.usefixtures("best_path")
@all_routes
@epilogues
def test_mot_linear_routes(
    route: Route, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x = normal(route.num_rows, 72, **options)
    weight = normal(route.num_experts, 144, 72, **options)
    bias = bias_for("first", normal, route.num_experts, 144, **options)
    residual = normal(route.num_rows, 144, **options)
    check(x, weight, route, bias=bias, epilogue=make_epilogue(epilogue, residual))


@pytest.mark.usefixtures("best_path")
@epilogues
@pytest.mark.parametrize("which", ["none", "first", "last", "all"], ids="bias_{}".format)
def test_mot_linear_biases(
    which: str, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    options = {"dtype": dtype, "device": device}
    x = normal(route.num_rows, 64, **options)
    weight = normal(3, 96, 64, **options)
    bias = bias_for(which, normal, 3, 96, **options)
    residual = normal(route.num_rows, 96, **options)
    check(x, weight, route, bias=bias, epilogue=make_epilogue(epilogue, residual))


@pytest.mark.usefixtures("best_path")
@epilogues
@pytest.mark.parametrize(("k", "n"), [(1, 2), (33, 50), (128, 128), (160, 322)], ids=str)
def test_mot_linear_sizes(
    k: int, n: int, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES["every_second_row"]
    options = {"dtype": dtype, "device": device}
    x = normal(route.num_rows, k, **options)
    weight = normal(2, n, k, **options)
    bias = bias_for("all", normal, 2, n, **options)
    residual = normal(route.num_rows, n, **options)
    check(x, weight, route, bias=bias, epilogue=make_epilogue(epilogue, residual))


@pytest.mark.usefixtures("best_path")
@all_routes
def test_mot_linear_exact_on_integers(
    route: Route, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x = integers(route.num_rows, INTEGER_K, **options)
    weight = integers(route.num_experts, 100, INTEGER_K, **options)
    bias = bias_for("last", integers, route.num_experts, 100, **options)
    y = mot_linear(x, weight, route.plan(device), bias=bias)
    assert torch.equal(y, exact(x, weight, route, bias))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["scattered", "one_branch"])
@pytest.mark.parametrize(
    "config",
    [
        TileConfig(16, 16, 16, group_m=1, num_warps=1, num_stages=1),
        TileConfig(16, 128, 128, group_m=1, num_warps=4, num_stages=1),
        TileConfig(32, 32, 64, group_m=3, num_warps=2, num_stages=2),
        TileConfig(64, 128, 32, group_m=64, num_warps=8, num_stages=4),
        TileConfig(128, 32, 32, group_m=8, num_warps=4, num_stages=3),
        TileConfig(256, 64, 16, group_m=2, num_warps=8, num_stages=2),
    ],
    ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}_group{c.group_m}",
)
def test_mot_linear_config(
    config: TileConfig, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    x = integers(route.num_rows, INTEGER_K, dtype=dtype, device=device)
    weight = integers(2, 100, INTEGER_K, dtype=dtype, device=device)
    y = mot_linear(x, weight, route.plan(device), config=config)
    assert torch.equal(y, exact(x, weight, route))


def test_mot_linear_config_covers_all_tile_rows() -> None:
    marks = test_mot_linear_config.pytestmark
    configs = next(m.args[1] for m in marks if m.args and m.args[0] == "config")
    assert {config.block_m for config in configs} == set(TILE_ROWS)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("step", ["bias", "silu_mul", "add_residual"])
def test_mot_linear_rounds_once(step: str, dtype: torch.dtype, device: torch.device) -> None:
    """Bias and epilogue work on the fp32 accumulator: 2049 is no float16, 257 no bfloat16."""
    if dtype is torch.float32:
        pytest.skip("float32 is the accumulator's own dtype: nothing is rounded")
    unit = 1 / torch.finfo(dtype).eps  # the distance between numbers is 2 from 2 * unit on
    plan = ROUTES["first_and_last_row"].plan(device)
    options = {"dtype": dtype, "device": device}
    x = torch.zeros(plan.num_rows, 32, **options)
    x[:, 0], x[:, 1] = 2 * unit, 1.0
    weight = torch.zeros(2, 32, 32, **options)
    weight[:, :, :2] = 1.0  # every product is 2 * unit + 1
    if step == "bias":
        bias = torch.full((2, 32), -2 * unit, **options)
        y, wanted = mot_linear(x, weight, plan, bias=bias), 1.0
    elif step == "add_residual":
        residual = torch.full((plan.num_rows, 32), -2 * unit, **options)
        y, wanted = mot_linear(x, weight, plan, epilogue=AddResidual(residual)), 1.0
    else:
        weight[:, 16:] = 0.0
        weight[:, 16:, 1] = 3.0  # gate 2 * unit + 1, up 3; the sigmoid of such a gate is 1
        y, wanted = mot_linear(x, weight, plan, epilogue=SILU_MUL), 3 * (2 * unit + 1)
    assert torch.equal(y, torch.full_like(y, wanted))
    # What rounding before the step gives instead.
    assert torch.tensor(2 * unit + 1, dtype=dtype) == 2 * unit


# --- strides and aliasing: on integers, bit for bit


def dirty(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout, with NaN in every gap."""
    *lead, rows, columns = t.shape
    if layout == "row_stride":
        view = poisoned((*lead, rows + 1, columns + 5), t.dtype, t.device)[..., :rows, 3:-2]
    elif layout == "column_stride":
        view = poisoned((*lead, rows, 2 * columns), t.dtype, t.device)[..., ::2]
    elif layout == "transposed":
        view = poisoned((*lead, columns, rows + 2), t.dtype, t.device)[..., :rows].mT
    else:
        raise ValueError(layout)
    view.copy_(t)
    assert view.stride() != t.stride()
    return view


# Several steps over K in every dtype, so that pointers advance; the computed default may take one.
MANY_STEPS = TileConfig(16, 32, 16, group_m=2, num_warps=1, num_stages=2)

layouts = pytest.mark.parametrize("layout", ["row_stride", "column_stride", "transposed"])
strided_routes = pytest.mark.parametrize("name", ["scattered", "one_branch", "no_gen_rows"])


@pytest.mark.usefixtures("best_path")
@layouts
@strided_routes
@pytest.mark.parametrize("argument", ["x", "weight", "residual"])
def test_mot_linear_strided_input(
    argument: str, name: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    options = {"dtype": dtype, "device": device}
    tensors = {
        "x": integers(route.num_rows, INTEGER_K, **options),
        "weight": integers(2, 50, INTEGER_K, **options),
        "residual": integers(route.num_rows, 50, **options),
    }
    wanted = exact(tensors["x"], tensors["weight"], route) + tensors["residual"]
    tensors[argument] = dirty(tensors[argument], layout)
    epilogue = AddResidual(tensors["residual"])
    plan = route.plan(device)
    y = mot_linear(tensors["x"], tensors["weight"], plan, epilogue=epilogue, config=MANY_STEPS)
    assert torch.equal(y, wanted)


@pytest.mark.usefixtures("best_path")
@layouts
def test_mot_linear_strided_weight_and_bias_silu_mul(
    layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The up half advances by the same strides as the gate half."""
    torch.manual_seed(0)
    plan = ROUTES["scattered"].plan(device)
    x = integers(plan.num_rows, INTEGER_K, dtype=dtype, device=device)
    weight = integers(2, 50, INTEGER_K, dtype=dtype, device=device)
    bias = integers(2, 50, dtype=dtype, device=device)
    options = {"plan": plan, "epilogue": SILU_MUL, "config": MANY_STEPS}
    wanted = mot_linear(x, weight, bias=bias, **options)
    y = mot_linear(x, dirty(weight, layout), bias=dirty(bias, layout), **options)
    assert torch.equal(y, wanted)


@pytest.mark.usefixtures("best_path")
def test_mot_linear_expert_stride(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    route = ROUTES["three_experts"]
    options = {"dtype": dtype, "device": device}
    x = integers(route.num_rows, INTEGER_K, **options)
    weight, bias = integers(3, 50, INTEGER_K, **options), integers(3, 50, **options)
    wanted = exact(x, weight, route, bias)
    apart = poisoned((6, 50, INTEGER_K), dtype, device)[::2].copy_(weight)
    bias_apart = poisoned((3, 60), dtype, device)[:, :50].copy_(bias)
    assert torch.equal(mot_linear(x, apart, route.plan(device), bias=bias_apart), wanted)


@pytest.mark.usefixtures("best_path")
@layouts
@strided_routes
def test_mot_linear_strided_out_leaves_gaps(
    name: str, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    x = integers(route.num_rows, INTEGER_K, dtype=dtype, device=device)
    weight = integers(2, 50, INTEGER_K, dtype=dtype, device=device)
    wanted = exact(x, weight, route)
    out = dirty(wanted, layout).fill_(float("nan"))
    assert mot_linear(x, weight, route.plan(device), out=out) is out
    assert torch.equal(out, wanted)
    out.fill_(float("nan"))
    everything = torch.empty(0, dtype=dtype, device=device).set_(out.untyped_storage())
    assert everything.isnan().all(), "wrote outside of `out`"


@pytest.mark.usefixtures("best_path")
@strided_routes
def test_mot_linear_out_is_residual(name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    options = {"dtype": dtype, "device": device}
    x, weight = integers(route.num_rows, INTEGER_K, **options), integers(2, 300, 40, **options)
    stream = integers(route.num_rows, 300, **options)
    wanted = exact(x, weight, route) + stream
    y = mot_linear(x, weight, route.plan(device), epilogue=AddResidual(stream), out=stream)
    assert y is stream
    assert torch.equal(stream, wanted)


# The interpreter multiplies with NumPy, which warns of inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("best_path")
@epilogues
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("bad_row", [0, 20, 39], ids="row_{}".format)
def test_mot_linear_bad_row_stays_alone(
    bad_row: int, value: float, epilogue: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    route = ROUTES["first_and_last_row"]
    options = {"dtype": dtype, "device": device}
    x, weight = normal(route.num_rows, 72, **options), normal(2, 144, 72, **options)
    chosen = make_epilogue(epilogue, normal(route.num_rows, 144, **options))
    plan = route.plan(device)
    clean = mot_linear(x, weight, plan, epilogue=chosen)
    x[bad_row] = value
    y = mot_linear(x, weight, plan, epilogue=chosen)
    others = torch.arange(route.num_rows, device=device) != bad_row
    assert torch.equal(y[others], clean[others])
    assert not y[bad_row].isfinite().any()


# --- dense, gradients


@pytest.mark.parametrize("which", ["none", "all"], ids="bias_{}".format)
def test_mot_linear_without_plan_is_dense(
    which: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x, weight = normal(33, 72, **options), normal(2, 144, 72, **options)
    bias = bias_for(which, normal, 2, 144, **options)
    dense = F.linear(x, weight[0], None if bias is None else bias[0])
    assert torch.equal(mot_linear(x, weight, bias=bias), dense)
    out = poisoned((33, 144), dtype, device)
    assert mot_linear(x, weight, bias=bias, out=out) is out
    assert torch.equal(out, dense)
    residual = normal(33, 144, **options)
    y = mot_linear(x, weight, bias=bias, epilogue=AddResidual(residual))
    assert torch.equal(y, dense + residual)


@all_routes
def test_mot_linear_gradients_equal_loop(route: Route, device: torch.device) -> None:
    """Integer values make every gradient exact, in whatever order it is summed."""
    torch.manual_seed(0)
    options = {"dtype": torch.float32, "device": device}
    leaves = [
        integers(route.num_rows, INTEGER_K, **options),
        integers(route.num_experts, 50, INTEGER_K, **options),
        integers(route.num_experts, 50, **options),
        integers(route.num_rows, 50, **options),
    ]
    upstream = integers(route.num_rows, 50, **options)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, leaves, upstream)

    for leaf in leaves:
        leaf.requires_grad_()
    x, weight, bias, residual = leaves
    epilogue = AddResidual(residual)
    y = mot_linear(x, weight, route.plan(device), bias=bias, epilogue=epilogue)
    labels = labels_of(route, device)
    looped = looped_linear(x, weight, labels, bias=bias, epilogue=epilogue)
    assert torch.equal(y, looped)
    for ours, theirs in zip(gradients(y), gradients(looped), strict=True):
        assert torch.equal(ours, theirs)


@epilogues
@pytest.mark.parametrize("name", ["first_and_last_row", "four_experts_one_empty", "no_und_rows"])
def test_mot_linear_gradcheck(name: str, epilogue: str) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    plan = route.plan()
    x, weight, bias, residual = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (
            (route.num_rows, 3),
            (route.num_experts, 4, 3),
            (route.num_experts, 4),
            (route.num_rows, 4),
        )
    )

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        chosen = make_epilogue(epilogue, leaves[3])
        return mot_linear(leaves[0], leaves[1], plan, bias=leaves[2], epilogue=chosen)

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual))
    # Twice: a sine makes the first derivative depend on all of them.
    leaves = (x, weight, bias, residual)
    assert torch.autograd.gradgradcheck(lambda *given: run(*given).sin(), leaves)


@pytest.mark.parametrize("leaf", ["x", "weight", "bias", "residual"])
def test_mot_linear_gradient_of_one_argument(leaf: str, device: torch.device) -> None:
    """Whichever argument asks, the differentiable path is taken."""
    torch.manual_seed(0)
    route = ROUTES["scattered"]
    options = {"dtype": torch.float32, "device": device}
    tensors = {
        "x": integers(route.num_rows, INTEGER_K, **options),
        "weight": integers(2, 50, INTEGER_K, **options),
        "bias": integers(2, 50, **options),
        "residual": integers(route.num_rows, 50, **options),
    }
    tensors[leaf].requires_grad_()
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    epilogue = AddResidual(tensors["residual"])
    y = mot_linear(x, weight, route.plan(device), bias=bias, epilogue=epilogue)
    looped = looped_linear(x, weight, labels_of(route, device), bias=bias, epilogue=epilogue)
    (ours,) = torch.autograd.grad(y.sum(), tensors[leaf])
    (theirs,) = torch.autograd.grad(looped.sum(), tensors[leaf])
    assert torch.equal(ours, theirs)


def test_mot_linear_gradient_into_out(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 8, device=device, requires_grad=True)
    weight = torch.randn(2, 6, 8, device=device)
    plan = ROUTES["first_and_last_row"].plan(device)
    out = poisoned((40, 6), torch.float32, device)
    mot_linear(x, weight, plan, out=out).sum().backward()
    (wanted,) = torch.autograd.grad(mot_linear(x, weight, plan).sum(), x)
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


# A weight in a format has no backward.
@pytest.mark.parametrize(
    ("stored", "gradient"), [("plain", False), ("plain", True), ("fp8", False)]
)
@pytest.mark.parametrize("planned", [False, True])
def test_mot_linear_under_autocast(
    planned: bool, stored: str, gradient: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    plan = ROUTES["first_and_last_row"].plan(device)
    x, w = torch.randn(plan.num_rows, 8, device=device), torch.randn(2, 6, 8, device=device)
    x.requires_grad_(gradient)
    weight = w if stored == "plain" else quantize_weight(w, Fp8W8A8())
    wanted = mot_linear(x, weight, plan if planned else None)
    with torch.autocast(device.type, torch.bfloat16):
        y = mot_linear(x, weight, plan if planned else None)
    assert y.dtype is torch.float32 and torch.equal(y, wanted)


@pytest.mark.parametrize("stored", ["plain", "fp8"])
def test_mot_linear_tells_autograd_what_it_overwrites(stored: str, device: torch.device) -> None:
    """Also the second time, replayed: a backward that needs what was there must not run."""
    torch.manual_seed(0)
    plan = ROUTES["first_and_last_row"].plan(device)
    x, w = torch.randn(plan.num_rows, 8, device=device), torch.randn(2, 6, 8, device=device)
    weight = w if stored == "plain" else quantize_weight(w, Fp8W8A8())
    for _ in range(2):
        saved = torch.randn(plan.num_rows, 6, device=device)
        factor = torch.ones_like(saved, requires_grad=True)
        product = (factor * saved).sum()
        mot_linear(x, weight, plan, out=saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_mot_linear_float64_takes_the_reference() -> None:
    torch.manual_seed(0)
    route = ROUTES["scattered"]
    x, weight = torch.randn(150, 8).double(), torch.randn(2, 6, 8).double()
    plan = route.plan()
    assert torch.equal(mot_linear(x, weight, plan), reference.mot_linear(x, weight, plan))


def test_stack_bias() -> None:
    a, b = torch.randn(5), torch.randn(5)
    assert stack_bias([None, None]) is None
    assert stack_bias([]) is None
    stacked = stack_bias([None, a, b, None])
    assert stacked is not None
    assert torch.equal(stacked, torch.stack([torch.zeros(5), a, b, torch.zeros(5)]))
