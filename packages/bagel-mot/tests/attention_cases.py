"""Packed segments for attention backends, and attention over them written out row by row."""

from __future__ import annotations

import torch
from golden_data import GOLDEN, relative_error
from torch import Tensor

from bagel_mot.model.attention import Backend
from bagel_mot.model.layout import Segment, build_spans

HEAD = 16

# Sizes are odd, so that a row too many or too few shows.
SEGMENTS = {
    "full": [Segment(5, 0, 0, causal=False)],
    "full-prefix": [Segment(5, 0, 7, causal=False)],
    "causal": [Segment(5, 0, 0, causal=True)],
    "causal-prefix": [Segment(5, 0, 7, causal=True)],
    "one-row-full": [Segment(1, 0, 0, causal=False)],
    "one-row-causal": [Segment(1, 0, 0, causal=True)],
    "one-row-causal-prefix": [Segment(1, 0, 9, causal=True)],
    "two-rows-causal-prefix": [Segment(2, 0, 1, causal=True)],
    "starts-later": [Segment(3, 11, 4, causal=True)],
    "three-branches": [
        Segment(9, 0, 7, causal=False),
        Segment(9, 16, 3, causal=False),
        Segment(9, 28, 0, causal=False),
    ],
    "mixed": [
        Segment(4, 40, 5, causal=True),
        Segment(1, 0, 3, causal=True),
        Segment(6, 10, 2, causal=False),
        Segment(3, 25, 0, causal=True),
    ],
    "shared-prefix-rows": [Segment(3, 0, 6, causal=False), Segment(2, 0, 6, causal=True)],
}


def attend_by_rows(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    """One query head of one row at a time, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    row = 0
    for segment in segments:
        for own in range(segment.rows):
            seen = segment.prefix + (own + 1 if segment.causal else segment.rows)
            keys = slice(segment.kv_start, segment.kv_start + seen)
            for head in range(q.shape[1]):
                scores = k[keys, head // groups].double() @ q[row, head].double() / HEAD**0.5
                out[row, head] = scores.softmax(0) @ v[keys, head // groups].double()
            row += 1
    return out


def random_rows(
    segments: list[Segment], heads: int, kv_heads: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v; rows of the cache that no segment may read are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(segment.rows for segment in segments)
    end = max(segment.kv_rows.stop for segment in segments)
    # One cache layer as the model has it: k and v are views that skip over one another.
    kv = torch.full((end + 3, 2, kv_heads, HEAD), float("nan"))
    for segment in segments:
        kv[segment.kv_rows] = torch.randn(kv[segment.kv_rows].shape, generator=generator)
    return torch.randn(rows, heads, HEAD, generator=generator), kv[:, 0], kv[:, 1]


def assert_rows_close(got: Tensor, want: Tensor, segments: list[Segment]) -> None:
    """Each segment for itself: a single wrong row hides among many."""
    sizes = [segment.rows for segment in segments]
    for index, pair in enumerate(zip(got.split(sizes), want.split(sizes), strict=True)):
        error = relative_error(*pair)
        assert error <= GOLDEN.fp32_bound, f"segment {index}: error {error:.2e}"


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    return backend.attend(q, k, v, build_spans(segments, q.device))


def random_segments(seed: int) -> list[Segment]:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    segments, start = [], 0
    for _ in range(1 + draw(5)):
        start += draw(4)
        segments.append(Segment(1 + draw(60), start, draw(2) * draw(90), bool(draw(2))))
        start = segments[-1].kv_rows.stop
    return segments
