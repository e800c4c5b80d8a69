"""Layers that vLLM's quantisation configs make: loaded by vLLM, read by us, routed."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from format_cases import (
    FFN,
    HIDDEN,
    KINDS,
    PLAN,
    Weights,
    build,
    fill,
    in_features,
    load,
    process,
    quantised,
)
from mot_kernels import Fp8W8A8, Int4W4A16, WeightScales, dequantize, mot_linear
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm_files import (
    CHECKPOINTS,
    Checkpoint,
    by_token,
    compressed,
    input_scale_of,
    loaded,
    meaning,
    pieces,
    weights,
)

from mot_layers import slow_ways
from mot_layers.vllm_formats import ConvertedLinearMethod

pytestmark = pytest.mark.usefixtures("vllm_groups", "vllm_model")

QUANTIZATION = "vllm.model_executor.layers.quantization"


class AnyKernel:
    """In place of a kernel of vLLM's for formats that its CPU build has none for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    @staticmethod
    def input_quant_key() -> str:
        """vLLM's layers may be given rows that were quantised for their kernel; ours may not."""
        return "rows quantised by the norm before"

    def process_weights_after_loading(self, layer: Any) -> None:
        pytest.fail("vLLM repacked the weights of a layer that is read by us")


@pytest.fixture
def vllm_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's methods ask of the engine: the model's dtype, and kernels for this device."""
    config = get_current_vllm_config()
    monkeypatch.setattr(config, "model_config", SimpleNamespace(dtype=torch.float32))
    for module, name, found in (
        ("compressed_tensors.schemes.compressed_tensors_wNa16", "choose_mp_linear_kernel", True),
        ("auto_gptq", "choose_mp_linear_kernel", True),
        ("auto_gptq", "verify_marlin_supported", False),
        ("fp8", "init_fp8_linear_kernel", True),
        ("online.fp8", "init_fp8_linear_kernel", True),
        ("compressed_tensors.schemes.compressed_tensors_w8a8_fp8", "init_fp8_linear_kernel", True),
    ):
        home = importlib.import_module(f"{QUANTIZATION}.{module}")
        answer = AnyKernel if found else None
        monkeypatch.setattr(home, name, lambda *_, answer=answer, **__: answer)


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ways, "_gathered", set())


CASES = [
    pytest.param(checkpoint, kind, id=f"{checkpoint}-{kind}")
    for checkpoint in CHECKPOINTS
    for kind in KINDS
    # The parts of qkv have 64 rows; shared blocks of 128 vLLM refuses itself.
    if not (kind == "qkv" and "block" in checkpoint.name)
]


@pytest.mark.parametrize(("checkpoint", "kind"), CASES)
def test_means_what_the_file_means(checkpoint: Checkpoint, kind: str) -> None:
    """Bit for bit, both experts: no scale is rounded, nothing is requantised."""
    layer = loaded(checkpoint, kind)
    weight = layer.routed_weight
    assert weight.format == checkpoint.format(kind)
    got = dequantize(weight)
    for e, want in enumerate(meaning(checkpoint, kind)):
        assert torch.equal(got[e], want), ("und", "gen")[e]
    assert (weight.activation_scale is not None) == checkpoint.has_input_scale
    if weight.activation_scale is not None:
        for e, scale in enumerate(weight.activation_scale):
            assert scale == max(input_scale_of(piece) for piece in pieces(kind, e))


@pytest.mark.parametrize(("checkpoint", "kind"), CASES)
def test_routed(checkpoint: Checkpoint, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    layer = loaded(checkpoint, kind)
    x = torch.randn(PLAN.num_rows, in_features(kind))
    bias = Weights.of(kind).bias
    y, _ = layer(x, PLAN)
    assert torch.equal(y, mot_linear(x, layer.routed_weight, PLAN, bias=bias))
    y, _ = layer(x)
    assert torch.equal(y, mot_linear(x, layer.routed_weight))
    assert "gathered" not in caplog.text


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=str)
def test_parameters_are_ours_alone(checkpoint: Checkpoint) -> None:
    """Nothing of the loaded layout is left to take memory, and reading twice changes nothing."""
    layer = loaded(checkpoint, "row")
    assert not hasattr(layer, "_input_quant_key")
    names = {name for name, _ in layer.named_parameters() if "gen_exp" not in name}
    assert names <= {"weight", "weight_scale", "weight_zero_point", "input_scale"}
    before = layer.routed_weight
    process(layer)
    assert layer.routed_weight is before


@pytest.mark.parametrize("name", ["compressed-int8-channel", "awq"])
def test_reload_weights(name: str) -> None:
    """vLLM's `reload_weights` restores the loaded layout, fills it and has it read again."""
    layerwise = importlib.import_module("vllm.model_executor.model_loader.reload.layerwise")
    checkpoint = next(c for c in CHECKPOINTS if c.name == name)
    layer = build("gate_up", checkpoint.config())
    model = torch.nn.Sequential(layer)
    layerwise.record_metadata_for_reloading(model)
    own = Weights.of("gate_up")
    others = Weights(own.weight.flip(0), own.gen_bias)
    load(layer, "gate_up", others, lambda piece: checkpoint.write(piece).tensors)
    process(layer)
    layerwise.initialize_layerwise_reload(model)
    load(layer, "gate_up", own, lambda piece: checkpoint.write(piece).tensors)
    layerwise.finalize_layerwise_reload(model, None)
    assert torch.equal(dequantize(layer.routed_weight), meaning(checkpoint, "gate_up"))


