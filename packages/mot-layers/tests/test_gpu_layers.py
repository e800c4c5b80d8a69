"""The layers in bf16 on a CUDA device, through the Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import (
    BIASES,
    FFN,
    HIDDEN,
    KINDS,
    ROUTINGS,
    Layer,
    assert_near,
    exact,
    load,
    make_plan,
    plain,
)
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    Path,
    RoutePlan,
    mot_linear,
    use_path,
)
from vllm.platforms import current_platform

from mot_layers import FormatConfig, MoTMergedColumnParallelLinear, MoTRMSNorm
from mot_layers.runtime import single_process


def missing() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if not current_platform.is_cuda_alike():
        return f"needs a GPU build of vLLM; this one is for {current_platform.device_type!r}"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing())]

LAYERS = [Layer(kind, bias) for kind in KINDS for bias in BIASES]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def on_the_gpu() -> Iterator[None]:
    with single_process(), use_path(Path.TRITON):
        yield


def built(spec: Layer, **options: Any) -> Any:
    with torch.device("cuda"):
        layer = spec.build(params_dtype=BF16, **options)
    load(layer, spec, spec.weights(BF16))
    return layer


def assert_right(spec: Layer, routing: str, epilogue: Epilogue | None = None) -> None:
    plan, weights = make_plan(routing, "cuda"), spec.weights(BF16, "cuda")
    x = torch.randn(plan.num_rows, spec.in_features, device="cuda", dtype=BF16)
    y, _ = built(spec)(x, plan, epilogue=epilogue)
    truth = exact(x, plan, weights, epilogue)
    assert_near(y, plain(x, plan, weights, epilogue), truth, plan)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_linear(spec: Layer, routing: str) -> None:
    assert_right(spec, routing)


@pytest.mark.parametrize("bias", BIASES)
def test_silu_mul(bias: str) -> None:
    assert_right(Layer("gate_up", bias), "image_between_markers", SILU_MUL)


@pytest.mark.parametrize("bias", BIASES)
def test_add_residual(bias: str) -> None:
    residual = torch.randn(len(ROUTINGS["two_images_and_text"]), HIDDEN, device="cuda", dtype=BF16)
    assert_right(Layer("row", bias), "two_images_and_text", AddResidual(residual))


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_linear_without_plan(spec: Layer) -> None:
    x = torch.randn(5, spec.in_features, device="cuda", dtype=BF16)
    und = spec.weights(BF16, "cuda")[0]
    torch.testing.assert_close(built(spec)(x)[0], F.linear(x, und.weight, und.bias))


def large_layer_is_right(format: Format | None, device: str, dtype: torch.dtype) -> None:
    """With a plan, and without one, against plain PyTorch on the weights that the layer has."""
    k, n, rows = 256, 512, 600
    config = None if format is None else FormatConfig(format)
    with torch.device(device):
        layer = MoTMergedColumnParallelLinear(
            k, [n // 2, n // 2], bias=False, params_dtype=dtype, quant_config=config
        )
    for expert in (layer, layer.gen_exp):
        for part in range(2):
            half = torch.randn(n // 2, k, device=device).div(k**0.5).to(dtype)
            expert.weight.weight_loader(expert.weight, half, part)
        expert.quant_method.process_weights_after_loading(expert)
    plan = RoutePlan.from_runs([(0, 20), (1, rows - 40), (0, 20)], num_experts=2, device=device)
    x = torch.randn(rows, k, device=device, dtype=dtype)
    for route in (plan, None):
        y = layer(x, route, epilogue=SILU_MUL)[0].float()
        with use_path(Path.REFERENCE):
            want = mot_linear(x, layer.routed_weight, route, epilogue=SILU_MUL).float()
        experts = torch.zeros(rows) if route is None else route.expert_ids.cpu()
        for expert in range(2):
            own = (experts == expert).nonzero().flatten().to(device)
            assert (y[own] - want[own]).norm() <= 0.01 * want[own].norm(), (route, expert)


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_rms_norm(routing: str, residual: bool) -> None:
    plan = make_plan(routing, "cuda")
    norm = MoTRMSNorm(HIDDEN, dtype=BF16).to("cuda")
    norm.stacked_weight.normal_()
    x = torch.randn(plan.num_rows, HIDDEN, device="cuda", dtype=BF16)
    r = torch.randn_like(x) if residual else None

    def reference(dtype: torch.dtype) -> torch.Tensor:
        h = x.to(dtype) if r is None else x.to(dtype) + r.to(dtype)
        gamma = norm.stacked_weight.to(dtype)[plan.expert_ids]
        return F.rms_norm(h, (HIDDEN,), eps=1e-6) * gamma

    result = norm(x, plan, residual=r)
    y = result[0] if residual else result
    assert_near(y, reference(BF16), reference(torch.float64), plan)
    dense = norm(x.clone(), residual=None if r is None else r.clone())
    h = x.float() if r is None else x.float() + r.float()
    want = F.rms_norm(h, (HIDDEN,), eps=1e-6) * norm.weight.float()
    torch.testing.assert_close(
        (dense[0] if residual else dense).float(), want, rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    "format",
    [None, Fp8W8A8(), Int8W8A8(), Int8W8A16(), Int4W4A16(128)],
    ids=lambda format: "16_bits" if format is None else str(format),
)
def test_sizes_that_gpus_run_by_default(format: Format | None) -> None:
    """Rows and columns enough for the kernels of large problems, on Hopper the ones for it."""
    large_layer_is_right(format, "cuda", BF16)


def test_moving_to_the_gpu_keeps_one_storage() -> None:
    spec = Layer("qkv", "und")
    layer = spec.build()
    load(layer, spec, spec.weights())
    layer.to("cuda")
    for expert, row in zip((layer, layer.gen_exp), layer.stacked_weight, strict=True):
        assert expert.weight.data_ptr() == row.data_ptr()
        assert row.is_cuda


def test_graph_capture() -> None:
    spec = Layer("row", "bias")
    layer, plan = built(spec), make_plan("image_between_markers", "cuda")
    x = torch.randn(plan.num_rows, FFN, device="cuda", dtype=BF16)
    wanted = layer(x, plan)[0]  # also compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(x, plan)[0]
    graph.replay()
    assert torch.equal(got, wanted)


def test_graph_capture_with_replaced_weights() -> None:
    layer, plan = built(Layer("row", "bias")), make_plan("image_between_markers", "cuda")
    x = torch.randn(plan.num_rows, FFN, device="cuda", dtype=BF16)
    layer(x, plan)
    layer.weight.data = layer.weight.data.clone()
    with (
        pytest.raises(RuntimeError, match="run the layer once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.mul_(2)  # torch warns of an empty graph
        layer(x, plan)
