"""The name table: which tensors a checkpoint holds, and what each of them fills."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from golden_checkpoint import K_PROJ
from golden_data import GOLDEN
from torch import nn

from bagel_mot.checkpoint import (
    CheckpointError,
    StoredTensor,
    Target,
    check_names,
    load_checkpoint,
    model_targets,
    read_headers,
    vae_targets,
)
from bagel_mot.config import BagelConfig
from bagel_mot.pipeline import build_model
from bagel_mot.synthetic import BAGEL_7B

pytestmark = pytest.mark.usefixtures("cpu")  # vLLM's layers can be built after it

TINY = BagelConfig.from_folder(GOLDEN.checkpoint)
CONFIGS = [pytest.param(TINY, id="golden"), pytest.param(BAGEL_7B, id="official-7b")]
PARTS: list[set[str | int | None]] = [{None}, {"q", "k", "v"}, {0, 1}, {0, 1, 2}]


def meta_model(config: BagelConfig) -> nn.Module:
    return build_model(config, device=torch.device("meta"), dtype=torch.bfloat16)


def all_targets(model: nn.Module, config: BagelConfig) -> dict[str, Target]:
    vae = model.get_submodule("vae")
    return model_targets(config) | vae_targets(vae)


@pytest.mark.parametrize("config", CONFIGS)
def test_names_are_a_bijection(config: BagelConfig) -> None:
    """Each parameter is filled once and completely, whole or by its parts."""
    model = meta_model(config)
    targets = all_targets(model, config)
    by_parameter: dict[str, list[Target]] = defaultdict(list)
    for target in targets.values():
        by_parameter[target.parameter].append(target)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert by_parameter.keys() == shapes.keys()
    for name, parts in by_parameter.items():
        shards = [part.shard for part in parts]
        assert len(set(shards)) == len(shards), f"{name}: {shards}"
        assert set(shards) in PARTS, f"{name}: {shards}"
        assert {part.shape[1:] for part in parts} == {shapes[name][1:]}, name
        assert sum(part.shape[0] for part in parts) == shapes[name][0], name


def test_official_counts() -> None:
    """The published sizes: 29.21 GB of ema.safetensors, and ae.safetensors."""
    targets = model_targets(BAGEL_7B)
    elements = {name: math.prod(target.shape) for name, target in targets.items()}
    assert sum(elements.values()) == 14_607_260_128
    # Counted in the released checkpoint: language model, vision tower, connectors and heads.
    language = [name for name in targets if name.startswith("language_model.")]
    vision = [name for name in targets if name.startswith("vit_model.")]
    assert (len(language), len(vision), len(targets)) == (788, 421, 788 + 421 + 14)
    twins = [name for name in language if "_moe_gen" in name]
    layers = sum(elements[name] for name in twins) - elements["language_model.model.norm.weight"]
    assert layers == 28 * 233_058_048
    vae = vae_targets(meta_model(BAGEL_7B).get_submodule("vae"))
    assert len(vae) == 244
    assert sum(math.prod(target.shape) for target in vae.values()) == 83_819_683


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.embed_tokens.weight", (152064, 3584)),
        ("language_model.model.norm_moe_gen.weight", (3584,)),
        ("language_model.model.layers.0.self_attn.q_proj_moe_gen.bias", (3584,)),
        ("language_model.model.layers.27.self_attn.k_proj.weight", (512, 3584)),
        ("language_model.model.layers.27.self_attn.o_proj_moe_gen.weight", (3584, 3584)),
        ("language_model.model.layers.13.self_attn.k_norm_moe_gen.weight", (128,)),
        ("language_model.model.layers.27.mlp_moe_gen.down_proj.weight", (3584, 18944)),
        ("language_model.model.layers.1.post_attention_layernorm_moe_gen.weight", (3584,)),
        ("vit_model.vision_model.embeddings.patch_embedding.weight", (1152, 588)),
        ("vit_model.vision_model.encoder.layers.25.mlp.fc2.weight", (1152, 4304)),
        ("vit_model.vision_model.post_layernorm.bias", (1152,)),
        ("connector.fc1.weight", (3584, 1152)),
        ("latent_pos_embed.pos_embed", (4096, 3584)),
        ("vit_pos_embed.pos_embed", (4900, 3584)),
        ("time_embedder.mlp.0.weight", (3584, 256)),
        ("llm2vae.weight", (64, 3584)),
    ],
)
def test_official_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert model_targets(BAGEL_7B)[name].shape == shape


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.28.input_layernorm.weight",
        "vit_model.vision_model.encoder.layers.26.layer_norm1.weight",
        "language_model.model.layers.0.self_attn.o_proj.bias",
        "language_model.model.embed_tokens_moe_gen.weight",
    ],
)
def test_official_has_no(name: str) -> None:
    assert name not in model_targets(BAGEL_7B)


def test_model_and_names_disagree() -> None:
    """A parameter that the name table forgets is not left uninitialised."""
    model = meta_model(TINY)
    targets = all_targets(model, TINY)
    del targets["llm2vae.bias"]
    with pytest.raises(CheckpointError, match=r"disagree about: llm2vae\.bias$"):
        load_checkpoint(model, {}, targets)


def test_read_headers() -> None:
    stored = read_headers(GOLDEN.checkpoint)
    assert len(stored) == 139 + 180
    assert stored[K_PROJ] == StoredTensor(GOLDEN.checkpoint / "ema.safetensors", (32, 64), "BF16")
    assert stored[K_PROJ].elements == 2048
    assert stored["decoder.conv_in.bias"].file.name == "ae.safetensors"
    assert stored["decoder.conv_in.bias"].dtype == "F32"


def test_check_names_accepts_a_fit() -> None:
    targets = all_targets(meta_model(TINY), TINY)
    check_names(read_headers(GOLDEN.checkpoint), targets)
