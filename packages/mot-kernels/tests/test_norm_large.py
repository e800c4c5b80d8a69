"""The norms at a model's sizes, and past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import RoutePlan, mot_qk_norm_rope, mot_rms_norm
from mot_kernels.testing import (
    assert_close,
    looped_qk_norm_rope,
    looped_rms_norm,
    poisoned,
)

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _memory_for_the_next_test() -> None:
    torch.cuda.empty_cache()


def one_branch(image_tokens: int, device: torch.device) -> RoutePlan:
    """One CFG branch: an image between its two markers."""
    runs = [(0, 1), (1, image_tokens), (0, 1)]
    return RoutePlan.from_runs(runs, num_experts=2, device=device)


def rope_table(positions: int, device: torch.device) -> torch.Tensor:
    angles = torch.outer(torch.arange(float(positions)), 1e6 ** -torch.linspace(0, 1, 64))
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


def test_mot_rms_norm_bagel(device: torch.device) -> None:
    torch.manual_seed(0)
    plan = one_branch(4096, device)
    x, residual = (torch.randn(plan.num_rows, 3584, device=device, dtype=BF16) for _ in range(2))
    weight = torch.randn(2, 3584, device=device, dtype=BF16)
    labels = plan.expert_ids
    truth, _ = looped_rms_norm(x.double(), weight.double(), labels, residual=residual.double())
    baseline, sums = looped_rms_norm(x, weight, labels, residual=residual)
    y, summed = mot_rms_norm(x, weight, plan, residual=residual, out=x)
    assert_close("mot_rms_norm", y, truth, plan, baseline)
    assert torch.equal(summed, sums)


def test_mot_qk_norm_rope_bagel(device: torch.device) -> None:
    torch.manual_seed(0)
    plan = one_branch(4096, device)
    qkv = torch.randn(plan.num_rows, (28 + 2 * 4) * 128, device=device, dtype=BF16)
    q_weight, k_weight = torch.randn(2, 2, 128, device=device, dtype=BF16)
    rope = rope_table(32, device)
    positions = torch.full((plan.num_rows,), 31, device=device)
    heads = {"num_heads": 28, "num_kv_heads": 4}
    wide = [t.double() for t in (qkv, q_weight, k_weight, rope)]
    truth = looped_qk_norm_rope(*wide, positions, plan.expert_ids, **heads)
    baseline = looped_qk_norm_rope(
        qkv, q_weight, k_weight, rope, positions, plan.expert_ids, **heads
    )
    q, k, v = mot_qk_norm_rope(qkv, q_weight, k_weight, rope, positions, plan, **heads)
    assert_close("q", q, truth[0], plan, baseline[0])
    assert_close("k", k, truth[1], plan, baseline[1])
    assert torch.equal(v, baseline[2])


def test_mot_rms_norm_past_int32(device: torch.device) -> None:
    torch.manual_seed(0)
    plan = one_branch(600_000, device)
    x = torch.randn(plan.num_rows, 3584, device=device, dtype=BF16)
    assert x.numel() > 2**31
    weight = torch.randn(2, 3584, device=device, dtype=BF16)
    last = x[-50:].clone()
    y = mot_rms_norm(x, weight, plan, out=x)
    few = RoutePlan.from_labels(plan.expert_ids[-50:], 2)
    truth, _ = looped_rms_norm(last.double(), weight.double(), few.expert_ids)
    baseline, _ = looped_rms_norm(last, weight, few.expert_ids)
    assert_close("last rows", y[-50:], truth, few, baseline)


def test_mot_qk_norm_rope_past_int32(device: torch.device) -> None:
    """Both the projection and the cache it goes to."""
    torch.manual_seed(0)
    plan = one_branch(480_000, device)
    qkv = torch.randn(plan.num_rows, (28 + 2 * 4) * 128, device=device, dtype=BF16)
    cache = poisoned((2_200_000, 2, 4, 128), BF16, device)
    assert min(qkv.numel(), cache.numel()) > 2**31
    q_weight, k_weight = torch.randn(2, 2, 128, device=device, dtype=BF16)
    rope, heads = rope_table(32, device), {"num_heads": 28, "num_kv_heads": 4}
    positions = torch.arange(plan.num_rows, device=device) % 32
    kv_rows = len(cache) - 1 - torch.arange(plan.num_rows, device=device)
    q, k, v = mot_qk_norm_rope(
        qkv,
        q_weight,
        k_weight,
        rope,
        positions,
        plan,
        **heads,
        k_out=cache[:, 0],
        v_out=cache[:, 1],
        kv_rows=kv_rows,
    )
    few = RoutePlan.from_labels(plan.expert_ids[-50:], 2)
    some, slots = qkv[-50:], kv_rows[-50:]
    wide = [t.double() for t in (some, q_weight, k_weight, rope)]
    truth = looped_qk_norm_rope(*wide, positions[-50:], few.expert_ids, **heads)
    narrow = (some, q_weight, k_weight, rope)
    baseline = looped_qk_norm_rope(*narrow, positions[-50:], few.expert_ids, **heads)
    assert_close("q", q[-50:], truth[0], few, baseline[0])
    assert_close("k", k[slots], truth[1], few, baseline[1])
    assert torch.equal(v[slots], baseline[2])
    assert cache[: len(cache) - plan.num_rows].isnan().all()
    assert not cache[-plan.num_rows :].isnan().any()
