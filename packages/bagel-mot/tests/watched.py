"""What tests watch of a model, and what they let it read unwritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from bagel_mot.model.kv_cache import KVCache


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[int]]:
    """Packed rows of every forward of the model."""
    seen: list[int] = []
    handle = model.register_forward_hook(
        lambda _module, inputs, _output: seen.append(inputs[0].shape[0])
    )
    try:
        yield seen
    finally:
        handle.remove()


def poison_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache that is made, grown ones too, starts as NaN."""
    plain = KVCache.__init__

    def poisoned(self: KVCache, *args: object, **kwargs: object) -> None:
        plain(self, *args, **kwargs)  # type: ignore[arg-type]
        self.k.fill_(float("nan"))
        self.v.fill_(float("nan"))

    monkeypatch.setattr(KVCache, "__init__", poisoned)
