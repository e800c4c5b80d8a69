"""vLLM's attention backend for CPUs, with full attention inside pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from vllm import __version_tuple__
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder

# What the kernel takes the flags of causal requests as.
_CAUSAL = torch.int32 if __version_tuple__[:2] >= (0, 32) else torch.bool


class Piece(NamedTuple):
    """Rows that attend alike, for the kernel a request of its own over its request's cache.

    Attributes:
        request: number of the request they belong to.
        rows: how many.
        seq_len: tokens of the request up to and including them.
        causal: text; otherwise a picture, or the rest of one.
    """

    request: int
    rows: int
    seq_len: int
    causal: bool


def cut_at_pictures(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    pictures: dict[int, list[tuple[int, int]]],
) -> list[Piece]:
    """Cut the rows of a step into runs of text and pictures.

    Args:
        query_lens: rows of each request.
        seq_lens: tokens of each request, those rows included, which come last.
        pictures: per request (first, last) token of each picture.

    Returns:
        The pieces, in row order.

    Raises:
        RuntimeError: a request's rows end inside a picture.
    """
    pieces = []
    for request, (rows, end) in enumerate(zip(query_lens, seq_lens, strict=True)):
        start = end - rows
        for first, last in sorted(pictures.get(request, ())):
            if last < start or first >= end:
                continue
            if last >= end:
                raise RuntimeError(
                    f"a step ends at token {end}, inside the picture at {first}..{last}; its "
                    "tokens must be computed together. Is another scheduler than bagel_mot's in "
                    "use?"
                )
            if first > start:
                pieces.append(Piece(request, first - start, first, True))
                start = first
            pieces.append(Piece(request, last + 1 - start, last + 1, False))
            start = last + 1
        if start < end or not rows:
            pieces.append(Piece(request, end - start, end, True))
    return pieces


class PictureCPUBackend(CPUAttentionBackend):
    """vLLM's CPU attention that honours the ranges of pictures.

    The kernel takes for each request whether it is causal. So runs of text and pictures become
    requests of their own, over the same cache: a picture is one that is not causal and ends with
    its last token. K and V of the step are in the cache before any of it is read, so the result is
    exact, whatever has been cached or computed in earlier steps.
    """

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return _PictureCPUBuilder


class _PictureCPUBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any
    ) -> Any:
        common = common_attn_metadata
        pieces = _pieces(common)
        if not all(piece.causal for piece in pieces):
            common = _with_requests(common, pieces)
        return super().build(common_prefix_len, common, *args, **kw)


def _pieces(common: Any) -> list[Piece]:
    """The pieces of a step, or none if they need not be told apart."""
    pictures = common.mm_req_doc_ranges
    # A single row sees all that is before it, in a picture too.
    if not pictures or not any(pictures.values()) or common.max_query_len == 1:
        return []
    starts = common.query_start_loc[: common.num_reqs + 1]
    ends = common.seq_lens[: common.num_reqs]
    return cut_at_pictures(starts.diff().tolist(), ends.tolist(), pictures)


def _with_requests(common: Any, pieces: list[Piece]) -> Any:
    """vLLM's description of the step with the pieces for requests."""
    requests = torch.tensor([piece.request for piece in pieces])
    starts = torch.tensor([0] + [piece.rows for piece in pieces]).cumsum(0)
    return common.replace(
        num_reqs=len(pieces),
        query_start_loc=starts.to(common.query_start_loc.dtype),
        seq_lens=torch.tensor([piece.seq_len for piece in pieces], dtype=common.seq_lens.dtype),
        block_table_tensor=common.block_table_tensor[requests],
        max_query_len=max(piece.rows for piece in pieces),
        causal=torch.tensor([piece.causal for piece in pieces], dtype=_CAUSAL),
        mm_req_doc_ranges=None,
    )
