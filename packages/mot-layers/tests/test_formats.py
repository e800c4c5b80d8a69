"""Layers in a format of ours: quantised as they are loaded, part by part, and routed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from format_cases import (
    FFN,
    FORMATS,
    HIDDEN,
    KINDS,
    PLAN,
    Weights,
    build,
    fill,
    in_features,
    in_format,
    load,
    quantised,
)
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    WeightScales,
    dequantize,
    mot_linear,
    quantize_rows,
    quantize_weight,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mot_layers import FormatConfig, stacking

pytestmark = pytest.mark.usefixtures("vllm_groups")


def assert_equal(got: Any, want: Any) -> None:
    """Two `ExpertWeight`s with the same bits."""
    assert got.format == want.format
    for part in ("data", "scales", "zero_points", "activation_scale"):
        mine, theirs = getattr(got, part), getattr(want, part)
        assert (mine is None) == (theirs is None), part
        if mine is not None:
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantised_while_loading(format: Any, kind: str) -> None:
    """Part by part gives the bits that the whole would; the experts lie in one storage."""
    layer = in_format(kind, format)
    assert_equal(layer.routed_weight, quantised(kind, format))
    assert layer.weight.untyped_storage().data_ptr() == layer.gen_exp.weight.data_ptr() - (
        layer.weight.nbytes
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_routed(format: Any, kind: str) -> None:
    weights, layer = Weights.of(kind), in_format(kind, format)
    x = torch.randn(PLAN.num_rows, in_features(kind))
    epilogue = {"gate_up": SILU_MUL, "row": AddResidual(torch.randn(PLAN.num_rows, HIDDEN))}
    y, _ = layer(x, PLAN, epilogue=epilogue.get(kind))
    weight = quantised(kind, format)
    want = mot_linear(x, weight, PLAN, bias=weights.bias, epilogue=epilogue.get(kind))
    assert torch.equal(y, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_rounded_before(format: Any, kind: str) -> None:
    """The layer says which rows it would round, and takes them rounded, with the same result."""
    layer, x = in_format(kind, format), torch.randn(PLAN.num_rows, in_features(kind))
    if not isinstance(format, Fp8W8A8 | Int8W8A8):
        assert layer.rounds_to is None
        with pytest.raises(TypeError, match="does not round rows to 8 bits"):
            layer(quantize_rows(x, Int8W8A8()), PLAN)
        return
    assert layer.rounds_to == format
    rows = quantize_rows(x, format)
    assert torch.equal(layer(rows, PLAN)[0], layer(x, PLAN)[0])
    with pytest.raises(TypeError, match="takes them with a plan only"):
        layer(rows)


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
@pytest.mark.parametrize("format", [Fp8W8A8(), Int8W8A8(), Int8W8A16(), None], ids=str)
def test_rounds_its_result(format: Any, kind: str) -> None:
    """For another layer, whatever its own format is."""
    options = {"return_bias": False}
    layer = build(kind, None, **options) if format is None else in_format(kind, format, **options)
    if format is None:
        for parameter in layer.parameters():
            parameter.data.normal_()
    x, epilogue = torch.randn(PLAN.num_rows, HIDDEN), SILU_MUL if kind == "gate_up" else None
    y = layer(x, PLAN, epilogue=epilogue)
    for to, group_size in ((Fp8W8A8(), 128), (Fp8W8A8(), None), (Int8W8A8(), None)):
        rows = layer(x, PLAN, epilogue=epilogue, quantize=to, group_size=group_size)
        want = quantize_rows(y, to, group_size=group_size)
        assert torch.equal(rows.data.view(torch.uint8), want.data.view(torch.uint8))
        assert torch.equal(rows.scales, want.scales)


def test_refuses_to_round_its_result() -> None:
    x, format = torch.randn(PLAN.num_rows, HIDDEN), Fp8W8A8()
    layer = in_format("gate_up", format, return_bias=False)
    with pytest.raises(ValueError, match="only routed rows are rounded in passing: give it a plan"):
        layer(x, quantize=format)
    with pytest.raises(ValueError, match="returns a bias beside y; build the layer with return_bi"):
        in_format("gate_up", format)(x, PLAN, quantize=format)
    row = in_format("row", format, return_bias=False)
    with pytest.raises(ValueError, match="the ranks' outputs are still to be joined"):
        row(torch.randn(PLAN.num_rows, in_features("row")), PLAN, quantize=format)
    with pytest.raises(ValueError, match="group_size is given, but quantize is not"):
        layer(x, PLAN, group_size=128)
    with pytest.raises(ValueError, match="group_size is 64; it can be 128"):
        layer(x, PLAN, quantize=format, group_size=64)


def test_plain_layers_round_nothing() -> None:
    layer = build("row", None)
    assert layer.rounds_to is None
    with pytest.raises(TypeError, match="does not round rows to 8 bits"):
        layer(quantize_rows(torch.randn(PLAN.num_rows, in_features("row")), Int8W8A8()), PLAN)


@pytest.mark.parametrize("epilogue", [False, True], ids=["plain", "silu_mul"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_without_plan_all_rows_are_und(format: Any, epilogue: bool) -> None:
    layer = in_format("gate_up", format)
    x = torch.randn(2, 5, HIDDEN)
    y, _ = layer(x, epilogue=SILU_MUL if epilogue else None)
    und = mot_linear(x.flatten(0, 1), quantised("gate_up", format)).view(2, 5, -1)
    if epilogue:
        gate, up = und.chunk(2, dim=-1)
        und = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(y, und, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("und", [False, True], ids=["gen_bias", "both"])
def test_without_plan_the_bias_is_unds(und: bool) -> None:
    layer, x = in_format("row", Int8W8A16(), bias=und), torch.randn(4, in_features("row"))
    if und:
        layer.bias.data.fill_(2)
    want = mot_linear(x, quantised("row", Int8W8A16()))
    torch.testing.assert_close(layer(x)[0], want + 2 * und, rtol=0, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gen_expert_alone(format: Any) -> None:
    """The submodule is a layer of its own, as tools that walk modules expect."""
    layer, x = in_format("row", format), torch.randn(4, in_features("row"))
    only_gen = quantize_weight(Weights.of("row").weight[1:], format)
    want = mot_linear(x, only_gen, bias=Weights.of("row").bias[1:])
    assert torch.equal(layer.gen_exp(x)[0], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantised_tensors_load_as_they_are(format: Any, kind: str) -> None:
    def files(piece: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = quantize_weight(piece[None], format)
        parts = {"weight": weight.data[0], "weight_scale": weight.scales[0]}
        if weight.zero_points is not None:
            parts["weight_zero_point"] = weight.zero_points[0]
        return parts

    layer = build(kind, FormatConfig(format))
    load(layer, kind, Weights.of(kind), files)
    assert_equal(layer.routed_weight, quantised(kind, format))


def test_16_bit_weights_and_activations() -> None:
    weights = Weights.of("row")
    layer = build("row", FormatConfig(Int8W8A8()), params_dtype=torch.bfloat16)
    rounded = Weights(weights.weight.bfloat16(), weights.gen_bias.bfloat16())
    load(layer, "row", rounded, lambda piece: {"weight": piece})
    x = torch.randn(PLAN.num_rows, in_features("row")).bfloat16()
    weight = quantize_weight(rounded.weight, Int8W8A8())
    y, _ = layer(x, PLAN)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, mot_linear(x, weight, PLAN, bias=rounded.bias))


def test_names_and_sizes() -> None:
    layer = in_format("qkv", Int4W4A16(128))
    found = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    n = HIDDEN
    assert found == {
        "weight": (n, HIDDEN // 2),
        "weight_scale": (n, 2),
        "gen_exp.weight": (n, HIDDEN // 2),
        "gen_exp.weight_scale": (n, 2),
        "gen_exp.bias": (n,),
    }
    assert not any(p.requires_grad for p in layer.parameters())


def test_replaced_parameters_are_stacked_again(caplog: pytest.LogCaptureFixture) -> None:
    stacking._warn_restacked.cache_clear()
    layer = in_format("row", Int8W8A16())
    layer.gen_exp.weight_scale.data = layer.gen_exp.weight_scale.data * 2
    with caplog.at_level(logging.WARNING, logger="mot_layers"):
        twice = dequantize(layer.routed_weight)[1]
    assert torch.equal(twice, 2 * dequantize(quantised("row", Int8W8A16()))[1])
    assert "parameters were replaced" in caplog.text


def test_state_dict_round_trip() -> None:
    layer, other = in_format("qkv", Fp8W8A8()), build("qkv", FormatConfig(Fp8W8A8()))
    other.load_state_dict(layer.state_dict())
    assert_equal(other.routed_weight, quantised("qkv", Fp8W8A8()))


def test_stacked_weight_says_where_to_look() -> None:
    with pytest.raises(RuntimeError, match="is quantised in int8_w8a8; its routed_weight has"):
        _ = in_format("row", Int8W8A8()).stacked_weight


@pytest.mark.parametrize("scales", [WeightScales.PER_TENSOR, WeightScales.BLOCK], ids=str)
def test_scales_beyond_a_row_are_refused(scales: WeightScales) -> None:
    with pytest.raises(ValueError, match=r"must not reach beyond a row: expected Fp8W8A8\("):
        FormatConfig(Fp8W8A8(scales))


def test_groups_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"'here' cannot be in int4_w4a16_group128: K=64 is not"):
        MoTRow = type(build("row", None))
        MoTRow(64, 64, quant_config=FormatConfig(Int4W4A16(128)), prefix="here")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("weight", torch.int16, "weight has dtype torch.int16"),
        ("weight_scale", torch.bfloat16, "cannot fill weight_scale, a parameter of dtype"),
    ],
)
def test_wrong_dtype(name: str, dtype: torch.dtype, message: str) -> None:
    parameter = getattr(build("row", FormatConfig(Int8W8A8())), name)
    with pytest.raises(TypeError, match=message):
        fill(parameter, torch.zeros(HIDDEN, in_features("row")).to(dtype), None)


def test_scales_of_channels_may_have_a_column() -> None:
    """As compressed-tensors stores them; a scale of a whole expert has no place."""
    scale = build("row", FormatConfig(Int8W8A8())).weight_scale
    values = torch.arange(HIDDEN, dtype=torch.float32)
    fill(scale, values[:, None], None)
    assert torch.equal(scale, values)
    with pytest.raises(
        ValueError, match=r"of shape \(\) cannot fill weight_scale, of which a rank"
    ):
        fill(scale, torch.tensor(0.5), None)


def test_missing_scales_are_no_numbers() -> None:
    """Of a checkpoint with weights in the format and no scales, or misnamed ones."""
    format = Int8W8A16()
    layer = build("row", FormatConfig(format))
    weights = Weights.of("row")
    load(
        layer,
        "row",
        weights,
        lambda piece: {"weight": quantize_weight(piece[None], format).data[0]},
    )
    y, _ = layer(torch.randn(PLAN.num_rows, in_features("row")), PLAN)
    assert y.isnan().all()
    with pytest.raises(ValueError, match="weight_scale was not loaded, or not all of it"):
        layer.quant_method.process_weights_after_loading(layer)


def test_missing_parts_are_told() -> None:
    """Scales alone, or a part's, must not make numbers of what memory held before."""
    format = Int8W8A16()
    layer = build("gate_up", FormatConfig(format)).gen_exp
    weights = [quantize_weight(torch.randn(1, FFN, HIDDEN), format) for _ in range(2)]
    finish = layer.quant_method.process_weights_after_loading
    for part, weight in enumerate(weights):
        fill(layer.weight_scale, weight.scales[0], part)
    fill(layer.weight, weights[0].data[0], 0)
    with pytest.raises(
        ValueError, match=r"weight was not loaded, or not all of it \(missing: part 1"
    ):
        finish(layer)
    for part in range(2):
        fill(layer.weight, torch.randn(FFN, HIDDEN), part)  # quantised here, scales and all
    finish(layer)
    for part, weight in enumerate(weights):
        fill(layer.weight, torch.randn(FFN, HIDDEN), part)
        fill(layer.weight, weight.data[0], part)
    with pytest.raises(ValueError, match=r"weight_scale was not .* \(missing: part 0, 1\)"):
        finish(layer)


