"""Rounding to formats: error bounds that follow from each format, packing, edge values, errors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mot_kernels import (
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    WeightScales,
    dequantize,
    quantize,
    quantize_weight,
)
from mot_kernels.formats import BLOCK

ALL_FORMATS: list[Format] = [
    *(Fp8W8A8(scales) for scales in WeightScales),
    Int8W8A8(),
    Int8W8A16(),
    *(Int4W4A16(size, symmetric) for size in (32, 64, 128) for symmetric in (True, False)),
]

all_formats = pytest.mark.parametrize("format", ALL_FORMATS, ids=str)


def spread_scales(weight: ExpertWeight) -> torch.Tensor:
    """The scale of each element, (E, N, K) float64, worked out apart from the code under test."""
    experts, n, k = weight.shape
    scales = weight.scales.double()
    if isinstance(weight.format, Int4W4A16):
        return scales[..., torch.arange(k) // weight.format.group_size]
    if weight.format == Fp8W8A8(WeightScales.PER_TENSOR):
        return scales.view(-1, 1, 1).expand(experts, n, k)
    if weight.format == Fp8W8A8(WeightScales.BLOCK):
        return scales[:, torch.arange(n) // 128][..., torch.arange(k) // 128]
    return scales[..., None].expand(experts, n, k)


def bound(wide: torch.Tensor, weight: ExpertWeight) -> torch.Tensor:
    """The most that rounding may have moved each element.

    e4m3fn has 3 bits after the leading one, so half a step is 2^-4 of the number, and 2^-10 below
    the least normal number 2^-6. Integers move by half a scale. INT4's levels need not reach to
    the largest elements: those move to the last one. Scale, quotient and product are float32, each
    within 2^-24 of the number.
    """
    scales = spread_scales(weight)
    arithmetic = wide.abs() * 2**-22
    if isinstance(weight.format, Fp8W8A8):
        return torch.maximum(wide.abs() * 2**-4, scales * 2**-10) + arithmetic
    if not isinstance(weight.format, Int4W4A16):
        return scales / 2 + arithmetic
    zeros = torch.full_like(scales, 8.0)
    if weight.zero_points is not None:
        group = torch.arange(wide.shape[-1]) // weight.format.group_size
        zeros = weight.zero_points.double()[..., group]
    ends = -zeros * scales, (15 - zeros) * scales
    inside = wide.clamp(torch.minimum(*ends), torch.maximum(*ends))
    return torch.maximum(scales.abs() / 2, (wide - inside).abs()) + arithmetic


def sample(*shape: int) -> torch.Tensor:
    """Rows and experts of very different sizes, a zero row, a constant row, a zero group."""
    torch.manual_seed(0)
    w = torch.randn(shape) * torch.logspace(-4, 4, shape[1])[:, None]
    w *= torch.tensor([1.0, 100.0, 1e-3])[: shape[0], None, None]
    w[0, 3] = 0.0
    w[0, 5] = -2.5
    w[-1, 7, :128] = 0.0
    w[-1, 9] = w[-1, 9].abs()
    return w


@all_formats
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quantize_weight_round_trip(format: Format, weight_dtype: torch.dtype) -> None:
    w = sample(3, 200, 384).to(weight_dtype)
    quantized = quantize_weight(w, format)
    assert quantized.shape == w.shape
    back = dequantize(quantized)
    assert back.isfinite().all() and (quantized.scales != 0).all()
    error = (back.double() - w.double()).abs()
    assert (error <= bound(w.double(), quantized)).all()
    assert (back[0, 3] == 0).all() and (back[-1, 7, :128] == 0).all()
    if format != Fp8W8A8(WeightScales.PER_TENSOR) and format != Fp8W8A8(WeightScales.BLOCK):
        torch.testing.assert_close(back[0, 5], torch.full((384,), -2.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "format", [f for f in ALL_FORMATS if not isinstance(f, Int4W4A16)], ids=str
)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 200), (127, 129)], ids=str)
def test_quantize_weight_ragged(format: Format, n: int, k: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(2, n, k)
    quantized = quantize_weight(w, format)
    error = (dequantize(quantized) - w).double().abs()
    assert (error <= bound(w.double(), quantized)).all()


@all_formats
@pytest.mark.parametrize(("n", "k"), [(0, 128), (4, 0), (0, 0)], ids=str)
def test_quantize_weight_of_nothing(format: Format, n: int, k: int) -> None:
    quantized = quantize_weight(torch.zeros(2, n, k), format)
    assert quantized.shape == (2, n, k)
    assert dequantize(quantized).shape == (2, n, k)


@all_formats
def test_largest_element_uses_the_last_level(format: Format) -> None:
    """Scales are as small as they can be: both signs of the largest element are exact."""
    w = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(1))
    w[0, 0, ::32], w[0, 0, 1::32] = 5.0, -5.0
    quantized = quantize_weight(w, format)
    back = dequantize(quantized)[0, 0]
    if isinstance(format, Int4W4A16) and not format.symmetric:  # an odd number of steps: no centre
        levels = quantized.data[0, 0] & 15, quantized.data[0, 0] >> 4
        assert (levels[0][::16] == 15).all() and (levels[1][::16] == 0).all()
    else:
        assert (back[::32] - 5.0).abs().max() < 1e-6 and (back[1::32] + 5.0).abs().max() < 1e-6


@all_formats
def test_quantize_weight_in_chunks(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits however many rows are taken at a time, and from a list as from a tensor."""
    w = sample(2, 300, 256)
    whole = quantize_weight(w, format)
    wide = dequantize(whole, torch.bfloat16)
    assert len(quantize.row_chunks(300, 256)) == 1
    few = [slice(0, 128), slice(128, 256), slice(256, 300)]
    monkeypatch.setattr(quantize, "row_chunks", lambda n, k: few)
    parts = quantize_weight(list(w), format)
    for field in dataclasses.fields(ExpertWeight):
        a, b = getattr(whole, field.name), getattr(parts, field.name)
        assert torch.equal(bits(a), bits(b)) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(dequantize(parts, torch.bfloat16), wide)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t


