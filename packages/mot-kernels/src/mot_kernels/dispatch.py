"""Which implementation runs, and why: asked by operations, layers, tests, CLI and messages."""

from __future__ import annotations

import enum
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mot_kernels.formats import BLOCK, ExpertWeight, Format, Fp8W8A8, QuantizedRows, WeightScales

logger = logging.getLogger("mot_kernels")

HOPPER_ROW_BYTES = 128
"""Bytes of a row of x, or of the weight, that schedule "hopper" multiplies at a time."""

# From so many rows of an expert on, the Hopper kernel is the faster one for all weights.
_HOPPER_ROWS = 256
_HOPPER_DTYPES = (torch.bfloat16, torch.float16)


class Path(enum.Enum):
    """An implementation of the operations."""

    TRITON = "triton"
    """Portable Triton kernels: CUDA, ROCm, and any device under TRITON_INTERPRET=1."""

    REFERENCE = "reference"
    """Plain PyTorch (`mot_kernels.reference`): any device, differentiable."""


@dataclass(frozen=True)
class Choice:
    """The path taken and the reason, as one sentence fit for a message."""

    path: Path
    why: str


_forced: Path | None = None


@contextmanager
def use_path(path: Path) -> Iterator[None]:
    """Run every operation inside the block on `path` (for baselines, tests and training).

    It holds for the whole process, other threads included: do not enter it in several at once.

    Raises:
        TypeError: `path` is not a `Path`.
    """
    global _forced
    if not isinstance(path, Path):
        raise TypeError(f"path is {path!r}; expected Path.TRITON or Path.REFERENCE")
    previous, _forced = _forced, path
    try:
        yield
    finally:
        _forced = previous


def forced_path() -> Path | None:
    """The path that `use_path` has put in force."""
    return _forced


def choose_path(device: torch.device, dtype: torch.dtype, *, needs_grad: bool = False) -> Choice:
    """The path an operation on `device` in `dtype` takes.

    Args:
        needs_grad: an input requires grad and grad mode is on.

    Raises:
        ValueError: `use_path(Path.TRITON)` is in force where Triton cannot run.
    """
    if _forced is Path.REFERENCE:
        return Choice(Path.REFERENCE, "use_path(Path.REFERENCE) is in force")
    choice = _choose_freely(device.type, dtype, needs_grad)
    if _forced is Path.TRITON and choice.path is not Path.TRITON:
        raise ValueError(f"use_path(Path.TRITON) is in force, but {choice.why}")
    return choice


def _choose_freely(device_type: str, dtype: torch.dtype, needs_grad: bool) -> Choice:
    if needs_grad:
        return Choice(Path.REFERENCE, "an input requires grad and the kernels have no backward")
    if not has_triton():
        return Choice(Path.REFERENCE, "the package triton is not installed")
    if dtype is torch.float64:
        return Choice(Path.REFERENCE, "no kernel computes float64")
    if device_type == "cuda":
        return Choice(Path.TRITON, "the tensors are on a GPU")
    if device_type == "cpu" and interpreting():
        if dtype is torch.bfloat16:
            return Choice(Path.REFERENCE, "Triton's interpreter multiplies bfloat16 wrongly")
        return Choice(Path.TRITON, "TRITON_INTERPRET=1 runs the kernels on the CPU")
    return Choice(Path.REFERENCE, f"Triton kernels do not run on device type {device_type!r}")


def choose_format_path(format: Format, device: torch.device, dtype: torch.dtype) -> Choice:
    """The path `mot_linear` takes for an `ExpertWeight` of this format and rows of this dtype.

    Raises:
        ValueError: `use_path(Path.TRITON)` is in force where Triton cannot run.
    """
    choice = choose_path(device, dtype)
    if choice.path is Path.REFERENCE:
        why = f"plain PyTorch computes format {format}, rightly but slowly: {choice.why}"
        return Choice(Path.REFERENCE, why)
    if isinstance(format, Fp8W8A8) and not has_fp8_units(device):
        why = (
            f"{choice.why}, where nothing multiplies e4m3fn (NVIDIA GPUs from compute capability "
            f"8.9 do): the kernel of format {format} multiplies in float16, rightly but slower"
        )
        return Choice(Path.TRITON, why)
    return choice


def has_fp8_units(device: torch.device) -> bool:
    """Whether matrix units multiply e4m3fn. AMD's gfx942 has another e4m3 (fnuz): False there."""
    return is_nvidia(device) and _capability(device) >= (8, 9)


def is_nvidia(device: torch.device) -> bool:
    """Whether it is a GPU of NVIDIA's, whose kernels may have instructions of PTX in them."""
    return device.type == "cuda" and torch.version.hip is None


