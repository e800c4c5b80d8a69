"""Sizes of the tiny model, and its configuration files in the official layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagel_mot.config import (
    COMBINED_FILE,
    LLM_FILE,
    OVERRIDE_FILE,
    VIT_FILE,
    BagelConfig,
)
from bagel_mot.tiny.scenes import SIDES

# The ViT sees patches of 14 pixels, so a side becomes the multiple of 14 next to it.
_VIT_LIMITS = (126, 56, 14)


@dataclass(frozen=True)
class Recipe:
    """What the tiny model is made of; everything else is as in the release.

    The VAE has one width on all levels, a multiple of 32: its GroupNorms have 32 groups.
    """

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 704
    vocabulary: int = 480
    vit_hidden: int = 128
    vit_layers: int = 4
    vit_heads: int = 4
    vit_mlp: int = 384
    vae_width: int = 64
    sides: tuple[int, ...] = SIDES

    def write_configs(self, folder: Path) -> None:
        """Write `llm_config.json`, `vit_config.json`, `oracle_config.json` and `config.json`."""
        llm: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "qk_norm": True,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        vit: dict[str, Any] = {
            "model_type": "siglip_vision_model",
            "hidden_size": self.vit_hidden,
            "intermediate_size": self.vit_mlp,
            "num_attention_heads": self.vit_heads,
            "num_hidden_layers": self.vit_layers + 1,
            "patch_size": 14,
            "image_size": _VIT_LIMITS[0],
        }
        overrides = {
            "vae_params": {
                "in_channels": 3,
                "out_ch": 3,
                "ch": self.vae_width,
                "ch_mult": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "z_channels": 16,
                "downsample": 8,
                "scale_factor": 0.3611,
                "shift_factor": 0.1159,
            },
            "vae_transform": [max(self.sides), min(self.sides), 16],
            "vit_transform": _VIT_LIMITS,
        }
        combined = {
            "architectures": ["BagelForConditionalGeneration"],
            "model_type": "bagel",
            "visual_gen": True,
            "visual_und": True,
            "llm_config": llm,
            "vit_config": vit,
            "vae_config": {"z_channels": 16, "downsample": 8},
            "latent_patch_size": 2,
            "max_latent_size": self.latent_grid,
            "vit_max_num_patch_per_side": self.vit_grid,
            "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            (LLM_FILE, llm),
            (VIT_FILE, vit),
            (OVERRIDE_FILE, overrides),
            (COMBINED_FILE, combined),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def latent_grid(self) -> int:
        """Side of the latents' position table: one token for 16 pixels."""
        return max(self.sides) // 16

    @property
    def vit_grid(self) -> int:
        """Side of the ViT's position tables."""
        return _VIT_LIMITS[0] // _VIT_LIMITS[2]

    def config(self, folder: Path) -> BagelConfig:
        """The configuration as a loader of `folder` would have it."""
        config = BagelConfig.from_folder(folder)
        return config.with_grids(self.latent_grid**2, self.vit_grid**2)
