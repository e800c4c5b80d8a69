"""The golden checkpoint, loaded and spoilt; the fixture `checkpoint_copy` is a copy to spoil."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.pipeline import BagelPipeline

K_PROJ = "language_model.model.layers.1.self_attn.k_proj_moe_gen.weight"


def load(folder: Path, **options: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", **({"dtype": "float32"} | options))


def parameters(pipeline: BagelPipeline) -> dict[str, Tensor]:
    return dict(pipeline.model.named_parameters())


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def counting_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every tensor that is read: how many read before it are still in memory."""
    reads: list[int] = []
    buffers: list[weakref.ref[np.ndarray[Any, Any]]] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Tensor:
            stored = self._file.get_tensor(name)
            reads.append(sum(buffer() is not None for buffer in buffers))
            # Lives as long as any view of the tensor.
            buffer = np.empty(stored.nbytes, dtype=np.uint8)
            buffers.append(weakref.ref(buffer))
            return torch.from_numpy(buffer).view(stored.dtype).view(stored.shape).copy_(stored)

    monkeypatch.setattr(checkpoint, "safe_open", Watched)
    return reads
