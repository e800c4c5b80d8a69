"""Attention in 8 bits: what is rounded, what is asked of FlashAttention-3, what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_fp8_checks as checks
import pytest
import torch
from attention_cases import attend
from attention_fp8_cases import ROUNDING, SETTINGS, gaussian, rounded_q, small_pipeline
from golden_data import relative_error
from kernel_checks import run_checks
from mot_kernels import Format, Fp8W8A8, Int8W8A8, quantize_rows
from torch import Tensor

from bagel_mot.model import attention, attention_fp8, layout
from bagel_mot.model.attention import Math, RoundedQ, Sdpa
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.attention_fp8 import HEADROOM, FlashAttention3Fp8, round_heads
from bagel_mot.model.layout import Segment, build_spans
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Request

CPU = torch.device("cpu")


class _Package:
    """Stands for FlashAttention-3: answers with math over what the 8 bits stand for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls.append({"dtype": q.dtype, **options})
        rows, keys = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
        out = torch.full(q.shape, float("nan"))
        for i in range(len(rows) - 1):
            own, seen = slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])
            if rows[i] == rows[i + 1]:
                continue
            factors = [options.get(f"{x}_descale") for x in "qkv"]
            mine, their_k, their_v = (
                x[part].float() if scales is None else _times(x[part], scales[i])
                for x, part, scales in zip((q, k, v), (own, seen, seen), factors, strict=True)
            )
            segment = Segment(len(mine), 0, len(their_k) - len(mine), options["causal"])
            out[own] = attend(Math(), mine, their_k, their_v, [segment])
        return out


def _times(x: Tensor, scales: Tensor) -> Tensor:
    """x (rows, heads, D) times the scales of its KV heads."""
    return (x.float().unflatten(1, (len(scales), -1)) * scales[:, None, None]).flatten(1, 2)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> _Package:
    stand = _Package()
    monkeypatch.setattr(FlashAttention3Fp8, "modules", ("json",))  # any that is there
    monkeypatch.setattr(attention.importlib, "import_module", lambda _name: stand)
    return stand


def velocities(pipeline: BagelPipeline, requests: list[Request]) -> list[Tensor]:
    """Of all rows in the first step."""
    seen: list[Tensor] = []
    hook = pipeline.model.llm2vae.register_forward_hook(lambda _, x, y: seen.append(y.clone()))
    pipeline.run(requests)
    hook.remove()
    return seen[:1]


@pytest.mark.parametrize("how", ["interpret", "compile"])
def test_kernel_without_a_gpu(how: str) -> None:
    run_checks(checks.__file__, how)


@pytest.mark.parametrize("name", checks.CASES)
def test_rounds_to_the_nearest(name: str) -> None:
    """By at most half a step of 3 bits; the largest number of each KV head is past half of 448."""
    q, k, v, span = checks.make(name, 1.0, CPU)
    rounded = round_heads(q, k, v, span)
    none = torch.zeros_like(rounded.shifts[0])
    for x, y, scales, shifts, bounds in (
        (q, rounded.q, rounded.scales[0], none, span.row_bounds.tolist()),
        (k, rounded.k, rounded.scales[1], rounded.shifts[0], span.kv_bounds.tolist()),
        (v, rounded.v, rounded.scales[2], rounded.shifts[1], span.kv_bounds.tolist()),
    ):
        untouched = torch.ones(len(x), dtype=torch.bool)
        for i in range(0, len(bounds), 2):
            rows = slice(bounds[i], bounds[i + 1])
            untouched[rows] = False
            each = x[rows].unflatten(1, (len(scales[i]), -1))
            want = each.masked_fill(each.isinf(), float("nan")) - shifts[i][:, None]
            own = scales[i][:, None, None]
            got = y[rows].float().unflatten(1, (len(scales[i]), -1)) * own
            assert torch.equal(got.isnan(), want.isnan())
            off, size = (got - want).abs().nan_to_num(), want.abs().nan_to_num()
            assert (off <= torch.maximum(size * 2**-4, own * 2**-10)).all()
            most = size.amax((0, 2, 3)) / scales[i]
            if x is q:
                most *= 2**HEADROOM
            assert ((most <= 448) & ((most > 224) | (most == 0))).all()
        assert not y[untouched].float().any()


