"""Every weight lands where it belongs, in the dtype asked for, and a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_checkpoint import counting_reads, load, parameters, rewrite
from golden_data import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.checkpoint import model_targets, vae_targets
from bagel_mot.pipeline import BagelPipeline

# --- where weights land


def expected_parameters() -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the golden model, put together from the file by hand."""
    file = GOLDEN.weights("")

    def both(name: str) -> dict[str, Tensor]:
        return {part: file[f"{name}.{part}"] for part in ("weight", "bias")}

    for index in range(3):
        theirs, ours = f"language_model.model.layers.{index}", f"transformer.layers.{index}"
        for twin, expert in (("", ""), ("_moe_gen", ".gen_exp")):
            attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp{twin}"
            for part in ("weight", "bias"):
                yield (
                    f"{ours}.attn.qkv{expert}.{part}",
                    torch.cat([file[f"{attention}.{x}_proj{twin}.{part}"] for x in "qkv"]),
                )
            for norm in ("q_norm", "k_norm"):
                yield (
                    f"{ours}.attn.{norm}{expert}.weight",
                    file[f"{attention}.{norm}{twin}.weight"],
                )
            yield f"{ours}.attn.o{expert}.weight", file[f"{attention}.o_proj{twin}.weight"]
            yield (
                f"{ours}.mlp.gate_up{expert}.weight",
                torch.cat([file[f"{mlp}.{x}_proj.weight"] for x in ("gate", "up")]),
            )
            yield f"{ours}.mlp.down{expert}.weight", file[f"{mlp}.down_proj.weight"]
            for norm, name in (
                ("input_norm", "input_layernorm"),
                ("post_norm", "post_attention_layernorm"),
            ):
                yield f"{ours}.{norm}{expert}.weight", file[f"{theirs}.{name}{twin}.weight"]
    for index in range(2):
        theirs = f"vit_model.vision_model.encoder.layers.{index}"
        for part in ("weight", "bias"):
            yield (
                f"vit.layers.{index}.attn.qkv.{part}",
                torch.cat([file[f"{theirs}.self_attn.{x}_proj.{part}"] for x in "qkv"]),
            )
            for name, stored in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("attn.out", "self_attn.out_proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                yield f"vit.layers.{index}.{name}.{part}", both(f"{theirs}.{stored}")[part]
    for ours, theirs in (
        ("vit.patch_embed", "vit_model.vision_model.embeddings.patch_embedding"),
        ("vit.norm", "vit_model.vision_model.post_layernorm"),
        ("connector.fc1", "connector.fc1"),
        ("connector.fc2", "connector.fc2"),
        ("time_embedder.fc1", "time_embedder.mlp.0"),
        ("time_embedder.fc2", "time_embedder.mlp.2"),
        ("vae2llm", "vae2llm"),
        ("llm2vae", "llm2vae"),
    ):
        for part, tensor in both(theirs).items():
            yield f"{ours}.{part}", tensor
    for ours, theirs in (
        ("embed_tokens", "language_model.model.embed_tokens.weight"),
        ("lm_head", "language_model.lm_head.weight"),
        ("transformer.norm", "language_model.model.norm.weight"),
        ("transformer.norm.gen_exp", "language_model.model.norm_moe_gen.weight"),
        ("vit.pos_embed", "vit_model.vision_model.embeddings.position_embedding.weight"),
        ("vit_pos", "vit_pos_embed.pos_embed"),
        ("latent_pos", "latent_pos_embed.pos_embed"),
    ):
        yield f"{ours}.weight", file[theirs]
    for name, tensor in GOLDEN.weights("", "ae.safetensors").items():
        yield f"vae.{name}", tensor


def test_every_weight_lands(cpu: BagelPipeline) -> None:
    want = dict(expected_parameters())
    got = parameters(cpu)
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def test_model_tensors_are_the_files(cpu: BagelPipeline) -> None:
    """Loading and saving are each other's reverse, for every tensor of the golden checkpoint."""
    targets = model_targets(cpu.config) | vae_targets(cpu.model.vae)
    saved = checkpoint.model_tensors(cpu.model, targets, torch.float32)
    files = {
        **load_file(GOLDEN.checkpoint / "ema.safetensors"),
        **load_file(GOLDEN.checkpoint / "ae.safetensors"),
    }
    assert saved.keys() == files.keys()
    for name, tensor in files.items():
        assert torch.equal(saved[name], tensor.float()), name


def test_kernels_read_the_loaded_weights(cpu: BagelPipeline) -> None:
    """The stacked tensors that the routed kernels read: expert 0 is und, expert 1 gen."""
    want = dict(expected_parameters())
    for index, layer in enumerate(cpu.model.transformer.layers):
        for name in ("attn.qkv", "attn.o", "attn.q_norm", "attn.k_norm", "mlp.gate_up", "mlp.down"):
            stacked = layer.get_submodule(name).stacked_weight
            for expert, suffix in enumerate(("", ".gen_exp")):
                full = f"transformer.layers.{index}.{name}{suffix}.weight"
                assert torch.equal(stacked[expert], want[full]), full
        bias = layer.attn.qkv.stacked_bias
        for expert, suffix in enumerate(("", ".gen_exp")):
            full = f"transformer.layers.{index}.attn.qkv{suffix}.bias"
            assert torch.equal(bias[expert], want[full]), full


# --- dtypes, streaming


@pytest.mark.parametrize("loaded_as", ["float32", "bfloat16"], ids=lambda dtype: f"as-{dtype}")
@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stored_dtypes(checkpoint_copy: Path, stored_as: torch.dtype, loaded_as: str) -> None:
    """What a file holds is converted once, straight to what the model computes in."""
    for file in ("ema.safetensors", "ae.safetensors"):
        rewrite(
            checkpoint_copy / file,
            lambda tensors: tensors.update({k: t.to(stored_as) for k, t in tensors.items()}),
        )
    dtype = getattr(torch, loaded_as)
    got = parameters(load(checkpoint_copy, dtype=loaded_as))
    for name, tensor in expected_parameters():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor.to(stored_as).to(dtype)), name


def test_dtypes_may_be_mixed(checkpoint_copy: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> None:
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        for index, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to(dtypes[index % 3])

    rewrite(checkpoint_copy / "ema.safetensors", mix)
    load(checkpoint_copy)


def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host never holds two tensors of the file."""
    reads = counting_reads(monkeypatch)
    loaded = load(GOLDEN.checkpoint)
    assert len(reads) == 139 + 180
    assert max(reads) == 0
    assert torch.equal(loaded.model.llm2vae.bias, GOLDEN.weights("llm2vae.")["bias"])


def test_parameters_do_not_live_in_the_file(checkpoint_copy: Path) -> None:
    """A loaded model stays as it is when its files are overwritten."""
    loaded = load(checkpoint_copy)
    before = {name: tensor.clone() for name, tensor in parameters(loaded).items()}
    for name in ("ema.safetensors", "ae.safetensors"):
        size = (checkpoint_copy / name).stat().st_size
        with open(checkpoint_copy / name, "r+b") as file:
            file.write(b"\xff" * size)
    got = parameters(loaded)
    assert all(torch.equal(got[name], before[name]) for name in before)


def test_on_tensor() -> None:
    """Called once for each tensor, with its size: a progress bar reaches its end."""
    seen: list[tuple[str, int]] = []
    load(GOLDEN.checkpoint, on_tensor=lambda name, elements: seen.append((name, elements)))
    stored = GOLDEN.weights("") | GOLDEN.weights("", "ae.safetensors")
    assert sorted(seen) == sorted((name, tensor.numel()) for name, tensor in stored.items())
