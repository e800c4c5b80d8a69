"""What `mot_qk_norm_rope` says when arguments do not fit together."""

from __future__ import annotations

import pytest
import torch

from mot_kernels import RoutePlan, mot_qk_norm_rope

PLAN = RoutePlan.from_runs([(0, 1), (1, 2)], num_experts=2)
CACHE = torch.zeros(3, 2, 4)


def heads(rows: int, count: int, **options: object) -> torch.Tensor:
    return torch.zeros(rows, count, 4, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"q_weight": torch.zeros(4)},
            ValueError,
            r"q_weight has shape \(4,\) and k_weight \(2, 4\); expected the same \(experts, head",
            id="q_weight_shared",
        ),
        pytest.param(
            {"k_weight": torch.zeros(2, 6)}, ValueError, r"k_weight \(2, 6\)", id="k_weight_shape"
        ),
        pytest.param(
            {"qkv": torch.zeros(3, 31)},
            ValueError,
            r"qkv has shape \(3, 31\); with 4 query heads, 2 key/value heads and \(even\) head "
            r"size 4 it should be \(M, 32\)",
            id="qkv_columns",
        ),
        pytest.param(
            {
                "qkv": torch.zeros(3, 24),
                "q_weight": torch.zeros(2, 3),
                "k_weight": torch.zeros(2, 3),
            },
            ValueError,
            r"\(even\) head size 3",
            id="head_size_odd",
        ),
        pytest.param(
            {"rope": torch.zeros(9, 4).half()},
            TypeError,
            r"rope is torch.float16 of shape \(9, 4\); expected float32 \(positions, 4\): cos",
            id="rope_dtype",
        ),
        pytest.param(
            {"rope": torch.zeros(9, 2)}, ValueError, r"shape \(9, 2\); expected", id="rope_width"
        ),
        pytest.param(
            {"positions": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"positions is torch.int64 of shape \(2,\); expected an integer tensor of shape \(3,\)",
            id="positions_shape",
        ),
        pytest.param(
            {"positions": torch.zeros(3)},
            TypeError,
            "positions is torch.float32",
            id="positions_f",
        ),
        pytest.param(
            {"positions": torch.ones(3, dtype=torch.bool)},
            TypeError,
            "positions is torch.bool",
            id="positions_bool",
        ),
        pytest.param(
            {"positions": torch.arange(6)[::2]},
            ValueError,
            r"positions has strides \(2,\); its last dimension must be contiguous",
            id="positions_strided",
        ),
        pytest.param(
            {"positions": torch.zeros(1, dtype=torch.int64).expand(3)},
            ValueError,
            r"positions has strides \(0,\)",
            id="positions_expanded",
        ),
        pytest.param(
            {"positions": torch.arange(3, device="meta")},
            ValueError,
            "positions is on meta but qkv is on cpu; move one",
            id="positions_device",
        ),
        pytest.param(
            {"rope": torch.zeros(9, 4, device="meta")},
            ValueError,
            "rope is on meta but qkv is on cpu; move one",
            id="rope_device",
        ),
        pytest.param(
            {"qkv": torch.zeros(3, 32).half()},
            TypeError,
            "q_weight has dtype torch.float32 but qkv has torch.float16",
            id="weight_dtype",
        ),
        pytest.param(
            {"k_weight": torch.zeros(2, 4, device="meta")},
            ValueError,
            "k_weight is on meta but qkv is on cpu",
            id="k_weight_device",
        ),
        pytest.param(
            {"qkv": torch.zeros(32, 3).T}, ValueError, "qkv has strides", id="qkv_transposed"
        ),
        pytest.param(
            {"rope": torch.zeros(9, 8)[:, :4]},
            ValueError,
            "rope, q_weight and k_weight must be contiguous; call",
            id="rope_strided",
        ),
        pytest.param(
            {"plan": RoutePlan.from_runs([(0, 4)], num_experts=2)},
            ValueError,
            "plan routes 4 rows but qkv has 3",
            id="plan_rows",
        ),
        pytest.param(
            {"plan": RoutePlan.from_runs([(0, 3)], num_experts=1)},
            ValueError,
            "plan has 1 experts but q_weight has 2",
            id="plan_experts",
        ),
        pytest.param({"plan": PLAN.to("meta")}, ValueError, "plan is on meta", id="plan_device"),
        pytest.param(
            {"positions": [0, 1, 2]},
            TypeError,
            "positions is a list; expected a tensor of integers",
            id="positions_list",
        ),
        pytest.param(
            {"k_out": CACHE, "v_out": CACHE},
            ValueError,
            "k_out overlaps v_out, which is needed while k_out is written",
            id="k_out_is_v_out",
        ),
        pytest.param(
            {"k_out": heads(1, 2).expand(3, 2, 4), "v_out": heads(3, 2)},
            ValueError,
            r"k_out has strides \(0, 4, 1\): several of its elements are one",
            id="k_out_expanded",
        ),
        pytest.param(
            {"q_out": heads(3, 4).requires_grad_()},
            ValueError,
            "q_out requires grad, but is to be written over",
            id="q_out_requires_grad",
        ),
        pytest.param(
            {"k_out": heads(3, 2)},
            ValueError,
            "k_out and v_out belong together; give both or neither",
            id="k_out_alone",
        ),
        pytest.param(
            {"kv_rows": torch.arange(3)},
            ValueError,
            "kv_rows is given without k_out and v_out, whose rows it names",
            id="kv_rows_without_out",
        ),
        pytest.param(
            {"kv_rows": torch.arange(2), "k_out": heads(9, 2), "v_out": heads(9, 2)},
            ValueError,
            r"kv_rows is torch.int64 of shape \(2,\); expected an integer tensor of shape \(3,\)",
            id="kv_rows_shape",
        ),
        pytest.param(
            {"kv_rows": torch.arange(3).float(), "k_out": heads(9, 2), "v_out": heads(9, 2)},
            TypeError,
            r"kv_rows is torch.float32 of shape \(3,\); expected an integer",
            id="kv_rows_float",
        ),
        pytest.param(
            {"kv_rows": torch.arange(6)[::2], "k_out": heads(9, 2), "v_out": heads(9, 2)},
            ValueError,
            r"kv_rows has strides \(2,\); its last dimension must be contiguous",
            id="kv_rows_strided",
        ),
        pytest.param(
            {
                "kv_rows": torch.arange(3, device="meta"),
                "k_out": heads(9, 2),
                "v_out": heads(9, 2),
            },
            ValueError,
            "kv_rows is on meta but qkv is on cpu; move one",
            id="kv_rows_device",
        ),
        pytest.param(
            {"kv_rows": torch.arange(3), "k_out": heads(9, 2), "v_out": heads(8, 2)},
            ValueError,
            "k_out has 9 rows and v_out 8; kv_rows names rows of both, so give as many",
            id="v_out_slots",
        ),
        pytest.param(
            {"q_out": heads(3, 2)},
            ValueError,
            r"q_out has shape \(3, 2, 4\); expected \(3, 4, 4\)",
            id="q_out_shape",
        ),
        pytest.param(
            {"q_out": heads(3, 4, dtype=torch.float16)}, TypeError, "q_out has dt", id="q_out_dtype"
        ),
        pytest.param(
            {"q_out": torch.zeros(3, 4, 8)[..., ::2]},
            ValueError,
            "q_out has strides",
            id="q_out_strided",
        ),
        pytest.param(
            {"qkv": torch.zeros(3, 32, dtype=torch.int32)},
            TypeError,
            "qkv has dtype torch.int32; supported are",
            id="qkv_integer",
        ),
        pytest.param(
            {"q_weight": torch.zeros(3, 4), "k_weight": torch.zeros(3, 4)},
            ValueError,
            "plan has 2 experts but q_weight has 3",
            id="other_experts",
        ),
        pytest.param({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; expected", id="no_heads"),
        pytest.param(
            {"k_out": heads(9, 2), "v_out": heads(9, 2)},
            ValueError,
            r"k_out has shape \(9, 2, 4\); expected \(3, 2, 4\)",
            id="k_out_rows",
        ),
        pytest.param(
            {"k_out": heads(3, 2), "v_out": heads(3, 1)},
            ValueError,
            r"v_out has shape \(3, 1, 4\); expected \(3, 2, 4\)",
            id="v_out_heads",
        ),
        pytest.param(
            {"k_out": heads(3, 2), "v_out": torch.zeros(3, 2, 8)[..., ::2]},
            ValueError,
            "v_out has strides",
            id="v_out_strided",
        ),
        pytest.param(
            {"k_out": heads(3, 2), "v_out": heads(3, 2, device="meta")},
            ValueError,
            "v_out is on meta",
            id="v_out_device",
        ),
        pytest.param(
            {
                "qkv": torch.zeros(3, 32, requires_grad=True),
                "k_out": heads(3, 2),
                "v_out": heads(3, 2),
            },
            ValueError,
            "an input requires grad, but no gradient flows through q_out, k_out and v_out",
            id="k_out_requires_grad",
        ),
        pytest.param(
            {"qkv": torch.zeros(3, 32, requires_grad=True), "q_scale": torch.zeros(1)},
            ValueError,
            "no gradient flows .*, nor where q is rounded",
            id="q_scale_requires_grad",
        ),
        pytest.param(
            {"q_scale": torch.zeros(2)},
            ValueError,
            r"q_scale has shape \(2,\); expected \(1,\)",
            id="q_scale_shape",
        ),
        pytest.param(
            {"q_scale": torch.zeros(1, dtype=torch.int32)},
            TypeError,
            "q_scale has dtype torch.int32",
            id="q_scale_dtype",
        ),
        pytest.param(
            {"q_scale": torch.zeros(1), "q_out": heads(3, 4)},
            TypeError,
            "q_out has dtype torch.float32; expected torch.float8_e4m3fn",
            id="q_out_not_rounded",
        ),
        pytest.param(
            {"q_out": heads(3, 4).to(torch.float8_e4m3fn)},
            TypeError,
            "q_out",
            id="q_out_without_q_scale",
        ),
    ],
)
def test_mot_qk_norm_rope_errors(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {
        "qkv": torch.zeros(3, 32),
        "q_weight": torch.zeros(2, 4),
        "k_weight": torch.zeros(2, 4),
        "rope": torch.zeros(9, 4),
        "positions": torch.arange(3),
        "plan": PLAN,
        "num_heads": 4,
        "num_kv_heads": 2,
    } | changes
    with pytest.raises(error, match=message):
        mot_qk_norm_rope(**arguments)


def test_heads_too_far_apart() -> None:
    """What the kernel would address in 32 bits; memory that is never touched is not taken."""
    far = torch.empty_strided((3, 4, 4), (4, 2**29, 1), dtype=torch.float16)
    weight = torch.zeros(1, 4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"q_out has strides .*: dimension 1 reaches over 2\*\*31"):
        mot_qk_norm_rope(
            torch.zeros(3, 32, dtype=torch.float16),
            weight,
            weight,
            torch.zeros(9, 4),
            torch.arange(3),
            num_heads=4,
            num_kv_heads=2,
            q_out=far,
        )
