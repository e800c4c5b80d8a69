"""Doing a call again without checking, routing and choosing anew.

Whether an operation's arguments fit, which path it takes and what it launches follow from its
tensors' shapes, strides, dtypes and devices, from the plan and from its other arguments; among
equal ones only addresses differ. So an operation keeps how it did a call, by all that decided it,
and does the next equal one again. A plan keeps what was done with it, for the layers of a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch

# Looked up here once: together they would cost as much as the questions.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_is_profiling = torch._C._autograd._profiler_enabled

Again = Callable[..., bool]
"""Do it again with other tensors of equal `metadata`; False, having done nothing, if it cannot."""

Keep = Callable[[], Again | None]
"""Prepare a call that was just made for being done again; None if that cannot be."""


class Replays(dict[Hashable, Again]):
    """What was done, by what decided it; starts anew when full."""

    MOST = 256

    def keep(self, key: Hashable, keep: Keep | None) -> None:
        """Keep how to do a call again, if there is a way."""
        again = None if keep is None else keep()
        if again is None:
            return
        if len(self) >= self.MOST:
            self.clear()
        self[key] = again

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        """A copied or pickled plan starts without: what is kept belongs to this process."""
        return Replays, ()

    def run(
        self,
        key: Hashable,
        implementation: Callable[..., Keep | None],
        tensors: tuple[torch.Tensor | None, ...],
        *others: object,
    ) -> None:
        """`implementation(*tensors, *others)`, or what was kept of an equal call."""
        again = self.get(key)
        if again is None or not again(*tensors):
            self.keep(key, implementation(*tensors, *others))


UNROUTED = Replays()
"""What was done without a plan."""


def metadata(*tensors: torch.Tensor | None) -> Hashable:
    """What a kernel launch depends on of tensors, other than whether 16 divides their addresses."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def is_unobserved(*tensors: torch.Tensor | None) -> bool:
    """Whether an operator called now with these tensors would only run its implementation.

    If not, something is to see the operator: a tracer or compiler, a mode, a tensor subclass,
    a transform of `torch.func`, the profiler.
    """
    if torch.compiler.is_compiling():
        return False
    if (
        _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _tracing_state() is not None
        or _is_profiling()
    ):
        return False
    return all([t is None or _is_plain(type(t)) for t in tensors])  # type: ignore[arg-type]


@functools.cache
def _is_plain(kind: Any) -> bool:
    """Whether tensors of this type do nothing of their own when an operator is called."""
    return (
        issubclass(kind, torch.Tensor)
        and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and kind.__torch_function__
        in (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)
    )
