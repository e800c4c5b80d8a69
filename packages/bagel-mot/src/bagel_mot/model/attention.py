"""Attention over packed segments, behind one function per backend.

`attend(q, k, v, segments)` with q (M, H, D) in packed row order and k, v (S, Hkv, D), one layer
of a `KVCache`, gives (M, H, D). Query head j reads KV head j // (H / Hkv); scale is D^-0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bagel_mot.model.layout import Segment

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Segment]], torch.Tensor]


def attend_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Sequence[Segment]
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, one call a segment."""
    out = torch.empty_like(q)
    start = 0
    for segment in segments:
        rows = slice(start, start + segment.rows)
        start += segment.rows
        # A single causal row sees everything, and without a prefix torch's own causal mask
        # (aligned to the first key) is ours.
        own_mask = segment.causal and segment.rows > 1
        mask = _causal_mask(segment, q.device) if own_mask and segment.prefix else None
        y = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1)[None],
            k[segment.kv_rows].transpose(0, 1)[None],
            v[segment.kv_rows].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=own_mask and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[rows] = y[0].transpose(0, 1)
    return out


def attend_math(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Sequence[Segment]
) -> torch.Tensor:
    """Scores written out in at least float32: the reference the other backends are checked with."""
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    start = 0
    for segment in segments:
        rows = slice(start, start + segment.rows)
        start += segment.rows
        wide = torch.promote_types(q.dtype, torch.float32)
        keys = k[segment.kv_rows].to(wide).repeat_interleave(groups, dim=1)
        values = v[segment.kv_rows].to(wide).repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(wide), keys) * q.shape[-1] ** -0.5
        if segment.causal:
            scores = scores.masked_fill(~_causal_mask(segment, q.device), float("-inf"))
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype)
    return out


def _causal_mask(segment: Segment, device: torch.device) -> torch.Tensor:
    """(rows, prefix + rows) bool: the whole prefix and own rows up to the query's."""
    shape = (segment.rows, segment.prefix + segment.rows)
    return torch.ones(shape, dtype=torch.bool, device=device).tril(segment.prefix)


BACKENDS: dict[str, Attend] = {"sdpa": attend_sdpa, "math": attend_math}


def choose_attention(name: str | None = None) -> Attend:
    """The backend called `name`; None means the fastest that is always there, "sdpa".

    Raises:
        ValueError: no backend has that name.
    """
    if name is None:
        return BACKENDS["sdpa"]
    if name not in BACKENDS:
        raise ValueError(f"attention is {name!r}; known backends are {', '.join(BACKENDS)}")
    return BACKENDS[name]
