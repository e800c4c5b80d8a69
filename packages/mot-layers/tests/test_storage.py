"""Both experts' parameters are views of one tensor, and stay so."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from layer_cases import BIASES, HIDDEN, KINDS, Layer, exact, load, make_plan, plain
from layer_cases import assert_near as assert_near_truth
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from mot_layers import MoTRMSNorm, stacking
from mot_layers.linear import StackedLinearMethod

pytestmark = pytest.mark.usefixtures("vllm_groups")

LAYERS = [Layer(kind, bias) for kind in KINDS for bias in BIASES]


def assert_shared(layer: Any) -> None:
    """Weights and biases are the rows of the stacks, and hold no memory besides."""
    stacks = [layer.stacked_weight, getattr(layer, "stacked_bias", None)]
    for name, stack in zip(("weight", "bias"), stacks, strict=True):
        experts = [getattr(e, name, None) for e in (layer, layer.gen_exp)]
        if stack is None:
            assert experts == [None, None]
            continue
        storage = stack.untyped_storage()
        assert storage.nbytes() == stack.nbytes
        assert stack.is_contiguous()
        for row, parameter in zip(stack, experts, strict=True):
            if parameter is None:
                assert not row.any()
            else:
                assert parameter.data_ptr() == row.data_ptr()
                assert parameter.shape == row.shape
                assert parameter.untyped_storage().data_ptr() == storage.data_ptr()


def assert_right(layer: Any, spec: Layer, dtype: torch.dtype = torch.float32) -> None:
    plan = make_plan("image_between_markers")
    weights = spec.weights(dtype)
    x = torch.randn(plan.num_rows, spec.in_features, dtype=dtype)
    truth = exact(x, plan, weights)
    assert_near_truth(layer(x, plan)[0], plain(x, plan, weights), truth, plan)


def built(spec: Layer) -> Any:
    layer = spec.build()
    load(layer, spec, spec.weights())
    return layer


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_linear_shares_storage(spec: Layer) -> None:
    layer = built(spec)
    assert_shared(layer)
    n, k = sum(spec.shards.values()), spec.in_features
    assert layer.stacked_weight.shape == (2, n, k)
    for stacked, own in zip(layer.stacked_weight, spec.weights(), strict=True):
        assert torch.equal(stacked, own.weight)


def test_norm_shares_storage() -> None:
    norm = MoTRMSNorm(HIDDEN)
    assert_shared(norm)
    assert norm.stacked_weight.shape == (2, HIDDEN)
    norm.gen_exp.weight.data.fill_(3)
    assert norm.stacked_weight.tolist() == [[1] * HIDDEN, [3] * HIDDEN]


def test_parameter_names() -> None:
    names = [name for name, _ in built(Layer("qkv", "bias")).named_parameters()]
    assert names == ["weight", "bias", "gen_exp.weight", "gen_exp.bias"]
    assert [n for n, _ in MoTRMSNorm(8).named_parameters()] == ["weight", "gen_exp.weight"]
    assert not list(built(Layer("qkv", "bias")).named_buffers())


def test_linear_parameters_need_no_gradient() -> None:
    for kind in KINDS:
        assert not any(p.requires_grad for p in Layer(kind, "bias").build().parameters())


def test_gen_expert_is_vllms_class() -> None:
    for kind in KINDS:
        spec = Layer(kind, "bias")
        layer = spec.build()
        assert type(layer.gen_exp) is spec.arguments()[1]
        assert layer.gen_exp.prefix == f"layers.0.{kind}.gen_exp"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_to_dtype(spec: Layer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inside another module, as a model would be converted.
    model = torch.nn.Sequential(built(spec)).to(dtype)
    # Stacked by `to` itself, and not only when a forward finds that they are not.
    monkeypatch.setattr(stacking, "_warn_restacked", pytest.fail)
    assert_shared(model[0])
    assert model[0].stacked_weight.dtype is dtype
    for stacked, own in zip(model[0].stacked_weight, spec.weights(), strict=True):
        assert torch.equal(stacked, own.weight.to(dtype))


def test_to_the_same_place_changes_nothing() -> None:
    layer = built(Layer("qkv", "und"))
    before = layer.stacked_weight
    assert layer.to("cpu").stacked_weight is before


def test_from_meta() -> None:
    spec = Layer("gate_up", "gen")
    with torch.device("meta"):
        layer = spec.build()
    assert layer.stacked_weight.is_meta
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.zero_()
    assert_shared(layer)
    assert not layer.stacked_weight.any()


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
def test_built_in_inference_mode(planned: bool) -> None:
    spec = Layer("qkv", "und")
    plan = make_plan("only_und")
    x, und = torch.randn(plan.num_rows, HIDDEN), spec.weights()[0]
    with torch.inference_mode():
        layer = built(spec)
        assert_shared(layer)
        y, _ = layer(x, plan if planned else None)
    assert torch.equal(y, torch.nn.functional.linear(x, und.weight, und.bias))


def test_norm_to_dtype() -> None:
    norm = MoTRMSNorm(HIDDEN).to(torch.bfloat16)
    assert_shared(norm)
    assert norm.stacked_weight.dtype is torch.bfloat16


@pytest.mark.parametrize("spec", LAYERS, ids=str)
def test_process_weights_after_loading(spec: Layer) -> None:
    """vLLM's loader calls this for every module with a quant_method; on CPU it packs weights."""
    layer = built(spec)
    weight = layer.stacked_weight
    walked = []
    for name, module in torch.nn.Sequential(layer).named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
            walked.append(name)
    assert walked == ["0", "0.gen_exp"]
    assert layer.stacked_weight is weight
    assert_shared(layer)
    assert_right(layer, spec)
    x = torch.randn(4, spec.in_features)
    own = spec.weights()[0]
    assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, own.weight, own.bias))


