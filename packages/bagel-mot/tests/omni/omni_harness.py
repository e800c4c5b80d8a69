"""What the tests need of vLLM-Omni: on a machine without a GPU, in one process.

vLLM-Omni has no platform for the CPU. It gets one here by answering what its workers ask of it,
and an executor that drives its model runner directly; everything else is its own: engine,
schedulers, model loader, runner.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, GoldenCase
from PIL import Image


def require_omni() -> None:
    """Skip the calling module where vLLM-Omni is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm_omni", reason="needs vLLM-Omni: the package vllm-omni")
        # Imported once here, in quiet, instead of in whatever test comes first.
        import vllm_omni.diffusion.diffusion_engine
        import vllm_omni.diffusion.worker.diffusion_model_runner  # noqa: F401


def sampling(**fields: Any) -> Any:
    """Sampling parameters; what is no field of theirs goes to `extra_args`."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    own = {k: v for k, v in fields.items() if k in OmniDiffusionSamplingParams.__dataclass_fields__}
    extra = {k: v for k, v in fields.items() if k not in own}
    if extra:
        own["extra_args"] = extra
    return OmniDiffusionSamplingParams(**own)


_numbers = itertools.count()


def request(prompt: Any, request_id: str | None = None, **fields: Any) -> Any:
    """One request; vLLM-Omni does not bear an id twice, not even one after the other."""
    from vllm_omni.diffusion.request import OmniDiffusionRequest

    return OmniDiffusionRequest(
        prompt=prompt,
        sampling_params=sampling(**fields),
        request_id=request_id or f"request-{next(_numbers)}",
    )


def batch(*requests: Any) -> Any:
    """Requests as the runner hands them to a pipeline."""
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

    return DiffusionRequestBatch(requests=list(requests))


def golden_request(case: GoldenCase, request_id: str | None = None, **changes: Any) -> Any:
    """A recorded case as a request; its seed gives the recorded noise."""
    params = dict(case.json["params"])
    fields: dict[str, Any] = {
        key: params[key] for key in params if key.startswith("cfg_") or key == "timestep_shift"
    }
    if "image_shapes" in params:
        fields["height"], fields["width"] = params["image_shapes"]
    if "num_timesteps" in params:
        fields["num_inference_steps"] = params["num_timesteps"]
    if params.get("understanding_output"):
        fields["max_think_tokens"] = params["max_think_token_n"]
    parts = case.json["inputs"]
    prompt: dict[str, Any] = {"prompt": parts[-1]["text"]}
    pictures = [Image.open(GOLDEN.folder / part["file"]) for part in parts[:-1]]
    if pictures:
        prompt["multi_modal_data"] = {"image": pictures}
    prompt["modalities"] = ["text" if params.get("understanding_output") else "image"]
    return request(prompt, request_id, **(fields | {"seed": case.json["seed"]} | changes))


def assert_recorded_image(case: GoldenCase, image: Image.Image) -> None:
    """Within one level of the recorded picture."""
    want = Image.open(GOLDEN.folder / "cases" / f"{case.name}.png")
    assert levels_apart(image, want) <= 1


def levels_apart(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures of one size."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a, np.int32) - np.asarray(b, np.int32)).max())


def image_of(output: Any) -> Image.Image:
    """The only picture of an answer."""
    assert output.error is None, output.error
    image = output.output["payload"]["image"]
    assert isinstance(image, Image.Image)
    return image


@dataclass
class World:
    """vLLM-Omni, ready to make runners and engines in this process."""

    device: torch.device

    def config(self, **changes: Any) -> Any:
        """vLLM-Omni's configuration for the golden model in our pipeline."""
        from vllm_omni.diffusion.data import OmniDiffusionConfig

        fields: dict[str, Any] = {
            "model": str(GOLDEN.checkpoint),
            "dtype": torch.float32,
            "enforce_eager": True,
            "num_gpus": 1,
        }
        config = OmniDiffusionConfig(**(fields | changes))
        config.enrich_config()
        config.model_class_name = changes.get("model_class_name", "MoTBagelPipeline")
        return config

    def runner(self, **changes: Any) -> Any:
        """A model runner whose pipeline is loaded."""
        from bagel_mot.plugins.omni import register

        register()
        return _load(self.config(**changes), self.device)

    @contextmanager
    def engine(self, **changes: Any) -> Iterator[Engine]:
        """vLLM-Omni's engine, started as its servers start it: with a dummy run."""
        from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

        from bagel_mot.plugins.omni import register

        register()
        backend = _executor_class(self.device)
        engine = DiffusionEngine.make_engine(
            self.config(distributed_executor_backend=backend, **changes)
        )
        # The engine stays with the event loop of its first request, so that must outlive the test.
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield Engine(engine, loop)
        finally:
            engine.close()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@dataclass
