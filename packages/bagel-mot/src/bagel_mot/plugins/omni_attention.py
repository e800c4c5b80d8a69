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
_UNROUNDED = (None, "auto", "float")


def asked_attention(od_config: OmniDiffusionConfig) -> Sequence[str]:
    """The attention backends that would do, the best first; none: whichever is fastest.

    Raises:
        ValueError: it asks for another one, or for two things at once.
    """
    asked = od_config.diffusion_attention_config
    spec = asked.per_role.get("self", asked.default)
    backend = None if spec is None else spec.backend.upper()
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(
            f"diffusion_attention_config (or DIFFUSION_ATTENTION_BACKEND) is {backend!r}; expected "
            f"{', '.join(_BACKENDS)} or auto"
        )
    rounded = od_config.diffusion_kv_cache_dtype
    if rounded in _UNROUNDED:
        return () if backend is None else _BACKENDS[backend]
    if rounded != "fp8":
        raise ValueError(f"diffusion_kv_cache_dtype is {rounded!r}; expected 'auto' or 'fp8'")
    if backend not in (None, "FLASH_ATTN"):
        raise ValueError(
            f"diffusion_kv_cache_dtype is 'fp8', but diffusion_attention_config is {backend!r}; "
            "expected FLASH_ATTN or auto"
        )
    if (ring := od_config.parallel_config.ring_degree) > 1:
        raise ValueError(
            f"diffusion_kv_cache_dtype is 'fp8', but ring_degree is {ring}: around a ring attention"
            " is in 16 bits; use ulysses_degree, or 'auto'"
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
        rounds = names == ("fa3-fp8",)
        option = "diffusion_kv_cache_dtype" if rounds else "diffusion_attention_config"
        raise ValueError(
            f"MoTBagelPipeline cannot run with this configuration: {option} asks for attention "
            f"that is not there ({'; '.join(reasons)})"
        )
    return None
