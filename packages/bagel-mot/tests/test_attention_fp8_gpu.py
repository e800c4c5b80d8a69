"""Attention in 8 bits with FlashAttention-3 itself: errors, bits, CUDA graphs."""

from __future__ import annotations

import attention_fp8_checks as checks
import pytest
import torch
from attention_cases import attend
from attention_fp8_cases import ROUNDING_ON_GPU, SETTINGS, gaussian, rounded_q, small_pipeline
from golden_data import relative_error
from mot_kernels import Fp8W8A8
from torch import Tensor

from bagel_mot.model import layout
from bagel_mot.model.attention import Math
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.attention_fp8 import FlashAttention3Fp8, round_heads
from bagel_mot.model.layout import Block, Segment, build_layout, build_spans
from bagel_mot.request import Request

pytestmark = pytest.mark.gpu


def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> FlashAttention3Fp8:
    """For segments of any size."""
    monkeypatch.setattr(layout, "LARGE_PICTURE", 1)
    try:
        choice = choose_attention("fa3-fp8", device="cuda", dtype=torch.bfloat16, head_dim=128)
    except ValueError as error:
        pytest.skip(str(error))
    assert isinstance(choice.backend, FlashAttention3Fp8)
    return choice.backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", checks.SCALES)
@pytest.mark.parametrize("name", checks.CASES)
def test_gpu_same_bits(name: str, scale: float, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no units for e4m3fn")
    q, k, v, span = checks.make(name, scale, torch.device("cuda"))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    checks.check_bits(round_heads(q, k, v, span), (q, k, v, span))


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(4098, 0, 30, False, room=256), Segment(1026, 4360, 0, False)],
        [Segment(9, 0, 7, False), Segment(200, 300, 90, False), Segment(1, 700, 0, False)],
    ],
    ids=["pictures", "small"],
)
def test_gpu_error(monkeypatch: pytest.MonkeyPatch, segments: list[Segment]) -> None:
    """V of another size than K; and with what all its rows share, which must not shrink."""
    backend = gpu_backend(monkeypatch)
    q, k, v = gaussian(segments, "cuda")
    sizes = [segment.rows for segment in segments]
    for scale, mean, bound in ((64, 0, ROUNDING_ON_GPU), (1, 30, 2**-8)):
        kv = torch.stack([k, v * scale + mean], dim=1)
        k, values = kv.unbind(1)
        got = attend(backend, q, k, values, segments).float()
        want = attend(Math(), q.float(), k.float(), values.float(), segments)
        for mine, theirs in zip(got.split(sizes), want.split(sizes), strict=True):
            assert relative_error(mine, theirs) <= bound


def test_gpu_queries_that_come_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = gpu_backend(monkeypatch)
    segments = [Segment(4098, 0, 30, False, room=256), Segment(1026, 4360, 0, False)]
    spans = build_spans(segments, torch.device("cuda"))
    q, k, v = gaussian(segments, "cuda")
    given = rounded_q(q)
    got = backend.attend_to_rounded(given, k, v, spans, None)
    assert isinstance(got, Tensor)
    want = attend(Math(), given.data.float() * given.scale, k.float(), v.float(), segments)
    want = want.flatten(1)
    sizes = [segment.rows for segment in segments]
    for mine, theirs in zip(got.float().split(sizes), want.split(sizes), strict=True):
        assert relative_error(mine, theirs) <= ROUNDING_ON_GPU
    rows = backend.attend_to_rounded(given, k, v, spans, Fp8W8A8())
    checks.check_rows(rows.data, rows.scales, got.unflatten(1, q.shape[1:]))


def test_gpu_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in CUDA graphs are those without."""
    gpu_backend(monkeypatch)
    monkeypatch.setattr(layout, "LARGE_PICTURE", 30)
    request = Request(["a red circle"], "image", settings=SETTINGS, height=96, width=96, seed=0)
    images = []
    for graphs in (True, False):
        pipeline = small_pipeline(
            torch.device("cuda"), torch.bfloat16, attention="fa3-fp8", cuda_graphs=graphs
        )
        images.append(pipeline.run([request])[0].image)
    assert images[0].tobytes() == images[1].tobytes()


def test_gpu_graph_replays_over_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a graph, to the bit, whatever the prefixes and their sizes are by then."""
    backend = gpu_backend(monkeypatch)

    def blocks(*prefixes: int) -> list[Block]:
        segments = [
            Segment(200, i * 456, prefix, causal=False, room=256)
            for i, prefix in enumerate(prefixes)
        ]
        return [Block(segment, ((0, 200),), 0) for segment in segments]

    cuda = torch.device("cuda")
    static = build_layout(blocks(30, 256), cuda)
    q, k, v = gaussian([block.segment for block in blocks(30, 256)], "cuda")
    backend.attend(q, k, v, static.spans)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backend.attend(q, k, v, static.spans)
    for turn, prefixes in enumerate(((30, 256), (1, 2), (200, 0))):
        static.load(blocks(*prefixes))
        k *= 2.0**turn
        graph.replay()
        want = backend.attend(q, k, v, build_layout(blocks(*prefixes), cuda).spans)
        assert torch.equal(got, want)
