"""What `mot_rms_norm` says when arguments do not fit together."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import Int8W8A8, RoutePlan, mot_rms_norm

PLAN = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2)
BUFFER = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"x": torch.zeros(8)},
            ValueError,
            r"x has shape \(8,\) and weight \(2, 8\); expected x \(M, D\) and weight \(experts, D",
            id="x_one_dimensional",
        ),
        pytest.param(
            {"weight": torch.zeros(8)}, ValueError, r"weight \(8,\); expected", id="weight_shared"
        ),
        pytest.param(
            {"weight": torch.zeros(2, 9)}, ValueError, r"weight \(2, 9\); exp", id="weight_width"
        ),
        pytest.param(
            {"weight": [torch.zeros(8)] * 2}, TypeError, "weight is a list; exp", id="weight_list"
        ),
        pytest.param({"x": [1.0]}, TypeError, "x is a list; expected a tensor", id="x_list"),
        pytest.param(
            {"residual": [1.0]}, TypeError, "residual is a list; expected", id="residual_list"
        ),
        pytest.param({"quantize": {}}, TypeError, r"format is {}; expected", id="quantize_dict"),
        pytest.param(
            {"out": torch.zeros(1, 8).expand(3, 8)},
            ValueError,
            r"out has strides \(0, 1\): several of its elements are one",
            id="out_expanded",
        ),
        pytest.param(
            {"x": BUFFER[:3], "out": BUFFER[1:]},
            ValueError,
            "out overlaps x, which is needed while out is written",
            id="out_over_x",
        ),
        pytest.param(
            {"out": torch.zeros(3, 8, requires_grad=True)},
            ValueError,
            "out requires grad, but is to be written over",
            id="out_requires_grad",
        ),
        pytest.param(
            {"x": torch.zeros(3, 0), "weight": torch.zeros(2, 0), "quantize": Int8W8A8()},
            ValueError,
            "x has 0 columns, so quantize has nothing to round",
            id="quantize_no_columns",
        ),
        pytest.param(
            {"x": torch.zeros(3, 8, dtype=torch.int32)},
            TypeError,
            "x has dtype torch.int32; supported are bfloat16, float16, float32",
            id="x_integer",
        ),
        pytest.param(
            {"weight": torch.zeros(2, 8).half()},
            TypeError,
            "weight has dtype torch.float16 but x has torch.float32; convert one",
            id="weight_dtype",
        ),
        pytest.param(
            {"weight": torch.zeros(2, 8, device="meta")},
            ValueError,
            "weight is on meta but x is on cpu; move one",
            id="weight_device",
        ),
        pytest.param(
            {"x": torch.zeros(4, 8)}, ValueError, "plan routes 3 rows but x has 4", id="plan_rows"
        ),
        pytest.param(
            {"weight": torch.zeros(3, 8)},
            ValueError,
            "plan has 2 experts but weight has 3",
            id="plan_experts",
        ),
        pytest.param(
            {"plan": PLAN.to("meta")}, ValueError, "plan is on meta but x is on", id="plan_device"
        ),
        pytest.param(
            {"x": torch.zeros(8, 3).T},
            ValueError,
            r"x has strides \(1, 3\); its last dimension must be contiguous \(stride 1\)",
            id="x_transposed",
        ),
        pytest.param(
            {"weight": torch.zeros(8, 2).T},
            ValueError,
            "weight has strides",
            id="weight_transposed",
        ),
        pytest.param(
            {"residual": torch.zeros(8, 3).T}, ValueError, "residual has str", id="residual_transp"
        ),
        pytest.param(
            {"out": torch.zeros(8, 3).T}, ValueError, "out has strides", id="out_transposed"
        ),
        pytest.param(
            {"residual": torch.zeros(3, 9)},
            ValueError,
            r"residual has shape \(3, 9\); expected \(3, 8\)",
            id="residual_shape",
        ),
        pytest.param(
            {"residual": torch.zeros(3, 8).half()},
            TypeError,
            "residual has dtype torch.float16",
            id="residual_dtype",
        ),
        pytest.param(
            {"residual": torch.zeros(3, 8, device="meta")},
            ValueError,
            "residual is on meta",
            id="residual_device",
        ),
        pytest.param(
            {"out": torch.zeros(2, 8)},
            ValueError,
            r"out has shape \(2, 8\); expected \(3, 8\)",
            id="out_shape",
        ),
        pytest.param(
            {"out": torch.zeros(3, 8).half()}, TypeError, "out has dtype torch.fl", id="out_dtype"
        ),
    ],
)
def test_mot_rms_norm_errors(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(2, 8), "plan": PLAN} | changes
    with pytest.raises(error, match=message):
        mot_rms_norm(**arguments)
