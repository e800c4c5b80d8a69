"""A stand-in for CUDA graphs that works on a CPU: bodies are traced once, the trace is run again.

A trace holds what a CUDA graph holds: operators, on the very tensors they were called with, with
every number that came from Python baked in. What replays wrongly here would replay wrongly there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_mot.graphs import Call, Workspace
from bagel_mot.model.bagel import Bagel
from bagel_mot.stepping import JobResult

pytree.register_dataclass(JobResult)


class _Recorder(TorchDispatchMode):
    """Notes operators with their arguments and results, all of which it keeps alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Trace:
    """Has `replay` as a `torch.cuda.CUDAGraph` has; it overwrites the tensors of `result`."""

    def __init__(self, body: Callable[[], Any]) -> None:
        self.replays = 0
        # This runs the body, as capturing does not: it is the first replay.
        with _Recorder() as recorder:
            self.result = body()
        self._calls = recorder.calls

    def launches(self) -> list[str]:
        """Names of the operators that compute something: no views, no allocations."""

        def is_view(func: Any) -> bool:
            returned = [value.alias_info for value in func._schema.returns]
            return any(alias is not None and not alias.is_write for alias in returned)

        names = [str(func) for func, *_ in self._calls if not is_view(func)]
        return [name for name in names if ".empty" not in name and ".new_empty" not in name]

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        now: dict[int, torch.Tensor] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, result in self._calls:
            made = func(*pytree.tree_map(current, args), **pytree.tree_map(current, kwargs))
            leaves = zip(pytree.tree_leaves(result), pytree.tree_leaves(made), strict=True)
            now |= {id(old): new for old, new in leaves if isinstance(old, torch.Tensor)}
        for static in pytree.tree_leaves(self.result):
            if isinstance(static, torch.Tensor):
                static.copy_(now[id(static)])


class TracingWorkspace(Workspace):
    """A workspace on a CPU that captures, by tracing."""

    def __init__(self, model: Bagel) -> None:
        super().__init__(model)
        self.capture = True
        self.traces: list[Trace] = []

    def _capture(self, call: Call[Any]) -> tuple[Any, Any]:
        trace = Trace(call.body)
        self._graphs[id(call)] = call
        self.traces.append(trace)
        return trace, trace.result