def why_not_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    rounds_groups: bool = False,
) -> str | None:
    """Why `mot_linear` cannot have schedule "hopper" for these tensors; None if it can.

    Args:
        x: (M, K) 16 bits, or the data of `QuantizedRows`.
        weight: (E, N, K) as x; None if it will be written anew for this product.
        rounds_groups: whether out is rounded to e4m3fn in passing.
    """
    if not is_nvidia(x.device):
        return f"device type {x.device.type!r} is no NVIDIA GPU"
    capability = _capability(x.device)
    if capability != (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"
    if (error := _hopper_error()) is not None:
        why = f"this Triton has no Gluon for Hopper as 3.6 has it ({error})"
        warn_once(f"mot_linear cannot have schedule 'hopper', which is faster here: {why}")
        return why
    if x.dtype not in (*_HOPPER_DTYPES, torch.float8_e4m3fn, torch.int8):
        return f"it multiplies bfloat16 and float16, not {x.dtype}"
    if out.dtype not in _HOPPER_DTYPES and not rounds_groups:
        return f"it writes bfloat16 and float16, not {out.dtype}"
    step = HOPPER_ROW_BYTES // x.element_size()
    if x.shape[1] == 0:
        return "K is 0"
    if x.shape[1] % step:
        return f"K={x.shape[1]} is not a multiple of {step}"
    if residual is not None and out.shape[1] % 16:
        return f"N={out.shape[1]} is not a multiple of 16, and there is a residual"
    if weight is not None and weight.stride(0) != weight.shape[1] * weight.stride(1):
        return f"the experts' weights do not follow each other (strides {weight.stride()})"
    # Descriptors need strides of whole 16 bytes. Triton copies gathered rows 16 bytes at a time
    # only where it knows that the stride is a multiple of 16 elements.
    w_unit = 16 // x.element_size()
    for name, t, unit in (("x", x, 16), ("weight", weight, w_unit), ("residual", residual, 16)):
        if t is None:
            continue
        if t.stride(-1) != 1 or t.data_ptr() % 16 or any(s % unit for s in t.stride()[:-1]):
            return (
                f"rows of {name} are not contiguous, 16-byte aligned and a multiple of {unit} "
                f"elements apart (strides {t.stride()})"
            )
    for name, other in (("out", out), ("bias", bias)):
        if other is not None and other.shape[-1] > 1 and other.stride(-1) != 1:
            return f"rows of {name} are not contiguous (strides {other.stride()})"
    return None


def why_not_hopper_format(
    out: torch.Tensor,
    x: torch.Tensor | QuantizedRows,
    weight: ExpertWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    has_plan: bool,
    rounds_groups: bool = False,
) -> str | None:
    """As `why_not_hopper`, for a weight in a format.

    8-bit weights are multiplied as they are. Those that leave activations in 16 bits are written
    out in 16 bits first.
    """
    if not has_plan:
        return "there is no plan"
    if x.dtype not in _HOPPER_DTYPES:
        return f"it multiplies rows of bfloat16 and float16, not {x.dtype}"
    n, columns = weight.shape[1], out.shape[1]
    if weight.format == Fp8W8A8(WeightScales.BLOCK) and n != columns and columns % BLOCK:
        return f"gate and up have {columns} columns each: a block of {BLOCK} has some of both"
    if isinstance(x, QuantizedRows):
        return why_not_hopper(out, x.data, weight.data, bias, residual, rounds_groups=rounds_groups)
    return why_not_hopper(out, x, None, bias, residual)


def warn_portable(
    weights: str, x: torch.Tensor | QuantizedRows, counts: Sequence[int], why: str
) -> None:
    """Say once that a call of many rows has the portable kernel where Hopper's would be faster.

    Args:
        weights: what they are, in words.
        x: rows that are multiplied.
        counts: rows of each expert.
        why: from `why_not_hopper` or `why_not_hopper_format`.
    """
    if (
        max(counts) >= _HOPPER_ROWS
        and x.dtype in _HOPPER_DTYPES
        and is_nvidia(x.device)
        and _capability(x.device) == (9, 0)
        and _hopper_error() is None
    ):
        warn_once(
            f"mot_linear, weights in {weights}: the portable kernel runs, which is slower on this "
            f"GPU than schedule 'hopper', because {why}"
        )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _hopper_error() -> str | None:
    """What importing the Hopper kernel raises; None if nothing."""
    try:
        import mot_kernels._triton.hopper  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def has_triton() -> bool:
    """Whether the package triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1 at first use)."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning the first time this very message comes up in the process."""
    logger.warning(message)