def test_scales_of_exact_sizes() -> None:
    """448 times a power of two needs that power, anything above the next one."""
    (span,) = build_spans([Segment(1, 0, 0, False)], CPU)
    for most, scale in ((448.0, 1.0), (448.0 * (1 + 2**-23), 2.0), (224.0, 0.5), (0.0, 2.0**-60)):
        x = torch.full((1, 1, 16), most)
        assert round_heads(x, x, x, span).scales[0].tolist() == [[scale * 2**HEADROOM]]


def test_headroom_of_q() -> None:
    """Rows that were not looked at may be 16 times as large; above, numbers become the largest."""
    (span,) = build_spans([Segment(1000, 0, 0, False)], CPU)
    x = torch.full((1000, 1, 16), 7.0)
    x[1, 0, :2] = torch.tensor([7.0 * 16, -7.0 * 17])
    rounded = round_heads(x, x, x, span)
    assert (rounded.q[1].float() * rounded.scales[0, 0])[0, :3].tolist() == [112.0, -112.0, 7.0]


def test_neighbours_do_not_matter() -> None:
    one, other = Segment(40, 0, 10, False), Segment(60, 50, 3, False)
    q, k, v = gaussian([one, other])
    (alone,), (both,) = build_spans([one], CPU), build_spans([one, other], CPU)
    want = round_heads(q[:40], k, v, alone)
    q[40:], k[50:], v[50:] = q[40:] * 1000, k[50:] * 1000, float("inf")
    got = round_heads(q, k, v, both)
    assert torch.equal(got.q[:40].float(), want.q.float())
    assert torch.equal(got.k[:50].float(), want.k[:50].float())
    assert torch.equal(got.v[:50].float(), want.v[:50].float())
    assert torch.equal(got.scales[:, 0], want.scales[:, 0])
    assert torch.equal(got.shifts[:, 0], want.shifts[:, 0])


@pytest.mark.parametrize("of", ["k", "v"])
def test_what_all_rows_share_costs_nothing(package: _Package, of: str) -> None:
    """A K or V of which all rows are large in the same direction; only the rest is rounded."""
    segments = [Segment(3100, 0, 30, False)]
    q, k, v = gaussian(segments)
    (k if of == "k" else v)[:] += 30.0
    got = attend(FlashAttention3Fp8(), q, k, v, segments)
    want = attend(Math(), q.float(), k.float(), v.float(), segments)
    # V's own share of the result is exact to bfloat16; of K's there is none in it.
    assert relative_error(got, want) <= (ROUNDING if of == "k" else 2**-8)


def test_large_pictures_are_rounded(package: _Package) -> None:
    """K and V of different sizes, whose scales must not be mixed up."""
    segments = [Segment(3100, 0, 30, False, room=64), Segment(3072, 3200, 0, False)]
    q, k, v = gaussian(segments)
    v *= 64
    got = attend(FlashAttention3Fp8(), q, k, v, segments)
    want = attend(Math(), q.float(), k.float(), v.float(), segments)
    (call,) = package.calls
    assert call["dtype"] is torch.float8_e4m3fn
    assert all(call[f"{x}_descale"].shape == (3, 2) for x in "qkv")
    for mine, theirs in zip(got.split([3100, 3072]), want.split([3100, 3072]), strict=True):
        assert 0.01 < relative_error(mine, theirs) <= ROUNDING


@pytest.mark.parametrize(
    "segment",
    [Segment(3100, 0, 30, True), Segment(1, 0, 3100, True), Segment(3071, 0, 30, False)],
    ids=["text", "token", "picture"],
)
def test_texts_and_smaller_pictures_are_not(package: _Package, segment: Segment) -> None:
    q, k, v = gaussian([segment])
    got = attend(FlashAttention3Fp8(), q, k, v, [segment])
    (call,) = package.calls
    assert call["dtype"] is torch.bfloat16 and "q_descale" not in call
    want = attend(Math(), q.float(), k.float(), v.float(), [segment])
    assert relative_error(got, want) <= 1e-5


def test_small_pictures_do_not_depend_on_large_ones(package: _Package) -> None:
    segments = [
        Segment(100, 0, 5, False),
        Segment(3100, 105, 0, False),
        Segment(90, 3205, 2, False),
    ]
    q, k, v = gaussian(segments)
    got = attend(FlashAttention3Fp8(), q, k, v, segments).split([100, 3100, 90])
    for i in (0, 2):
        own = q.split([100, 3100, 90])[i]
        assert torch.equal(got[i], attend(FlashAttention3Fp8(), own, k, v, [segments[i]]))
    assert [call["dtype"].itemsize for call in package.calls] == [2, 1, 2, 2, 2]


