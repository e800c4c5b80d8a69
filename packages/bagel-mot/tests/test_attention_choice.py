"""Which attention backend is chosen, and what is said about it."""

from __future__ import annotations

import pytest
import torch

from bagel_mot.model import attention_choice
from bagel_mot.model.attention import Backend, Math, Sdpa
from bagel_mot.model.attention_choice import choose_attention


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
