"""What FlashAttention is asked, by a stand-in that answers with math."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_cases import (
    SEGMENTS,
    assert_rows_close,
    attend,
    attend_by_rows,
    random_rows,
)
from torch import Tensor

from bagel_mot.model import attention
from bagel_mot.model.attention import Math
from bagel_mot.model.layout import Segment, Span


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


@pytest.mark.parametrize(
    ("rows", "packs"),
    [([1], True), ([1026], True), ([2050], False), ([4098, 4098], False), ([4098, 9], False)],
    ids=str,
)
def test_heads_share_tiles_where_that_fills_them(rows: list[int], packs: bool) -> None:
    """BAGEL has 7 query heads a KV head; FlashAttention-3's tiles are 128 rows high."""
    own = [Segment(n, 9000 * i, 0, False) for i, n in enumerate(rows)]
    bounds = torch.zeros(2 * len(own), dtype=torch.int32)
    span = Span(tuple(own), 0, bounds, bounds)
    fa3 = object.__new__(attention.FlashAttention3)  # its package is only on GPUs
    assert fa3._options(span, 7) == {"pack_gqa": packs}
