"""vLLM-Omni's options for attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omni_harness import World, require_omni

from bagel_mot.model import attention_choice
from bagel_mot.model.attention import Math, Sdpa

require_omni()

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, []),
        ({"diffusion_attention_config": {"default": "auto"}}, []),
        ({"diffusion_attention_config": {"default": "TORCH_SDPA"}}, ["sdpa"]),
        ({"diffusion_attention_config": {"default": "cudnn_attn"}}, ["cudnn"]),
        ({"diffusion_attention_config": {"default": "FLASH_ATTN"}}, ["fa3", "fa2"]),
        ({"diffusion_attention_config": {"per_role": {"self": "CUDNN_ATTN"}}}, ["cudnn"]),
        ({"diffusion_kv_cache_dtype": "auto"}, []),
        ({"diffusion_kv_cache_dtype": "fp8"}, ["fa3-fp8"]),
        (
            {
                "diffusion_kv_cache_dtype": "fp8",
                "diffusion_attention_config": {"default": "FLASH_ATTN"},
            },
            ["fa3-fp8"],
        ),
    ],
    ids=str,
)
def test_names(world: World, options: dict[str, Any], names: list[str]) -> None:
    from bagel_mot.plugins.omni_attention import asked_attention
    from bagel_mot.plugins.omni_options import check_supported

    config = world.config(**options)
    assert list(asked_attention(config)) == names
    check_supported(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"diffusion_attention_config": {"default": "SAGE_ATTN"}},
            r"diffusion_attention_config \(or .*\) is 'SAGE_ATTN'; expected FLASH_ATTN, CUDNN",
        ),
        (
            {
                "diffusion_kv_cache_dtype": "fp8",
                "diffusion_attention_config": {"default": "TORCH_SDPA"},
            },
            "diffusion_kv_cache_dtype is 'fp8', but diffusion_attention_config is 'TORCH_SDPA'",
        ),
    ],
    ids=str,
)
def test_refused(world: World, options: dict[str, Any], message: str) -> None:
    from bagel_mot.plugins.omni_options import check_supported

    with pytest.raises(ValueError, match=message):
        check_supported(world.config(**options))


def test_rings_do_not_round(world: World) -> None:
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    from bagel_mot.plugins.omni_options import check_supported

    config = world.config(diffusion_kv_cache_dtype="fp8")
    config.parallel_config = DiffusionParallelConfig(ulysses_degree=2, ring_degree=2)
    with pytest.raises(ValueError, match="'fp8', but ring_degree is 2: around a ring"):
        check_supported(config)
    config.parallel_config = DiffusionParallelConfig(ulysses_degree=2)
    check_supported(config)


def test_first_that_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3, or 2; where neither is, that is said, and nothing else taken."""
    from bagel_mot.plugins.omni_attention import usable_attention

    missing = ["fa3"]
    monkeypatch.setattr(
        attention_choice, "_why_not", lambda name, *_where: "gone" if name in missing else None
    )
    monkeypatch.setitem(attention_choice.BACKENDS, "fa2", Math)
    config = world.config(diffusion_attention_config={"default": "FLASH_ATTN"})
    assert usable_attention(config, CPU, 128) == "fa2"
    missing.append("fa2")
    with pytest.raises(
        ValueError, match=r"'fa3', which.*: gone; attention is 'fa2', which.*: gone"
    ):
        usable_attention(config, CPU, 128)
    assert usable_attention(world.config(), CPU, 128) is None


def test_pipeline_takes_it(world: World) -> None:
    runner = world.runner(diffusion_attention_config={"default": "TORCH_SDPA"})
    assert isinstance(runner.pipeline.bagel.attention, Sdpa)
    with pytest.raises(
        ValueError, match=r"diffusion_kv_cache_dtype asks for .*'fa3-fp8', which cannot"
    ):
        world.runner(diffusion_kv_cache_dtype="fp8")
