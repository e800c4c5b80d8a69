"""Argument checks shared by the public operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.autograd import forward_ad

from mot_kernels.formats import (
    Format,
    QuantizedRows,
    check_activation_scale,
    check_group_size,
    rows_dtype,
)
from mot_kernels.plan import RoutePlan, check_kind
from mot_kernels.replay import is_unobserved

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants to see this call, backward or forward; the kernels have neither."""
    if _is_forward_mode():
        return True
    return torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in tensors
    )


def why_grad(name: str = "an input") -> str:
    """Why `needs_grad` is true, to begin an error with."""
    return "forward-mode AD is on here" if _is_forward_mode() else f"{name} requires grad"


def _is_forward_mode() -> bool:
    """Whether this is inside `dual_level` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def check_same_dtype(
    x: torch.Tensor | QuantizedRows, x_name: str = "x", /, **others: torch.Tensor | None
) -> None:
    """x has a supported dtype, and the others share its dtype and device."""
    for name, each in ((x_name, x), *others.items()):
        if not isinstance(each, torch.Tensor | QuantizedRows | None):
            raise TypeError(f"{name} is a {type(each).__name__}; expected a tensor")
    # float64 is not computed by any kernel, but the reference path takes it (gradient checks).
    if x.dtype not in DTYPES and not (x.dtype is torch.float64 and x.device.type == "cpu"):
        raise TypeError(f"{x_name} has dtype {x.dtype}; supported are {_names(DTYPES)}")
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype is not x.dtype:
            raise TypeError(
                f"{name} has dtype {other.dtype} but {x_name} has {x.dtype}; convert one"
            )
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device} but {x_name} is on {x.device}; move one")


def check_plan(
    plan: RoutePlan | None,
    rows: int,
    experts: int,
    device: torch.device,
    x_name: str = "x",
    weight_name: str = "weight",
) -> None:
    """The plan routes exactly these rows to exactly these experts, on this device."""
    if experts < 1:
        raise ValueError(f"{weight_name} has {experts} experts; expected at least 1")
    check_kind(plan)
    if plan is None:
        return
    if plan.num_rows != rows:
        raise ValueError(
            f"plan routes {plan.num_rows} rows but {x_name} has {rows}; was the plan built for "
            "another layout?"
        )
    if plan.num_experts != experts:
        raise ValueError(f"plan has {plan.num_experts} experts but {weight_name} has {experts}")
    if plan.device != device:
        raise ValueError(
            f"plan is on {plan.device} but {x_name} is on {device}; build it there or use "
            "plan.to(device)"
        )


def check_out(
    name: str,
    out: torch.Tensor,
    shape: tuple[int, ...],
    x: torch.Tensor | QuantizedRows,
    dtype: torch.dtype | None = None,
) -> None:
    """A tensor of the caller's to write to or add: shape given, device and, if not given, dtype
    of x."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"{name} is a {type(out).__name__}; expected a tensor of shape {shape}")
    if tuple(out.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(out.shape)}; expected {shape}")
    if dtype is None or dtype is x.dtype:
        check_same_dtype(x, **{name: out})
    elif out.dtype is not dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; expected {dtype}")
    elif out.device != x.device:
        raise ValueError(f"{name} is on {out.device} but x is on {x.device}; move one")


def check_written(
    name: str,
    out: torch.Tensor,
    others: Mapping[str, torch.Tensor | None],
    may_be: Sequence[torch.Tensor | None] = (),
) -> None:
    """A caller's tensor can be written to: no element twice, and none that others need.

    Args:
        others: what the kernels read while they write, or write as well.
        may_be: those of them that `out` may be, element by element.

    Raises:
        ValueError: it cannot, or autograd would have to know of it.
    """
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError(
            f"{name} requires grad, but is to be written over; use torch.no_grad(), or leave it out"
        )
    if any(s == 0 and n > 1 for s, n in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(
            f"{name} has strides {out.stride()}: several of its elements are one (expand does that)"
        )
    if not is_unobserved(out) or out.device.type == "meta":
        return  # there are no addresses
    for other_name, other in others.items():
        if other is None or not _overlap(out, other):
            continue
        same = _span(out) == _span(other) and out.stride() == other.stride()
        if not (same and any(other is each for each in may_be)):
            raise ValueError(
                f"{name} overlaps {other_name}, which is needed while {name} is written"
            )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory; of strided ones only the same beginning is seen."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    if a_begin == a_end or b_begin == b_end:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return a_begin < b_end and b_begin < a_end
    return a_begin == b_begin


def _span(t: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first byte to behind the last, if t is contiguous."""
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


def note_written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that a caller's tensors were written to, which kernels do behind its back.

    A backward that needs what was there then raises, instead of taking what is there now.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if t is not None])


def check_quantize(
    quantize: Format | None,
    activation_scale: torch.Tensor | None,
    out: torch.Tensor | None,
    experts: int,
    x: torch.Tensor | QuantizedRows,
    group_size: int | None = None,
) -> None:
    """The arguments by which an operation is asked to round its result to 8 bits."""
    if quantize is None:
        for name, value in (("activation_scale", activation_scale), ("group_size", group_size)):
            if value is not None:
                raise ValueError(f"{name} is given, but quantize is not: what is it for?")
        return
    rows_dtype(quantize)
    check_group_size(group_size, quantize, activation_scale)
    if out is not None:
        raise ValueError("out is given along with quantize, whose result is no single tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; quantize takes {_names(DTYPES)}")
    check_activation_scale(activation_scale, experts, x.device)


def check_reach(name: str, t: torch.Tensor | None, dim: int) -> None:
    """The kernels address a dimension, rows aside, in 32 bits."""
    if t is not None and t.shape[dim] * t.stride(dim) >= 2**31:
        raise ValueError(
            f"{name} has strides {t.stride()}: dimension {dim} reaches over 2**31 elements or "
            "more, which the kernels do not address; call .contiguous()"
        )


def check_row_contiguous(name: str, t: torch.Tensor) -> None:
    """The kernels address the last dimension as consecutive elements."""
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {t.stride()}; its last dimension must be contiguous "
            "(stride 1), call .contiguous()"
        )
