"""Triton's host side on a GPU that is not there: nothing is compiled, launches are written down.

Everything up to a compiled kernel is Triton's own: binding, specialising, its cache.
"""

from __future__ import annotations

from collections import defaultdict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from mot_kernels import dispatch
from mot_kernels._triton import (
    hopper,
    launch,
    launch_few_rows,
    launch_formats,
    launch_hopper,
    launch_rows,
    launcher,
)

KERNELS = [
    launch._mot_linear_kernel,
    launch._mot_rms_norm_kernel,
    launch._mot_qk_norm_rope_kernel,
    launch_few_rows._mot_linear_few_rows_kernel,
    launch_formats._mot_linear_8bit_kernel,
    launch_formats._mot_linear_16bit_kernel,
    launch_rows._quantize_rows_kernel,
    launch_rows._quantize_groups_kernel,
    hopper._mot_linear_hopper_kernel,
]
_ELEMENT = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "fp4_padded": False}
_Metadata = namedtuple("_Metadata", ("target", "tensordesc_meta", "name"))


@dataclass(frozen=True)
class Launched:
    """What reached CUDA; pointers as addresses, descriptors as what their maps were made from."""

    compiled: Any
    grid: tuple[int, ...]
    stream: int
    arguments: list[Any]


class FakeDriver:
    """Stands in for Triton's driver; `launched` holds the launches, `public` those through jit."""

    def __init__(self, backend: str = "cuda") -> None:
        self.target = GPUTarget(backend, 90 if backend == "cuda" else "gfx942", 32)
        self.device, self.stream = 0, 7
        self.launched: list[Launched] = []
        self.public = 0
        make = lambda *given: tuple(map(str, given))  # noqa: E731  (lists are not hashable)
        self.utils = SimpleNamespace(fill_tma_descriptor=make, fill_tma_descriptor_tiled=make)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Like Triton's: with descriptors' metadata it makes their maps, without it takes maps."""
        descriptors = list(metadata.tensordesc_meta or ())

        def run(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            _packed, launch_metadata, enter, leave, *arguments = rest
            if enter is not None:
                enter(launch_metadata)
            flat: list[Any] = []
            left = iter(descriptors)
            for kind, value in zip(source.signature.values(), arguments, strict=True):
                if kind.startswith("tensordesc"):
                    arrange = launcher._make_tensor_map()
                    flat += [arrange(value, next(left)), *value.shape, *value.strides]
                else:
                    flat.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
            self.launched.append(Launched(function, (x, y, z), stream, flat))
            if leave is not None:
                leave(launch_metadata)

        return run

    def compile(self, source: Any, target: GPUTarget, options: Any) -> CompiledKernel:
        kinds = [k for k in source.signature.values() if k.startswith("tensordesc")]
        blocks = [k[k.index("[") + 1 : k.index("]")].split(",") for k in kinds]
        meta = [_ELEMENT | {"block_size": [int(b) for b in block]} for block in blocks]
        compiled: Any = CompiledKernel.__new__(CompiledKernel)
        compiled.src, compiled.name, compiled.module = source, source.fn.__name__, None
        compiled.metadata = _Metadata(target, meta, compiled.name)
        compiled.packed_metadata, compiled._run = (), self.launcher_cls(source, compiled.metadata)
        # Nothing to load: what is launched is known by the compiled kernel itself.
        compiled._init_handles = lambda: None
        compiled.function = (source.fn.__name__, source.hash(), str(options))
        return compiled


@contextmanager
def faked(backend: str = "cuda") -> Iterator[FakeDriver]:
    """CPU tensors pass for those of a Hopper GPU."""
    fake = FakeDriver(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", fake)
        patch.setattr(triton.compiler, "compile", fake.compile)
        for kernel in KERNELS:
            patch.setattr(kernel, "compile", fake.compile, raising=False)
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
            patch.setattr(kernel, "run", _counting(fake, kernel.run))
        on_gpu = dispatch.Choice(dispatch.Path.TRITON, "the GPU is faked")
        patch.setattr(dispatch, "_choose_freely", lambda *question: on_gpu)
        patch.setattr(dispatch, "has_fp8_units", lambda device: True)
        patch.setattr(launch_hopper, "count_multiprocessors", lambda device: 132)
        yield fake


def _counting(fake: FakeDriver, run: Any) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        fake.public += 1
        return run(*args, **options)

    return counted
