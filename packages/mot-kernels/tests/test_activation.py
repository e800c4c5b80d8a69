"""SiLU(gate) * up of a finished product, and the dense products that leave it to be done."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mot_kernels import SILU_MUL, AddResidual, Epilogue, mot_linear
from mot_kernels._triton.launch import launch_silu_mul
from mot_kernels.testing import ROUTES, assert_close, looped_linear, poisoned


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 80), (5, 1500), (0, 8)])
def test_silu_mul(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * columns + 3, dtype=dtype, device=device)[:, 1:-2]
    around = poisoned((columns, rows + 1), dtype, device)
    out = around.T[:rows]  # any strides
    launch_silu_mul(out, x)
    gate, up = x.float().chunk(2, dim=-1)
    wanted = (torch.nn.functional.silu(gate) * up).to(dtype)
    torch.testing.assert_close(out, wanted)
    assert around.T[rows:].isnan().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["no_und_rows", "no_gen_rows"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual", "in_place"])
def test_one_expert_has_all_rows(
    epilogue: str, has_bias: bool, name: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    plan = ROUTES[name].plan(device)
    options = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(plan.num_rows, 256, **options)
    weight = torch.randn(2, 192, 256, **options) / 16
    bias = torch.randn(2, 192, **options) if has_bias else None
    residual = torch.randn(plan.num_rows, 192, **options)
    chosen: Epilogue | None = None
    if epilogue != "none":
        chosen = SILU_MUL if epilogue == "silu_mul" else AddResidual(residual)
    wide = None if bias is None else bias.double()
    wanted = looped_linear(x.double(), weight.double(), plan.expert_ids, bias=wide, epilogue=chosen)
    baseline = looped_linear(x, weight, plan.expert_ids, bias=bias, epilogue=chosen)
    out = residual if epilogue == "in_place" else None
    y = mot_linear(x, weight, plan, bias=bias, epilogue=chosen, out=out)
    assert_close(epilogue, y, wanted, plan, baseline)
