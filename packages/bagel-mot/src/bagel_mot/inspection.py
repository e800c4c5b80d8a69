"""What is in a checkpoint folder, read from its headers only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mot_kernels import Int4W4A16

from bagel_mot import checkpoint
from bagel_mot.checkpoint import DTYPES, PLAIN_DTYPES, CheckpointError, StoredTensor, Target
from bagel_mot.compressed import stored_formats, stored_targets
from bagel_mot.config import BagelConfig
from bagel_mot.copying import merged_adapters
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.quantization import LayerFormats
from bagel_mot.tokenizer import BagelTokenizer

# Bytes an element takes once loaded, by what the model computes in.
_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
# Bytes an element takes in a file; other dtypes have no place in the model and count as nothing.
_STORED_WIDTHS = defaultdict(int, {name: dtype.itemsize for name, dtype in DTYPES.items()})

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """Result of `inspect_checkpoint`.

    Attributes:
        config: with grid sizes as the checkpoint has them.
        stored: every tensor in the files.
        targets: where each expected tensor goes.
        problems: why it would not load; empty if it would.
        formats: what is quantised in the files; None if nothing is.
        width: bytes an element takes in memory, if it is not quantised.
        attention: the attention backend that would run here, and why.
        merged: LoRA adapters that were merged into it, see `copying.MERGED_KEY`.
    """

    config: BagelConfig
    stored: dict[str, StoredTensor]
    targets: dict[str, Target]
    problems: list[str]
    formats: LayerFormats | None
    width: int
    attention: str
    merged: list[dict[str, Any]]

    def component_of(self, name: str) -> str:
        """Part of the model a checkpoint tensor belongs to."""
        target = self.targets.get(name)
        if target is None:
            return "unknown"
        top = target.parameter.split(".")[0]
        if top == "transformer":
            return "gen expert" if ".gen_exp" in target.parameter else "und expert"
        return {"vit": "vision tower", "vae": "VAE"}.get(top, "embeddings and heads")

    def format_of(self, name: str) -> str:
        """How a checkpoint tensor is stored: the format it is a part of, or its dtype."""
        if self.formats is not None and self._is_quantized(name):
            return str(self.formats.format)
        return self.stored[name].dtype

    def parameters_of(self, name: str) -> int:
        """How many of the model's parameters a tensor stands for; scales are none."""
        tensor, target = self.stored[name], self.targets.get(name)
        if target is None or not self._is_quantized(name):
            return tensor.elements
        assert self.formats is not None
        bits = 4 if isinstance(self.formats.format, Int4W4A16) else 8
        packed = {"weight": 1, "weight_packed": 32 // bits}  # values in an element
        return tensor.elements * packed.get(name.rpartition(".")[2], 0)

    def memory_of(self, name: str) -> int:
        """Bytes that a tensor takes once it is loaded."""
        tensor = self.stored[name]
        if not self._is_quantized(name):
            return tensor.elements * self.width
        part = name.rpartition(".")[2]
        widths = {"weight_scale": 4, "weight_shape": 0}  # scales become float32
        return tensor.elements * widths.get(part, _STORED_WIDTHS[tensor.dtype])

    def _is_quantized(self, name: str) -> bool:
        """Whether a tensor is a part of a quantised matrix."""
        target = self.targets.get(name)
        if target is None:
            return False
        return target.dtypes != PLAIN_DTYPES or target.parameter.endswith("_scale")

    def _summed(self, key: Callable[[str], str]) -> Rows:
        """A row of sums for each kind of tensor, the one with most parameters first."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.stored:
            groups[key(name)].append(name)
        largest_first = sorted(groups, key=lambda kind: -sum(map(self.parameters_of, groups[kind])))
        return [(kind, *self._sums(groups[kind])) for kind in largest_first]

    def _sums(self, names: list[str]) -> tuple[str, str, str]:
        """Tensors, parameters and memory."""
        memory = _gib(sum(map(self.memory_of, names)))
        return str(len(names)), f"{sum(map(self.parameters_of, names)):,}", memory

    def _bytes_in_files(self, kind: str) -> int:
        tensors = [self.stored[name] for name in self.stored if self.format_of(name) == kind]
        return sum(tensor.elements * _STORED_WIDTHS[tensor.dtype] for tensor in tensors)

    def kv_bytes_per_row(self) -> int:
        """KV cache bytes of one token, all layers."""
        llm = self.config.llm
        return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * self.width

    def tables(self, *, with_names: bool) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
        """(title, columns, rows) of what there is to print."""
        columns = ("tensors", "parameters", "memory")
        parts = self._summed(self.component_of)
        parts.append(("all", *self._sums([*self.stored])))
        yield "components", ("part", *columns), parts
        formats = [
            (kind, *sums, _gib(self._bytes_in_files(kind)))
            for kind, *sums in self._summed(self.format_of)
        ]
        yield "formats", ("stored as", *columns, "in files"), formats

        unit = self.config.latent_token_pixels
        side = unit * self.config.latent_grid
        tokens = self.config.latent_grid**2 + 2
        llm = self.config.llm
        yield (
            "model",
            ("what", "value"),
            [
                ("language model", f"{llm.num_hidden_layers} layers, {llm.hidden_size} wide"),
                ("largest image", f"{side} x {side} pixels, a multiple of {unit} each side"),
                ("KV cache, a token", f"{self.kv_bytes_per_row():,} bytes"),
                ("KV cache, largest image, 3 contexts", _gib(3 * tokens * self.kv_bytes_per_row())),
                ("attention, on this machine", self.attention),
                *(
                    ("merged LoRA adapter", f"{each['adapter']}, scale {each['scale']:g}")
                    for each in self.merged
                ),
            ],
        )
        if with_names:
            yield (
                "tensors",
                ("checkpoint name", "shape", "dtype", "file", "parameter", "shard"),
                [self._name_row(name) for name in sorted(self.stored)],
            )

    def _name_row(self, name: str) -> tuple[str, ...]:
        tensor, target = self.stored[name], self.targets.get(name)
        place = ("-", "-")
        if target is not None:
            place = (target.parameter, "" if target.shard is None else str(target.shard))
        shape = "x".join(str(side) for side in tensor.shape)
        return (name, shape, tensor.dtype, tensor.file.name, *place)


def inspect_checkpoint(path: str | os.PathLike[str], dtype: str = "bfloat16") -> Report:
    """Read a checkpoint's configs and headers and compare them with the model.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a config or header cannot be read, or dtype is unknown.
    """
    if dtype not in _WIDTHS:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_WIDTHS)}")
    folder = Path(path)
    config = BagelConfig.from_folder(folder)
    stored = checkpoint.read_headers(folder)
    config = checkpoint.config_with_grids(config, stored)
    vae = AutoEncoder.without_weights(config.vae)
    targets = checkpoint.model_targets(config)
    problems: list[str] = []
    formats = None
    try:
        formats = stored_formats(folder, stored, config)
        if formats is not None:
            targets = stored_targets(targets, formats)
        targets |= checkpoint.vae_targets(vae)
        checkpoint.check_names(stored, targets)
    except CheckpointError as error:
        problems = str(error).splitlines()
    try:
        BagelTokenizer.of_model(folder, config.llm.vocab_size)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    attention = choose_attention(
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=getattr(torch, dtype),
        head_dim=config.llm.head_dim,
    )
    width, merged = _WIDTHS[dtype], merged_adapters(stored)
    return Report(config, stored, targets, problems, formats, width, str(attention), merged)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
