"""Which layers of the model are quantised, and how: what a user asks for, and what a model has.

Only the decoder layers' projections are ever quantised, both experts' alike: they are nine tenths
of BAGEL-7B's weights. Embeddings, heads, norms, the vision tower, the connectors and the VAE keep
their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from mot_kernels import Format, Fp8W8A8, Int4W4A16, Int8W8A8, Int8W8A16
from mot_kernels.formats import GROUP_SIZES
from mot_layers import FormatConfig
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from bagel_mot.config import LlmConfig

Projection = Literal["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]

PROJECTIONS: dict[str, Projection] = {
    "attn.qkv": "qkv_proj",
    "attn.o": "o_proj",
    "mlp.gate_up": "gate_up_proj",
    "mlp.down": "down_proj",
}
"""What users call a decoder layer's projections (as vLLM does), by their place in the layer."""

NAMES = ("fp8", "int8", "w8a16", "w4a16")
FORMATS = (*NAMES, *(f"w4a16:{size}" for size in GROUP_SIZES))
"""All that `Quantization.parse` takes."""


class Keep(BaseModel):
    """What stays in 16 bits although the model is quantised.

    Attributes:
        first, last: this many decoder layers at either end.
        projections: these of every layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: NonNegativeInt = 0
    last: NonNegativeInt = 0
    projections: frozenset[Projection] = frozenset()

    @classmethod
    def parse(cls, words: str) -> Self:
        """From the command line: "first,last:2,o_proj,down_proj"; "" keeps nothing.

        Raises:
            ValueError: a word is none of these.
        """
        ends = {"first": 0, "last": 0}
        projections: set[Projection] = set()
        known = {str(name): name for name in PROJECTIONS.values()}
        for word in filter(None, (part.strip() for part in words.split(","))):
            name, colon, count = word.partition(":")
            if name in ends and (not colon or (count.isdecimal() and int(count) > 0)):
                ends[name] = int(count) if colon else 1
            elif word in known:
                projections.add(known[word])
            else:
                raise ValueError(
                    f"keep: {word!r} is none of first, first:N, last, last:N (N from 1), "
                    f"{', '.join(known)}"
                )
        return cls(**ends, projections=frozenset(projections))

    def has(self, layer: int, projection: Projection, layers: int) -> bool:
        """Whether a projection of layer number `layer` of `layers` is kept."""
        at_an_end = layer < self.first or layer >= layers - self.last
        return at_an_end or projection in self.projections


class Quantization(BaseModel):
    """A number format for the decoder layers, and what is left out.

    Attributes:
        format: "fp8" (W8A8, E4M3, a scale for each output feature), "int8" (W8A8), "w8a16"
            (INT8 weights) or "w4a16" (INT4 weights, symmetric). W8A8 rounds activations too, with
            a scale for each token.
        group_size: for "w4a16", how many neighbouring weights of a row share a scale.
        keep: default, nothing: which layers suffer most is not known for the released weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fp8", "int8", "w8a16", "w4a16"]
    group_size: Literal[32, 64, 128] = 128
    keep: Keep = Keep()

    @classmethod
    def parse(cls, format: str, keep: str = "") -> Self:
        """From the command line: "fp8", "int8", "w8a16", "w4a16", "w4a16:GROUP"; see `Keep.parse`.

        Raises:
            ValueError: there is no such format, or a word of `keep` is not known.
        """
        if format not in FORMATS:
            raise ValueError(f"quantization is {format!r}; expected one of {', '.join(FORMATS)}")
        name, colon, group = format.partition(":")
        values = {"group_size": int(group)} if colon else {}
        return cls.model_validate({"format": name, "keep": Keep.parse(keep), **values})

    @classmethod
    def of(cls, quantization: str | Quantization) -> Quantization:
        """One that may have been given as a word; see `parse`.

        Raises:
            TypeError: it is neither.
        """
        if isinstance(quantization, str):
            return cls.parse(quantization)
        if not isinstance(quantization, Quantization):
            raise TypeError(
                f"quantization is {quantization!r}; expected one of {', '.join(FORMATS)}, or a "
                "Quantization"
            )
        return quantization

    def __str__(self) -> str:
        """The word for it; what is kept is not in it."""
        return f"{self.format}:{self.group_size}" if self.format == "w4a16" else self.format

    @property
    def weight_format(self) -> Format:
        """What it is to mot-kernels."""
        match self.format:
            case "fp8":
                return Fp8W8A8()
            case "int8":
                return Int8W8A8()
            case "w8a16":
                return Int8W8A16()
        return Int4W4A16(self.group_size)

    def formats(self, llm: LlmConfig) -> LayerFormats:
        """Which projections of a model that means."""
        layers = llm.num_hidden_layers
        return LayerFormats(
            self.weight_format,
            frozenset(
                (layer, projection)
                for layer in range(layers)
                for projection in PROJECTIONS.values()
                if not self.keep.has(layer, projection, layers)
            ),
        )


@dataclass(frozen=True)
class LayerFormats:
    """What is quantised in a model.

    Attributes:
        format: of all that is.
        quantized: (layer, projection); the others are in the model's dtype.
    """

    format: Format
    quantized: frozenset[tuple[int, Projection]]

    @classmethod
    def none(cls) -> Self:
        """Of a model in which nothing is quantised; the format is of no matter."""
        return cls(Fp8W8A8(), frozenset())

    def config(self, layer: int, projection: Projection) -> FormatConfig | None:
        """What mot-layers' layers take as `quant_config`."""
        return FormatConfig(self.format) if (layer, projection) in self.quantized else None

    def check(self, llm: LlmConfig, tensor: int = 1) -> None:
        """Refuse sizes that do not go with the format, and a format for nothing at all.

        Args:
            tensor: tensor parallel ranks, which split the columns of o_proj and down_proj.

        Raises:
            ValueError: groups do not divide the columns that a rank has of a projection, or no
                projection is quantised.
        """
        if not self.quantized:
            raise ValueError(
                "nothing is left to quantise: all projections of the model's "
                f"{llm.num_hidden_layers} layers are kept; keep less, or give no quantization"
            )
        columns: dict[Projection, int] = {
            "qkv_proj": llm.hidden_size,
            "o_proj": llm.num_attention_heads * llm.head_dim // tensor,
            "gate_up_proj": llm.hidden_size,
            "down_proj": llm.intermediate_size // tensor,
        }
        if not isinstance(self.format, Int4W4A16):
            return
        for projection in sorted({projection for _, projection in self.quantized}):
            have, group = columns[projection], self.format.group_size
            if have % group:
                fitting = [f"w4a16:{size}" for size in GROUP_SIZES if have % size == 0]
                others = f"use {' or '.join(fitting)}, or " if fitting else ""
                raise ValueError(
                    f"w4a16 with groups of {group} does not divide the {have} columns "
                    f"of {projection}" + (" on a rank" if tensor > 1 else "") + f"; {others}"
                    f"keep it in 16 bits (--keep-bf16 {projection})"
                )
