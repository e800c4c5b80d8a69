"""Every attention backend that is there on a GPU, against math."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    SEGMENTS,
    attend,
    random_segments,
)
from golden_data import relative_error
from torch import Tensor

from bagel_mot.model.attention import Backend, Math, merge
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.layout import Block, Segment, build_layout

# What runs on a GPU, each of which may be missing there: the rule says why.
ON_GPU = ["fa3", "fa2", "cudnn", "sdpa", "math"]


def gpu_backend(name: str, dtype: torch.dtype = torch.bfloat16) -> Backend:
    try:
        return choose_attention(name, device="cuda", dtype=dtype, head_dim=128).backend
    except ValueError as error:
        pytest.skip(str(error))


def assert_as_rounded(got: Tensor, want: Tensor, segments: list[Segment]) -> None:
    """Within bfloat16's rounding: of the probabilities, the values and the result."""
    sizes = [segment.rows for segment in segments]
    for index, pair in enumerate(zip(got.split(sizes), want.split(sizes), strict=True)):
        error = relative_error(*(tensor.float() for tensor in pair))
        assert error <= 6e-3, f"segment {index}: error {error:.2e}"


def gpu_rows(segments: list[Segment], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    end = max(segment.region.stop for segment in segments)
    shape = (end + 3, 2, kv_heads, 128)
    kv = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    rows = sum(segment.rows for segment in segments)
    q = torch.randn(rows, heads, 128, generator=generator, device="cuda").bfloat16()
    return q, kv[:, 0], kv[:, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SEGMENTS, "pictures", *range(3)])
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_backends_agree(name: str, case: str | int) -> None:
    backend = gpu_backend(name)
    if case == "pictures":
        segments = [Segment(1026, 0, 30, False, room=256), Segment(1026, 1282, 0, False)]
    else:
        segments = random_segments(case) if isinstance(case, int) else SEGMENTS[case]
    q, k, v = gpu_rows(segments, 28, 4)
    if not backend.needs_finite_rows:
        unread = torch.ones(len(k), dtype=torch.bool, device="cuda")
        for segment in segments:
            unread[segment.kv_rows] = False
        k[unread] = v[unread] = float("nan")
    got = attend(backend, q, k, v, segments)
    want = attend(Math(), q.float(), k.float(), v.float(), segments)
    assert_as_rounded(got, want, segments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_attend_rows(name: str) -> None:
    backend = gpu_backend(name)
    lengths = torch.tensor([1, 1000, 257], dtype=torch.int32, device="cuda")
    q, k, v = gpu_rows([Segment(3 * 1280, 0, 0, False)], 28, 4)
    q = q[:3]
    k, v = (tensor[: 3 * 1280].unflatten(0, (3, 1280)) for tensor in (k, v))
    got = backend.attend_rows(q, k, v, lengths, backend.reach(1000, 1280))
    want = Math().attend_rows(q.float(), k.float(), v.float(), lengths, 1280)
    assert_as_rounded(got, want, [Segment(1, 0, 0, False)] * 3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_merged_halves_are_the_whole(name: str) -> None:
    backend = gpu_backend(name)
    segments = [Segment(300, 0, 200, causal=False)]
    q, k, v = gpu_rows(segments, 28, 4)
    parts = [backend.attend_with_lse(q, k[rows], v[rows]) for rows in (slice(190), slice(190, 500))]
    want = attend(Math(), q.float(), k.float(), v.float(), segments)
    assert_as_rounded(merge(*parts)[0], want, segments)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu_graph_replays_over_other_lengths(name: str) -> None:
    """Captured once; the lengths of the prefixes change on the device."""
    backend = gpu_backend(name)
    if not backend.device_lengths:
        pytest.skip(f"{name} bakes the lengths into its launches")

    def blocks(*prefixes: int) -> list[Block]:
        segments = [
            Segment(200, i * 456, prefix, causal=False, room=256)
            for i, prefix in enumerate(prefixes)
        ]
        return [Block(segment, ((0, 200),), 0) for segment in segments]

    static = build_layout(blocks(30, 256), torch.device("cuda"))
    q, k, v = gpu_rows([block.segment for block in blocks(30, 256)], 28, 4)
    backend.attend(q, k, v, static.spans)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.attend(q, k, v, static.spans)
    for prefixes in ((30, 256), (1, 2), (200, 0)):
        static.load(blocks(*prefixes))
        graph.replay()
        segments = [block.segment for block in blocks(*prefixes)]
        want = attend(Math(), q.float(), k.float(), v.float(), segments)
        assert_as_rounded(got, want, segments)
