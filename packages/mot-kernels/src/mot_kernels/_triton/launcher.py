"""Launch a kernel, and launch it again without asking Triton anything.

`kernel[grid](...)` binds and examines all arguments in Python to find the compiled kernel, which is
most of what a launch costs the host. What it finds follows from the arguments' types, the values of
integers and constexprs, and whether 16 divides addresses. So a launch whose arguments are the same
but for some addresses, again multiples of 16, is one of the same compiled kernel: `Launch` hands it
the new addresses. That all else is the same is for its caller to see to (`mot_kernels.replay`).

How a compiled kernel is run is not documented, but the same from Triton 3.6 to 3.9 for NVIDIA GPUs:
`compiled.run(*grid, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook,
*arguments)`, with a tensor or its address for a pointer. Other Tritons and GPUs (AMD's backend asks
more about a pointer than 16 bytes) launch the public way every time.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from mot_kernels._triton.tile import (
    _EPILOGUE_ADD_RESIDUAL,
    _EPILOGUE_NONE,
    _EPILOGUE_SILU_MUL,
)
from mot_kernels.replay import Again, Keep

logger = logging.getLogger("mot_kernels")

_KNOWN = ((3, 6), (3, 9))

# A product and a sum in one instruction, rounded once: Triton's default, but not from 3.10 on, of
# which 3.9 warns.
OPTIONS = {"enable_fp_fusion": True}

_DESCRIPTOR = "tensordesc"

EPILOGUES = {
    "none": _EPILOGUE_NONE.value,
    "silu_mul": _EPILOGUE_SILU_MUL.value,
    "add_residual": _EPILOGUE_ADD_RESIDUAL.value,
}
"""What kernels take for the name of an epilogue."""

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# Which tensor a parameter of the kernels of `mot_linear` points to: of out, x, weight, bias and
# residual, or of the first ten arguments of the operator for formats; then scratch, if any.
LINEAR_PLACES = {
    "out_ptr": 0,
    "x_ptr": 1,
    "x_desc": 1,
    "w_ptr": 2,
    "w_desc": 2,
    "bias_ptr": 3,
    "residual_ptr": 4,
    "residual_desc": 4,
    "partials_ptr": 5,
}
FORMAT_PLACES = {
    "out_ptr": 0,
    "out_scales_ptr": 1,
    "x_ptr": 2,
    "x_desc": 2,
    "x_scales_ptr": 3,
    "w_ptr": 4,
    "w_desc": 4,
    "w_scales_ptr": 5,
    "w_zeros_ptr": 6,
    "bias_ptr": 7,
    "residual_ptr": 8,
    "residual_desc": 8,
    "static_ptr": 9,
    "partials_ptr": 10,
}

# Tensor maps a launch keeps for each descriptor: more than a model has layers.
_MOST_MAPS = 256


def launch(
    kernel: Any, grid: tuple[int, ...], places: Mapping[str, int], /, **arguments: Any
) -> Keep:
    """`kernel[grid](**arguments)`; returns what makes a `Launch` of it, if that can be.

    Args:
        places: for each parameter that is a pointer to (or a descriptor of) a tensor that may be
            another next time: which of the tensors that `Launch` is then called with. Every other
            tensor stays what it is and is kept alive. Parameters that there are not are no matter.
    """
    compiled = kernel[grid](**arguments, **OPTIONS)
    if not isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
        return lambda: None
    device = driver.active.get_current_device()

    def keep() -> Launch | None:
        if _has_listeners():
            return None
        if not _is_known(compiled.metadata.target.backend):
            return None
        for name in places:
            given = arguments.get(name)
            if given is not None and getattr(given, "base", given).data_ptr() % 16:
                return None
        return Launch(compiled, device, grid, places, arguments)

    return keep


def on_device(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device; make that the tensors' own (no-op on a CPU)."""
    return torch.cuda.device(device.index if device.type == "cuda" else -1)


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def strides(name: str, t: torch.Tensor | None, dims: str) -> dict[str, int]:
    """A kernel's arguments `stride_NAME_D`, one for each letter of `dims`.

    0 where t has no such dimension, and for all of them where there is no t.
    """
    found = () if t is None else t.stride()
    return {f"stride_{name}_{d}": found[i] if i < len(found) else 0 for i, d in enumerate(dims)}


def with_partials(keep: Keep, number: int, dtype: torch.dtype) -> Keep:
    """`keep`, with so many elements of scratch as the last tensor.

    Each launch has its own: a CUDA graph takes their memory from its own pool.
    """

    def keep_with_partials() -> Again | None:
        again = keep()
        if again is None:
            return None
        return lambda out, *others: again(out, *others, out.new_empty(number, dtype=dtype))

    return keep_with_partials


