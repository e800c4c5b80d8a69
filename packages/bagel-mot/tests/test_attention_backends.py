"""Attention backends against attention written out row by row, and in a whole request."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    HEAD,
    SEGMENTS,
    assert_rows_close,
    attend,
    attend_by_rows,
    random_rows,
    random_segments,
)
from golden_data import GOLDEN, Judge
from golden_requests import paint_and_judge

from bagel_mot.model.attention import Backend, Math, Sdpa, merge
from bagel_mot.model.layout import Block, Segment, build_layout
from bagel_mot.pipeline import BagelPipeline

CPU = torch.device("cpu")
ON_CPU = [Sdpa(), Math()]
# Query heads and key/value heads; the last two are the golden model's and the release's.
HEADS = [(1, 1), (6, 6), (6, 1), (4, 2), (28, 4)]


def backend_id(backend: Backend) -> str:
    return backend.name


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}-heads-{heads[1]}-kv")
@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("backend", ON_CPU, ids=backend_id)
def test_attention(backend: Backend, case: str, heads: tuple[int, int]) -> None:
    segments = SEGMENTS[case]
    q, k, v = random_rows(segments, *heads)
    before = [tensor.clone() for tensor in (q, k, v)]
    got = attend(backend, q, k, v, segments)
    assert got.dtype == q.dtype and got.shape == q.shape
    assert_rows_close(got, attend_by_rows(q, k, v, segments), segments)
    for tensor, kept in zip((q, k, v), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), kept.nan_to_num())


@pytest.mark.parametrize("seed", range(8), ids=lambda seed: f"seed-{seed}")
def test_sdpa_and_math_agree(seed: int) -> None:
    """On random packings, of up to a few hundred rows."""
    segments = random_segments(seed)
    q, k, v = random_rows(segments, 8, 2, seed)
    got, want = (attend(backend, q, k, v, segments) for backend in ON_CPU)
    assert_rows_close(got, want, segments)


def test_math_computes_in_float32() -> None:
    """In bfloat16 the reference rounds its inputs and its result, and nothing between."""
    segments = SEGMENTS["mixed"]
    q, k, v = (tensor.bfloat16() for tensor in random_rows(segments, 4, 2))
    got = attend(Math(), q, k, v, segments)
    want = attend(Math(), q.float(), k.float(), v.float(), segments)
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("prefixes", [(7, 3), (5, 0), (0, 8), (8, 8)])
def test_prefix_of_another_length_in_the_same_room(prefixes: tuple[int, int]) -> None:
    """One layout for prefixes of any length up to the room: only tensors on the device change."""
    rows, room = (6, 4), 8
    starts = (0, room + rows[0])

    def blocks(lengths: tuple[int, int]) -> list[Block]:
        segments = [
            Segment(n, start, length, causal=False, room=room)
            for n, start, length in zip(rows, starts, lengths, strict=True)
        ]
        return [Block(segment, ((0, segment.rows),), 3) for segment in segments]

    layout = build_layout(blocks((1, 2)), CPU)
    tensors = [layout.positions, layout.kv_rows, *(s.kv_bounds for s in layout.spans)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    layout.load(blocks(prefixes))
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    now = [block.segment for block in blocks(prefixes)]
    own = torch.cat([torch.arange(s.own_rows.start, s.own_rows.stop) for s in now])
    assert layout.kv_rows.tolist() == own.tolist()
    q, k, v = random_rows(now, 4, 2)
    end = now[-1].region.stop
    k, v = (
        torch.cat([t, torch.full((max(end - len(t), 0), 2, HEAD), float("nan"))]) for t in (k, v)
    )
    got = Math().attend(q, k, v, layout.spans)
    assert_rows_close(got, attend_by_rows(q, k, v, now), now)


@pytest.mark.parametrize("backend", ON_CPU, ids=backend_id)
def test_attend_rows(backend: Backend) -> None:
    """One row of each of several sequences, at the device's lengths."""
    generator = torch.Generator().manual_seed(0)
    room, lengths = 600, torch.tensor([1, 300, 17], dtype=torch.int32)
    q = torch.randn(3, 6, HEAD, generator=generator)
    kv = torch.randn(3, room, 2, 2, HEAD, generator=generator)
    k, v = kv[:, :, 0], kv[:, :, 1]
    reach = backend.reach(300, room)
    assert 300 <= reach <= room
    got = backend.attend_rows(q, k, v, lengths, reach)
    for i, length in enumerate(lengths.tolist()):
        segment = [Segment(1, 0, length - 1, causal=False)]
        assert_rows_close(
            got[i : i + 1], attend_by_rows(q[i : i + 1], k[i], v[i], segment), segment
        )


@pytest.mark.parametrize("backend", ON_CPU, ids=backend_id)
def test_merged_halves_are_the_whole(backend: Backend) -> None:
    segments = [Segment(9, 0, 12, causal=False)]
    q, k, v = random_rows(segments, 6, 2)
    parts = [backend.attend_with_lse(q, k[rows], v[rows]) for rows in (slice(0, 5), slice(5, 21))]
    assert_rows_close(merge(*parts)[0], attend_by_rows(q, k, v, segments), segments)


def test_whole_request_with_math() -> None:
    """A recorded edit, all three contexts, through the reference backend."""
    case, judge = GOLDEN.case("b1"), Judge(torch.float32)
    own = BagelPipeline.from_pretrained(
        GOLDEN.checkpoint, device="cpu", dtype="float32", attention="math"
    )
    assert isinstance(own.model.attention, Math)
    paint_and_judge(own, judge, case)
    assert any(key.endswith(".v_cfg_img") for key in judge.checked)
