"""What vLLM-Omni makes of the arguments of `vllm serve`: its parser and its stage configurations.

Run as a program, with a JSON list of lists of arguments, it prints one as well: the options of each
one's image stage that matter here, and the extras of an edit over `/v1/images/edits`. It is a
process of its own because vLLM-Omni imports every model that it has, and these torchvision, which
vLLM's CPU build does without: it gets something that can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import vllm_omni  # noqa: F401  # before torchvision seems to be there

MISSING = [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None]


class Stand(MetaPathFinder, Loader):
    """Finds missing packages and all their modules; whatever is asked of them is a mock."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        missing = fullname.split(".")[0] in MISSING
        return ModuleSpec(fullname, self, is_package=True) if missing else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__path__=[], __name__=spec.name, __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        pass


def configured(arguments: list[str]) -> dict[str, Any]:
    """What the arguments of one command come to."""
    from vllm_omni.config.omni_config import VllmOmniDiffusionStageConfig
    from vllm_omni.config.resolver import resolve_omni_config
    from vllm_omni.engine.stage_init_utils import (
        build_diffusion_config,
        extract_stage_metadata_from_omni_stage_config,
    )
    from vllm_omni.entrypoints.cli.serve import OmniServeCommand
    from vllm_omni.entrypoints.openai.diffusion import apply_stage_default_sampling_params
    from vllm_omni.entrypoints.utils import prepare_stage_config_inputs
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams
    from vllm_omni.utils.tracking_parser import TrackingArgumentParser

    parser = TrackingArgumentParser()
    OmniServeCommand().subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(arguments)
    inputs = prepare_stage_config_inputs(
        args.model_tag, args.get_explicit_kwargs_dict(), trust_remote_code=None
    )
    resolved = resolve_omni_config(
        inputs.model,
        trust_remote_code=inputs.trust_remote_code,
        deploy_config_path=inputs.deploy_config_path,
        cli_overrides=inputs.kwargs,
        stage_overrides=inputs.stage_overrides,
        strategy_config_path=inputs.strategy_config_path,
    )
    stages = resolved.stage_configs
    (ours,) = [stage for stage in stages if isinstance(stage, VllmOmniDiffusionStageConfig)]
    metadata = extract_stage_metadata_from_omni_stage_config(ours)
    config = build_diffusion_config(inputs.model, ours, metadata)
    edit = OmniDiffusionSamplingParams()
    apply_stage_default_sampling_params(args.default_sampling_params, edit, str(ours.stage_id))
    return {
        "stages": len(stages),
        "enforce_eager": config.enforce_eager,
        "max_num_seqs": config.max_num_seqs,
        "need_recv_cache": (config.omni_kv_config or {}).get("need_recv_cache", False),
        "edit": edit.extra_args,
    }


def main(commands: list[list[str]]) -> None:
    """Parse, resolve, print."""
    sys.meta_path.append(Stand())
    from vllm_omni.platforms import current_omni_platform

    # There is no platform for the CPU; this is all that a configuration asks of one.
    type(current_omni_platform).device_control_env_var = None
    type(current_omni_platform).get_device_count = staticmethod(lambda: 8)
    print(json.dumps([configured(arguments) for arguments in commands]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
