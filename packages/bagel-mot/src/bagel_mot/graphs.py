"""Memory with fixed addresses for forward passes of a fixed shape, and CUDA graphs over it.

At 512x512 the GPU has computed a step before Python has launched it. A step whose tensors keep
their addresses is captured in a CUDA graph once and then launched as one. `Workspace` owns what
graphs need: one KV cache that all of them address, one pool of memory for what they compute, and
the bounds on how many there are.

The code that runs is the same without capture (on a CPU, or switched off): static buffers, and
bodies that are called instead of replayed.

A graph of several ranks holds their exchanges. NCCL wants all of them to capture an exchange, and
none to replay what another one launches: whatever decides here (shapes, capacities, the order of
use) is the same on every rank.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from mot_layers.runtime import before_shutdown, capturing

from bagel_mot.model.bagel import Bagel
from bagel_mot.model.kv_cache import KVCache, lasting

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shaped(Protocol):
    """Buffers of one shape, and calls over them."""

    def close(self) -> None:
        """Drop the graphs; nobody will use it any more."""
        ...


S = TypeVar("S", bound=Shaped)

# Shapes (of a batch of images, say) whose buffers are kept, and graphs over all of them. A graph
# costs some MB besides the pool, which is as large as the largest graph needs.
_SHAPES = 8
_GRAPHS = 16

# A KV cache of more rows (3.5 GiB for BAGEL-7B) is not kept for ever, should a single request have
# needed it: it goes when so many in a row would have done with a quarter.
_KEPT_ROWS = 65_536
_PATIENCE = 16


class Workspace:
    """What forward passes of fixed shapes share.

    One user at a time has its rows in the KV cache: `enter` says whose they are now.

    Args:
        model: whose passes these are.
        capture: make CUDA graphs. Without, bodies are called each time.
    """

    def __init__(self, model: Bagel, *, capture: bool = False) -> None:
        if capture and model.device.type != "cuda":
            raise ValueError(f"capture is True, but the model is on {model.device}, not on a GPU")
        self.model = model
        self.capture = capture
        self._cache: KVCache | None = None
        self._too_large = 0  # how often in a row it was, for what was asked
        self._shapes: OrderedDict[Hashable, Shaped] = OrderedDict()
        self._graphs: OrderedDict[int, Call[Any]] = OrderedDict()
        self._pool: Any = None
        self._owner: object = None
        self.on_leave: Callable[[], None] | None = None
        self._rope = model.rope

    def enter(self, owner: object) -> bool:
        """Make the workspace `owner`'s (a token); True if it was not, and nothing of it is there.

        Who enters sets `on_leave`, which is called before another one enters: to save what is in
        static buffers.
        """
        if self._owner is owner:
            return False
        if self.on_leave is not None:
            self.on_leave()
        self._owner, self.on_leave = owner, None
        if self.model.rope is not self._rope:
            # Graphs read the old rotary table, which a longer prompt has outgrown.
            self._forget()
            self._rope = self.model.rope
        return True

    def leave(self, owner: object) -> None:
        """Say that nothing of `owner` is needed any more."""
        if self._owner is owner:
            self._owner = self.on_leave = None

    def cache(self, rows: int, kv_heads: int | None = None) -> KVCache:
        """The KV cache, with room for `rows` of `kv_heads` (default: all of this rank).

        What was in it may be gone.
        """
        heads = self.model.kv_heads if kv_heads is None else kv_heads
        cache = self._cache
        if cache is not None:
            is_large = cache.capacity > max(_KEPT_ROWS, 4 * rows)
            self._too_large = self._too_large + 1 if is_large else 0
        if (
            cache is None
            or cache.capacity < rows
            or cache.kv.shape[3] != heads
            or self._too_large > _PATIENCE
        ):
            self._too_large = 0
            # All that was made addresses the old one.
            self._forget()
            self._cache = cache = None  # before there is a new one
            self._cache = cache = self.model.new_cache(rows, heads)
        return cache

    def shaped(self, key: Hashable, build: Callable[[], S]) -> S:
        """What `build` made for this key, if it is still kept; else what it makes now.

        Ask again after each `enter` that was answered with True.
        """
        if key not in self._shapes:
            while len(self._shapes) >= _SHAPES:
                _, oldest = self._shapes.popitem(last=False)
                oldest.close()
            with lasting():
                self._shapes[key] = build()
        self._shapes.move_to_end(key)
        return cast(S, self._shapes[key])

    def call(self, body: Callable[[], T]) -> Call[T]:
        """A call of `body` that is captured if this workspace captures."""
        return Call(body, self)

    def _capture(self, call: Call[T]) -> tuple[torch.cuda.CUDAGraph, T]:
        while len(self._graphs) >= _GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            oldest.drop()
        try:
            graph, result = self._record(call.body)
        except Exception as error:
            raise RuntimeError(
                f"capturing a CUDA graph failed: {error}. Without graphs (cuda_graphs=False, "
                "--no-cuda-graphs) the same computation runs launch by launch"
            ) from error
        self._graphs[id(call)] = call
        return graph, result

    def _record(self, body: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        with torch.cuda.device(self.model.device):
            if self._pool is None:
                before_shutdown(partial(_drop_graphs, weakref.ref(self)))
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last graph
            graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self.model.device)
            # Other threads may use the GPU meanwhile, NCCL's and its watchdog among them.
            with (
                capturing(stream),
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=stream,
                    capture_error_mode="thread_local",
                ),
            ):
                result = body()
        return graph, result

    def drop_graphs(self) -> None:
        """Give all graphs up; calls capture them anew."""
        for call in list(self._graphs.values()):
            call.drop()

    def _used(self, call: Call[Any]) -> None:
        self._graphs.move_to_end(id(call))

    def _dropped(self, call: Call[Any]) -> None:
        self._graphs.pop(id(call), None)

    def _forget(self) -> None:
        for shaped in self._shapes.values():
            shaped.close()
        self._shapes.clear()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: the memory of a pool, and cuBLAS's, belong to a stream."""
    return torch.cuda.Stream(device)


def _drop_graphs(workspace: weakref.ref[Workspace]) -> None:
    living = workspace()
    if living is not None and living._graphs:
        torch.cuda.synchronize(living.model.device)
        living.drop_graphs()


class Call(Generic[T]):
    """A function without arguments over memory that stays: captured at its second call.

    The first call runs as it is, which compiles kernels, fills caches and connects ranks; many
    calls are not made a second time. The tensors of a result are overwritten by the next call of
    any `Call` of the workspace.
    """

    def __init__(self, body: Callable[[], T], workspace: Workspace) -> None:
        self.body = body
        self._workspace = workspace
        self._captured: tuple[torch.cuda.CUDAGraph, T] | None = None
        self._rope: torch.Tensor | None = None  # the graph reads it, whatever the model has now
        self._was_called = False

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph."""
        return self._captured is not None

    def __call__(self) -> T:
        if not self._workspace.capture or not self._was_called:
            self._was_called = True
            return self.body()
        if self._captured is None:
            self._captured = self._workspace._capture(self)
            self._rope = self._workspace.model.rope
        graph, result = self._captured
        self._workspace._used(self)
        graph.replay()
        return result

    def drop(self) -> None:
        """Give the graph up; the next call captures it anew."""
        self._captured = None
        self._workspace._dropped(self)
