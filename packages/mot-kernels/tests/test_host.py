"""What the host side hands to the kernels, recorded by a stand-in that runs nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Path,
    TileConfig,
    dispatch,
    mot_linear,
    mot_qk_norm_rope,
    mot_rms_norm,
    use_path,
)
from mot_kernels._triton import launch
from mot_kernels.plan import TILE_ROWS
from mot_kernels.testing import ROUTES
from mot_kernels.tuning.lookup import Problem, find_config

CPU = torch.device("cpu")


class Recorder:
    """Stands in for a jitted kernel: `kernel[grid](**arguments)` is written down."""

    def __init__(self, kernel: Any) -> None:
        self.parameters = set(kernel.arg_names)
        self.calls: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.calls.append((grid, arguments))

    @property
    def only_call(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        (call,) = self.calls
        options = set(call[1]) - self.parameters
        assert set(call[1]) >= self.parameters
        assert options <= {"num_warps", "num_stages", "enable_fp_fusion"}
        return call


def record(monkeypatch: pytest.MonkeyPatch, name: str) -> Recorder:
    recorder = Recorder(getattr(launch, name))
    monkeypatch.setattr(launch, name, recorder)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)  # so that the CPU may launch
    return recorder


@pytest.fixture
def linear_kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return record(monkeypatch, "_mot_linear_kernel")


@pytest.fixture
def rms_norm_kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return record(monkeypatch, "_mot_rms_norm_kernel")


@pytest.fixture
def qk_norm_rope_kernel(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return record(monkeypatch, "_mot_qk_norm_rope_kernel")


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


# --- mot_linear


@pytest.mark.parametrize("block_m", TILE_ROWS, ids="{}_rows_a_tile".format)
@pytest.mark.parametrize("name", ["scattered", "one_branch", "no_und_rows", "three_experts"])
def test_mot_linear_grid_and_tiles(name: str, block_m: int, linear_kernel: Recorder) -> None:
    route = ROUTES[name]
    plan = route.plan()
    x, weight = torch.zeros(route.num_rows, 40), torch.zeros(route.num_experts, 100, 40)
    config = TileConfig(block_m, 32, 16, group_m=5, num_warps=2, num_stages=6)
    mot_linear(x, weight, plan, config=config)
    grid, arguments = linear_kernel.only_call
    tiles = plan.tiles_for(block_m)
    assert grid == (len(tiles) * 4,)  # 100 columns in blocks of 32
    assert same_memory(arguments["tiles_ptr"], tiles)
    assert same_memory(arguments["row_ids_ptr"], plan.row_ids)
    expected = {
        "num_tiles": len(tiles),
        "num_rows": route.num_rows,
        "w_rows": 100,
        "N_OUT": 100,
        "K": 40,
        "BLOCK_M": block_m,
        "BLOCK_N": 32,
        "BLOCK_K": 16,
        "GROUP_M": 5,
        "num_warps": 2,
        "num_stages": 6,
    }
    assert {key: arguments[key] for key in expected} == expected


def test_mot_linear_passes_the_callers_memory(linear_kernel: Recorder) -> None:
    """No copies: strides go to the kernel as they are."""
    plan = ROUTES["one_branch"].plan()
    x = torch.zeros(50, plan.num_rows).T[:, 10:]
    weight = torch.zeros(4, 40, 24)[::2].mT
    bias = torch.zeros(2, 30)[:, :24]
    out = torch.zeros(plan.num_rows, 33)[:, 5:29]
    y = mot_linear(x, weight, plan, bias=bias, out=out)
    _, arguments = linear_kernel.only_call
    assert y is out
    for key, tensor in (("x", x), ("w", weight), ("bias", bias), ("out", out)):
        assert same_memory(arguments[f"{key}_ptr"], tensor), key
    strides = {key: value for key, value in arguments.items() if key.startswith("stride_")}
    assert strides == {
        "stride_out_m": 33,
        "stride_out_n": 1,
        "stride_x_m": 1,
        "stride_x_k": plan.num_rows,
        "stride_w_e": 2 * 40 * 24,
        "stride_w_n": 1,
        "stride_w_k": 24,
        "stride_bias_e": 30,
        "stride_bias_n": 1,
        "stride_residual_m": 0,
        "stride_residual_n": 0,
    }
    assert arguments["HAS_BIAS"] is True
    assert arguments["residual_ptr"] is None


def test_mot_linear_out_is_residual(linear_kernel: Recorder) -> None:
    plan = ROUTES["scattered"].plan()
    x, weight = torch.zeros(plan.num_rows, 40), torch.zeros(2, 24, 40)
    stream = torch.zeros(plan.num_rows, 48)[:, ::2]
    mot_linear(x, weight, plan, epilogue=AddResidual(stream), out=stream)
    _, arguments = linear_kernel.only_call
    assert same_memory(arguments["out_ptr"], arguments["residual_ptr"])
    assert same_memory(arguments["out_ptr"], stream)
    assert (arguments["stride_residual_m"], arguments["stride_residual_n"]) == (48, 2)
    assert (arguments["EPILOGUE"], arguments["HAS_BIAS"]) == (2, False)


def test_mot_linear_silu_mul(linear_kernel: Recorder) -> None:
    plan = ROUTES["scattered"].plan()
    x, weight = torch.zeros(plan.num_rows, 40), torch.zeros(2, 100, 40)
    config = TileConfig(64, 32, 16)
    y = mot_linear(x, weight, plan, epilogue=SILU_MUL, config=config)
    grid, arguments = linear_kernel.only_call
    assert y.shape == (plan.num_rows, 50)
    assert grid == (len(plan.tiles_for(64)) * 2,)  # 50 columns in blocks of 32
    assert (arguments["w_rows"], arguments["N_OUT"], arguments["EPILOGUE"]) == (100, 50, 1)


@pytest.mark.parametrize(
    ("k", "block_k", "even"), [(64, 32, True), (64, 64, True), (72, 16, False), (8, 16, False)]
)
def test_mot_linear_even_k(k: int, block_k: int, even: bool, linear_kernel: Recorder) -> None:
    plan = ROUTES["one_row"].plan()
    config = TileConfig(16, 16, block_k)
    mot_linear(torch.zeros(1, k), torch.zeros(2, 24, k), plan, config=config)
    assert linear_kernel.only_call[1]["EVEN_K"] is even


@pytest.mark.parametrize(
    ("dtype_", "precision"),
    [(torch.float32, "ieee"), (torch.float16, None)],
    ids=["float32", "float16"],
)
def test_mot_linear_float32_is_not_tf32(
    dtype_: torch.dtype, precision: str | None, linear_kernel: Recorder
) -> None:
    plan = ROUTES["one_row"].plan()
    x, weight = torch.zeros(1, 40, dtype=dtype_), torch.zeros(2, 24, 40, dtype=dtype_)
    mot_linear(x, weight, plan, config=TileConfig(16, 16, 16))
    assert linear_kernel.only_call[1]["PRECISION"] == precision


@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "add_residual"])
@pytest.mark.parametrize("name", ["one_row", "one_branch", "four_experts_one_empty"])
def test_mot_linear_looks_up_the_config(name: str, epilogue: str, linear_kernel: Recorder) -> None:
    plan = ROUTES[name].plan()
    x = torch.zeros(plan.num_rows, 40)
    weight = torch.zeros(plan.num_experts, 24, 40)
    chosen = {
        "none": None,
        "silu_mul": SILU_MUL,
        "add_residual": AddResidual(torch.zeros(plan.num_rows, 24)),
    }[epilogue]
    mot_linear(x, weight, plan, epilogue=chosen)
    _, arguments = linear_kernel.only_call
    config = find_config(Problem(24, 40, torch.float32, epilogue, plan.counts), CPU)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")
    assert [arguments[key] for key in names] == config.as_ints()[:-1]


@pytest.mark.parametrize("case", ["no_rows", "no_plan", "reference", "needs_grad"])
def test_mot_linear_launches_nothing(case: str, linear_kernel: Recorder) -> None:
    plan = ROUTES["no_rows" if case == "no_rows" else "scattered"].plan()
    x = torch.zeros(plan.num_rows, 40, requires_grad=case == "needs_grad")
    weight = torch.zeros(2, 24, 40)
    with use_path(Path.REFERENCE) if case == "reference" else nullcontext():
        y = mot_linear(x, weight, None if case == "no_plan" else plan)
    assert y.shape == (plan.num_rows, 24)
    assert y.requires_grad == (case == "needs_grad")
    assert not linear_kernel.calls


# --- mot_rms_norm


@pytest.mark.parametrize(
    ("width", "block", "warps"), [(1, 1, 1), (80, 128, 1), (3584, 4096, 4), (20000, 32768, 16)]
)
def test_mot_rms_norm_launch(width: int, block: int, warps: int, rms_norm_kernel: Recorder) -> None:
    plan = ROUTES["scattered"].plan()
    x, weight = torch.zeros(150, width + 8)[:, 4:-4], torch.zeros(2, width)
    out = torch.zeros(150, width + 1)[:, 1:]
    mot_rms_norm(x, weight, plan, out=out, eps=0.25)
    grid, arguments = rms_norm_kernel.only_call
    assert grid == (150,)
    tensors = {"x": x, "out": out, "weight": weight, "expert_ids": plan.expert_ids}
    for key, tensor in tensors.items():
        assert same_memory(arguments[f"{key}_ptr"], tensor), key
    expected = {
        "D": width,
        "eps": 0.25,
        "BLOCK_D": block,
        "num_warps": warps,
        "HAS_PLAN": True,
        "HAS_RESIDUAL": False,
        "residual_ptr": None,
        "residual_out_ptr": None,
        "stride_x_m": width + 8,
        "stride_out_m": width + 1,
        "stride_weight_e": width,
    }
    assert {key: arguments[key] for key in expected} == expected


def test_mot_rms_norm_launch_in_place_with_residual(rms_norm_kernel: Recorder) -> None:
    x, residual, weight = torch.zeros(5, 16), torch.zeros(5, 32)[:, :16], torch.zeros(2, 16)
    y, summed = mot_rms_norm(x, weight, None, residual=residual, out=x)
    _, arguments = rms_norm_kernel.only_call
    assert y is x
    assert same_memory(arguments["out_ptr"], x)
    assert same_memory(arguments["x_ptr"], x)
    assert same_memory(arguments["residual_ptr"], residual)
    assert same_memory(arguments["residual_out_ptr"], summed)
    assert (arguments["stride_residual_m"], arguments["stride_residual_out_m"]) == (32, 16)
    assert (arguments["HAS_PLAN"], arguments["HAS_RESIDUAL"]) == (False, True)
    assert arguments["expert_ids_ptr"] is None


def test_mot_rms_norm_launches_nothing(rms_norm_kernel: Recorder) -> None:
    assert mot_rms_norm(torch.zeros(0, 16), torch.zeros(2, 16)).shape == (0, 16)
    assert not rms_norm_kernel.calls


# --- mot_qk_norm_rope


@pytest.mark.parametrize("head_dim", [16, 96, 128], ids="head{}".format)
def test_mot_qk_norm_rope_launch(head_dim: int, qk_norm_rope_kernel: Recorder) -> None:
    plan = ROUTES["scattered"].plan()
    rows, heads, kv_heads = plan.num_rows, 7, 2
    qkv = torch.zeros(rows, 11 * head_dim + 8)[:, 8:]
    weights = torch.zeros(2, 2, head_dim)
    rope, positions = torch.zeros(9, head_dim), torch.zeros(rows, dtype=torch.int32)
    cache, kv_rows = torch.zeros(400, 2, kv_heads, head_dim), torch.arange(rows)
    q, k, v = mot_qk_norm_rope(
        qkv,
        *weights,
        rope,
        positions,
        plan,
        num_heads=heads,
        num_kv_heads=kv_heads,
        k_out=cache[:, 0],
        v_out=cache[:, 1],
        kv_rows=kv_rows,
    )
    grid, arguments = qk_norm_rope_kernel.only_call
    assert grid == (rows,)
    tensors = {"q": q, "k": k, "v": v, "qkv": qkv, "positions": positions, "kv_rows": kv_rows}
    for key, tensor in tensors.items():
        assert same_memory(arguments[f"{key}_ptr"], tensor), key
    assert same_memory(k, cache[:, 0])
    assert same_memory(v, cache[:, 1])
    expected = {
        "BLOCK_HALF": {16: 8, 96: 64, 128: 64}[head_dim],
        "BLOCK_HEADS": 8,
        "BLOCK_KV_HEADS": 2,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": head_dim,
        "HAS_PLAN": True,
        "HAS_KV_ROWS": True,
        "EXPERTS": 2,
        "BLOCK_WEIGHT": {16: 32, 96: 256, 128: 256}[head_dim],
        "Q_KIND": 0,
        "q_scale_ptr": None,
        "stride_qkv_m": 11 * head_dim + 8,
        "stride_q_m": heads * head_dim,
        "stride_q_h": head_dim,
        "stride_k_s": 2 * kv_heads * head_dim,
        "stride_k_h": head_dim,
        "stride_v_s": 2 * kv_heads * head_dim,
        "stride_v_h": head_dim,
    }
    assert {key: arguments[key] for key in expected} == expected


def test_mot_qk_norm_rope_launches_nothing(qk_norm_rope_kernel: Recorder) -> None:
    weights = torch.zeros(2, 2, 16)
    positions = torch.zeros(0, dtype=torch.int64)
    empty, rope = torch.zeros(0, 64), torch.zeros(9, 16)
    q, k, v = mot_qk_norm_rope(empty, *weights, rope, positions, None, num_heads=2, num_kv_heads=1)
    assert (q.shape, k.shape, v.shape) == ((0, 2, 16), (0, 1, 16), (0, 1, 16))
    assert not qk_norm_rope_kernel.calls
