"""What is in a checkpoint folder, read from its headers only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bagel_mot import checkpoint
from bagel_mot.checkpoint import CheckpointError, StoredTensor, Target
from bagel_mot.config import BagelConfig
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.vae import AutoEncoder

# Bytes an element takes once loaded.
_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """Result of `inspect_checkpoint`.

    Attributes:
        config: with grid sizes as the checkpoint has them.
        stored: every tensor in the files.
        targets: where each expected tensor goes.
        problems: why it would not load; empty if it would.
        width: bytes an element takes in memory.
        attention: the attention backend that would run here, and why.
    """

    config: BagelConfig
    stored: dict[str, StoredTensor]
    targets: dict[str, Target]
    problems: list[str]
    width: int
    attention: str

    def component_of(self, name: str) -> str:
        """Part of the model a checkpoint tensor belongs to."""
        target = self.targets.get(name)
        if target is None:
            return "unknown"
        top = target.parameter.split(".")[0]
        if top == "transformer":
            return "gen expert" if ".gen_exp" in target.parameter else "und expert"
        return {"vit": "vision tower", "vae": "VAE"}.get(top, "embeddings and heads")

    def kv_bytes_per_row(self) -> int:
        """KV cache bytes of one token, all layers."""
        llm = self.config.llm
        return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * self.width

    def tables(self, *, with_names: bool) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
        """(title, columns, rows) of what there is to print."""
        count: dict[str, int] = defaultdict(int)
        elements: dict[str, int] = defaultdict(int)
        for name, tensor in self.stored.items():
            part = self.component_of(name)
            count[part] += 1
            elements[part] += tensor.elements
        rows: Rows = [
            (part, str(count[part]), f"{elements[part]:,}", _gib(elements[part] * self.width))
            for part in sorted(elements, key=lambda part: -elements[part])
        ]
        total = sum(elements.values())
        rows.append(("all", str(len(self.stored)), f"{total:,}", _gib(total * self.width)))
        yield "components", ("part", "tensors", "parameters", "memory"), rows

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
    with torch.device("meta"):
        vae = AutoEncoder(config.vae)
    targets = checkpoint.model_targets(config) | checkpoint.vae_targets(vae)
    problems: list[str] = []
    try:
        checkpoint.check_names(stored, targets)
    except CheckpointError as error:
        problems = str(error).splitlines()
    attention = choose_attention(
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=getattr(torch, dtype),
        head_dim=config.llm.head_dim,
    )
    return Report(config, stored, targets, problems, _WIDTHS[dtype], str(attention))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
