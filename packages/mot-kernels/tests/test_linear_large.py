"""`mot_linear` at a model's sizes, and past 2^31 elements in every tensor."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import SILU_MUL, AddResidual, Epilogue, RoutePlan, mot_linear
from mot_kernels.testing import assert_close, looped_linear, poisoned

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _full_precision_truth() -> None:
    assert torch.get_float32_matmul_precision() == "highest", "TF32 is no ground truth"


@pytest.fixture(autouse=True)
def _memory_for_the_next_test() -> None:
    torch.cuda.empty_cache()


def one_branch(image_tokens: int, device: torch.device) -> RoutePlan:
    """One CFG branch: an image between its two markers."""
    runs = [(0, 1), (1, image_tokens), (0, 1)]
    return RoutePlan.from_runs(runs, num_experts=2, device=device)


@pytest.mark.parametrize("image_tokens", [4096, 1024], ids="gen{}".format)
@pytest.mark.parametrize(
    ("k", "n", "epilogue"),
    [
        pytest.param(3584, 4608, "bias", id="qkv"),
        pytest.param(3584, 3584, "add_residual", id="attention_out"),
        pytest.param(3584, 37888, "silu_mul", id="gate_up"),
        pytest.param(18944, 3584, "add_residual", id="down"),
    ],
)
def test_mot_linear_bagel(
    k: int, n: int, epilogue: str, image_tokens: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": device}
    plan = one_branch(image_tokens, device)
    x = torch.randn(plan.num_rows, k, **options)
    weight = torch.randn(2, n, k, **options) * k**-0.5
    bias = torch.randn(2, n, **options) if epilogue == "bias" else None
    residual = torch.randn(plan.num_rows, n, **options) if epilogue == "add_residual" else None
    chosen: Epilogue | None = SILU_MUL if epilogue == "silu_mul" else None
    if residual is not None:
        chosen = AddResidual(residual)
    labels = plan.expert_ids
    wide_bias = None if bias is None else bias.float()
    truth = looped_linear(x.float(), weight.float(), labels, bias=wide_bias, epilogue=chosen)
    baseline = looped_linear(x, weight, labels, bias=bias, epilogue=chosen)
    # In place where the model will do it in place.
    out = poisoned(tuple(truth.shape), torch.bfloat16, device) if residual is None else residual
    y = mot_linear(x, weight, plan, bias=bias, epilogue=chosen, out=out)
    assert_close("mot_linear", y, truth, plan, baseline)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_mot_linear_does_not_wait_for_the_device(device: torch.device) -> None:
    plan = one_branch(1024, device)
    x = torch.randn(plan.num_rows, 256, device=device, dtype=torch.bfloat16)
    weight = torch.randn(2, 256, 256, device=device, dtype=torch.bfloat16)
    mot_linear(x, weight, plan)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        mot_linear(x, weight, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Small integers: every sum is exact, so the far corners must be equal bit for bit.


def integers(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-2, 3, shape, dtype=torch.int8, device=device).to(torch.bfloat16)


def corners(t: torch.Tensor) -> torch.Tensor:
    """The first and last 150 rows and columns: more than a tile each."""
    rows = torch.cat([t[:150], t[-150:]])
    return torch.cat([rows[:, :150], rows[:, -150:]], dim=1)


@pytest.mark.parametrize("epilogue", ["none", "add_residual", "silu_mul"])
def test_mot_linear_out_past_int32(epilogue: str, device: torch.device) -> None:
    torch.manual_seed(0)
    plan = one_branch(70_000 - 2, device)
    n_out = 37_888
    assert plan.num_rows * n_out > 2**31
    n = 2 * n_out if epilogue == "silu_mul" else n_out
    x, weight = integers(plan.num_rows, 32, device=device), integers(2, n, 32, device=device)
    out = poisoned((plan.num_rows, n_out), torch.bfloat16, device)
    chosen: Epilogue | None = SILU_MUL if epilogue == "silu_mul" else None
    if epilogue == "add_residual":
        out.fill_(3.0)
        chosen = AddResidual(out)
    mot_linear(x, weight, plan, epilogue=chosen, out=out)
    rows = torch.cat([torch.arange(150), torch.arange(plan.num_rows - 150, plan.num_rows)])
    rows, labels = rows.to(device), plan.expert_ids[rows.to(device)]
    if epilogue == "silu_mul":
        ends = torch.cat([torch.arange(150), torch.arange(n_out - 150, n_out)]).to(device)
        some = weight[:, torch.cat([ends, ends + n_out])]
        truth = looped_linear(x[rows].double(), some.double(), labels, epilogue=SILU_MUL)
        baseline = looped_linear(x[rows], some, labels, epilogue=SILU_MUL)
        few = RoutePlan.from_labels(labels, 2)
        assert_close("corners", corners(out), truth, few, baseline)
    else:
        wanted = looped_linear(x[rows], weight, labels) + (epilogue == "add_residual") * 3.0
        assert torch.equal(corners(out), corners(wanted))
    assert not out.isnan().any()


def test_mot_linear_x_past_int32(device: torch.device) -> None:
    torch.manual_seed(0)
    plan = one_branch(700_000, device)
    x, weight = integers(plan.num_rows, 3_584, device=device), integers(2, 16, 3_584, device=device)
    x *= torch.arange(3_584, device=device) % 128 == 0  # 28 terms: the sums stay exact
    assert x.numel() > 2**31
    assert torch.equal(mot_linear(x, weight, plan), looped_linear(x, weight, plan.expert_ids))


def test_mot_linear_weight_past_int32(device: torch.device) -> None:
    torch.manual_seed(0)
    runs = [(7, 3), (0, 2), (3, 4), (7, 1)]
    plan = RoutePlan.from_runs(runs, num_experts=8, device=device)
    x, weight = integers(10, 8_192, device=device), integers(8, 37_888, 8_192, device=device)
    x *= torch.arange(8_192, device=device) % 256 == 0  # 32 terms: the sums stay exact
    assert weight.numel() > 2**31
    assert torch.equal(mot_linear(x, weight, plan), looped_linear(x, weight, plan.expert_ids))
