"""Entry point of vLLM-Omni: registers our BAGEL pipeline, and if asked to, in place of theirs.

vLLM-Omni calls `register` in each of its processes before it reads a model's configuration. The
pipeline itself is named as strings and imported where it is used, so this module stays light.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from bagel_mot.plugins import is_on

logger = logging.getLogger("bagel_mot")

# Set to 1, it makes BAGEL checkpoints, which vLLM-Omni resolves to "BagelPipeline", run on ours.
REPLACE_VARIABLE = "BAGEL_MOT_REPLACE_OMNI"
OWN_NAME = "MoTBagelPipeline"
REPLACED_NAME = "BagelPipeline"
_MODULE = "bagel_mot.plugins.omni_pipeline"
# Quantisation methods, as users and checkpoints spell them; see `omni_quantization`.
OWN_METHOD = "bagel_mot"
STORED_METHOD = "compressed-tensors"


def register() -> None:
    """Register `MoTBagelPipeline` with vLLM-Omni; does nothing where that is not installed.

    May be called any number of times. A vLLM-Omni that lacks what we register with gets a warning
    and its own BAGEL: what a plugin raises would end its process, whatever model that serves.
    """
    if importlib.util.find_spec("vllm_omni") is None:
        return
    try:
        from vllm_omni.diffusion.registry import register_diffusion_model
        from vllm_omni.quantization.factory import (
            SUPPORTED_QUANTIZATION_METHODS,
            register_quantization_override,
        )
    except ImportError as error:
        logger.warning(
            "MoTBagelPipeline is not registered: this vLLM-Omni has no such registries (%s); "
            "bagel-mot works with 0.26 to 0.30",
            error,
        )
        return
    for name in (OWN_NAME, REPLACED_NAME) if is_on(REPLACE_VARIABLE) else (OWN_NAME,):
        # The process functions are named even where they have the names of those they replace:
        # vLLM-Omni keeps no function of an unnamed one, only its name.
        register_diffusion_model(
            name,
            _MODULE,
            "MoTBagelPipeline",
            pre_process_func_name="get_bagel_pre_process_func",
            post_process_func_name="get_bagel_post_process_func",
        )
    register_quantization_override(OWN_METHOD, _own_config)
    # vLLM-Omni writes names with underscores, and so misses vLLM's method of this name: without
    # ours it would refuse the config.json of every quantised checkpoint.
    if STORED_METHOD.replace("-", "_") not in SUPPORTED_QUANTIZATION_METHODS:
        register_quantization_override(STORED_METHOD, _stored_config)


def _own_config(**options: Any) -> Any:
    from bagel_mot.plugins.omni_quantization import own_config

    return own_config(**options)


def _stored_config(**options: Any) -> Any:
    from bagel_mot.plugins.omni_quantization import stored_config

    return stored_config(**options)
