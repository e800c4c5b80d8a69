"""The least time of a denoising step: its work, and what attention reaches on this device."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from bagel_mot.config import LlmConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from mot_bench.model_results import AttentionRate, Work
from mot_bench.protocol import Variant, first_line, measure, stopwatch_for

# Queries and keys of the image whose attention is the ceiling: 1024 x 1024 behind 30 tokens.
_QUERIES, _KEYS = 4098, 4130
_CPU_QUERIES, _CPU_KEYS = 66, 98

# Modules that offer FlashAttention-3, as `flash_attn_func(q, k, v)` with (B, M, H, D).
_FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")

_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def step_work(llm: LlmConfig, blocks: Iterable[tuple[int, int]], item_size: int) -> Work:
    """The work of one step through all layers.

    "Each activation moved once" is: both norms read their input and write their output; norm and
    RoPE of the heads read the packed projection and write q, k and v; SiLU * up reads two and
    writes one; both residuals are read. Reading and writing of the products belongs to them.

    Args:
        llm: sizes.
        blocks: (rows, keys that they attend to) of each image and context.
        item_size: bytes of an activation.
    """
    hidden, inner, dim = llm.hidden_size, llm.intermediate_size, llm.head_dim
    heads, kv_heads = llm.num_attention_heads, llm.num_key_value_heads
    qkv = (heads + 2 * kv_heads) * dim
    weights = hidden * qkv + heads * dim * hidden + 3 * hidden * inner
    moved = 2 * 2 * hidden + 2 * qkv + 3 * inner + 2 * hidden
    blocks = list(blocks)
    rows = sum(rows for rows, _ in blocks)
    layers = llm.num_hidden_layers
    return Work(
        gemm_flops=2.0 * layers * rows * weights,
        attention_flops=sum(layers * _attention_flops(m, n, heads, dim) for m, n in blocks),
        bytes_moved=float(layers * rows * moved * item_size),
    )


def attention_rates(
    llm: LlmConfig, device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[AttentionRate, ...]:
    """What every attention that is installed reaches on one image, timed against each other."""
    on_gpu = device.type == "cuda"
    m, n = (_QUERIES, _KEYS) if on_gpu else (_CPU_QUERIES, _CPU_KEYS)
    heads, kv_heads, dim = llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim
    sets = 2
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (
        [
            torch.randn(1, rows, count, dim, device=device, generator=draw).to(dtype)
            for _ in range(sets)
        ]
        for rows, count in ((m, heads), (n, kv_heads), (n, kv_heads))
    )
    variants: dict[str, Variant] = {}
    failed: dict[str, str] = {}
    for name, attend in _backends(m, n, device).items():
        try:
            attend(q[0], k[0], v[0])
            if on_gpu:
                torch.cuda.synchronize(device)
        except Exception as error:  # each says in its own way that it cannot
            failed[name] = first_line(error)
            continue
        variants[name] = functools.partial(_on_set, attend, q, k, v)
    timings = measure(variants, sets, rounds, stopwatch=stopwatch_for(device)) if variants else {}
    flops = _attention_flops(m, n, heads, dim)
    return tuple(
        AttentionRate(name, flops / timings[name].median_us / 1e6, "")
        if name in timings
        else AttentionRate(name, None, failed[name])
        for name in [*timings, *failed]
    )


def _on_set(
    attend: _Attend,
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    index: int,
) -> torch.Tensor:
    return attend(q[index], k[index], v[index])


def _attention_flops(m: int, n: int, heads: int, dim: int) -> float:
    """Scores and weighted values, two operations for each multiplication."""
    return 4.0 * m * n * heads * dim


def _backends(m: int, n: int, device: torch.device) -> dict[str, _Attend]:
    """Attention of q (1, m, H, D) to k, v (1, n, Hkv, D), by name."""
    found: dict[str, _Attend] = {"sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION)}
    if device.type == "cuda":
        found["sdpa cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
        found["fa3-fwd"] = _fa3
        found["vllm fa3"] = _vllm_fa3(m, n, device)
    return found


def _sdpa(kind: SDPBackend) -> _Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def _fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    for name in _FA3_MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        out = importlib.import_module(name).flash_attn_func(q, k, v)
        attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return attended
    raise ImportError(f"none of the modules {', '.join(_FA3_MODULES)} is installed (fa3-fwd)")


def _vllm_fa3(m: int, n: int, device: torch.device) -> _Attend:
    """FlashAttention-3 as CUDA builds of vLLM bring it."""
    ends = [torch.tensor([0, rows], dtype=torch.int32, device=device) for rows in (m, n)]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        attended: torch.Tensor = flash_attn_varlen_func(
            *(x[0] for x in (q, k, v)),
            max_seqlen_q=m,
            cu_seqlens_q=ends[0],
            max_seqlen_k=n,
            cu_seqlens_k=ends[1],
            fa_version=3,
        )
        return attended

    return attend
