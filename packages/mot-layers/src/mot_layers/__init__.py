"""Tensor-parallel mixture-of-transformers layers in vLLM's shape.

Four layers that are vLLM's own (constructors, parameter names, weight loaders, tensor
parallelism) and know a second expert, whose weights sit in the submodule `gen_exp`. Called with
a `mot_kernels.RoutePlan` they compute every row with the weights of its expert in one routed
operation; called without one they are vLLM's layers.
"""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("vllm") is None:
    raise ImportError(
        "mot-layers needs vLLM; install it with `pip install 'mot-layers[cuda]'` (GPU) or "
        "`pip install 'mot-layers[cpu]'` (CPU)"
    )

from mot_layers.formats import FormatConfig
from mot_layers.linear import (
    MoTMergedColumnParallelLinear,
    MoTQKVParallelLinear,
    MoTRowParallelLinear,
)
from mot_layers.norm import MoTRMSNorm

__all__ = [
    "FormatConfig",
    "MoTMergedColumnParallelLinear",
    "MoTQKVParallelLinear",
    "MoTRMSNorm",
    "MoTRowParallelLinear",
]
