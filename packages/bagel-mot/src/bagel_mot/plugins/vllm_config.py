"""What vLLM's configuration must say for BAGEL understanding, and what it must not.

vLLM calls `UnderstandingConfig` while it builds its configuration, for our architectures only.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from vllm import __version_tuple__
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from bagel_mot.config import BagelConfig, LlmConfig, VitConfig
from bagel_mot.plugins.vllm import CHAT_TEMPLATE

SCHEDULER = "bagel_mot.plugins.vllm_scheduler.build_scheduler"


class UnderstandingConfig(VerifyAndUpdateConfig):
    """Turns on custom positions and keeps a picture's tokens in one prefill step."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Adjust vLLM's `ModelConfig`; may be called again on the same one.

        Raises:
            ValueError: `hf_overrides` asks for another RoPE.
        """
        asked = getattr(model_config.hf_config, "rope_parameters", None) or {}
        if asked.get("rope_type", "default") != "default":
            raise ValueError(
                f"hf_overrides: rope_parameters is {asked}; BAGEL has plain RoPE, without scaling"
            )
        # All tokens of a picture share one position. M-RoPE is vLLM's hook for positions of one's
        # own; this is what turns it on. Three times the same position is plain RoPE.
        sections = [model_config.get_head_size() // 2, 0, 0]
        model_config.hf_config.rope_parameters = {
            "rope_type": "default",
            "mrope_section": sections,
        }
        if model_config.multimodal_config is not None and __version_tuple__[:2] != (0, 26):
            # Pictures are to arrive as they are; transparency is composited as officially. (0.26
            # makes them RGB itself, which differs for gray pictures with transparency alone.)
            options = model_config.multimodal_config.media_io_kwargs
            options.setdefault("image", {}).setdefault("image_mode", None)
        _offer_chat_template()

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Adjust vLLM's `VllmConfig`.

        Raises:
            ValueError: an option would split pictures, or compute them with causal attention.
        """
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f"scheduler_cls is {scheduler.scheduler_cls!r}; BAGEL needs its own scheduler, "
                "which keeps a picture's tokens in one step; leave scheduler_cls unset"
            )
        scheduler.scheduler_cls = SCHEDULER
        scheduler.disable_chunked_mm_input = True
        # A CUDA graph that holds prefills would replay without the pictures' attention ranges.
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.name == "FULL":
            raise ValueError(
                "cudagraph_mode is FULL, whose graphs of prefill steps know no pictures; use "
                "FULL_AND_PIECEWISE, FULL_DECODE_ONLY, PIECEWISE or NONE"
            )


def bagel_config(model_config: Any) -> BagelConfig:
    """Our config of the checkpoint that vLLM serves.

    Raises:
        FileNotFoundError, ValueError: the checkpoint's config files are missing or wrong.
    """
    hf = model_config.hf_config
    # What vLLM has read of config.json, `hf_overrides` included; it is refused as in a file.
    llm = LlmConfig.model_validate(hf.llm_config.to_dict())
    if os.path.isdir(model_config.model):
        config = BagelConfig.from_folder(model_config.model)
    else:  # on a hub: there are no files to read
        config = BagelConfig(llm=llm, vit=VitConfig.model_validate(hf.vit_config.to_dict()))
    grid = getattr(hf, "vit_max_num_patch_per_side", config.vit_grid)
    return config.with_grids(config.latent_grid**2, grid**2)


@functools.cache
def _offer_chat_template() -> None:
    """Have vLLM use the official layout for BAGEL checkpoints without a chat template.

    Once, since vLLM warns of a second time, and not before a model of ours is asked for.
    """
    from vllm.transformers_utils.chat_templates import registry

    registry.register_chat_template_fallback_path("bagel", CHAT_TEMPLATE)


def takes_pictures(vllm_config: Any) -> bool:
    """Whether requests may have any: `limit_mm_per_prompt` can say none."""
    multimodal = vllm_config.model_config.multimodal_config
    return multimodal is not None and multimodal.get_limit_per_prompt("image") > 0
