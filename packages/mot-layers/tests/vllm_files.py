"""Checkpoints as vLLM's quantisation methods load them: configs, tensors, and what those mean.

The tensors are packed by the libraries that define the layouts (compressed-tensors; vLLM's own
packers for GPTQ and AWQ), so that what reads them is judged by somebody else's writing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from format_cases import Weights, build, load, process, shards_of
from mot_kernels import (
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    WeightScales,
)
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack

FP8 = torch.float8_e4m3fn
SERIALIZED = True  # said, because before vLLM 0.32 the default was to quantise online


@dataclass(frozen=True)
class File:
    """What a file holds for one matrix (N, K), and the float32 matrix that it stands for."""

    tensors: dict[str, torch.Tensor]
    meaning: torch.Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A way to quantise.

    Attributes:
        format: what a layer becomes; by kind of layer where parts that were fused matter.
        config: vLLM's quantisation config.
        write: from a matrix to its file.
        input_scale: what `write` puts down for activations, largest of several parts.
    """

    name: str
    format: Callable[[str], Format]
    config: Callable[[], Any]
    write: Callable[[torch.Tensor], File]
    has_input_scale: bool = False

    def __str__(self) -> str:
        return self.name


def compressed(
    format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> CompressedTensorsConfig:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False} | weights,
        "input_activations": activations and {"symmetric": True} | activations,
    }
    return CompressedTensorsConfig.from_config(
        {
            "quant_method": "compressed-tensors",
            "format": format,
            "config_groups": {"group_0": group},
            "ignore": [],
        }
    )


def by_token(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}


def by_tensor(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False}


def input_scale_of(piece: torch.Tensor) -> torch.Tensor:
    """Some scale for activations, another for each part and expert."""
    return piece.abs().amax() / 30


