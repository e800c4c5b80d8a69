"""Paged attention in which a picture's rows see all of their picture.

vLLM marks such ranges itself for BAGEL checkpoints ("mm_prefix"), and on GPUs its backends that
know the ranges are chosen for it. Its CPU backend does not look at them; ours does (`vllm_cpu`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

# What every backend of vLLM takes; other head sizes are padded with zeros, which changes nothing
# but the memory taken. Only tiny test models have such.
_HEAD_UNIT = 32


class PictureAttention(Attention):
    """Writes K and V into vLLM's paged cache and attends: causally, and fully inside pictures.

    Args:
        num_heads, num_kv_heads: on this rank.
        head_dim: D.
        cache_config, quant_config: vLLM's.
        needs_pictures: whether requests may hold pictures.
        prefix: the layer's name, by which vLLM finds its cache.

    Raises:
        ValueError: requests may hold pictures, and vLLM's backend would not see their ranges.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        cache_config: Any,
        quant_config: Any,
        needs_pictures: bool,
        prefix: str,
    ) -> None:
        padding = -head_dim % _HEAD_UNIT
        super().__init__(
            num_heads,
            head_dim + padding,
            head_dim**-0.5,
            num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=prefix,
            attn_backend=_own_backend(),
        )
        self.padding = padding
        backend = self.attn_backend
        if needs_pictures and not (self.use_mm_prefix and backend.supports_mm_prefix()):
            raise ValueError(
                f"attention backend {backend.get_name()} would compute pictures causally; BAGEL "
                "needs full attention inside them. Leave the choice of backend to vLLM and "
                "hf_overrides without is_mm_prefix_lm, or serve text only with "
                "limit_mm_per_prompt={'image': 0}"
            )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (M, H, D), k and v (M, Hkv, D) -> (M, H * D)."""
        if not self.padding:
            return super().forward(q.flatten(1), k.flatten(1), v.flatten(1))
        y = super().forward(*(F.pad(x, (0, self.padding)).flatten(1) for x in (q, k, v)))
        return y.unflatten(1, (q.shape[1], -1))[..., : -self.padding].flatten(1)


def _own_backend() -> Any:
    """The backend to use in place of vLLM's choice, if any."""
    if not current_platform.is_cpu():
        return None
    from bagel_mot.plugins.vllm_cpu import PictureCPUBackend

    return PictureCPUBackend
