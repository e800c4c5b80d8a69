"""Layers quantised by a method without a routed kernel: right, and said once to be slow."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from halves_format import HalvesConfig, quantised
from layer_cases import BIASES, FFN, HIDDEN, KINDS, ROUTINGS, Layer, exact, load, make_plan
from layer_cases import assert_near as assert_near_truth
from layer_cases import plain as plainly
from mot_kernels import SILU_MUL, AddResidual, Epilogue

from mot_layers import slow_ways

pytestmark = pytest.mark.usefixtures("vllm_groups")

LAYERS = [Layer(kind, bias) for kind in KINDS for bias in BIASES]


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ways, "_gathered", set())


def assert_right(
    layer: torch.nn.Module, spec: Layer, routing: str, epilogue: Epilogue | None = None
) -> None:
    plan = make_plan(routing)
    x = torch.randn(plan.num_rows, spec.in_features)
    y, bias = layer(x, plan, epilogue=epilogue)
    y = y if bias is None else y + bias
    weights = spec.weights()
    truth = exact(x, plan, weights, epilogue)
    assert_near_truth(y, plainly(x, plan, weights, epilogue), truth, plan)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_routing(kind: str, routing: str) -> None:
    spec = Layer(kind, "und")
    assert_right(quantised(spec), spec, routing)


@pytest.mark.parametrize("skip", [False, True], ids=["add_bias", "skip_bias_add"])
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_biases(spec: Layer, skip: bool) -> None:
    assert_right(quantised(spec, skip_bias_add=skip), spec, "two_images_and_text")


def test_silu_mul() -> None:
    spec = Layer("gate_up", "gen")
    assert_right(quantised(spec), spec, "image_between_markers", SILU_MUL)


def test_add_residual() -> None:
    spec = Layer("row", "bias")
    assert_right(quantised(spec), spec, "every_second_row", AddResidual(torch.randn(16, HIDDEN)))


def test_without_plan() -> None:
    spec = Layer("row", "bias")
    x, und = torch.randn(5, FFN), spec.weights()[0]
    torch.testing.assert_close(quantised(spec)(x)[0], F.linear(x, und.weight, und.bias))


def test_each_expert_asks_for_its_own_method() -> None:
    config = HalvesConfig()
    Layer("qkv", "bias").build(quant_config=config)
    assert config.prefixes == ["layers.0.qkv", "layers.0.qkv.gen_exp"]


@pytest.mark.parametrize("ignored", ["gen_exp", "layers"], ids=["one_quantised", "none_quantised"])
def test_partly_quantised(ignored: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = Layer("row", "bias")
    layer = spec.build(quant_config=HalvesConfig(ignored))
    load(layer, spec, spec.weights())
    if ignored == "gen_exp":
        layer.quant_method.process_weights_after_loading(layer)
        layer.gen_exp.cpu_linear = F.linear  # as in test_linear_without_plan_is_vllms
    assert_right(layer, spec, "every_second_row")
    assert ("gathered" in caplog.text) == (ignored == "gen_exp")
    assert ("only one of its experts is quantised" in caplog.text) == (ignored == "gen_exp")


def test_says_once_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    spec = Layer("row", "no_bias")
    with caplog.at_level(logging.WARNING, logger="mot_layers"):
        for prefix in ("layers.3.o", "layers.4.o"):
            assert_right(quantised(spec, prefix=prefix), spec, "every_second_row")
    (record,) = caplog.records
    assert "layer 'layers.3.o' is quantised by HalvesLinearMethod" in record.getMessage()


def test_no_stacked_weight() -> None:
    layer = quantised(Layer("row", "gen"))
    with pytest.raises(
        RuntimeError, match=r"'layers\.0\.row' has no stacked weight: .*HalvesLinear"
    ):
        _ = layer.stacked_weight
    assert torch.equal(layer.stacked_bias[1], layer.gen_exp.bias)
    assert not layer.stacked_bias[0].any()


def test_wrong_shapes() -> None:
    layer, plan = quantised(Layer("row", "gen")), make_plan("every_second_row")
    with pytest.raises(ValueError, match=r"expected \(M, K\)"):
        layer(torch.randn(1, 16, FFN), plan)
    with pytest.raises(ValueError, match="plan routes 16 rows but x has 3"):
        layer(torch.randn(3, FFN), plan)