class Launch:
    """One launch of a compiled kernel, where only the addresses of some tensors are left open."""

    def __init__(
        self,
        compiled: CompiledKernel,
        device: int,
        grid: tuple[int, ...],
        places: Mapping[str, int],
        arguments: Mapping[str, Any],
    ) -> None:
        self._device = device
        self._get_device = driver.active.get_current_device
        if self._get_device is torch.cuda.current_device:
            self._get_device = torch._C._cuda_getDevice  # CUDA need not be initialised any more
        self._get_stream = driver.active.get_current_stream
        self._grid = (*grid, 1, 1)[:3]
        self._compiled = compiled  # which unloads its function when it goes
        self._function = compiled.function
        self._metadata = compiled.packed_metadata
        self._arguments: list[Any] = []
        self._pointers: list[tuple[int, int]] = []  # (where in arguments, which tensor)
        self._maps: list[tuple[int, int, _TensorMaps]] = []
        self._kept: list[torch.Tensor] = []
        for name, kind in compiled.src.signature.items():
            value, at = arguments[name], len(self._arguments)
            if kind.startswith("*"):
                if name in places:
                    self._pointers.append((at, places[name]))
                else:
                    self._kept.append(value)
                self._arguments.append(value.data_ptr())
            elif kind.startswith(_DESCRIPTOR):
                maps = _TensorMaps(value, compiled.metadata.tensordesc_meta[len(self._maps)])
                self._maps.append((at, places[name], maps))
                self._arguments += [None, *value.shape, *value.strides]
            else:
                self._arguments.append(value)
        self._run = _run_with_maps(compiled) if self._maps else compiled.run

    def __call__(self, *tensors: torch.Tensor | None) -> bool:
        """Launch on the current stream with these tensors' addresses.

        They must have the shapes, strides, dtypes and device of those of the first launch, or be
        None where those were.

        Returns:
            False, having launched nothing, where an address is not a multiple of 16, or somebody
            wants to see launches (a profiler): do it the public way.
        """
        if self._get_device() != self._device:
            with torch.cuda.device(self._device):
                return self(*tensors)
        if _has_listeners():
            return False
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        arguments = self._arguments.copy()
        bits = 0
        for at, place in self._pointers:
            arguments[at] = address = addresses[place]
            bits |= address
        for at, place, maps in self._maps:
            arguments[at] = maps[addresses[place]]
            bits |= addresses[place]
        if bits % 16:
            return False
        stream = self._get_stream(self._device)
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments)
        return True


@functools.lru_cache(maxsize=1024)
def _run_with_maps(compiled: CompiledKernel) -> Any:
    """`compiled.run`, but for tensor maps, shapes and strides instead of descriptors.

    Triton's own makes the maps anew each time. Its signatures are of what it then passes on.
    """
    signature: dict[str, str] = {}
    for name, kind in compiled.src.signature.items():
        if not kind.startswith(_DESCRIPTOR):
            signature[name] = kind
            continue
        rank = kind[: kind.index("]")].count(",") + 1
        for i, part in enumerate(["nvTmaDesc", *["i32"] * rank, *["i64"] * rank]):
            signature[f"{name}.{i}"] = part
    source = SimpleNamespace(signature=signature, constants={})
    metadata = compiled.metadata._replace(tensordesc_meta=None)
    return driver.active.launcher_cls(source, metadata)


class _TensorMaps(dict[int, Any]):
    """CUDA's tensor map for a descriptor like this one at an address: plain data, made once."""

    def __init__(self, descriptor: Any, metadata: Any) -> None:
        super().__init__()
        self._like = {
            "shape": list(descriptor.shape),
            "strides": list(descriptor.strides),
            "padding": descriptor.padding,
            "round_f32_to_tf32": False,
        }
        self._metadata = metadata

    def __missing__(self, address: int) -> Any:
        if len(self) >= _MOST_MAPS:
            self.clear()
        base = SimpleNamespace(data_ptr=lambda: address)
        descriptor = SimpleNamespace(base=base, **self._like)
        made = self[address] = _make_tensor_map()(descriptor, self._metadata)
        return made


@functools.cache
def _make_tensor_map() -> Callable[[Any, Any], Any]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    # Since Triton 3.7 it is also given the launch's grid and stream, which it does not use.
    more = [None] * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)
    return lambda descriptor, metadata: make_tensordesc_arg(descriptor, metadata, *more)[0]


def _has_listeners() -> bool:
    """Whether hooks want to be called with each launch: Triton's chains of them may be empty."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _is_known(backend: str) -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    known = _KNOWN[0] <= version <= _KNOWN[1] and backend == "cuda"
    if not known:
        logger.debug(
            f"Triton {triton.__version__} for {backend}: each launch goes through Triton's own "
            "launcher, which costs the host more"
        )
    return known
