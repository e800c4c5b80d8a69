"""`mot_rms_norm` against one masked norm per expert.

Two judges, as for `mot_linear`. Rows of +-2^j have a root mean square of 2^j, so with small
integer weights and a vanishing eps every result is exact: routes and strides are compared bit for
bit. On random data `assert_close` judges the rounding, on routes that give each expert enough rows:
all elements of a row share the rounding of its scale, so in float32 one or two rows measure luck,
not the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from norm_cases import ALTERNATING, NO_EPS, all_routes, labels_of, powers, some_routes

from mot_kernels import RoutePlan, mot_linear, mot_qk_norm_rope, mot_rms_norm
from mot_kernels.testing import ROUTES, Route, assert_close, looped_rms_norm, poisoned

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "best_path")
differentiable = pytest.mark.usefixtures("free_path")

with_residual = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


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
