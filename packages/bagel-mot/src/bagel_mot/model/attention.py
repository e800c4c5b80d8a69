"""Attention over packed segments, behind one function per backend.

A backend is called as `attend(q, k, v, segments)` with q (M, H, D) in packed row order and
k, v (S, Hkv, D), one layer of a `KVCache`, and gives (M, H, D). Query head j reads KV head
j // (H / Hkv); the scale is D^-0.5. `attend_with_lse` is for ranks that attend to parts of the keys
and merge what they got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from bagel_mot.model.layout import Segment

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Segment]], torch.Tensor]


def attend_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Sequence[Segment]
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, one call a segment."""
    out = torch.empty_like(q)
    for segment, rows in _with_rows(segments):
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
    for segment, rows in _with_rows(segments):
        keys, values = k[segment.kv_rows], v[segment.kv_rows]
        mask = _causal_mask(segment, q.device) if segment.causal else None
        out[rows] = _attend_written_out(q[rows], keys, values, mask)[0].to(q.dtype)
    return out


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full attention of q (m, H, D) to k, v (n, Hkv, D), n > 0, ready to be merged.

    Returns:
        Output (m, H, D) and log-sum-exp of the scores (m, H), both float32.
    """
    if q.is_cuda and q.dtype is not torch.float32 and len(q):
        groups = q.shape[1] // k.shape[1]
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(
            q.transpose(0, 1)[None],
            k.repeat_interleave(groups, dim=1).transpose(0, 1)[None],
            v.repeat_interleave(groups, dim=1).transpose(0, 1)[None],
        )
        return out[0].transpose(0, 1).float(), lse[0].transpose(0, 1)
    return _attend_written_out(q, k, v, None)


def merge(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to two disjoint sets of keys, each (output, lse), as one to their union."""
    lse = torch.logaddexp(one[1], other[1])
    out = one[0] * (one[1] - lse).exp()[..., None] + other[0] * (other[1] - lse).exp()[..., None]
    return out, lse


def _attend_written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(groups, dim=1)
    values = v.to(wide).repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse.transpose(0, 1)


def _with_rows(segments: Sequence[Segment]) -> Iterator[tuple[Segment, slice]]:
    """Segments that have rows, and where these are in the packed sequence."""
    start = 0
    for segment in segments:
        if segment.rows:
            yield segment, slice(start, start + segment.rows)
        start += segment.rows


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
