"""Attention backends against attention written out row by row, and in a whole request."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_data import GOLDEN, Judge, relative_error
from golden_requests import paint_and_judge
from torch import Tensor

from bagel_mot.model import attention, attention_choice
from bagel_mot.model.attention import Backend, Math, Sdpa, merge
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.layout import Block, Segment, build_layout, build_spans
from bagel_mot.pipeline import BagelPipeline

HEAD = 16
CPU = torch.device("cpu")
ON_CPU = [Sdpa(), Math()]
# What runs on a GPU, each of which may be missing there: the rule says why.
ON_GPU = ["fa3", "fa2", "cudnn", "sdpa", "math"]

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
# Query heads and key/value heads; the last two are the golden model's and the release's.
HEADS = [(1, 1), (6, 6), (6, 1), (4, 2), (28, 4)]


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


# --- what FlashAttention is asked


class _Recorded(ModuleType):
    """Stands for a FlashAttention package: checks what a kernel would, answers with math."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls.append(options)
        rows, keys = (options[f"cu_seqlens_{x}"] for x in "qk")
        assert rows.dtype == keys.dtype == torch.int32 and len(rows) == len(keys)
        rows, keys = rows.tolist(), keys.tolist()
        assert rows == sorted(rows) and keys == sorted(keys), "bounds must not go down"
        assert rows[0] == 0 and rows[-1] == len(q) and keys[-1] <= len(k)
        out = torch.full_like(q, float("nan"))
        for i in range(len(rows) - 1):
            own, length = rows[i + 1] - rows[i], keys[i + 1] - keys[i]
            if own:
                assert own <= options["max_seqlen_q"] and length <= options["max_seqlen_k"]
                segment = Segment(own, keys[i], length - own, options["causal"])
                out[rows[i] : rows[i + 1]] = attend(
                    Math(), q[rows[i] : rows[i + 1]], k, v, [segment]
                )
        return out


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> _Recorded:
    module = _Recorded("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention.FlashAttention2, "module", lambda _self: "flash_attn")
    return module


@pytest.mark.parametrize("case", SEGMENTS)
def test_flash_arguments(flash: _Recorded, case: str) -> None:
    """The bounds handed to variable-length kernels describe the segments."""
    segments = SEGMENTS[case]
    q, k, v = random_rows(segments, 4, 2)
    got = attend(attention.FlashAttention2(), q, k, v, segments)
    assert_rows_close(got, attend_by_rows(q, k, v, segments), segments)


def test_flash_makes_one_call_for_all_branches(flash: _Recorded) -> None:
    segments = SEGMENTS["three-branches"]
    attend(attention.FlashAttention2(), *random_rows(segments, 4, 2), segments)
    (call,) = flash.calls
    assert call["cu_seqlens_q"].tolist() == [0, 9, 9, 18, 18, 27]
    assert call["cu_seqlens_k"].tolist() == [0, 16, 16, 28, 28, 37]
    assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (9, 16)
    roomy = [replace(segment, room=segment.prefix and 20) for segment in segments[:1]]
    attend(attention.FlashAttention2(), *random_rows(roomy, 4, 2), roomy)
    assert flash.calls[-1]["max_seqlen_k"] == 29  # whatever prefix comes in its place


# --- the rule


def test_choose_attention() -> None:
    assert isinstance(choose_attention().backend, Sdpa)
    assert str(choose_attention()) == "sdpa (the fastest for float32 on cpu)"
    assert isinstance(choose_attention("math").backend, Math)
    assert str(choose_attention("math")) == "math (asked for)"


def test_choose_attention_unknown() -> None:
    with pytest.raises(ValueError, match=r"attention is 'fa9'; known backends are .*sdpa.*math"):
        choose_attention("fa9")


@pytest.mark.parametrize("name", ["fa3", "fa2", "cudnn"])
def test_choose_attention_impossible(name: str) -> None:
    message = f"attention is '{name}', which cannot be used here: it needs a GPU"
    with pytest.raises(ValueError, match=message):
        choose_attention(name)


@pytest.mark.parametrize(
    ("capability", "dtype", "missing", "want"),
    [
        ((9, 0), "bfloat16", [], "fa3 (the fastest for bfloat16 on cuda)"),
        ((9, 0), "bfloat16", ["fa3"], "cudnn (the fastest for bfloat16 on cuda; not fa3: gone)"),
        ((9, 0), "bfloat16", ["fa3", "cudnn"], "fa2 (.*; not fa3: gone; not cudnn: gone)"),
        ((9, 0), "float32", ["fa3", "cudnn", "fa2"], "sdpa (the fastest for float32 on cuda; .*)"),
        ((8, 0), "bfloat16", [], "fa2 (the fastest for bfloat16 on cuda)"),
        ((10, 0), "bfloat16", ["fa2"], "sdpa (.*; not fa2: gone)"),
    ],
)
def test_rule_on_gpus(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: str,
    missing: list[str],
    want: str,
) -> None:
    """The order, with every backend there but the missing ones."""
    import re

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(
        attention_choice, "_why_not", lambda name, *_where: "gone" if name in missing else None
    )
    monkeypatch.setattr(
        attention_choice, "BACKENDS", {name: _named(name) for name in attention_choice.BACKENDS}
    )
    choice = choose_attention(device="cuda", dtype=getattr(torch, dtype))
    pattern = re.escape(want).replace(r"\.\*", ".*")
    assert re.fullmatch(pattern, str(choice)), str(choice)


def _named(own: str) -> type[Backend]:
    class Stand(Math):
        name = own

    return Stand


def test_whole_request_with_math() -> None:
    """A recorded edit, all three contexts, through the reference backend."""
    case, judge = GOLDEN.case("b1"), Judge(torch.float32)
    own = BagelPipeline.from_pretrained(
        GOLDEN.checkpoint, device="cpu", dtype="float32", attention="math"
    )
    assert isinstance(own.model.attention, Math)
    paint_and_judge(own, judge, case)
    assert any(key.endswith(".v_cfg_img") for key in judge.checked)


# --- on a GPU: every backend that is there, against math


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
