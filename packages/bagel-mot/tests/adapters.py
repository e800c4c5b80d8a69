"""LoRA adapters for the golden checkpoint, in PEFT's format, and what they should make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_data import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYER = "language_model.model.layers"
# Both experts' attention and MLP, and every other part of the model.
MODULES = (
    *(f"{LAYER}.0.self_attn.{x}_proj{twin}" for x in "qkvo" for twin in ("", "_moe_gen")),
    *(f"{LAYER}.2.mlp{twin}.{x}_proj" for x in ("gate", "up", "down") for twin in ("", "_moe_gen")),
    "language_model.lm_head",
    "vit_model.vision_model.encoder.layers.1.self_attn.out_proj",
    "vit_model.vision_model.embeddings.patch_embedding",
    "connector.fc1",
    "time_embedder.mlp.2",
    "vae2llm",
    "llm2vae",
)
PREFIX = "base_model.model."


def golden() -> dict[str, Tensor]:
    """The golden model's weights as they are stored."""
    return load_file(GOLDEN.checkpoint / "ema.safetensors")


def pairs(
    modules: tuple[str, ...] = MODULES, rank: int = 4, prefix: str = PREFIX
) -> dict[str, Tensor]:
    """Random A (rank, K) and B (N, rank) for some modules."""
    weights = golden()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        n, k = weights[f"{module}.weight"].shape
        for half, shape in (("A", (rank, k)), ("B", (n, rank))):
            value = torch.randn(shape, generator=generator) * 0.2
            tensors[f"{prefix}{module}.lora_{half}.weight"] = value
    return tensors


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write an adapter of rank 4 and alpha 8, if `config` does not say otherwise."""
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def product(tensors: Mapping[str, Tensor], module: str, prefix: str = PREFIX) -> Tensor:
    """B A of a module, in float64."""
    up, down = (tensors[f"{prefix}{module}.lora_{half}.weight"].double() for half in "BA")
    return up @ down


def assert_merged(got: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> None:
    """The golden weights plus what is added to some modules (float64), and nothing else."""
    weights = golden()
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        assert got[name].dtype is torch.bfloat16
        if (sum_ := added.get(name.removesuffix(".weight"))) is None:
            assert torch.equal(got[name], weight), name
        else:
            assert not torch.equal(got[name], weight), name
            # Half a step of bfloat16's 8 bits, from one rounding; the rest is float32's error.
            exact = weight.double() + sum_
            torch.testing.assert_close(got[name].double(), exact, rtol=2**-8, atol=1e-6)