def test_not_processed() -> None:
    layer = build("row", CHECKPOINTS[0].config())
    x = torch.randn(PLAN.num_rows, in_features("row"))
    with pytest.raises(RuntimeError, match=r"weights as they were loaded; call quant_method"):
        layer(x, PLAN)


@pytest.mark.parametrize("name", ["fp8", "compressed-int8-tensor", "awq"])
def test_parts_fused_in_the_file(name: str) -> None:
    """A file may hold gate and up as one matrix, with one scale."""
    checkpoint = next(c for c in CHECKPOINTS if c.name == name)
    layer, own = build("gate_up", checkpoint.config()), Weights.of("gate_up")
    files = [checkpoint.write(matrix) for matrix in own.weight]
    for expert, file in zip((layer, layer.gen_exp), files, strict=True):
        for name, tensor in file.tensors.items():
            fill(getattr(expert, name), tensor, None)
    process(layer)
    assert torch.equal(dequantize(layer.routed_weight), torch.stack([f.meaning for f in files]))


@pytest.mark.parametrize(
    ("name", "kind", "missing", "of"),
    [
        ("fp8", "qkv", "weight_scale", 0),
        ("fp8", "qkv", "weight_scale", 1),
        ("fp8", "row", "weight_scale", 0),
        ("fp8-static", "row", "input_scale", 0),
        ("compressed-fp8-channel", "qkv", "weight_scale", 1),
    ],
)
def test_missing_scales(name: str, kind: str, missing: str, of: int) -> None:
    """Of one part of a layer; another part's must not stand in for it."""
    checkpoint = next(each for each in CHECKPOINTS if each.name == name)
    layer = build(kind, checkpoint.config())
    parts = iter(range(100))

    def file(piece: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = dict(checkpoint.write(piece).tensors)
        if next(parts) == of:
            del tensors[missing]
        return tensors

    load(layer, kind, Weights.of(kind), file)
    with pytest.raises(ValueError, match=f"{missing} was not loaded, or not all of it"):
        process(layer)


@pytest.mark.parametrize("kind", ["gate_up", "row"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=str)
def test_whatever_is_missing(checkpoint: Checkpoint, kind: str) -> None:
    """Any parameter that is read, of the last part of either expert."""
    for name in build(kind, checkpoint.config()).quant_method.reading.needs:
        for lacking in (pieces(kind, 0)[-1], pieces(kind, 1)[-1]):
            layer = build(kind, checkpoint.config())

            def file(piece: torch.Tensor, *, name: str = name, lacking: Any = lacking) -> Any:
                tensors = dict(checkpoint.write(piece).tensors)
                if torch.equal(piece, lacking):
                    del tensors[name]
                return tensors

            load(layer, kind, Weights.of(kind), file)
            with pytest.raises(ValueError, match=f"{name} was not loaded, or not all of it"):
                process(layer)


def test_weights_that_come_without_loaders() -> None:
    """As vLLM's `load_format="dummy"` writes them."""
    checkpoint = next(c for c in CHECKPOINTS if c.name == "compressed-w4a16-group32")
    layer = build("gate_up", checkpoint.config())
    for expert in (layer, layer.gen_exp):
        expert.weight_packed.data.zero_()
        expert.weight_scale.data.fill_(0.5)
    process(layer)
    assert torch.equal(dequantize(layer.routed_weight), torch.full((2, 2 * FFN, HIDDEN), -4.0))


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("fp8_per_tensor", WeightScales.PER_TENSOR),
        ("fp8_per_channel", WeightScales.PER_CHANNEL),
        ("fp8_per_block", WeightScales.BLOCK),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_online(name: str, scales: WeightScales, kind: str) -> None:
    """vLLM calls the method once a layer is loaded, and again at the end."""
    quantization = importlib.import_module("vllm.config.quantization")
    online = importlib.import_module(f"{QUANTIZATION}.online.base")
    config = online.OnlineQuantizationConfig(quantization._ONLINE_SHORTHANDS[name])
    layer = build(kind, config)
    assert layer.weight.is_meta  # no full-precision weights before the layer's turn
    load(layer, kind, Weights.of(kind), lambda piece: {"weight": piece})
    process(layer)
    format, want = Fp8W8A8(scales), quantised(kind, Fp8W8A8(scales))
    weight = layer.routed_weight
    assert weight.format == format
    assert torch.equal(dequantize(weight), dequantize(want))
    x = torch.randn(PLAN.num_rows, in_features(kind))
    bias = Weights.of(kind).bias
    assert torch.equal(layer(x, PLAN)[0], mot_linear(x, want, PLAN, bias=bias))


def test_scheme_for_gpus_without_fp8_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """There vLLM keeps activations in 16 bits; the checkpoint's format is another, and runs."""
    checkpoint = next(c for c in CHECKPOINTS if c.name == "compressed-fp8-channel")
    config = checkpoint.config()
    monkeypatch.setattr(type(config), "_check_scheme_supported", lambda *_, **__: False)
    scheme = importlib.import_module(
        f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w8a16_fp8"
    )
    monkeypatch.setattr(scheme, "init_wfp8_a16_linear_kernel", AnyKernel)
    layer = build("row", config)
    assert type(layer.scheme).__name__ == "CompressedTensorsW8A16Fp8"
    assert layer.quant_method.format == Fp8W8A8()


# --- what has no format


def assert_gathered(config: Any, why: str) -> None:
    layer = build("gate_up", config)
    assert not isinstance(layer.quant_method, ConvertedLinearMethod)
    assert why in layer._why_gathered


def test_asymmetric_activations() -> None:
    asymmetric = by_token("int") | {"symmetric": False}
    config = compressed("int-quantized", weights(8, "int", "channel"), asymmetric)
    assert_gathered(config, "INT8 activations with a zero point")


@pytest.mark.parametrize(
    ("bits", "strategy", "why"),
    [
        (8, {"strategy": "group", "group_size": 128}, "8 bits, symmetric, with a scale for each"),
        (4, {"strategy": "group", "group_size": 16}, "4 bits, symmetric, with a scale for each 16"),
        (8, {"strategy": "channel", "symmetric": False}, "8 bits, with zero points"),
    ],
)
def test_weight_only_of_other_kinds(bits: int, strategy: dict[str, Any], why: str) -> None:
    assert_gathered(compressed("pack-quantized", {"num_bits": bits, "type": "int"} | strategy), why)


def test_large_groups_become_ours() -> None:
    """A scale for 256 elements is the same scale for two groups of 128."""
    config = compressed("pack-quantized", weights(4, "int", "group", group_size=256))
    assert build("gate_up", config).quant_method.format == Int4W4A16(128)


def test_experts_in_different_formats() -> None:
    config = CHECKPOINTS[0].config()
    other = next(c for c in CHECKPOINTS if c.name == "compressed-int8-channel").config()

    class Both(type(config)):  # type: ignore[misc]
        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return (other if "gen_exp" in prefix else config).get_quant_method(layer, prefix)

    assert_gathered(Both(), "its experts are in different formats")


def test_a_method_by_the_same_name_elsewhere() -> None:
    """Another package's class may keep other weights than vLLM's of that name."""

    class Fp8LinearMethod(LinearMethodBase):
        def create_weights(self, layer: Any, *args: Any, **extra: Any) -> None:
            layer.register_parameter("weight", None)

        def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return x.new_zeros(x.shape[0], 2 * HIDDEN)

    config = CHECKPOINTS[0].config()
    config.get_quant_method = lambda layer, prefix: Fp8LinearMethod()
    assert_gathered(config, "its parameters are of no known layout")


def test_says_why_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    asymmetric = by_token("int") | {"symmetric": False}
    layer = build("row", compressed("int-quantized", weights(8, "int", "channel"), asymmetric))
    layer.quant_method.apply = lambda layer, x, bias: x.new_zeros(x.shape[0], HIDDEN)
    layer.gen_exp.quant_method.apply = layer.quant_method.apply
    with caplog.at_level(logging.WARNING, logger="mot_layers"):
        layer(torch.randn(PLAN.num_rows, in_features("row")), PLAN)
    assert "CompressedTensorsLinearMethod" in caplog.text
    assert "INT8 activations with a zero point" in caplog.text
