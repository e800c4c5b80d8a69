"""How long the ranks of a CPU run exchange data: the calls that do it, timed.

On a GPU a profiler sees the kernels of an exchange; gloo has none, and works in other threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mot_layers.linear
import torch.distributed as dist

from mot_bench.errors import MeasurementError

# Where the model looks up what exchanges data. Of the first two a release of torch has one or both.
_GATHERS = ("all_gather_single", "all_gather_into_tensor")
_PLACES: tuple[tuple[Any, str], ...] = (
    (dist, "all_to_all_single"),
    (dist, "batch_isend_irecv"),
    (mot_layers.linear, "tensor_model_parallel_all_reduce"),
    (mot_layers.linear, "tensor_model_parallel_all_gather"),
)


class ExchangeClock:
    """Adds up the time of this process's exchanges.

    Attributes:
        seconds: so far. Waiting for the other ranks is in it.
        calls: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._inside = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the exchanges inside the block.

        Raises:
            MeasurementError: the model looks an exchange up somewhere else by now.
        """
        places = [(dist, name) for name in _GATHERS if hasattr(dist, name)] + list(_PLACES)
        kept: list[tuple[Any, str, Any]] = []
        try:
            for module, name in places:
                if not hasattr(module, name):
                    raise MeasurementError(f"{module.__name__} has no {name} that could be timed")
                original = getattr(module, name)
                kept.append((module, name, original))
                setattr(module, name, self._timed(original))
            yield
        finally:
            for module, name, original in kept:
                setattr(module, name, original)

    def _timed(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one exchange may be made of others
                return exchange(*args, **kwargs)
            self._inside = True
            self.calls += 1
            begin = time.perf_counter()
            try:
                result = exchange(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self._inside = False
            # What goes on in the background is waited for later.
            return [_TimedWait(work, self) for work in result] if _are_works(result) else result

        return call


class _TimedWait:
    """An exchange in the background, of which the waiting is timed."""

    def __init__(self, work: Any, clock: ExchangeClock) -> None:
        self._work, self._clock = work, clock

    def wait(self) -> Any:
        begin = time.perf_counter()
        done = self._work.wait()
        self._clock.seconds += time.perf_counter() - begin
        return done


def _are_works(result: Any) -> bool:
    return isinstance(result, list) and all(hasattr(each, "wait") for each in result)