def test_parts_of_a_large_picture_are_rounded(package: _Package) -> None:
    """With all-gather KV a rank has few of its rows, and sees all."""
    segment = Segment(100, 0, 30, False, first=500, block_rows=4098)
    (span,) = build_spans([segment], CPU)
    q, k, v = gaussian([replace(segment, rows=4098)])
    FlashAttention3Fp8().attend(q[:100], k, v, [span])
    assert [call["dtype"] for call in package.calls] == [torch.float8_e4m3fn]


def test_room_beyond_is_left_alone(package: _Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may be many times what this step needs."""
    seen: list[int] = []
    monkeypatch.setattr(
        attention_fp8,
        "round_heads",
        lambda q, k, *rest: seen.append(len(k)) or round_heads(q, k, *rest),
    )
    segments = [Segment(3100, 7, 30, False, room=64)]
    q, k, v = gaussian(segments)
    more = torch.zeros(9000, *k.shape[1:], dtype=k.dtype)
    attend(FlashAttention3Fp8(), q, torch.cat([k, more]), torch.cat([v, more]), segments)
    assert seen == [7 + 64 + 3100]


def test_through_the_pipeline(package: _Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole request, alone and beside a small one, in 8 bits and in 16."""
    monkeypatch.setattr(layout, "LARGE_PICTURE", 30)
    pipeline = small_pipeline(CPU, torch.float32)
    large = Request(["a red circle"], "image", settings=SETTINGS, height=96, width=96, seed=0)
    small = Request(["a blue square"], "image", settings=SETTINGS, height=64, width=64, seed=1)
    pipeline.model.attention = Sdpa()
    plain = velocities(pipeline, [large])
    pipeline.model.attention = FlashAttention3Fp8()
    (rounded,), (alone,) = velocities(pipeline, [large]), velocities(pipeline, [small])
    assert {call["dtype"] for call in package.calls} == {torch.float8_e4m3fn, torch.float32}
    assert 1e-4 < relative_error(rounded, plain[0]) <= 0.02
    (beside,) = velocities(pipeline, [large, small])
    # Other rows beside them are other shapes for torch's products, which may add in another order.
    assert relative_error(beside[: len(rounded)], rounded) <= 1e-2
    assert relative_error(beside[len(rounded) :], alone) <= 1e-5


@pytest.mark.parametrize(
    ("segments", "format", "in_passing"),
    [
        ([Segment(3100, 0, 30, False)], Fp8W8A8(), True),
        ([Segment(3100, 0, 30, False), Segment(3072, 3130, 0, False)], Fp8W8A8(), True),
        ([Segment(3100, 0, 30, False)], Int8W8A8(), False),
    ],
    ids=["one", "two", "int8"],
)
def test_rounded_for_the_next_product(
    package: _Package,
    monkeypatch: pytest.MonkeyPatch,
    segments: list[Segment],
    format: Format,
    in_passing: bool,
) -> None:
    """The numbers of two passes; in one where FP8 is wanted."""
    calls: list[str] = []
    for name in ("add_shifts", "shift_and_round"):
        own = getattr(attention_fp8, name)
        monkeypatch.setattr(
            attention_fp8, name, lambda *x, own=own, name=name: calls.append(name) or own(*x)
        )
    q, k, v = gaussian(segments)
    spans = build_spans(segments, CPU)
    given, backend = rounded_q(q), FlashAttention3Fp8()
    got = backend.attend_to_rounded(given, k, v, spans, format)
    assert ("shift_and_round" in calls) is in_passing
    want = quantize_rows(backend.attend_to_rounded(given, k, v, spans, None), format)
    assert got.dtype is want.dtype
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))


