"""The weights of a `Bagel` in training: which tensors learn, how they start, how they are saved."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from mot_layers.stacking import StackedExperts
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.model.bagel import Bagel


def leaves(model: Bagel) -> dict[str, Tensor]:
    """The tensors that training changes, by name, all with `requires_grad`; not the VAE's.

    The layers of two experts compute with one stacked tensor for both, of which their parameters
    are views. So it is the stacks that learn, and a forward pass in training must always have a
    plan: without one a layer would use the und parameter, past the stack.
    """
    found: dict[str, Tensor] = {}
    inside: list[str] = ["vae."]
    for name, module in model.named_modules():
        if not isinstance(module, StackedExperts):
            continue
        inside.append(f"{name}.")
        for stack in ("stacked_weight", "stacked_bias"):
            tensor = getattr(module, stack, None)
            if tensor is not None:
                found[f"{name}.{stack}"] = tensor
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(inside)):
            found[name] = parameter
    for tensor in found.values():
        tensor.requires_grad_(True)
    return found


def vae_leaves(model: Bagel) -> dict[str, Tensor]:
    """The VAE's parameters, by name, all with `requires_grad`."""
    found: dict[str, Tensor] = dict(model.vae.named_parameters(prefix="vae"))
    for tensor in found.values():
        tensor.requires_grad_(True)
    return found


@torch.no_grad()
def initialise(model: Bagel, seed: int) -> None:
    """Give every weight a start value; the VAE keeps torch's own but for its latents.

    With those its noise would be much stronger than its means, and it would learn to ignore them.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = len(model.transformer.layers)
    for name, leaf in leaves(model).items():
        leaf.copy_(_start(name, leaf, layers, generator))
    out, means = model.vae.encoder.conv_out, model.config.vae.z_channels
    out.weight[:means] *= 4
    out.weight[means:] *= 0.1
    out.bias[means:] = -5


@torch.no_grad()
def save_checkpoint(model: Bagel, folder: Path, values: dict[str, Tensor]) -> None:
    """Write `ema.safetensors` and `ae.safetensors`, bfloat16, under the official names.

    Args:
        values: what the leaves are to be for this, by name: averages of their past. Leaves that
            are not named are saved as they are.
    """
    everything = {**leaves(model), **vae_leaves(model)}
    kept = {name: everything[name].clone() for name in values}
    for name, value in values.items():
        everything[name].copy_(value)
    try:
        for file, targets in (
            (checkpoint.MODEL_FILE, checkpoint.model_targets(model.config)),
            (checkpoint.VAE_FILE, checkpoint.vae_targets(model.vae)),
        ):
            tensors = checkpoint.model_tensors(model, targets, torch.bfloat16)
            temporary = folder / f".{file}"
            checkpoint.save_tensors(tensors, temporary, {"format": "pt"})
            os.replace(temporary, folder / file)
    finally:
        for name, value in kept.items():
            everything[name].copy_(value)


def _start(name: str, leaf: Tensor, layers: int, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.zeros_like(leaf) if name.endswith("bias") else torch.ones_like(leaf)
    if name.endswith("bias") or name == "llm2vae.weight":
        return torch.zeros_like(leaf)
    if name in ("vit_pos.weight", "latent_pos.weight"):
        return _sinusoids(math.isqrt(leaf.shape[0]), leaf.shape[1])
    spread = leaf.shape[-1] ** -0.5
    if name in ("embed_tokens.weight", "vit.pos_embed.weight"):
        spread = 0.5
    elif ".o." in name or ".down." in name or ".out." in name or ".mlp.fc2." in name:
        spread /= (2 * layers) ** 0.5  # what is added to the residual stream
    elif name == "time_embedder.fc1.weight":
        spread *= 3  # times lie in 0..1, and of its 256 inputs all but a few hardly change there
    return torch.randn(leaf.shape, generator=generator) * spread


def _sinusoids(side: int, width: int) -> Tensor:
    """The release's 2-D position table: columns in the first half, rows in the second."""
    places = torch.arange(side, dtype=torch.float32)
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = places[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([table.repeat(side, 1), table.repeat_interleave(side, dim=0)], dim=1)