def test_row_chunks_cover_all_rows_in_whole_blocks() -> None:
    chunks = quantize.row_chunks(37_888, 3_584)
    assert chunks[0].start == 0 and chunks[-1].stop == 37_888 and len(chunks) > 2
    assert all(a.stop == b.start for a, b in itertools.pairwise(chunks))
    assert all(chunk.start % BLOCK == 0 for chunk in chunks)
    assert all((chunk.stop - chunk.start) * 3_584 <= 2**24 for chunk in chunks)


def test_int4_nibbles() -> None:
    """Even k in the low nibble, offset 8; weights on a grid of -7..7 keep their values."""
    w = torch.zeros(1, 1, 32)
    w[0, 0, :4] = torch.tensor([7.0, -7.0, 1.0, -3.0])
    quantized = quantize_weight(w, Int4W4A16(32))
    assert quantized.scales.tolist() == [[[1.0]]]
    assert quantized.data[0, 0, :3].tolist() == [0x1F, 0x59, 0x88]
    assert torch.equal(dequantize(quantized), w)


INT4_FORMATS = [f for f in ALL_FORMATS if isinstance(f, Int4W4A16)]


def int4_of(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Groups (.., size) rounded with scales and zero points (.., 1), and back."""
    return (((w / scale).round() + zero).clamp(0, 15) - zero) * scale


@pytest.mark.parametrize("format", INT4_FORMATS, ids=str)
def test_int4_scales_are_the_best_of_those_tried(format: Int4W4A16) -> None:
    """By squared distance, of each group: none of the scales one would think of does better."""
    w = torch.randn(1, 64, 512, generator=torch.Generator().manual_seed(0)).double()
    w[:, ::2] **= 3  # few large weights, many small ones
    quantized = quantize_weight(w.float(), format)
    groups = w.unflatten(-1, (-1, format.group_size))
    back = dequantize(quantized).double().unflatten(-1, (-1, format.group_size))
    distance = (back - groups).square().sum(-1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    largest = torch.where(high >= -low, high, low)
    for factor in (1.0, 0.9, 0.8):
        if format.symmetric:
            others = [largest.abs() / 7 * factor, -largest / 8 * factor]
            zero = torch.full_like(low, 8.0)
        else:
            others = [(high - low) / 15 * factor]
            zero = (-low / ((high - low) / 15)).round()
        for scale in others if factor == 1.0 else others[-1:]:
            other = (int4_of(groups, scale, zero) - groups).square().sum(-1)
            assert (distance <= other * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("format", "most"),
    [(Int4W4A16(128), 0.098), (Int4W4A16(32), 0.083), (Int4W4A16(128, symmetric=False), 0.096)],
    ids=str,
)
def test_int4_distance_of_gaussian_weights(format: Int4W4A16, most: float) -> None:
    """Scales of amax / 7 (range / 15) give 0.117, 0.097 and 0.101."""
    w = torch.randn(1, 256, 4096, generator=torch.Generator().manual_seed(0))
    back = dequantize(quantize_weight(w, format))
    assert (back - w).norm() / w.norm() < most


def test_int4_scales_do_not_depend_on_strides() -> None:
    """Nor on the device: distances that are nearly equal are added up in one order."""
    w = torch.randn(1, 512, 1024, generator=torch.Generator().manual_seed(153))
    w = (w / 64).bfloat16().float()
    straight = quantize_weight(w, Int4W4A16(128))
    for other in (w.mT.contiguous().mT, w.repeat(1, 1, 2)[..., 1024:]):
        again = quantize_weight(other, Int4W4A16(128))
        assert torch.equal(again.data, straight.data)
        assert torch.equal(again.scales, straight.scales)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_int4_scales_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    w = torch.randn(1, 64, 512, generator=torch.Generator().manual_seed(0))
    wanted = quantize_weight(w, Int4W4A16(128))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = quantize_weight(w, Int4W4A16(128))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got.data, wanted.data) and torch.equal(got.scales, wanted.scales)


@pytest.mark.parametrize("format", INT4_FORMATS, ids=str)
def test_int4_again_changes_nothing(format: Int4W4A16) -> None:
    w = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0))
    once = dequantize(quantize_weight(w, format))
    assert (dequantize(quantize_weight(once, format)) - once).abs().max() < 1e-6


def test_int4_of_infinite_and_huge_and_tiny_weights() -> None:
    """The search gives up where distances are no numbers, and takes scales that hold all."""
    w = torch.zeros(1, 4, 32)
    w[0, 0, :2] = torch.tensor([float("nan"), 1.0])
    w[0, 1, :2] = torch.tensor([3e38, -3e38])
    w[0, 2, :2] = torch.tensor([1e-38, -1e-39])
    w[0, 3, :2] = torch.tensor([float("inf"), 1.0])
    back = dequantize(quantize_weight(w, Int4W4A16(32)))[0]
    assert back[0].isnan().any() and not back[3, 0].isfinite()
    torch.testing.assert_close(back[1], w[0, 1], rtol=1e-6, atol=0)
    assert (back[2] - w[0, 2]).abs().max() <= 1.2e-38


def test_int4_reads_minus_eight_and_16_bit_scales() -> None:
    data = torch.zeros(1, 1, 16, dtype=torch.uint8)
    weight = ExpertWeight(data, torch.full((1, 1, 1), 0.5, dtype=torch.bfloat16), Int4W4A16(32))
    assert (dequantize(weight) == -4.0).all()


def test_int4_zero_points() -> None:
    w = torch.arange(-5.0, 11.0).repeat(2).view(1, 1, 32)
    quantized = quantize_weight(w, Int4W4A16(32, symmetric=False))
    assert quantized.zero_points is not None
    assert quantized.scales.item() == 1.0 and quantized.zero_points.item() == 5
    assert torch.equal(dequantize(quantized), w)


def test_expert_weight_to() -> None:
    weight = quantize_weight(
        torch.randn(2, 4, 32), Int8W8A8(), activation_scale=torch.tensor([1.0, 2.0])
    )
    moved = weight.to("meta")
    assert moved.device.type == "meta" and moved.activation_scale is not None
    assert moved.activation_scale.device.type == "meta" and moved.format == weight.format


# --- errors

INT8 = torch.zeros(2, 6, 64, dtype=torch.int8)
FP8 = torch.zeros(2, 6, 64).to(torch.float8_e4m3fn)
INT4 = torch.zeros(2, 6, 32, dtype=torch.uint8)
ROW_SCALES = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("data", "scales", "format", "message"),
    [
        (FP8, ROW_SCALES, Int8W8A8(), "data has dtype torch.float8_e4m3fn; expected torch.int8"),
        (INT8, ROW_SCALES, Fp8W8A8(), "data has dtype torch.int8; expected torch.float8_e4m3fn"),
        (INT8, ROW_SCALES.half(), Int8W8A8(), "scales has dtype torch.float16; expected"),
        (INT8, ROW_SCALES, "int8", "format is 'int8'; expected Fp8W8A8"),
    ],
)
def test_expert_weight_type_errors(
    data: torch.Tensor, scales: torch.Tensor, format: Format, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        ExpertWeight(data, scales, format)


@pytest.mark.parametrize(
    ("data", "scales", "format", "message"),
    [
        (INT8[0], ROW_SCALES, Int8W8A8(), r"data has shape \(6, 64\); expected 3 dimensions"),
        (INT8.mT, ROW_SCALES, Int8W8A8(), "K must be contiguous"),
        (INT8, torch.ones(2), Int8W8A8(), r"scales has shape \(2,\); expected \(2, 6\)"),
        (FP8, ROW_SCALES, Fp8W8A8(WeightScales.PER_TENSOR), r"expected \(2,\)"),
        (FP8, ROW_SCALES, Fp8W8A8(WeightScales.BLOCK), r"expected \(2, 1, 1\)"),
        (INT4, torch.ones(2, 6, 3), Int4W4A16(32), r"expected \(2, 6, 2\)"),
        (INT4, torch.ones(2, 6, 0), Int4W4A16(128), "K=64 is not a multiple of the format's"),
        (INT8, ROW_SCALES.to("meta"), Int8W8A8(), "scales is on meta but data is on cpu"),
        (INT4, torch.ones(2, 6, 2), Int4W4A16(32, symmetric=False), "zero_points are missing"),
    ],
)
def test_expert_weight_value_errors(
    data: torch.Tensor, scales: torch.Tensor, format: Format, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertWeight(data, scales, format)


def test_expert_weight_zero_point_errors() -> None:
    zeros = torch.zeros(2, 6, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zero_points are given, but format int4_w4a16_group32"):
        ExpertWeight(INT4, torch.ones(2, 6, 2), Int4W4A16(32), zeros)
    with pytest.raises(TypeError, match=r"zero_points has dtype torch\.float32"):
        ExpertWeight(INT4, torch.ones(2, 6, 2), Int4W4A16(32, False), zeros.float())
    with pytest.raises(ValueError, match="zero_points has shape"):
        ExpertWeight(INT4, torch.ones(2, 6, 2), Int4W4A16(32, False), zeros[:1])


def test_expert_weight_activation_scale_errors() -> None:
    with pytest.raises(ValueError, match="int8_w8a16 keeps activations"):
        ExpertWeight(INT8, ROW_SCALES, Int8W8A16(), activation_scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"activation_scale has shape \(1,\); expected \(2,\)"):
        ExpertWeight(INT8, ROW_SCALES, Int8W8A8(), activation_scale=torch.ones(1))


@pytest.mark.parametrize("size", [0, 16, 256])
def test_group_size_error(size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size is {size}; it can be one of"):
        Int4W4A16(size)


def test_quantize_errors() -> None:
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int8"):
        quantize_weight(INT8, Int8W8A8())
    with pytest.raises(ValueError, match="the same"):
        quantize_weight([torch.ones(2, 4), torch.ones(3, 4)], Int8W8A8())
    with pytest.raises(ValueError, match="K=48 is not a multiple"):
        quantize_weight(torch.ones(1, 2, 48), Int4W4A16(32))
    with pytest.raises(ValueError, match="could overflow the int32 accumulator"):
        quantize_weight(torch.ones(1, 1, 2**17 + 1), Int8W8A8())
