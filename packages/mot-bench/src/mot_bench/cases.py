"""What is measured: layer shapes, routings, and the cases they make. No torch here.

A generation step packs, per CFG branch, one und row (the marker before the image), the image's
gen rows and another und row: `Routing.generation`. Cases know the work they stand for, in
operations and bytes, so that times can be turned into rates.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

ITEM_SIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per element of the dtypes that can be measured."""

EPILOGUES = ("none", "silu_mul", "add_residual")

BRANCHES = (1, 2, 3)
IMAGE_TOKENS = (4096, 1024)
"""gen rows of a 1024x1024 and of a 512x512 image."""


@dataclass(frozen=True)
class Layer:
    """One linear layer: weight (N, K) per expert; for "silu_mul" N counts gate and up."""

    name: str
    k: int
    n: int
    epilogue: str = "none"
    bias: bool = False

    @property
    def n_out(self) -> int:
        """Columns of the output."""
        return self.n // 2 if self.epilogue == "silu_mul" else self.n


@dataclass(frozen=True)
class Model:
    """The dimensions that a transformer's linear and norm shapes follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_folder(cls, folder: Path) -> Model:
        """From the llm_config.json (or config.json) of a checkpoint.

        Raises:
            ValueError: there is none, or a size is missing; the message names it.
        """
        for name in ("llm_config.json", "config.json"):
            path = folder / name
            if path.is_file():
                break
        else:
            raise ValueError(f"{folder} holds no llm_config.json")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected an object, found {type(content).__name__}")
        hidden, heads = (
            _size(content, path, "hidden_size"),
            _size(content, path, "num_attention_heads"),
        )
        return cls(
            hidden=hidden,
            intermediate=_size(content, path, "intermediate_size"),
            heads=heads,
            kv_heads=_size(content, path, "num_key_value_heads"),
            head_dim=_size(content, path, "head_dim")
            if content.get("head_dim")
            else hidden // heads,
        )

    def shard(self, tp: int) -> Model:
        """What one of `tp` tensor-parallel ranks holds; KV heads repeat beyond their number.

        Raises:
            ValueError: the heads or the intermediate size do not divide by `tp`.
        """
        for name, value in (("heads", self.heads), ("intermediate size", self.intermediate)):
            if tp < 1 or value % tp:
                raise ValueError(f"the model's {name} {value} does not divide by {tp}")
        if self.kv_heads % tp and tp % self.kv_heads:
            raise ValueError(f"the model's {self.kv_heads} KV heads cannot be shared by {tp} ranks")
        return replace(
            self,
            heads=self.heads // tp,
            kv_heads=max(self.kv_heads // tp, 1),
            intermediate=self.intermediate // tp,
        )

    def layers(self, tp: int = 1) -> tuple[Layer, ...]:
        """qkv, o, gate_up and down as one of `tp` ranks runs them."""
        own = self.shard(tp)
        # With tensor parallelism an all-reduce stands between the product and the residual.
        residual = "add_residual" if tp == 1 else "none"
        suffix = "" if tp == 1 else f"_tp{tp}"
        qkv = (own.heads + 2 * own.kv_heads) * own.head_dim
        return (
            Layer(f"qkv{suffix}", self.hidden, qkv, bias=True),
            Layer(f"o{suffix}", own.heads * own.head_dim, self.hidden, residual),
            Layer(f"gate_up{suffix}", self.hidden, 2 * own.intermediate, "silu_mul"),
            Layer(f"down{suffix}", own.intermediate, self.hidden, residual),
        )


BAGEL_7B = Model(hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128)


def _size(content: Mapping[str, Any], path: Path, key: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: key {key!r} is {value!r}; expected a positive integer")
    return value


@dataclass(frozen=True)
class Routing:
    """How rows are dealt to experts: (expert, length) runs in row order."""

    name: str
    runs: tuple[tuple[int, int], ...]
    num_experts: int = 2

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows per expert."""
        counts = [0] * self.num_experts
        for expert, length in self.runs:
            counts[expert] += length
        return tuple(counts)

    @property
    def rows(self) -> int:
        """M, all rows."""
        return sum(self.counts)

    @classmethod
    def generation(cls, branches: int, image_tokens: int) -> Routing:
        """A denoising step: per CFG branch one und row, the image's gen rows, one und row."""
        runs = ((0, 1), (1, image_tokens), (0, 1)) * branches
        return cls(f"{branches}x{image_tokens}", runs)

    @classmethod
    def scattered(cls, rows: int, und_share: float) -> Routing:
        """Every row und with probability `und_share`, drawn alike on every machine."""
        draw = random.Random(0)
        labels = [0 if draw.random() < und_share else 1 for _ in range(rows)]
        runs = tuple((expert, len(list(run))) for expert, run in groupby(labels))
        return cls(f"{rows}rows-und{und_share:g}", runs)

    @classmethod
    def packed(cls, counts: Sequence[int]) -> Routing:
        """These rows per expert in contiguous runs, expert 0 around the others as in a step."""
        first, *others = counts
        middle = [(expert, rows) for expert, rows in enumerate(others, start=1) if rows]
        ends = [(0, first - first // 2), (0, first // 2)]
        runs = [run for run in (ends[0], *middle, ends[1]) if run[1]]
        return cls("+".join(str(count) for count in counts), tuple(runs), len(counts))


@dataclass(frozen=True)
class LinearCase:
    """One call of `mot_linear`; `format` is the weight's, as mot-kernels spells it.

    Rows of formats that round them are rounded before.
    """

    layer: Layer
    routing: Routing
    dtype: str
    format: str | None = None

    @property
    def op(self) -> str:
        """Weights in a format are an operation of their own, with other providers."""
        return "linear" if self.format is None else "linear_format"

    @property
    def shape(self) -> str:
        """Layer, K, N and epilogue, for tables."""
        parts = [f"{self.layer.name} {self.layer.k}→{self.layer.n}"]
        parts += ["bias"] if self.layer.bias else []
        parts += [self.layer.epilogue] if self.layer.epilogue != "none" else []
        parts += [self.format] if self.format else []
        return ", ".join(parts)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product."""
        return 2.0 * self.routing.rows * self.layer.n * self.layer.k

    @property
    def bytes_moved(self) -> int:
        """x, the weights of experts that have rows, bias, residual and output, each once."""
        layer, rows = self.layer, self.routing.rows
        experts = sum(count > 0 for count in self.routing.counts)
        outputs = rows * layer.n_out * (2 if layer.epilogue == "add_residual" else 1)
        outputs += experts * layer.n * layer.bias
        x, weight = rows * layer.k, experts * layer.n * layer.k
        size = ITEM_SIZE[self.dtype]
        x_size = 1 if self.format and "w8a8" in self.format else size
        # Scales are left out: a hundredth of INT4 in groups of 128.
        bits = 8 * size if self.format is None else 4 if "int4" in self.format else 8
        return outputs * size + x * x_size + weight * bits // 8

    def __str__(self) -> str:
        name = _name(self, f"K{self.layer.k}-N{self.layer.n}", self.layer.name)
        return f"{name}-{self.format}" if self.format else name


@dataclass(frozen=True)
class NormCase:
    """One call of `mot_rms_norm`; `add` means that a residual is added first."""

    width: int
    add: bool
    routing: Routing
    dtype: str

    op = "rms_norm"
    flops = 0.0  # Bound by memory: the few operations per element do not count.

    @property
    def shape(self) -> str:
        """Width and residual, for tables."""
        return f"{self.width} wide, residual add" if self.add else f"{self.width} wide"

    @property
    def bytes_moved(self) -> int:
        """Rows read and written once (with a residual two of each), and the weights."""
        rows = self.routing.rows * self.width * (4 if self.add else 2)
        return (rows + self.routing.num_experts * self.width) * ITEM_SIZE[self.dtype]

    def __str__(self) -> str:
        return _name(self, f"D{self.width}", "add" if self.add else "plain")


@dataclass(frozen=True)
class QkCase:
    """One call of `mot_qk_norm_rope`."""

    heads: int
    kv_heads: int
    head_dim: int
    routing: Routing
    dtype: str

    op = "qk_norm_rope"
    flops = 0.0

    @property
    def shape(self) -> str:
        """Heads, for tables."""
        return f"{self.heads}+2x{self.kv_heads} heads of {self.head_dim}"

    @property
    def bytes_moved(self) -> int:
        """The packed projection in, q, k and v out, and each row's fp32 cos and sin."""
        columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.routing.rows * (2 * columns * ITEM_SIZE[self.dtype] + 4 * self.head_dim)

    def __str__(self) -> str:
        return _name(self, f"H{self.heads}-Hkv{self.kv_heads}-D{self.head_dim}")


@dataclass(frozen=True)
class MlpCase:
    """A norm, gate_up with SiLU*mul, down and the residual; `format` is the weights'."""

    hidden: int
    intermediate: int
    routing: Routing
    dtype: str
    format: str | None = None

    op = "mlp"

    @property
    def shape(self) -> str:
        """Widths and format, for tables."""
        widths = f"{self.hidden}→2x{self.intermediate}→{self.hidden}"
        return f"{widths}, {self.format}" if self.format else widths

    @property
    def _products(self) -> tuple[LinearCase, LinearCase]:
        up = Layer("gate_up", self.hidden, 2 * self.intermediate, "silu_mul")
        down = Layer("down", self.intermediate, self.hidden, "add_residual")
        gate_up, last = (LinearCase(e, self.routing, self.dtype, self.format) for e in (up, down))
        return gate_up, last

    @property
    def flops(self) -> float:
        """Of the two products."""
        return sum(each.flops for each in self._products)

    @property
    def bytes_moved(self) -> int:
        """Of the two products; the norm's result is the first one's x."""
        return sum(each.bytes_moved for each in self._products)

    def __str__(self) -> str:
        name = _name(self, f"D{self.hidden}-F{self.intermediate}")
        return f"{name}-{self.format}" if self.format else name


Case = LinearCase | NormCase | QkCase | MlpCase


def _name(case: Case, *parts: str) -> str:
    rows = "-".join(str(count) for count in case.routing.counts)
    return "-".join([case.op, *reversed(parts), case.routing.name, f"rows{rows}", case.dtype])


def routings(
    branches: Iterable[int], image_tokens: Iterable[int], und_shares: Iterable[float] = ()
) -> list[Routing]:
    """A denoising step's routing for each combination; with shares, scattered rows instead."""
    steps = [Routing.generation(count, tokens) for tokens in image_tokens for count in branches]
    shares = list(und_shares)
    if not shares:
        return steps
    return [Routing.scattered(step.rows, share) for share in shares for step in steps]


def select(
    operations: Iterable[str],
    layers: Iterable[Layer],
    model: Model,
    routes: Sequence[Routing],
    dtype: str,
    format: str | None = None,
) -> list[Case]:
    """The cases of these operations: `layers` for linear, the rest from `model`.

    `format` is that of the linears' and the MLP's weights.
    """
    cases: list[Case] = []
    for op in operations:
        for route in routes:
            if op == "linear":
                cases += [LinearCase(layer, route, dtype, format) for layer in layers]
            elif op == "rms_norm":
                cases += [NormCase(model.hidden, add, route, dtype) for add in (False, True)]
            elif op == "qk_norm_rope":
                cases.append(QkCase(model.heads, model.kv_heads, model.head_dim, route, dtype))
            elif op == "mlp":
                cases.append(MlpCase(model.hidden, model.intermediate, route, dtype, format))
            else:
                raise ValueError(f"unknown operation {op!r}")
    return cases