class Engine:
    """Requests to an engine and its answers; an exception stands for itself."""

    engine: Any
    loop: asyncio.AbstractEventLoop

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """The last output of each of the requests, which come at the same time."""
        answers = asyncio.run_coroutine_threadsafe(self._answer(requests), self.loop)
        return answers.result(timeout=120)

    async def _answer(self, requests: Sequence[Any]) -> list[Any]:
        return await asyncio.gather(*map(self._one, requests), return_exceptions=True)

    async def _one(self, request: Any) -> Any:
        outputs = [output async for output in self.engine.step_streaming(request)]
        (last,) = outputs[-1]
        return last


@contextmanager
def single_process_world(world_size: int = 1, rank: int = 0, **sizes: int) -> Iterator[World]:
    """A world of `world_size` processes; `sizes` are those of vLLM-Omni's groups."""
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.platforms import current_omni_platform

    torch.set_num_threads(1)  # of a tiny model; more would only wait for each other
    device = torch.device("cpu")
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if world_size == 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    answers = {
        "get_device_count": lambda: world_size,
        "set_device": lambda device: None,
        "synchronize": lambda: None,
        "is_available": lambda: False,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_reserved": lambda: 0,
        "max_memory_allocated": lambda: 0,
    }
    with ExitStack() as undo:
        undo.enter_context(patch.dict(os.environ, environment))
        for name, answer in answers.items():
            undo.enter_context(
                patch.object(type(current_omni_platform), name, staticmethod(answer), create=True)
            )
        world = World(device)
        config = world.config()
        vllm_config = _vllm_config(device, config)
        with (
            set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config),
            set_current_vllm_config(vllm_config),
        ):
            parallel_state.init_distributed_environment(
                world_size=world_size, rank=rank, backend="gloo"
            )
            parallel_state.initialize_model_parallel(**sizes)
        undo.callback(parallel_state.destroy_distributed_env)
        yield world


def _vllm_config(device: torch.device, config: Any) -> Any:
    """vLLM's configuration as vLLM-Omni's worker makes it."""
    try:
        from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config
    except ImportError:  # 0.26
        from vllm.config import CompilationConfig, DeviceConfig, VllmConfig

        vllm_config = VllmConfig(
            compilation_config=CompilationConfig(), device_config=DeviceConfig(device=device)
        )
        sizes = config.parallel_config
        vllm_config.parallel_config.tensor_parallel_size = sizes.tensor_parallel_size
        return vllm_config
    return create_diffusion_vllm_config(device, config)


def _load(config: Any, device: torch.device) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

    vllm_config = _vllm_config(device, config)
    runner = DiffusionModelRunner(vllm_config, config, device)
    with (
        set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config),
        set_current_vllm_config(vllm_config),
    ):
        runner.load_model()
    return runner


def _executor_class(device: torch.device) -> type:
    from vllm_omni.diffusion.executor.abstract import DiffusionExecutor

    class RunnerExecutor(DiffusionExecutor):
        """The work goes to a model runner in this process."""

        is_dead = False

        def _init_executor(self) -> None:
            self.runner = _load(self.od_config, device)

        def execute_batch(self, scheduler_output: Any) -> Any:
            return self.runner.execute_model_batch(scheduler_output, self.od_config)

        execute_request = execute_batch

        def execute_step(self, scheduler_output: Any) -> Any:
            return self.runner.execute_stepwise(scheduler_output)

        def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def check_health(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    return RunnerExecutor


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