def test_missing_zero_points_are_told() -> None:
    format = Int4W4A16(32, symmetric=False)
    layer = build("row", FormatConfig(format))

    def file(piece: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = quantize_weight(piece[None], format)
        return {"weight": weight.data[0], "weight_scale": weight.scales[0]}

    load(layer, "row", Weights.of("row"), file)
    with pytest.raises(ValueError, match="weight_zero_point was not loaded, or not all of it"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("format", [Fp8W8A8(), Int8W8A8()], ids=str)
def test_conversion_to_another_dtype_is_refused(format: Any) -> None:
    """`Module.to(dtype)` would turn FP8 numbers into wider ones without their scales' help."""
    layer, x = in_format("row", format), torch.randn(PLAN.num_rows, in_features("row"))
    before = layer(x, PLAN)[0]
    with pytest.raises(TypeError, match=r"its weight(_scale)? stays torch\.\w+, but is to become"):
        layer.to(torch.float16)
    assert torch.equal(layer.to("cpu")(x, PLAN)[0], before)


class Unsynchronised(TorchDispatchMode):
    """Fails where the host would wait for the device: such a layer is not for CUDA graphs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no_plan"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nothing_waits_for_the_device(format: Any, planned: bool) -> None:
    layer, x = in_format("gate_up", format), torch.randn(PLAN.num_rows, HIDDEN)
    with Unsynchronised():
        layer(x, PLAN if planned else None, epilogue=SILU_MUL)
    with pytest.raises(AssertionError), Unsynchronised():
        x.sum().item()
