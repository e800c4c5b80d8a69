"""Parameters load as vLLM's do: v1 and v2 loaders, shard by shard or merged on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_cases import BIASES, KINDS, Layer, Weights, load
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.parameter import ModelWeightParameter

pytestmark = pytest.mark.usefixtures("vllm_groups")

LAYERS = [Layer(kind, bias) for kind in KINDS for bias in BIASES]

# How a loader is reached: through the parameter, as every vLLM model does it, or by its name.
LOADERS: dict[str, Callable[[Any, Any], Callable[..., None]]] = {
    "parameter": lambda expert, parameter: parameter.weight_loader,
    "v1": lambda expert, parameter: expert.weight_loader,
    "v2": lambda expert, parameter: (
        expert.weight_loader_v2
        if isinstance(parameter, ModelWeightParameter)
        else expert.weight_loader  # biases have no v2 loader in vLLM
    ),
}


def poisoned(spec: Layer) -> Any:
    layer = spec.build()
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan"))
    return layer


def assert_loaded(layer: Any, weights: list[Weights]) -> None:
    for e, own in enumerate(weights):
        assert torch.equal(layer.stacked_weight[e], own.weight)
        if own.bias is not None:
            assert torch.equal(layer.stacked_bias[e], own.bias)
        elif layer.stacked_bias is not None:
            assert not layer.stacked_bias[e].any()


@pytest.mark.parametrize("merged", [False, True], ids=["shards", "merged_on_disk"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_load(spec: Layer, loader: str, merged: bool) -> None:
    layer, weights = poisoned(spec), spec.weights()
    for expert, own in zip((layer, layer.gen_exp), weights, strict=True):
        for name, full in own.parameters().items():
            parameter = getattr(expert, name)
            fill = LOADERS[loader](expert, parameter)
            if merged or spec.kind == "row":
                fill(parameter, full)
                continue
            # In reverse: shards may come in any order.
            for shard_id, piece in reversed(
                list(zip(spec.shards, full.split(list(spec.shards.values())), strict=True))
            ):
                fill(parameter, piece, shard_id)
    assert_loaded(layer, weights)


def test_weights_use_the_v2_loader() -> None:
    """vLLM chooses by the name of the quantisation method, before we replace that method."""
    for kind in KINDS:
        layer = Layer(kind, "bias").build()
        for expert in (layer, layer.gen_exp):
            assert expert.weight.weight_loader.__name__ == "weight_loader_v2"
            assert expert.weight.weight_loader.__self__ is expert
            assert expert.bias.weight_loader.__self__ is expert


def test_weights_use_the_v1_loader_where_vllm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    supported = [n for n in vllm_linear.WEIGHT_LOADER_V2_SUPPORTED if "Unquantized" not in n]
    monkeypatch.setattr(vllm_linear, "WEIGHT_LOADER_V2_SUPPORTED", supported)
    for kind in KINDS:
        spec = Layer(kind, "bias")
        layer = poisoned(spec)
        assert layer.gen_exp.weight.weight_loader.__name__ == "weight_loader"
        load(layer, spec, spec.weights())
        assert_loaded(layer, spec.weights())


def test_experts_do_not_load_into_each_other() -> None:
    spec = Layer("gate_up", "bias")
    layer = poisoned(spec)
    half = torch.ones(48, 32)
    layer.gen_exp.weight.weight_loader(layer.gen_exp.weight, half, 1)
    assert layer.stacked_weight[0].isnan().all()
    assert layer.stacked_weight[1, :48].isnan().all()
    assert torch.equal(layer.stacked_weight[1, 48:], half)


@pytest.mark.parametrize(
    ("kind", "shard_id"), [("qkv", "o"), ("gate_up", 2)], ids=["qkv", "merged"]
)
def test_unknown_shard(kind: str, shard_id: Any) -> None:
    layer = Layer(kind, "bias").build()
    with pytest.raises(ValueError, match=r"[Ss]hard id"):
        layer.weight.weight_loader(layer.weight, torch.ones(48, 32), shard_id)