def write_8_bit(scales: str, dtype: torch.dtype, **names: Any) -> Callable[[torch.Tensor], File]:
    """8-bit values (N, K) with a scale by "tensor", "channel" or "block"."""
    scale_name = names.get("scale_name", "weight_scale")
    most = 448 if dtype is FP8 else 127

    def write(piece: torch.Tensor) -> File:
        n, k = piece.shape
        if scales == "block":
            blocks = piece.view(n // 128, 128, k // 128, 128).abs().amax((1, 3))
            scale = blocks / most
            spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        else:
            amax = piece.abs().amax() if scales == "tensor" else piece.abs().amax(1, keepdim=True)
            spread = scale = amax / most
        ratio = (piece / spread).clamp(-most, most)
        data = ratio.to(FP8) if dtype is FP8 else ratio.round().to(dtype)
        tensors = {"weight": data, scale_name: scale}
        if names.get("static"):
            tensors["input_scale"] = input_scale_of(piece)
        return File(tensors, data.float() * spread)

    return write


def levels_of(
    piece: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned levels (N, K) int32, scales (N, G), zero points (N, G) int32, the meaning (N, K)."""
    groups = piece.unflatten(1, (-1, group))
    middle, top = 2 ** (bits - 1), 2**bits - 1
    low = -groups.abs().amax(-1) if symmetric else groups.amin(-1).clamp_max(0)
    high = -low if symmetric else groups.amax(-1).clamp_min(0)
    scale = (high - low) / top
    zero = torch.full_like(scale, middle) if symmetric else (-low / scale).round()
    levels = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, top)
    meaning = ((levels - zero[..., None]) * scale[..., None]).flatten(1)
    return levels.flatten(1).int(), scale, zero.int(), meaning


def write_packed(bits: int, group: int | None, symmetric: bool = True) -> Any:
    def write(piece: torch.Tensor) -> File:
        levels, scale, zero, meaning = levels_of(piece, bits, group or piece.shape[1], symmetric)
        offset = 2 ** (bits - 1)
        tensors = {
            "weight_packed": pack_to_int32((levels - offset).to(torch.int8), bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(piece.shape),
        }
        if not symmetric:
            signed = (zero - offset).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0).contiguous()
        return File(tensors, meaning)

    return write


def write_gptq(bits: int, group: int | None) -> Any:
    def write(piece: torch.Tensor) -> File:
        n, k = piece.shape
        levels, scale, _, meaning = levels_of(piece, bits, group or k, symmetric=True)
        tensors = {
            "qweight": gptq_pack(levels.T.contiguous(), bits, k, n),
            "scales": scale.T.contiguous(),
            "qzeros": torch.full((scale.shape[1], n * bits // 32), 0x77777777, dtype=torch.int32),
        }
        return File(tensors, meaning)

    return write


def write_awq(group: int) -> Any:
    def write(piece: torch.Tensor) -> File:
        n, k = piece.shape
        levels, scale, zero, meaning = levels_of(piece, 4, group, symmetric=False)
        tensors = {
            "qweight": awq_pack(levels.T.contiguous(), 4, k, n),
            "scales": scale.T.contiguous(),
            "qzeros": awq_pack(zero.T.contiguous(), 4, k // group, n),
        }
        return File(tensors, meaning)

    return write


def by_tensor_format(kind: str) -> Format:
    """One scale a part: a row layer has one part, the others have several."""
    return Fp8W8A8(WeightScales.PER_TENSOR if kind == "row" else WeightScales.PER_CHANNEL)


def awq_config(group: int) -> AutoAWQConfig:
    return AutoAWQConfig.from_config(
        {"bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "lm_head": False}
    )


def gptq_config(bits: int, group: int) -> AutoGPTQConfig:
    # Named, because before vLLM 0.32 no names meant that nothing is quantised.
    return AutoGPTQConfig(bits, group, False, True, False, {}, {}, ["layers"])


def weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy} | more


CHECKPOINTS = [
    Checkpoint("fp8", by_tensor_format, lambda: Fp8Config(SERIALIZED), write_8_bit("tensor", FP8)),
    Checkpoint(
        "fp8-static",
        by_tensor_format,
        lambda: Fp8Config(SERIALIZED, activation_scheme="static"),
        write_8_bit("tensor", FP8, static=True),
        has_input_scale=True,
    ),
    Checkpoint(
        "fp8-block",
        lambda _: Fp8W8A8(WeightScales.BLOCK),
        lambda: Fp8Config(SERIALIZED, weight_block_size=[128, 128]),
        write_8_bit("block", FP8, scale_name="weight_scale_inv"),
    ),
    Checkpoint(
        "compressed-fp8-channel",
        lambda _: Fp8W8A8(WeightScales.PER_CHANNEL),
        lambda: compressed("float-quantized", weights(8, "float", "channel"), by_token("float")),
        write_8_bit("channel", FP8),
    ),
    Checkpoint(
        "compressed-fp8-tensor-static",
        by_tensor_format,
        lambda: compressed("float-quantized", weights(8, "float", "tensor"), by_tensor("float")),
        write_8_bit("tensor", FP8, static=True),
        has_input_scale=True,
    ),
    Checkpoint(
        "compressed-fp8-block",
        lambda _: Fp8W8A8(WeightScales.BLOCK),
        lambda: compressed(
            "float-quantized",
            weights(8, "float", "block", block_structure=[128, 128]),
            by_token("float") | {"strategy": "group", "group_size": 128},
        ),
        write_8_bit("block", FP8),
    ),
    Checkpoint(
        "compressed-int8-channel",
        lambda _: Int8W8A8(),
        lambda: compressed("int-quantized", weights(8, "int", "channel"), by_token("int")),
        write_8_bit("channel", torch.int8),
    ),
    Checkpoint(
        "compressed-int8-tensor",
        lambda _: Int8W8A8(),
        lambda: compressed("int-quantized", weights(8, "int", "tensor"), by_token("int")),
        write_8_bit("tensor", torch.int8),
    ),
    Checkpoint(
        "compressed-w8a16",
        lambda _: Int8W8A16(),
        lambda: compressed("pack-quantized", weights(8, "int", "channel")),
        write_packed(8, None),
    ),
    Checkpoint(
        "compressed-w4a16-group32",
        lambda _: Int4W4A16(32),
        lambda: compressed("pack-quantized", weights(4, "int", "group", group_size=32)),
        write_packed(4, 32),
    ),
    Checkpoint(
        "compressed-w4a16-group128-zero-points",
        lambda _: Int4W4A16(128, symmetric=False),
        lambda: compressed(
            "pack-quantized", weights(4, "int", "group", group_size=128, symmetric=False)
        ),
        write_packed(4, 128, symmetric=False),
    ),
    Checkpoint(
        "compressed-w4a16-channel",
        lambda _: Int4W4A16(128),
        lambda: compressed("pack-quantized", weights(4, "int", "channel")),
        write_packed(4, None),
    ),
    Checkpoint(
        "gptq-4",
        lambda _: Int4W4A16(128),
        lambda: gptq_config(4, 128),
        write_gptq(4, 128),
    ),
    Checkpoint(
        "gptq-8",
        lambda _: Int8W8A16(),
        lambda: gptq_config(8, -1),
        write_gptq(8, None),
    ),
    Checkpoint(
        "awq",
        lambda _: Int4W4A16(64, symmetric=False),
        lambda: awq_config(64),
        write_awq(64),
    ),
]


def loaded(checkpoint: Checkpoint, kind: str) -> Any:
    """A layer that vLLM has filled from a checkpoint."""
    layer = build(kind, checkpoint.config())
    load(layer, kind, Weights.of(kind), lambda piece: checkpoint.write(piece).tensors)
    process(layer)
    return layer


def pieces(kind: str, expert: int) -> tuple[torch.Tensor, ...]:
    """The matrices that a fused layer is made of."""
    return Weights.of(kind).weight[expert].split(list(shards_of(kind).values()))


def meaning(checkpoint: Checkpoint, kind: str) -> torch.Tensor:
    """(E, N, K) float32 of the whole model."""
    return torch.stack(
        [
            torch.cat([checkpoint.write(piece).meaning for piece in pieces(kind, expert)])
            for expert in range(2)
        ]
    )
