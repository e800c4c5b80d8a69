"""What vLLM's layers need around them, for programs that do not run vLLM's engine.

vLLM's layers ask for a current `VllmConfig` and for process groups when they are built, and for
the groups when they run. vLLM's engine sets these up in its workers; without it::

    with single_process():
        layer = MoTQKVParallelLinear(...)
        y = layer(x, plan)

or `init_parallel` once per process of several. Where vLLM's engine (or an earlier call) has set
something up already, that is kept.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    DeviceConfig,
    KernelConfig,
    ParallelConfig,
    VllmConfig,
    get_current_vllm_config_or_none,
    set_current_vllm_config,
)
from vllm.config.kernel import IrOpPriorityConfig
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from mot_layers.stacking import logger

# What init_parallel has set up, undone by shutdown_parallel.
_active: ExitStack | None = None


def init_parallel(
    tp_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    init_method: str | None = None,
    backend: str | None = None,
) -> None:
    """Make vLLM's layers work in this process, until `shutdown_parallel` or its end.

    Sets a default `VllmConfig` as current and creates vLLM's process groups; each of the two only
    if there is none yet. Calling it again with the same `tp_size` does nothing.

    Args:
        tp_size: tensor parallel ranks; neighbouring ranks form a group.
        rank, world_size: of this process among all. If `torch.distributed` is initialised already,
            its rank and size are taken instead.
        init_method: where the processes meet, the same on every rank: "env://" (torchrun),
            "tcp://127.0.0.1:PORT" or "file:///PATH" (a file that does not exist yet). Not needed
            for one process.
        backend: of `torch.distributed`; "nccl" on GPUs and "gloo" elsewhere if None.

    Raises:
        ValueError: the sizes do not fit together, `init_method` is missing, or vLLM already runs
            with another `tp_size`.
    """
    global _active
    if parallel_state.model_parallel_is_initialized():
        current = parallel_state.get_tensor_model_parallel_world_size()
        if current != tp_size:
            raise ValueError(
                f"tp_size is {tp_size}, but vLLM's groups exist already with tensor parallel size "
                f"{current}; call shutdown_parallel() first if they are yours"
            )
        if get_current_vllm_config_or_none() is not None:
            return
    elif torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        _check_sizes(tp_size, rank, world_size, init_method)
    with ExitStack() as undo:
        if get_current_vllm_config_or_none() is None:
            config = _default_config(tp_size)
            undo.enter_context(config.kernel_config.ir_op_priority.set_priority())
            undo.enter_context(set_current_vllm_config(config))
        if not parallel_state.model_parallel_is_initialized():
            _create_groups(undo, tp_size, rank, world_size, init_method, backend)
        _active = _active or ExitStack()
        _active.push(undo.pop_all())
    atexit.register(shutdown_parallel)


def shutdown_parallel() -> None:
    """Undo what `init_parallel` set up here; nothing if it set up nothing."""
    global _active
    if _active is not None:
        undo, _active = _active, None
        undo.close()
    atexit.unregister(shutdown_parallel)


def before_shutdown(callback: Callable[[], None]) -> None:
    """Have `callback` called before `shutdown_parallel` takes the process groups down.

    For what must be gone by then: NCCL waits for CUDA graphs that hold its kernels, for ever.
    Nothing if none of this is `init_parallel`'s: who made the groups takes them down.
    """
    if _active is not None:
        _active.callback(callback)


def capturing(stream: torch.cuda.Stream) -> AbstractContextManager[object]:
    """What vLLM's all-reduce needs around the capture of a CUDA graph on `stream`.

    vLLM's own all-reduce kernel notes the buffers that the graph uses and, at the end of the
    block, shows them to the other ranks: all tensor parallel ranks capture at the same time.
    """
    group = parallel_state.get_tp_group()
    if group.world_size == 1:
        return nullcontext()
    capture: AbstractContextManager[object] = group.graph_capture(
        parallel_state.GraphCaptureContext(stream)
    )
    return capture


@contextmanager
def single_process() -> Iterator[None]:
    """`init_parallel()` for the block; what was set up before it stays afterwards."""
    was_active = _active is not None
    init_parallel()
    try:
        yield
    finally:
        if not was_active:
            shutdown_parallel()


def has_compiled_operators() -> bool:
    """Whether vLLM's compiled operators are there; a build of its Python part alone lacks them."""
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "rms_norm")