def test_method_still_is_vllms_unquantised_one() -> None:
    layer = Layer("row", "bias").build()
    for expert in (layer, layer.gen_exp):
        assert isinstance(expert.quant_method, UnquantizedLinearMethod)
        assert isinstance(expert.quant_method, StackedLinearMethod)


def test_state_dict_round_trip() -> None:
    spec = Layer("qkv", "und")
    layer, other = built(spec), spec.build()
    other.load_state_dict(layer.state_dict())
    assert_shared(other)
    assert_right(other, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_reload_weights(kind: str) -> None:
    """vLLM's `reload_weights` loads beside the weights in use and copies over them."""
    # Imported here: it pulls in what builds of vLLM without compiled operators do not have.
    from vllm.model_executor.model_loader.reload import layerwise

    spec = Layer(kind, "bias")
    layer = spec.build()
    model = torch.nn.Sequential(layer)
    layerwise.record_metadata_for_reloading(model)
    und, gen = spec.weights()
    load(layer, spec, [gen, und])
    before = layer.stacked_weight
    layerwise.initialize_layerwise_reload(model)
    load(layer, spec, [und, gen])
    layerwise.finalize_layerwise_reload(model, None)
    assert layer._is_stacked()
    assert layer.stacked_weight is before
    assert_right(layer, spec)


class TestReplacedParameters:
    """A stack that no longer holds what the parameters hold is made again, with one warning."""

    @pytest.fixture(autouse=True)
    def warn_anew(self) -> None:
        stacking._warn_restacked.cache_clear()

    spec = Layer("qkv", "bias")

    def assert_restacked(self, layer: Any, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="mot_layers"):
            assert_right(layer, self.spec)
            assert_right(layer, self.spec)
        assert [r.getMessage().split(":")[0] for r in caplog.records] == ["MoTQKVParallelLinear"]
        assert_shared(layer)

    def test_data_assigned(self, caplog: pytest.LogCaptureFixture) -> None:
        layer = self.spec.build()
        und, gen = self.spec.weights()
        load(layer, self.spec, [und, und])
        layer.gen_exp.weight.data = gen.weight.clone()
        assert gen.bias is not None
        layer.gen_exp.bias.data = gen.bias.clone()
        self.assert_restacked(layer, caplog)

    def test_state_dict_assigned(self, caplog: pytest.LogCaptureFixture) -> None:
        """At once, without a word: a compiled graph could not know."""
        layer = self.spec.build()
        state = {k: v.clone() for k, v in built(self.spec).state_dict().items()}
        layer.load_state_dict(state, assign=True)
        assert_shared(layer)
        assert_right(layer, self.spec)
        assert not caplog.records

    def test_copied(self) -> None:
        """Of a norm; vLLM's own parameters, which the linears have, cannot be copied so."""
        norm = copy.deepcopy(MoTRMSNorm(HIDDEN))
        assert norm._is_stacked()
        norm.load_state_dict({key: p * 3 for key, p in norm.state_dict().items()})
        assert (norm.stacked_weight == 3).all()

    def test_in_inference_mode(self, caplog: pytest.LogCaptureFixture) -> None:
        layer = built(self.spec)
        layer.weight.data = layer.weight.data.clone()
        with torch.inference_mode():
            self.assert_restacked(layer, caplog)
        assert not layer.stacked_weight.is_inference()

    def test_norm(self, caplog: pytest.LogCaptureFixture) -> None:
        norm = copy.deepcopy(MoTRMSNorm(HIDDEN))
        norm.gen_exp.weight = torch.nn.Parameter(torch.full((HIDDEN,), 2.0))
        assert norm.stacked_weight[1, 0] == 2
        assert "MoTRMSNorm" in caplog.text

    def test_one_expert_converted(self) -> None:
        layer = built(self.spec)
        layer.gen_exp.to(torch.bfloat16)
        x, plan = torch.randn(16, HIDDEN), make_plan("every_second_row")
        with pytest.raises(ValueError, match=r"float32 on cpu but gen_exp\.weight is .*bfloat16"):
            layer(x, plan)
        layer.gen_exp.to(torch.float32)
        layer(x, plan)

    def test_wrapped_expert_is_refused(self) -> None:
        layer = built(self.spec)
        layer.gen_exp = torch.nn.Sequential(layer.gen_exp)
        with pytest.raises(RuntimeError, match=r"now a Sequential.*LoRA adapters"):
            layer(torch.randn(16, HIDDEN), make_plan("every_second_row"))


def test_norm_weights_that_would_get_no_gradient() -> None:
    norm = MoTRMSNorm(HIDDEN)
    x, plan = torch.randn(16, HIDDEN, requires_grad=True), make_plan("every_second_row")
    norm(x, plan).sum().backward()
    assert x.grad is not None
    norm.gen_exp.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="MoTRMSNorm: its parameters require grad, but with a"):
        norm(x, plan)
    with torch.no_grad():
        norm(x, plan)


def test_parameters_that_would_get_no_gradient() -> None:
    layer = built(Layer("qkv", "bias"))
    x, plan = torch.randn(16, HIDDEN), make_plan("every_second_row")
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="its parameters require grad, but with a plan"):
        layer(x, plan)
    with torch.no_grad():
        layer(x, plan)
    layer.weight.requires_grad_(False)
    layer.stacked_weight.requires_grad_(True)
    layer(x, plan)[0].sum().backward()
    assert layer.stacked_weight.grad is not None
