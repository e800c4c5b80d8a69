"""mot-layers' linear layers with the und expert alone.

Understanding has no rows for the gen expert, whose weights would take as much memory again.
Without a route plan the layers do not touch it, so here nothing stands in its place.
"""

from __future__ import annotations

from typing import Any

from mot_layers import (
    MoTMergedColumnParallelLinear,
    MoTQKVParallelLinear,
    MoTRowParallelLinear,
)
from torch import nn


class _NoExpert(nn.Module):
    """Where a layer has its gen expert: no parameters, nothing to run."""

    weight = None
    bias = None
    quant_method = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class UndQKVParallelLinear(MoTQKVParallelLinear):
    """See `MoTQKVParallelLinear`; must be called without a plan."""

    expert_class = _NoExpert


class UndMergedColumnParallelLinear(MoTMergedColumnParallelLinear):
    """See `MoTMergedColumnParallelLinear`; must be called without a plan."""

    expert_class = _NoExpert


class UndRowParallelLinear(MoTRowParallelLinear):
    """See `MoTRowParallelLinear`; must be called without a plan."""

    expert_class = _NoExpert
