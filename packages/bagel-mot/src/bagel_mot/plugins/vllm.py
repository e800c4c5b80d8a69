"""Entry point of vLLM: registers BAGEL understanding (text and pictures in, text out).

vLLM calls `register` in each of its processes before it looks for a model's class. The model is
named as a string and imported where it is used, so this module stays light.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagel_mot.plugins import is_on

logger = logging.getLogger("bagel_mot")

# Set to 1, it makes BAGEL checkpoints, whose config.json names vLLM's own class, run on ours.
REPLACE_VARIABLE = "BAGEL_MOT_REPLACE_VLLM"
OWN_NAME = "MoTBagelForConditionalGeneration"
REPLACED_NAME = "BagelForConditionalGeneration"
_MODEL = "bagel_mot.plugins.vllm_model:MoTBagelForConditionalGeneration"

# The official prompt layout; for `--chat-template` where a checkpoint brings one of its own.
CHAT_TEMPLATE = Path(__file__).with_name("bagel_chat.jinja")
# Stands for a picture in a prompt, markers included. The same as for vLLM's own BAGEL.
PICTURE = "<|image_pad|>"


def register() -> None:
    """Register `MoTBagelForConditionalGeneration` with vLLM; does nothing where that is missing.

    May be called any number of times. A vLLM that lacks what we register with gets a warning and
    its own BAGEL: what a plugin raises would end its process, whatever model that serves.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from bagel_mot.plugins.vllm_config import UnderstandingConfig
    except ImportError as error:
        logger.warning(
            "%s is not registered (%s); bagel-mot works with vLLM 0.26 to 0.33", OWN_NAME, error
        )
        return
    for name in (OWN_NAME, REPLACED_NAME) if is_on(REPLACE_VARIABLE) else (OWN_NAME,):
        ModelRegistry.register_model(name, _MODEL)
        MODELS_CONFIG_MAP[name] = UnderstandingConfig


def build_prompt(parts: Sequence[Any]) -> dict[str, Any]:
    """A prompt for `LLM.generate` in the official layout, as the chat template makes it.

    Args:
        parts: strings and pictures (PIL images) in reading order.

    Returns:
        `{"prompt": text}`, with `"multi_modal_data"` if there are pictures.
    """
    pictures = [part for part in parts if not isinstance(part, str)]
    blocks = [
        f"<|im_start|>{part}<|im_end|>" if isinstance(part, str) else PICTURE for part in parts
    ]
    prompt: dict[str, Any] = {"prompt": "".join(blocks) + "<|im_start|>"}
    if pictures:
        prompt["multi_modal_data"] = {"image": pictures}
    return prompt
