"""vLLM-Omni's choice of attention, in our words.

| vLLM-Omni | ours |
|---|---|
| nothing, `auto` | `choose_attention`'s own choice |
| backend `FLASH_ATTN` | `fa3`, or `fa2` if that cannot be used |
| backend `CUDNN_ATTN`, `TORCH_SDPA` | `cudnn`, `sdpa` |
| `diffusion_kv_cache_dtype` `fp8`: Q, K and V rounded for FlashAttention | `fa3-fp8` |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm_omni.diffusion.data import OmniDiffusionConfig

from bagel_mot.model.attention_choice import choose_attention

_BACKENDS = {"FLASH_ATTN": ("fa3", "fa2"), "CUDNN_ATTN": ("cudnn",), "TORCH_SDPA": ("sdpa",)}
# What leaves the choice to us, and what leaves Q, K and V as they are.
_OWN_CHOICE = (None, "AUTO")
_UNROUNDED = (None, "auto", "float")


def asked_attention(od_config: OmniDiffusionConfig) -> Sequence[str]:
    """The attention backends that would do, the best first; none: whichever is fastest.

    Raises:
        ValueError: it asks for another one, or for two things at once.
    """
    asked = od_config.diffusion_attention_config
    spec = asked.per_role.get("self", asked.default)
    backend = None if spec is None else spec.backend.upper()
    if backend not in (*_OWN_CHOICE, *_BACKENDS):
        raise ValueError(
            f"the attention backend is {backend!r}; expected one of {', '.join(_BACKENDS)}, or none"
        )
    rounded = od_config.diffusion_kv_cache_dtype
    if rounded in _UNROUNDED:
        return () if backend in _OWN_CHOICE else _BACKENDS[backend]
    if rounded != "fp8":
        raise ValueError(f"diffusion_kv_cache_dtype is {rounded!r}; expected 'auto' or 'fp8'")
    if backend not in (*_OWN_CHOICE, "FLASH_ATTN"):
        raise ValueError(
            f"diffusion_kv_cache_dtype is 'fp8', but the attention backend is {backend!r}; "
            "expected FLASH_ATTN, or none"
        )
    if od_config.parallel_config.ring_degree > 1:
        raise ValueError(
            "diffusion_kv_cache_dtype is 'fp8', but ring_degree is "
            f"{od_config.parallel_config.ring_degree}: rings attend in 16 bits; use "
            "ulysses_degree, or 'auto'"
        )
    return ("fa3-fp8",)


def usable_attention(
    od_config: OmniDiffusionConfig, device: torch.device, head_dim: int
) -> str | None:
    """The first of them that can be used there; None if nothing was asked for.

    Raises:
        ValueError: none can, with each reason.
    """
    reasons = []
    names = asked_attention(od_config)
    for name in names:
        try:
            choose_attention(name, device=device, dtype=od_config.dtype, head_dim=head_dim)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return name
    if reasons:
        raise ValueError("; ".join(reasons))
    return None