def _check_sizes(tp_size: int, rank: int, world_size: int, init_method: str | None) -> None:
    if tp_size < 1 or world_size < 1 or world_size % tp_size or not 0 <= rank < world_size:
        raise ValueError(
            f"tp_size={tp_size}, rank={rank}, world_size={world_size} do not fit together: "
            "tp_size must divide world_size, the number of processes, and rank lie below it"
        )
    if world_size > 1 and init_method is None and not torch.distributed.is_initialized():
        raise ValueError(
            f"world_size is {world_size}, so init_method must say where the processes meet, the "
            'same on every rank: "env://" (torchrun) or "tcp://127.0.0.1:PORT"'
        )


def _default_config(tp_size: int) -> VllmConfig:
    """A configuration without compilation, which would need vLLM's engine."""
    compilation = CompilationConfig(mode=CompilationMode.NONE, cudagraph_mode=CUDAGraphMode.NONE)
    kernels = KernelConfig()
    if not has_compiled_operators():
        logger.warning(
            "vLLM's compiled operators are not installed; its layers (those outside the routed "
            "kernels) run as plain PyTorch operations"
        )
        # Both choices count: custom_ops that of a layer class, the priority that of vLLM's IR
        # operators, in which RMSNorm is written.
        compilation.custom_ops = ["none"]
        kernels.ir_op_priority = IrOpPriorityConfig.with_default(["native"])
    # Without a platform of its own (an accelerator build of vLLM on a machine without one) vLLM
    # cannot infer the device.
    device = "auto" if current_platform.device_type else "cpu"
    with _engine_advice_muted():
        return VllmConfig(
            compilation_config=compilation,
            kernel_config=kernels,
            device_config=DeviceConfig(device=device),
            # "mp" only keeps vLLM from choosing, and failing to find, an executor of its own.
            parallel_config=ParallelConfig(
                tensor_parallel_size=tp_size, distributed_executor_backend="mp"
            ),
        )


@contextmanager
def _engine_advice_muted() -> Iterator[None]:
    """Only errors of vLLM's in the block, unless VLLM_LOGGING_LEVEL asks for more.

    A configuration warns of how its engine will run, which here it does not.
    """
    vllm = logging.getLogger("vllm")
    level = vllm.level
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        vllm.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        vllm.setLevel(level)


def _create_groups(
    undo: ExitStack,
    tp_size: int,
    rank: int,
    world_size: int,
    init_method: str | None,
    backend: str | None,
) -> None:
    on_gpu = current_platform.is_cuda_alike()
    local_rank = rank
    if on_gpu:
        # A single process stays on the device its user has chosen.
        count = torch.cuda.device_count()
        local_rank = torch.cuda.current_device() if world_size == 1 else rank % count
        torch.cuda.set_device(local_rank)
    if init_method is None:
        folder = tempfile.mkdtemp(prefix="mot-layers-")
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # A file rather than a port: nothing else on the machine can take it first.
        init_method = f"file://{folder}/store"
    if world_size > 1 and not on_gpu and "VLLM_DIST_IDENT" not in os.environ:
        # vLLM's CPU communicator names its shared memory after this; its workers set it.
        meeting = f"{init_method} {os.environ.get('MASTER_PORT', '')}"
        os.environ["VLLM_DIST_IDENT"] = hashlib.sha256(meeting.encode()).hexdigest()[:16]
        undo.callback(os.environ.pop, "VLLM_DIST_IDENT", None)
    if not torch.distributed.is_initialized():
        undo.callback(parallel_state.destroy_distributed_environment)
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=init_method,
        local_rank=local_rank,
        backend=backend or ("nccl" if on_gpu else "gloo"),
    )
    undo.callback(parallel_state.destroy_model_parallel)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
