"""Layers in number formats: sizes that groups, blocks and several ranks divide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mot_kernels import (
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    RoutePlan,
    quantize_weight,
)
from torch import nn

from mot_layers import (
    FormatConfig,
    MoTMergedColumnParallelLinear,
    MoTQKVParallelLinear,
    MoTRowParallelLinear,
)

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN = 256, 4, 2, 32, 512
KINDS = ("qkv", "gate_up", "row")
PLAN = RoutePlan.from_runs([(0, 3), (1, 14), (0, 2)], num_experts=2)

FORMATS: list[Format] = [
    Fp8W8A8(),
    Int8W8A8(),
    Int8W8A16(),
    Int4W4A16(32),
    Int4W4A16(128),
    Int4W4A16(64, symmetric=False),
]


def shards_of(kind: str) -> dict[Any, int]:
    """Shard id -> out-features of the whole model."""
    heads, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    return {
        "qkv": {"q": heads, "k": kv, "v": kv},
        "gate_up": {0: FFN, 1: FFN},
        "row": {None: HIDDEN},
    }[kind]


def part_of_rank(kind: str, rank: int, tp_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Out-features and in-features of the whole layer that a rank holds."""
    k = torch.arange(in_features(kind))
    if kind == "row":
        return torch.arange(HIDDEN), k.chunk(tp_size)[rank]
    rows, start = [], 0
    for shard, size in shards_of(kind).items():
        parts, place = tp_size, rank
        if shard in ("k", "v") and tp_size > KV_HEADS:  # several ranks hold the same head
            parts, place = KV_HEADS, rank * KV_HEADS // tp_size
        rows.append(torch.arange(start, start + size).chunk(parts)[place])
        start += size
    return torch.cat(rows), k


def in_features(kind: str) -> int:
    return FFN if kind == "row" else HIDDEN


def build(kind: str, config: Any, **options: Any) -> Any:
    """A layer with a bias for the gen expert alone."""
    options = {"prefix": f"model.layers.0.{kind}", "bias": False, "gen_bias": True} | options
    match kind:
        case "qkv":
            return MoTQKVParallelLinear(
                HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, quant_config=config, **options
            )
        case "gate_up":
            return MoTMergedColumnParallelLinear(HIDDEN, [FFN, FFN], quant_config=config, **options)
    return MoTRowParallelLinear(FFN, HIDDEN, quant_config=config, **options)


@dataclass(frozen=True)
class Weights:
    """The whole model's, float32: weights (E, N, K), and the gen expert's bias (N,)."""

    weight: torch.Tensor
    gen_bias: torch.Tensor

    @classmethod
    def of(cls, kind: str) -> Weights:
        numbers = torch.Generator().manual_seed(7)
        n, k = sum(shards_of(kind).values()), in_features(kind)
        # Rows and columns of different sizes: a scale in the wrong place shows.
        weight = torch.randn(2, n, k, generator=numbers) / k**0.5
        weight *= torch.rand(2, n, 1, generator=numbers) + 0.25
        weight *= torch.rand(2, 1, k, generator=numbers) + 0.25
        return cls(weight, torch.randn(n, generator=numbers))

    @property
    def bias(self) -> torch.Tensor:
        """(E, N), zeros for the und expert."""
        return torch.stack([torch.zeros_like(self.gen_bias), self.gen_bias])


def load(
    layer: Any,
    kind: str,
    weights: Weights,
    files: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Fill the layer shard by shard as vLLM does; `files` says what stands for a matrix (N, K)."""
    for e, expert in enumerate((layer, layer.gen_exp)):
        pieces: Sequence[torch.Tensor] = weights.weight[e].split(list(shards_of(kind).values()))
        for shard, piece in zip(shards_of(kind), pieces, strict=True):
            for name, tensor in files(piece).items():
                fill(getattr(expert, name), tensor, shard)
    biases = weights.gen_bias.split(list(shards_of(kind).values()))
    for shard, piece in zip(shards_of(kind), biases, strict=True):
        fill(layer.gen_exp.bias, piece, shard)


def fill(parameter: Any, tensor: torch.Tensor, shard: Any) -> None:
    parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


def process(layer: nn.Module) -> None:
    """What vLLM does after loading."""
    for module in layer.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)


def in_format(kind: str, format: Format, weights: Weights | None = None, **options: Any) -> Any:
    """A loaded layer of our own quantisation."""
    layer = build(kind, FormatConfig(format), **options)
    load(layer, kind, weights or Weights.of(kind), lambda piece: {"weight": piece})
    process(layer)
    return layer


def quantised(kind: str, format: Format) -> Any:
    """What the whole model's weights are in a format: an `ExpertWeight`."""
    return quantize_weight(Weights.of(kind).weight, format)
