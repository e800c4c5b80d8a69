"""The compiled references: the values and gradients of those that are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mot_kernels import SILU_MUL, RoutePlan, mot_linear, mot_qk_norm_rope, mot_rms_norm, reference
from mot_kernels.testing import ROUTES, relative_error

D, HEADS, KV_HEADS, HEAD_DIM = 48, 3, 1, 16


def all_operations(plan: RoutePlan, leaves: list[Tensor], rope: Tensor) -> list[Tensor]:
    """One layer's worth of them, in the order that a layer has them."""
    x, norm, gate_up, qkv, head_norm = leaves
    positions = torch.arange(len(x), device=x.device, dtype=torch.int32)
    h, x = mot_rms_norm(x, norm, plan, residual=x.sin())
    heads = mot_linear(h, qkv, plan)
    q, k, v = mot_qk_norm_rope(
        heads, head_norm, head_norm, rope, positions, plan, num_heads=HEADS, num_kv_heads=KV_HEADS
    )
    return [x, q, k, v, mot_linear(h, gate_up, plan, epilogue=SILU_MUL)]


# Dynamo looks at the gradients of everything it is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_references_are_the_references(device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    rope = torch.randn(256, HEAD_DIM, device=device)
    for name in ("scattered", "first_and_last_row"):  # of other sizes: shapes are dynamic
        plan = ROUTES[name].plan(device)
        shapes = [
            (plan.num_rows, D),
            (2, D),
            (2, 2 * D, D),
            (2, (HEADS + 2 * KV_HEADS) * HEAD_DIM, D),
            (2, HEAD_DIM),
        ]
        leaves = [torch.randn(shape, **options).div_(8).requires_grad_() for shape in shapes]
        found = []
        for compiled in (False, True):
            if compiled:
                with reference.compiled():
                    outputs = all_operations(plan, leaves, rope)
            else:
                outputs = all_operations(plan, leaves, rope)
            gradients = torch.autograd.grad([y.float().square().sum() for y in outputs], leaves)
            found.append([y.detach() for y in (*outputs, *gradients)])
        assert all(y.dtype is dtype for y in found[1])
        limit = 1e-5 if dtype is torch.float32 else 0.01
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert relative_error(ours, theirs) < limit