def test_o_in_fp8_gets_rounded_rows(package: _Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of two layers, from the step of a large picture alone."""
    monkeypatch.setattr(layout, "LARGE_PICTURE", 30)
    calls: list[int] = []
    own = attention_fp8.shift_and_round
    monkeypatch.setattr(
        attention_fp8, "shift_and_round", lambda y, *rest: calls.append(len(y)) or own(y, *rest)
    )
    pipeline = small_pipeline(CPU, torch.float32, quantization="fp8")
    pipeline.model.attention = FlashAttention3Fp8()
    request = Request(["a red circle"], "image", settings=SETTINGS, height=96, width=96, seed=0)
    velocities(pipeline, [request])
    assert calls == [36 + 2] * 2


def test_queries_that_come_rounded(package: _Package) -> None:
    """They are attended with as they are; for `o` in FP8 and INT8 as for any other."""
    segments = [Segment(3100, 0, 30, False)]
    spans = build_spans(segments, CPU)
    q, k, v = gaussian(segments)
    given = rounded_q(q)
    scale = given.scale
    backend = FlashAttention3Fp8()
    assert backend.rounds_q(spans)
    got = backend.attend_to_rounded(given, k, v, spans, None)
    assert isinstance(got, Tensor)
    (call,) = package.calls
    assert call["dtype"] is torch.float8_e4m3fn and (call["q_descale"] == scale).all()
    want = attend(Math(), given.data.float() * scale, k.float(), v.float(), segments)
    assert 0.01 < relative_error(got, want.flatten(1)) <= ROUNDING
    for format in (Fp8W8A8(), Int8W8A8()):
        rows = backend.attend_to_rounded(given, k, v, spans, format)
        assert torch.equal(rows.float(), quantize_rows(got, format).float())


def test_queries_are_rounded_for_large_pictures_alone(package: _Package) -> None:
    large, small = Segment(3100, 0, 30, False), Segment(90, 3200, 30, False)
    text = Segment(3100, 0, 30, True)
    backend = FlashAttention3Fp8()
    for segments, rounds in (
        ([large], True),
        ([small], False),
        ([text], False),
        ([large, small], False),
        ([], False),
    ):
        assert backend.rounds_q(build_spans(segments, CPU)) is rounds
        assert not Math().rounds_q(build_spans(segments, CPU))
    q, k, v = gaussian([small])
    with pytest.raises(TypeError, match="attention math takes queries as they are, not rounded"):
        Math().attend_to_rounded(RoundedQ(q, q), k, v, build_spans([small], CPU), None)


def test_rings_are_not_and_it_is_said(package: _Package, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(attention_fp8, "warn_once", said.append)
    package.flash_attn_func = lambda q, k, v, **_: (q, torch.zeros(1, 6, len(q[0])))  # type: ignore[attr-defined]
    FlashAttention3Fp8().attend_with_lse(*gaussian([Segment(9, 0, 0, False)]))
    assert said == ["attention fa3-fp8 is fa3, in 16 bits, where ranks pass K and V around a ring"]


def test_no_gradients() -> None:
    (span,) = build_spans([Segment(9, 0, 0, False)], CPU)
    q, k, v = gaussian([Segment(9, 0, 0, False)])
    with pytest.raises(RuntimeError, match="attention fa3-fp8 has no backward pass"):
        round_heads(q.requires_grad_(True), k, v, span)


def test_strides_must_agree() -> None:
    from bagel_mot._triton.round_heads import launch_round_heads

    (span,) = build_spans([Segment(9, 0, 0, False)], CPU)
    q, k, v = gaussian([Segment(9, 0, 0, False)])
    with pytest.raises(
        ValueError, match=r"k and v have strides \(512, 128, 1\) and \(256, 128, 1\)"
    ):
        launch_round_heads(
            (q, k, v), q[:1], q[:1], (q, k, v.contiguous()), span.row_bounds, span.kv_bounds
        )


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        ((8, 9), "bfloat16", 128, "it has no kernels for compute capability 8.9"),
        ((10, 0), "bfloat16", 128, "it has no kernels for compute capability 10.0"),
        ((9, 0), "float16", 128, "it has no kernels for float16"),
        ((9, 0), "bfloat16", 80, "it has no kernels for heads of 80"),
        ((9, 0), "bfloat16", 128, None),
    ],
)
def test_where_it_runs(
    package: _Package,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: str,
    head_dim: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    where = {"device": "cuda", "dtype": getattr(torch, dtype), "head_dim": head_dim}
    if reason is None:
        assert str(choose_attention("fa3-fp8", **where)) == "fa3-fp8 (asked for)"
        return
    with pytest.raises(ValueError, match=f"attention is 'fa3-fp8'.*: {reason}"):
        choose_attention("fa3-fp8", **where)
