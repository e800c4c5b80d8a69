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
from mot_kernels import SILU_MUL, AddResidual, Epilogue, Path, use_path
from vllm.platforms import current_platform

from mot_layers import MoTRMSNorm
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
    assert (dense[0] if residual else dense).isfinite().all()


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
