"""What `mot_linear` says when arguments do not fit together."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import SILU_MUL, AddResidual, Int8W8A8, RoutePlan, mot_linear

X = torch.zeros(3, 8)
WEIGHT = torch.zeros(2, 6, 8)
PLAN = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"x": torch.zeros(1, 3, 8)},
            ValueError,
            r"x has shape \(1, 3, 8\) and weight \(2, 6, 8\); expected x \(M, K\) and weight",
            id="x_three_dimensional",
        ),
        pytest.param(
            {"weight": torch.zeros(6, 8)},
            ValueError,
            r"weight \(6, 8\); expected .*weight \(experts, N, K\)",
            id="weight_two_dimensional",
        ),
        pytest.param(
            {"weight": torch.zeros(2, 8, 6)},
            ValueError,
            r"weight has shape \(2, 8, 6\), so K=6, but x has K=8 columns",
            id="weight_transposed",
        ),
        pytest.param(
            {"weight": list(WEIGHT)},
            TypeError,
            r"weight is a list; expected a tensor \(experts, N, K\) or an ExpertWeight",
            id="weight_list",
        ),
        pytest.param(
            {"x": [1]}, TypeError, r"x is a list; expected a tensor \(M, K\)", id="x_list"
        ),
        pytest.param(
            {"plan": torch.tensor([0, 1, 1])},
            TypeError,
            "plan is a Tensor; expected a RoutePlan or None",
            id="plan_tensor",
        ),
        pytest.param(
            {"config": {"block_m": 16}}, TypeError, "config is a dict; expected", id="config_dict"
        ),
        pytest.param({"bias": [X]}, TypeError, "bias is a list; expected a tensor", id="bias_list"),
        pytest.param(
            {"epilogue": AddResidual(None)},
            TypeError,
            r"epilogue\.residual is a NoneType; expected a tensor of shape \(3, 6\)",
            id="residual_none",
        ),
        pytest.param(
            {"out": [X]}, TypeError, r"out is a list; expected a tensor of shape", id="out_list"
        ),
        pytest.param(
            {"config": (16, 64, 32)},
            TypeError,
            "config is a tuple; expected a TileConfig",
            id="config_tuple",
        ),
        pytest.param(
            {"x": X.double(), "weight": WEIGHT.double(), "quantize": Int8W8A8()},
            TypeError,
            "x has dtype torch.float64; quantize takes bfloat16, float16, float32",
            id="quantize_float64",
        ),
        pytest.param(
            {"x": torch.zeros(3, 8, dtype=torch.int8)},
            TypeError,
            "x has dtype torch.int8; supported are bfloat16, float16, float32",
            id="x_integer",
        ),
        pytest.param(
            {"x": torch.zeros(3, 8, dtype=torch.float64, device="meta")},
            TypeError,
            "x has dtype torch.float64; supported are",
            id="float64_off_the_cpu",
        ),
        pytest.param(
            {"weight": WEIGHT[:0], "plan": None},
            ValueError,
            "weight has 0 experts; expected at least 1",
            id="no_experts",
        ),
        pytest.param(
            {"weight": WEIGHT.half()},
            TypeError,
            "weight has dtype torch.float16 but x has torch.float32; convert one",
            id="weight_dtype",
        ),
        pytest.param(
            {"weight": WEIGHT.to("meta")},
            ValueError,
            "weight is on meta but x is on cpu; move one",
            id="weight_device",
        ),
        pytest.param(
            {"bias": torch.zeros(2, 6).half()},
            TypeError,
            "bias has dtype torch.float16",
            id="bias_dtype",
        ),
        pytest.param(
            {"bias": torch.zeros(2, 6, device="meta")},
            ValueError,
            "bias is on meta but x is on cpu",
            id="bias_device",
        ),
        pytest.param(
            {"bias": torch.zeros(6)},
            ValueError,
            r"bias has shape \(6,\); expected \(2, 6\), one row per expert \(stack_bias",
            id="bias_shared",
        ),
        pytest.param(
            {"plan": RoutePlan.from_runs([(0, 4)], num_experts=2)},
            ValueError,
            "plan routes 4 rows but x has 3; was the plan built for another layout?",
            id="plan_rows",
        ),
        pytest.param(
            {"plan": RoutePlan.from_runs([(0, 3)], num_experts=3)},
            ValueError,
            "plan has 3 experts but weight has 2",
            id="plan_experts",
        ),
        pytest.param(
            {"plan": PLAN.to("meta")},
            ValueError,
            r"plan is on meta but x is on cpu; build it there or use plan\.to\(device\)",
            id="plan_device",
        ),
        pytest.param(
            {"weight": torch.zeros(2, 7, 8), "epilogue": SILU_MUL},
            ValueError,
            "SILU_MUL needs gate and up halves, but weight has odd N=7",
            id="silu_mul_odd",
        ),
        pytest.param(
            {"epilogue": AddResidual(torch.zeros(3, 7))},
            ValueError,
            r"epilogue\.residual has shape \(3, 7\); expected \(3, 6\)",
            id="residual_shape",
        ),
        pytest.param(
            {"epilogue": AddResidual(torch.zeros(3, 6).half())},
            TypeError,
            r"epilogue\.residual has dtype torch.float16",
            id="residual_dtype",
        ),
        pytest.param(
            {"epilogue": AddResidual(torch.zeros(3, 6, device="meta"))},
            ValueError,
            r"epilogue\.residual is on meta",
            id="residual_device",
        ),
        pytest.param(
            {"epilogue": "silu"},
            TypeError,
            r"epilogue is 'silu'; expected None, SILU_MUL or AddResidual\(residual\)",
            id="epilogue_unknown",
        ),
        pytest.param(
            {"out": torch.zeros(3, 7)},
            ValueError,
            r"out has shape \(3, 7\); expected \(3, 6\)",
            id="out_shape",
        ),
        pytest.param(
            {"out": torch.zeros(3, 6), "epilogue": SILU_MUL},
            ValueError,
            r"out has shape \(3, 6\); expected \(3, 3\)",
            id="out_shape_silu_mul",
        ),
        pytest.param(
            {"out": torch.zeros(3, 6).half()}, TypeError, "out has dtype torch.fl", id="out_dtype"
        ),
        pytest.param(
            {"out": torch.zeros(3, 6, device="meta")}, ValueError, "out is on meta", id="out_device"
        ),
    ],
)
def test_mot_linear_errors(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": X, "weight": WEIGHT, "plan": PLAN} | changes
    with pytest.raises(error, match=message):
        mot_linear(**arguments)


@pytest.mark.usefixtures("kernels")
def test_out_that_is_still_read(device: torch.device) -> None:
    """The residual alone may be `out`, element by element: each is read before it is written."""
    x, weight = torch.randn(4, 8, device=device), torch.randn(2, 8, 8, device=device)
    plan = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2, device=device)
    for out in (x[:3], x[1:]):
        with pytest.raises(ValueError, match="out overlaps x, which is needed while out"):
            mot_linear(x[:3], weight, plan, out=out)
    residual = torch.randn(4, 8, device=device)
    with pytest.raises(ValueError, match="out overlaps the residual, which is needed"):
        mot_linear(x[:3], weight, plan, epilogue=AddResidual(residual[:3]), out=residual[1:])
    with pytest.raises(ValueError, match="out overlaps weight, which is needed"):
        mot_linear(x[:3], weight, plan, out=weight[1, :3])
    with pytest.raises(ValueError, match="out requires grad, but is to be written over"):
        mot_linear(x[:3], weight, plan, out=residual[:3].clone().requires_grad_())
    one_row = torch.empty(1, 8, device=device).expand(3, 8)
    with pytest.raises(ValueError, match=r"out has strides \(0, 1\): several of its elements"):
        mot_linear(x[:3], weight, plan, out=one_row)

    wanted = mot_linear(x[:3], weight, plan, epilogue=AddResidual(residual[:3]))
    both = torch.empty(3, 16, device=device)  # side by side in one buffer
    both[:, :8] = x[:3]
    for epilogue, out in ((AddResidual(residual[:3]), residual[:3]), (None, both[:, 8:])):
        rows = both[:, :8] if epilogue is None else x[:3]
        got = mot_linear(rows, weight, plan, epilogue=epilogue, out=out)
        assert got is out
        if epilogue is not None:
            assert torch.equal(got, wanted)
    assert torch.equal(both[:, 8:], mot_linear(x[:3], weight, plan))
