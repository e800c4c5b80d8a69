"""`mot_qk_norm_rope` against one masked norm per expert.

Judged as `mot_rms_norm` is (test_norm.py); a RoPE table of halves keeps results exact, so that
destinations are compared bit for bit, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from norm_cases import ALTERNATING, NO_EPS, all_routes, labels_of, powers, some_routes

from mot_kernels import RoutePlan, mot_qk_norm_rope
from mot_kernels.testing import ROUTES, Route, assert_close, looped_qk_norm_rope, poisoned

pytestmark = pytest.mark.usefixtures("poisoned_allocations", "best_path")
differentiable = pytest.mark.usefixtures("free_path")


def bits(t: torch.Tensor) -> torch.Tensor:
    """For comparing NaN with NaN."""
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


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
    none = Heads(ROUTES["no_rows"], 16, torch.float32, device, exact=False)
    none.run(q_scale=scale.fill_(7.0))
    assert scale.item() == 7.0  # there was nothing to be rounded


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
@pytest.mark.parametrize("leaf", ["qkv", "q_weight", "k_weight", "rope"])
def test_mot_qk_norm_rope_gradient_of_one_argument(leaf: str, device: torch.device) -> None:
    gradients = []
    for leaves in (["qkv", "q_weight", "k_weight", "rope"], [leaf]):
        heads = Heads(ALTERNATING, 16, torch.float32, device, exact=False)
        for name in leaves:
            setattr(heads, name, getattr(heads, name).clone().requires_grad_())
        q, k, _ = heads.run()
        gradients += torch.autograd.grad(q.sum() + k.sum(), getattr(heads, leaf))
    assert torch.equal(*gradients)


@differentiable
def test_mot_qk_norm_rope_gradcheck() -> None:
    cpu, route = torch.device("cpu"), ROUTES["first_and_last_row"]
    heads = Heads(route, 4, torch.float64, cpu, (2, 1), exact=False)

    def run(*leaves: torch.Tensor) -> Triple:
        heads.qkv, heads.q_weight, heads.k_weight = leaves
        return heads.run()

    leaves = (heads.qkv, heads.q_weight.clone(), heads.k_weight.clone())
    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves))
