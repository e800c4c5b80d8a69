"""What vLLM-Omni's configuration asks of the pipeline: refused, or put in our words."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from mot_layers.runtime import init_parallel
from vllm_omni.diffusion.data import OmniDiffusionConfig

from bagel_mot.config import LlmConfig
from bagel_mot.parallel import ALONE, Parallel, ParallelConfig, start
from bagel_mot.plugins.omni_attention import asked_attention
from bagel_mot.plugins.omni_quantization import asked_quantization

logger = logging.getLogger("bagel_mot")


def receives_caches(od_config: OmniDiffusionConfig) -> bool:
    """Whether another stage reads the prompts and hands its KV caches over."""
    return bool((od_config.omni_kv_config or {}).get("need_recv_cache"))


def check_supported(od_config: OmniDiffusionConfig) -> None:
    """Refuse a configuration that would otherwise be ignored or fail later.

    Raises:
        ValueError: listing every option that is not available and what to set it to.
    """
    problems = []
    parallel = od_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        problems.append(
            f"parallel_config.pipeline_parallel_size is {parallel.pipeline_parallel_size}, but "
            "layers are not spread over ranks; use tensor or sequence parallelism"
        )
    if parallel.use_hsdp:
        problems.append("parallel_config.use_hsdp is on, but weights are not sharded; turn it off")
    if receives_caches(od_config) and parallel.cfg_parallel_size > 1:
        problems.append(
            f"parallel_config.cfg_parallel_size is {parallel.cfg_parallel_size}, but another stage "
            "hands KV caches over, of which vLLM-Omni then gives each rank some and ours need all; "
            "use sequence parallelism, or bagel_single_stage.yaml"
        )
    try:
        asked_quantization(od_config.quantization_config)
    except ValueError as error:
        problems.append(str(error))
    try:
        asked_attention(od_config)
    except ValueError as error:
        problems.append(str(error))
    if od_config.cache_backend not in (None, "none"):
        problems.append(f"cache_backend is {od_config.cache_backend!r}; expected 'none'")
    for name in (
        "enable_cpu_offload",
        "enable_layerwise_offload",
        "enable_distributed_layerwise_offload",
        "diffusion_offload_config",
        "diffusion_kv_cache_skip_steps",
        "diffusion_kv_cache_skip_layers",
        "lora_path",
    ):
        if getattr(od_config, name, None):
            problems.append(f"{name} is set, but it is not available; leave it out")
    if problems:
        raise ValueError(
            f"MoTBagelPipeline cannot run with this configuration: {'; '.join(problems)}"
        )


def joined(od_config: OmniDiffusionConfig, llm: LlmConfig, device: torch.device) -> Parallel:
    """This worker among vLLM-Omni's others, in our words; their ranks are laid out as ours are.

    Raises:
        ValueError: the model or the number of workers does not allow these sizes.
    """
    sizes = od_config.parallel_config
    config = ParallelConfig(
        tensor=sizes.tensor_parallel_size,
        ulysses=sizes.ulysses_degree,
        ring=sizes.ring_degree,
        allgather=sizes.allgather_degree,
        cfg=sizes.cfg_parallel_size,
    )
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > config.world_size and config.world_size == config.tensor:
        # Replicas (data parallel): each answers requests of its own, and knows of no other.
        init_parallel(config.tensor)
        return ALONE
    config.check(llm, world)
    return start(config, device.type)


def captures_graphs(
    od_config: OmniDiffusionConfig, parallel: Parallel, device: torch.device
) -> bool:
    """Whether steps may be captured in CUDA graphs; a warning where only an option forbids it."""
    # Replicas may be tensor parallel, too.
    workers = max(parallel.config.world_size, od_config.parallel_config.tensor_parallel_size)
    if workers > 1:
        # vLLM-Omni takes groups down without asking who holds graphs of their exchanges, and NCCL
        # would wait for those.
        return False
    if od_config.enforce_eager and device.type == "cuda":
        logger.warning(
            "enforce_eager is on, as it is in vLLM-Omni's own deploy files for BAGEL: every kernel "
            "of a step is launched one by one; with --no-enforce-eager (or, for one of several "
            'stages, --stage-overrides \'{"1": {"enforce_eager": false}}\') steps are CUDA graphs'
        )
    return not od_config.enforce_eager
