"""`mot_rms_norm` and `mot_qk_norm_rope` against one masked norm per expert.

Two judges, as for `mot_linear`. Rows of +-2^j have a root mean square of 2^j, so with small
integer weights, a RoPE table of halves and a vanishing eps every result is exact: routes, strides
and destinations are compared bit for bit. On random data `assert_close` judges the rounding, on
routes that give each expert enough rows: all elements of a row share the rounding of its scale, so
in float32 one or two rows measure luck, not the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mot_kernels import RoutePlan, mot_linear, mot_qk_norm_rope, mot_rms_norm
from mot_kernels.testing import (
    ROUTES,
    Route,
    assert_close,
    looped_qk_norm_rope,
    looped_rms_norm,
    poisoned,
)

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "best_path")
differentiable = pytest.mark.usefixtures("free_path")

# Too small to change a mean square, but not 0: an unused lane must not divide by it.
NO_EPS = 2.0**-80

ALTERNATING = Route("alternating", 2, ((0, 1), (1, 1)) * 20)

all_routes = pytest.mark.parametrize("route", ROUTES.values(), ids=str)
some_routes = pytest.mark.parametrize("name", ["scattered", "one_branch", "one_row", "no_rows"])
with_residual = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


def powers(*shape: int) -> torch.Tensor:
    """+-2^j, one j for each vector of the last dimension."""
    signs = torch.randint(0, 2, shape) * 2.0 - 1.0
    return signs * 2.0 ** torch.randint(-1, 3, (*shape[:-1], 1))


def labels_of(route: Route, device: torch.device) -> torch.Tensor:
    return torch.tensor(route.labels, dtype=torch.int64, device=device)


def bits(t: torch.Tensor) -> torch.Tensor:
    """For comparing NaN with NaN."""
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


# --- mot_rms_norm


def as_pair(
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return result if isinstance(result, tuple) else (result, None)


@dataclass
class Norm:
    """Exact inputs of `mot_rms_norm` and what must come out."""

    route: Route
    residual: bool
    dtype: torch.dtype
    device: torch.device
    arguments: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        # A row of a width that leaves unused lanes; but a GPU divides by 80 only approximately,
        # which float32 would show.
        rows, width = self.route.num_rows, 64 if self.dtype is torch.float32 else 80
        summed, added = powers(rows, width), torch.randint(-2, 3, (rows, width)) / 2.0
        weight = torch.randint(-3, 4, (self.route.num_experts, width)).float()
        tensors = {"x": summed - added if self.residual else summed, "weight": weight}
        if self.residual:
            tensors["residual"] = added
        self.arguments = {k: t.to(self.device, self.dtype) for k, t in tensors.items()}
        labels = labels_of(self.route, torch.device("cpu"))
        y, _ = looped_rms_norm(summed.double(), weight.double(), labels, eps=NO_EPS)
        self.y = y.to(self.device, self.dtype)
        self.summed = summed.to(self.device, self.dtype)

    def run(self, **options: Any) -> None:
        plan = self.route.plan(self.device)
        y, summed = as_pair(mot_rms_norm(**self.arguments, plan=plan, eps=NO_EPS, **options))
        assert "out" not in options or y is options["out"]
        assert torch.equal(y, self.y)
        assert (summed is not None) == self.residual
        assert summed is None or torch.equal(summed, self.summed)


@with_residual
@all_routes
def test_mot_rms_norm_routes(
    route: Route, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    Norm(route, residual, dtype, device).run()


@with_residual
@some_routes
def test_mot_rms_norm_out_is_x(
    name: str, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    norm = Norm(ROUTES[name], residual, dtype, device)
    norm.run(out=norm.arguments["x"])


@pytest.mark.parametrize("argument", ["x", "residual", "out", "weight"])
def test_mot_rms_norm_strided(argument: str, dtype: torch.dtype, device: torch.device) -> None:
    norm = Norm(ROUTES["scattered"], True, dtype, device)
    norm.arguments["out"] = poisoned(tuple(norm.y.shape), dtype, device)
    rows, width = norm.arguments[argument].shape
    whole = poisoned((rows, width + 20), dtype, device)
    norm.arguments[argument] = whole[:, 10:-10].copy_(norm.arguments[argument])
    norm.run()
    assert torch.equal(norm.arguments["out"], norm.y)
    assert whole[:, :10].isnan().all()
    assert whole[:, -10:].isnan().all()


def judge_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    plan: RoutePlan | None,
    eps: float,
) -> None:
    labels = torch.zeros(len(x), device=x.device) if plan is None else plan.expert_ids
    wide = None if residual is None else residual.double()
    truth, _ = looped_rms_norm(x.double(), weight.double(), labels, residual=wide, eps=eps)
    baseline, sums = looped_rms_norm(x, weight, labels, residual=residual, eps=eps)
    y, summed = as_pair(mot_rms_norm(x, weight, plan, residual=residual, eps=eps))
    assert_close("mot_rms_norm", y, truth, plan, baseline)
    assert summed is None or torch.equal(summed, sums)  # one addition, rounded once: no freedom


@with_residual
@pytest.mark.parametrize("width", [1, 16, 80, 3584], ids="width{}".format)
def test_mot_rms_norm_rounding(
    width: int, residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x, added = (normal(ALTERNATING.num_rows, width, **options) for _ in range(2))
    weight = normal(2, width, **options)
    judge_rms_norm(x, weight, added if residual else None, ALTERNATING.plan(device), 1e-6)


@with_residual
def test_mot_rms_norm_without_plan(
    residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x, added = normal(40, 80, **options), normal(40, 80, **options)
    judge_rms_norm(x, normal(2, 80, **options), added if residual else None, None, 1e-6)


def test_mot_rms_norm_eps(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x, weight = normal(40, 80, **options), normal(2, 80, **options)
    judge_rms_norm(x, weight, None, ALTERNATING.plan(device), 0.5)
    x[3] = 0.0
    assert not mot_rms_norm(x, weight, ALTERNATING.plan(device))[3].any()


def test_mot_rms_norm_bad_row_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x, weight = normal(150, 80, **options), normal(2, 80, **options)
    plan = ROUTES["scattered"].plan(device)
    clean = mot_rms_norm(x, weight, plan)
    x[70, 5] = float("nan")
    y = mot_rms_norm(x, weight, plan)
    assert y[70].isnan().all()
    y[70] = clean[70]
    assert torch.equal(y, clean)


@differentiable
def test_forward_mode_is_not_lost() -> None:
    """A tangent of zeros would be a wrong derivative: it is right, or an error."""
    plan = RoutePlan.from_runs([(0, 2), (1, 4)], num_experts=2)
    x, weight, gamma = torch.randn(6, 16), torch.randn(2, 8, 16), torch.randn(2, 16)

    def tangent(run: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(run, (at,), (torch.ones_like(at),))[1]

    found = tangent(lambda g: mot_rms_norm(x, g, plan), gamma)
    torch.testing.assert_close(found, mot_rms_norm(x, torch.ones_like(gamma), plan))
    with pytest.raises(RuntimeError, match="jvp"):
        tangent(lambda w: mot_linear(x, w, plan), weight)


@differentiable
def test_gradients_of_torch_func() -> None:
    plan = RoutePlan.from_runs([(0, 2), (1, 4)], num_experts=2)
    x, bias = torch.randn(6, 16), torch.randn(2, 8)
    weight = torch.randn(2, 8, 16, requires_grad=True)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return mot_linear(x, weight, plan, bias=bias).square().sum()

    found = torch.func.grad(loss)(weight.detach())
    loss(weight).backward()
    assert torch.equal(found, weight.grad)


@differentiable
@with_residual
@pytest.mark.parametrize("name", ["first_and_last_row", "four_experts_one_empty"])
def test_mot_rms_norm_gradcheck(name: str, residual: bool) -> None:
    torch.manual_seed(0)
    route = ROUTES[name]
    plan = route.plan()
    x, added, weight = (
        torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        for rows in (route.num_rows, route.num_rows, route.num_experts)
    )
    leaves = (x, weight, added) if residual else (x, weight)

    def run(
        x: torch.Tensor, weight: torch.Tensor, added: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return mot_rms_norm(x, weight, plan, residual=added)

    assert torch.autograd.gradcheck(run, leaves)


@differentiable
@pytest.mark.parametrize("leaf", ["x", "weight", "residual"])
def test_mot_rms_norm_gradient_of_one_argument(leaf: str, device: torch.device) -> None:
    """Whichever argument asks, the differentiable path is taken: all three give one result."""
    torch.manual_seed(0)
    plan = ALTERNATING.plan(device)
    shapes = {"x": (40, 80), "weight": (2, 80), "residual": (40, 80)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    all_leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y, _ = mot_rms_norm(**all_leaves, plan=plan)
    (wanted,) = torch.autograd.grad(y.sum(), all_leaves[leaf])
    tensors[leaf].requires_grad_()
    y, _ = mot_rms_norm(**tensors, plan=plan)
    (ours,) = torch.autograd.grad(y.sum(), tensors[leaf])
    assert torch.equal(ours, wanted)


# --- mot_qk_norm_rope

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Heads:
    """Inputs of `mot_qk_norm_rope`, exact or random, and what must come out."""

    route: Route
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    heads: tuple[int, int] = (6, 2)  # grouped-query attention
    exact: bool = True

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        rows, size = self.route.num_rows, self.head_dim
        all_heads = self.heads[0] + 2 * self.heads[1]
        if self.exact:
            qkv = powers(rows, all_heads, size).flatten(1)
            weights = torch.randint(-3, 4, (2, self.route.num_experts, size))
            rope = torch.randint(-2, 3, (500, size)) / 2.0
        else:
            qkv = torch.randn(rows, all_heads * size)
            weights = torch.randn(2, self.route.num_experts, size)
            angles = torch.outer(torch.arange(500.0), 1e4 ** -torch.linspace(0, 1, size // 2))
            rope = torch.cat([angles.cos(), angles.sin()], dim=1)
        self.qkv = qkv.to(self.device, self.dtype)
        self.q_weight, self.k_weight = weights.to(self.device, self.dtype)
        self.rope = rope.to(self.device)
        self.positions = torch.randint(0, 500, (rows,)).to(self.device)
        self.plan: RoutePlan | None = self.route.plan(self.device)
        self.options = {
            "num_heads": self.heads[0],
            "num_kv_heads": self.heads[1],
            "eps": NO_EPS if self.exact else 1e-6,
        }

    def run(self, **options: Any) -> Triple:
        tensors = (self.qkv, self.q_weight, self.k_weight, self.rope, self.positions)
        return mot_qk_norm_rope(*tensors, self.plan, **self.options, **options)

    def looped(self, *, wide: bool) -> Triple:
        tensors = [self.qkv, self.q_weight, self.k_weight, self.rope]
        if wide:
            tensors = [t.double() for t in tensors]
        labels = labels_of(self.route, self.device)
        return looped_qk_norm_rope(*tensors, self.positions, labels, **self.options)

    def compare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Bit for bit; `k` and `v` in row order."""
        assert self.exact
        for ours, wanted in zip((q, k, v), self.looped(wide=True), strict=True):
            assert torch.equal(ours, wanted.to(self.dtype))

    def judge(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        truth, baseline = self.looped(wide=True), self.looped(wide=False)
        assert_close("q", q, truth[0], self.plan, baseline[0])
        assert_close("k", k, truth[1], self.plan, baseline[1])
        assert torch.equal(v, baseline[2])


@all_routes
def test_mot_qk_norm_rope_routes(route: Route, dtype: torch.dtype, device: torch.device) -> None:
    heads = Heads(route, 16, dtype, device)
    heads.compare(*heads.run())


@pytest.mark.parametrize(
    ("head_dim", "heads"),
    [
        pytest.param(2, (6, 2), id="head2"),
        pytest.param(16, (6, 2), id="head16"),
        pytest.param(64, (6, 2), id="head64"),
        pytest.param(64, (4, 4), id="head64-as_many_kv_heads"),
        pytest.param(64, (1, 1), id="head64-single"),
        pytest.param(96, (6, 2), id="head96"),
        pytest.param(128, (6, 2), id="head128"),
    ],
)
def test_mot_qk_norm_rope_rounding(
    head_dim: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = Heads(ALTERNATING, head_dim, dtype, device, heads, exact=False)
    inputs.judge(*inputs.run())


@pytest.mark.parametrize(("head_dim", "size"), [(16, 1.0), (96, 2.0**-9), (128, 40.0), (128, 0.0)])
def test_mot_qk_norm_rope_rounds_q(
    head_dim: int, size: float, dtype: torch.dtype, device: torch.device
) -> None:
    """To the nearest of what it is without, by a scale that no number is too large for."""
    heads = Heads(ROUTES["scattered"], head_dim, dtype, device, exact=False)
    heads.q_weight *= size
    q, k, v = heads.run()
    for _ in range(2):  # and once more, replayed
        scale = torch.full((1,), float("nan"), device=device)
        rounded, own_k, own_v = heads.run(q_scale=scale)
        assert rounded.dtype is torch.float8_e4m3fn
        most = heads.q_weight.double().abs().max().item() * head_dim**0.5 / 448
        assert most <= scale.item() < max(2 * most, 2.0**-59)
        assert math.frexp(scale.item())[0] == 0.5
        wanted = (q.float() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(rounded.view(torch.uint8), wanted.view(torch.uint8))
        assert torch.equal(own_k, k) and torch.equal(own_v, v)


def test_mot_qk_norm_rope_scale_of_exact_sizes(device: torch.device) -> None:
    """448 times a power of two needs that power, anything above the next one."""
    for weight, wanted in ((112.0, 1.0), (112.125, 2.0), (56.0, 0.5)):
        heads = Heads(ROUTES["scattered"], 16, torch.float32, device, exact=False)
        heads.q_weight = torch.full_like(heads.q_weight, -weight)
        scale = torch.zeros(1, device=device)
        heads.run(q_scale=scale)
        assert scale.item() == wanted


def test_mot_qk_norm_rope_without_plan(dtype: torch.dtype, device: torch.device) -> None:
    heads = Heads(ROUTES["one_expert"], 64, dtype, device, exact=False)
    heads.plan = None
    heads.judge(*heads.run())


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_mot_qk_norm_rope_integer_types(
    integer: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    heads = Heads(ROUTES["scattered"], 64, dtype, device)
    heads.positions = heads.positions.to(integer)
    slots = torch.randperm(heads.route.num_rows).to(device, integer)
    k, v = (poisoned((heads.route.num_rows, 2, 64), dtype, device) for _ in range(2))
    q, *_ = heads.run(k_out=k, v_out=v, kv_rows=slots)
    heads.compare(q, k[slots.long()], v[slots.long()])


@some_routes
@pytest.mark.parametrize("layout", ["separate", "interleaved", "heads_first"])
def test_mot_qk_norm_rope_kv_rows(
    layout: str, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """K and V land in their rows of a larger cache; not a bit of anything else changes."""
    heads = Heads(ROUTES[name], 16, dtype, device)
    rows = heads.route.num_rows
    slots = rows + 70
    if layout == "separate":
        cache = poisoned((2, slots, 2, 16), dtype, device)
        k_out, v_out = cache[0], cache[1]
    elif layout == "interleaved":
        cache = poisoned((slots, 2, 2, 16), dtype, device)
        k_out, v_out = cache[:, 0], cache[:, 1]
    else:
        cache = poisoned((2, 2, slots, 19), dtype, device)
        k_out, v_out = cache[0, ..., 1:-2].transpose(0, 1), cache[1, ..., 1:-2].transpose(0, 1)
    before = cache.clone()
    kv_rows = torch.randperm(slots)[:rows].to(device)
    q, k, v = heads.run(k_out=k_out, v_out=v_out, kv_rows=kv_rows)
    assert k is k_out
    assert v is v_out
    heads.compare(q, k[kv_rows], v[kv_rows])
    k_out[kv_rows] = v_out[kv_rows] = float("nan")
    assert torch.equal(bits(cache), bits(before))


def test_mot_qk_norm_rope_strided(dtype: torch.dtype, device: torch.device) -> None:
    heads = Heads(ROUTES["scattered"], 64, dtype, device)
    rows, columns = heads.qkv.shape
    heads.qkv = poisoned((rows, columns + 24), dtype, device)[:, 8:-16].copy_(heads.qkv)
    whole = poisoned((rows, 7, 72), dtype, device)
    q_out = whole[:, 1:, :64]
    kv = poisoned((rows, 2, 2, 64), dtype, device)
    q, k, v = heads.run(q_out=q_out, k_out=kv[:, 0], v_out=kv[:, 1])
    assert q is q_out
    heads.compare(q, k, v)
    q_out[...] = float("nan")
    assert whole.isnan().all()


def test_mot_qk_norm_rope_bad_row_stays_alone(dtype: torch.dtype, device: torch.device) -> None:
    heads = Heads(ROUTES["scattered"], 16, dtype, device)
    clean = heads.run()
    heads.qkv[70] = float("nan")
    for ours, theirs in zip(heads.run(), clean, strict=True):
        assert ours[70].isnan().all()
        ours[70] = theirs[70]
        assert torch.equal(ours, theirs)


@differentiable
@pytest.mark.parametrize("leaf", ["qkv", "q_weight", "k_weight"])
def test_mot_qk_norm_rope_gradient_of_one_argument(leaf: str, device: torch.device) -> None:
    gradients = []
    for leaves in (["qkv", "q_weight", "k_weight"], [leaf]):
        heads = Heads(ALTERNATING, 16, torch.float32, device, exact=False)
        for name in leaves:
            setattr(heads, name, getattr(heads, name).clone().requires_grad_())
        q, k, _ = heads.run()
        gradients += torch.autograd.grad(q.sum() + k.sum(), getattr(heads, leaf))
    assert torch.equal(*gradients)


def test_norms_tell_autograd_what_they_overwrite(device: torch.device) -> None:
    """Also the second time, replayed."""
    torch.manual_seed(0)
    x, gamma = torch.randn(6, 16, device=device), torch.randn(1, 16, device=device)
    qkv, rope = torch.randn(6, 64, device=device), torch.randn(6, 16, device=device)
    positions = torch.arange(6, device=device)
    for _ in range(2):
        out, k, v = (torch.randn(6, *shape, device=device) for shape in ((16,), (1, 16), (1, 16)))
        factors = [torch.ones_like(each, requires_grad=True) for each in (out, k, v)]
        sums = [(f * each).sum() for f, each in zip(factors, (out, k, v), strict=True)]
        mot_rms_norm(x, gamma, eps=1e-6, out=out)
        mot_qk_norm_rope(
            qkv, gamma, gamma, rope, positions, num_heads=2, num_kv_heads=1, eps=1e-6, k_out=k,
            v_out=v,
        )  # fmt: skip
        for each in sums:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                each.backward()


@differentiable
def test_mot_qk_norm_rope_gradcheck() -> None:
    cpu, route = torch.device("cpu"), ROUTES["first_and_last_row"]
    heads = Heads(route, 4, torch.float64, cpu, (2, 1), exact=False)

    def run(*leaves: torch.Tensor) -> Triple:
        heads.qkv, heads.q_weight, heads.k_weight = leaves
        return heads.run()

    leaves = (heads.qkv, heads.q_weight.clone(), heads.k_weight.clone())
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves))
