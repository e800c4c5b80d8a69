"""Small layers with known weights, what they should compute, and how far off they may be.

Used with one process, with several (test_tensor_parallel.py) and on a GPU (test_gpu_layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mot_kernels import SILU_MUL, AddResidual, Epilogue, RoutePlan

from mot_layers import (
    MoTMergedColumnParallelLinear,
    MoTQKVParallelLinear,
    MoTRowParallelLinear,
)

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN = 32, 4, 2, 8, 48

# The expert of each row; 0 is und, 1 is gen.
ROUTINGS = {
    "image_between_markers": [0, *[1] * 17, 0],
    "two_images_and_text": [*[0] * 5, *[1] * 9, *[0] * 3, *[1] * 4],
    "every_second_row": [0, 1] * 8,
    "only_und": [0] * 7,
    "only_gen": [1] * 7,
    "one_und_row": [0],
    "one_gen_row": [1],
    "no_rows": [],
}

KINDS = ("qkv", "gate_up", "row")
BIASES = {
    "no_bias": (False, False),
    "bias": (True, True),
    "und": (True, False),
    "gen": (False, True),
}


def make_plan(routing: str, device: str = "cpu") -> RoutePlan:
    labels = torch.tensor(ROUTINGS[routing], dtype=torch.int32, device=device)
    return RoutePlan.from_labels(labels, num_experts=2)


@dataclass(frozen=True)
class Layer:
    """One linear layer of a kind, with biases for und, gen, both or none."""

    kind: str
    bias: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.bias}"

    @property
    def in_features(self) -> int:
        return FFN if self.kind == "row" else HIDDEN

    @property
    def shards(self) -> dict[Any, int]:
        """Shard id -> out-features of the whole model, in the order of the merged tensor."""
        heads, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
        shards: dict[str, dict[Any, int]] = {
            "qkv": {"q": heads, "k": kv, "v": kv},
            "gate_up": {0: FFN, 1: FFN},
            "row": {None: HIDDEN},
        }
        return shards[self.kind]

    def arguments(self) -> tuple[Any, Any, tuple[Any, ...]]:
        """The MoT class, vLLM's class and vLLM's positional arguments."""
        mot, args = {
            "qkv": (MoTQKVParallelLinear, (HIDDEN, HEAD_SIZE, HEADS, KV_HEADS)),
            "gate_up": (MoTMergedColumnParallelLinear, (HIDDEN, [FFN, FFN])),
            "row": (MoTRowParallelLinear, (FFN, HIDDEN)),
        }[self.kind]
        return mot, mot.expert_class, args

    def build(self, **options: Any) -> Any:
        mot, _, args = self.arguments()
        und, gen = BIASES[self.bias]
        return mot(*args, bias=und, gen_bias=gen, **{"prefix": f"layers.0.{self.kind}"} | options)

    def weights(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Weights]:
        """The whole model's weights, und and gen; the same in every process."""
        numbers = torch.Generator().manual_seed(7)
        n, k = sum(self.shards.values()), self.in_features

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=numbers).to(device, dtype)

        return [
            Weights(draw(n, k) / k**0.5, draw(n) if has_bias else None)
            for has_bias in BIASES[self.bias]
        ]


@dataclass(frozen=True)
class Weights:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})


def load(layer: Any, spec: Layer, weights: list[Weights]) -> None:
    """Fill the layer shard by shard, through the loaders of its parameters."""
    for expert, own in zip((layer, layer.gen_exp), weights, strict=True):
        for name, full in own.parameters().items():
            parameter = getattr(expert, name)
            if spec.kind == "row":
                parameter.weight_loader(parameter, full)
                continue
            pieces = full.split(list(spec.shards.values()))
            for shard_id, piece in zip(spec.shards, pieces, strict=True):
                parameter.weight_loader(parameter, piece, shard_id)


def rows_of_rank(spec: Layer, rank: int, tp_size: int) -> torch.Tensor:
    """The out-features of the whole layer that one rank computes."""
    start, parts = 0, []
    for shard_id, size in spec.shards.items():
        own, place = size // tp_size, rank
        if shard_id in ("k", "v"):
            own = max(own, HEAD_SIZE)  # at least one head: several ranks may hold the same one
            place = rank * KV_HEADS // tp_size
        if spec.kind == "row":
            own, place = size, 0
        parts.append(torch.arange(start + place * own, start + (place + 1) * own))
        start += size
    return torch.cat(parts)


def plain(
    x: torch.Tensor,
    plan: RoutePlan,
    weights: list[Weights],
    epilogue: Epilogue | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a layer should return: one plain linear per expert, in the dtype of its arguments."""
    n = weights[0].weight.shape[0]
    columns = torch.arange(n, device=x.device) if columns is None else columns.to(x.device)
    y = x.new_empty(x.shape[0], len(columns))
    for e, own in enumerate(weights):
        rows = plan.rows_of(e).long()
        bias = None if own.bias is None else own.bias[columns]
        y[rows] = F.linear(x[rows], own.weight[columns], bias)
    if epilogue is SILU_MUL:
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y + epilogue.residual if isinstance(epilogue, AddResidual) else y


def exact(
    x: torch.Tensor,
    plan: RoutePlan,
    weights: list[Weights],
    epilogue: Epilogue | None = None,
    columns: torch.Tensor | None = None,
) -> torch.Tensor:
    """`plain` in float64."""
    wide = [
        Weights(own.weight.double(), None if own.bias is None else own.bias.double())
        for own in weights
    ]
    if isinstance(epilogue, AddResidual):
        epilogue = AddResidual(epilogue.residual.double())
    return plain(x.double(), plan, wide, epilogue, columns)


def assert_near(
    got: torch.Tensor, torch_own: torch.Tensor, truth: torch.Tensor, plan: RoutePlan
) -> None:
    """Each expert's rows are about as near to the truth as plain torch's in the same dtype.

    Per expert: two wrong und rows among thousands vanish in any measure over the whole tensor.
    The allowance of some roundings is for sums in another order (blocks of K, ranks).
    """
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.dtype is torch_own.dtype
    eps = torch.finfo(got.dtype).eps
    for e, name in enumerate(("und", "gen")):
        rows = plan.rows_of(e).long()
        if not len(rows):
            continue
        want = truth[rows]
        error = (got[rows].double() - want).abs()
        own_error = (torch_own[rows].double() - want).abs()
        for measure in (torch.max, lambda t: t.square().mean().sqrt()):
            allowed = 2 * measure(own_error) + 4 * eps * measure(want.abs())
            assert measure(error) <= allowed, (
                f"{name} rows are off by {measure(error):.3g}; torch by {measure(own_error):.3g}, "
                f"allowed {allowed:.3g}"
            )
