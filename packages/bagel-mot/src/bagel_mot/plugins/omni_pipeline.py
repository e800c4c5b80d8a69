"""`MoTBagelPipeline`: BAGEL as vLLM-Omni's diffusion stage.

One stage serves everything (text and picture to image, and to text), or the image stage of the
two-stage deployment, whose language model hands its KV caches over. Requests in one batch may
differ in all they ask for, sizes included. vLLM-Omni 0.26 to 0.30; `omni.py` registers it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm_omni.diffusion.data import DiffusionOutput, OmniDiffusionConfig
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.profiler.diffusion_pipeline_profiler import DiffusionPipelineProfilerMixin
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError

from bagel_mot.denoising import Denoising
from bagel_mot.pipeline import BagelPipeline, Prepared, build_model
from bagel_mot.plugins.omni_attention import usable_attention
from bagel_mot.plugins.omni_checkpoint import Checkpoint, load_stream
from bagel_mot.plugins.omni_context import contexts_from, handed_over_size
from bagel_mot.plugins.omni_noise import noise_sources
from bagel_mot.plugins.omni_options import (
    captures_graphs,
    check_supported,
    joined,
    receives_caches,
)
from bagel_mot.plugins.omni_painting import Painting, image_answer, text_answer
from bagel_mot.plugins.omni_request import (
    Asked,
    client_errors,
    initial_latents,
    read_request,
    report_size,
    set_size_apart,
)
from bagel_mot.request import Noise, image_size
from bagel_mot.sampling import ImageJob, Step

_STATE = "bagel_mot"

logger = logging.getLogger("bagel_mot")

try:
    from vllm_omni.diffusion.cancellation import check_request_cancellation
except ImportError:  # before 0.30 a running request cannot be cancelled

    def check_request_cancellation() -> None:
        """Never asks to stop."""


try:
    from vllm_omni.diffusion.data import DiffusionRequestAbortedError
except ImportError:

    class DiffusionRequestAbortedError(RuntimeError):  # type: ignore[no-redef]
        """Never raised."""


def get_bagel_pre_process_func(
    od_config: OmniDiffusionConfig,
) -> Callable[[OmniDiffusionRequest], OmniDiffusionRequest]:
    """What vLLM-Omni's engine does with a request before it is queued: refuse what is wrong."""
    found: list[Checkpoint] = []
    handed_over = receives_caches(od_config)

    def pre_process(request: OmniDiffusionRequest) -> OmniDiffusionRequest:
        if not found:  # not before a request comes: the engine is built before the download
            found.append(Checkpoint.of(od_config))
        sampling = request.sampling_params
        _settle_dummy_run(request.request_id, sampling)
        asked = read_request(request.prompt, sampling, found[0].config, handed_over=handed_over)
        set_size_apart(sampling)
        # The step scheduler counts steps before the pipeline sees the request.
        sampling.num_inference_steps = asked.settings.num_timesteps
        return request

    return pre_process


def get_bagel_post_process_func(od_config: OmniDiffusionConfig) -> Callable[..., Any]:
    """What vLLM-Omni's engine does with an answer: nothing, it is complete."""

    def post_process(output: Any, sampling_params: Any = None) -> Any:
        images = output["payload"].get("image") if isinstance(output, dict) else None
        if images and sampling_params is not None:
            first = images[0] if isinstance(images, list) else images
            report_size(sampling_params, *first.size)
        return output

    return post_process


class MoTBagelPipeline(nn.Module, DiffusionPipelineProfilerMixin):
    """BAGEL for vLLM-Omni's diffusion worker.

    Args:
        od_config: vLLM-Omni's configuration. Its tensor, sequence (Ulysses, ring, all-gather) and
            CFG parallel sizes become ours, and so do its quantisation (`omni_quantization`) and
            choice of attention (`omni_attention`).
        prefix: of parameter names; always "".

    Attributes:
        bagel: the model. `transformer` and `vae` are parts of it.
        scheduler: None, or what makes the steps instead of ours; see `Painting`.

    Raises:
        ValueError: the configuration asks for what this pipeline cannot do, or the checkpoint
            holds something else than BAGEL's tensors.
        FileNotFoundError: a file of the checkpoint is missing.
    """

    supports_step_execution: ClassVar[bool] = True
    supports_request_batch: ClassVar[bool] = True
    supports_request_cancellation: ClassVar[bool] = True

    _dit_modules: ClassVar[list[str]] = ["transformer"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = ["vae"]
    _resident_modules: ClassVar[list[str]] = []
    _PROFILER_TARGETS: ClassVar[list[str]] = ["vae.encode", "vae.decode", "diffuse"]

    def __init__(self, *, od_config: OmniDiffusionConfig, prefix: str = "") -> None:
        super().__init__()
        check_supported(od_config)
        self.od_config = od_config
        self.device = get_local_device()
        self.scheduler: Any = None
        self.scheduler_kwargs: dict[str, Any] = {}
        loaded = Checkpoint.of(od_config)
        self._parallel = joined(od_config, loaded.config.llm, self.device)
        self.tokenizer = loaded.tokenizer()
        # The parameters' names begin with this attribute's, the first that holds them.
        self.bagel = build_model(
            loaded.config,
            device=self.device,
            dtype=od_config.dtype,
            attention=usable_attention(od_config, self.device, loaded.config.llm.head_dim),
            formats=loaded.formats,
        )
        self.transformer = self.bagel.transformer
        self.vae = self.bagel.vae
        self._targets = loaded.targets(self.vae)
        self.weights_sources = loaded.sources()
        self._core = BagelPipeline(
            self.bagel,
            self.tokenizer,
            self._parallel,
            cuda_graphs=captures_graphs(od_config, self._parallel, self.device),
        )
        self._together: Denoising | None = None
        self.setup_diffusion_pipeline_profiler(
            enable_diffusion_pipeline_profiler=od_config.enable_diffusion_pipeline_profiler
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the model from a stream of checkpoint tensors; the filled parameters' names.

        Raises:
            CheckpointError: the stream does not hold exactly the model's tensors.
        """
        return {f"bagel.{name}" for name in load_stream(self.bagel, weights, self._targets)}

    def setup_compile(self) -> None:
        """Nothing: the routed layers are compiled kernels already."""

    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        """Answer all requests of a batch, their images denoised together.

        A request that asks for something impossible gets an answer with a client error, one whose
        prompt or picture fails otherwise that error, and the others theirs; an exception would
        have failed all of them. With several ranks it does: the others may not have failed.
        """
        begun = [
            self._begin(each.request_id, each.prompt, each.sampling_params) for each in req.requests
        ]
        self.diffuse([each for each in begun if isinstance(each, Painting)])
        return [
            self._finished(each, request) if isinstance(each, Painting) else each
            for each, request in zip(begun, req.requests, strict=True)
        ]

    def diffuse(self, paintings: Sequence[Painting]) -> None:
        """Make all steps of all images."""

        def after_step(step: Step) -> None:
            next(painting for painting in paintings if painting.note(step))
            check_request_cancellation()

        self._core.denoise([job for each in paintings for job in each.jobs], on_step=after_step)

    def prepare_encode(self, state: Any, **kwargs: Any) -> Any:
        """Step execution, once a request: read its prompt and make its first noise.

        A request that is answered by then (a text, or a client error) makes one step of nothing.
        """
        begun = self._begin(state.request_id, state.prompt, state.sampling)
        state.extra[_STATE] = begun
        state.step_index = 0
        # vLLM-Omni refuses to batch requests that differ in this; to us guidance is each one's own.
        state.do_true_cfg = False
        if isinstance(begun, Painting):
            job = begun.jobs[0]
            state.latents = torch.cat([latents.to(self.device) for latents in begun.latents])
            state.timesteps = job.timesteps[:-1].to(self.device)
            state.scheduler = begun.schedulers[0]
            unit = self.bagel.config.latent_token_pixels
            state.img_shapes = [(job.grid[0] * unit, job.grid[1] * unit)]
        else:
            state.latents = torch.zeros(1, self.bagel.config.latent_token_dim, device=self.device)
            state.timesteps = torch.zeros(1, device=self.device)
            state.img_shapes = [(0, 0)]
        return state

    def denoise_step(
        self, input_batch: Any, *, states: Sequence[Any] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Velocities (rows of all states' latents, 64) float32, guided; of requests of any size."""
        states = states or input_batch.states
        jobs: list[ImageJob] = []
        for state in states:
            painting = state.extra[_STATE]
            if isinstance(painting, Painting):
                painting.set_latents(state.latents)
                jobs += painting.jobs
        if jobs and (self._together is None or self._together.jobs != jobs):
            self._together = Denoising(
                self.bagel, self.tokenizer, jobs, self._parallel, self._core.workspace
            )
        made = iter(self._together.step() if jobs and self._together else ())
        velocities: list[torch.Tensor] = []
        for state in states:
            painting = state.extra[_STATE]
            if isinstance(painting, Painting):
                velocities += [next(made).velocity for _ in painting.jobs]
            else:
                velocities.append(torch.zeros_like(state.latents))
        return torch.cat(velocities)

    def step_scheduler(self, state: Any, noise_pred: torch.Tensor, **kwargs: Any) -> None:
        """Move one request's latents by its velocities."""
        painting = state.extra[_STATE]
        if isinstance(painting, Painting):
            state.latents = painting.move(noise_pred, state.step_index)
        state.step_index += 1

    def post_decode(self, state: Any, **kwargs: Any) -> DiffusionOutput:
        """The answer to a request whose steps are made."""
        painting = state.extra[_STATE]
        if not isinstance(painting, Painting):
            answer: DiffusionOutput = painting
            return answer
        painting.set_latents(state.latents)
        if self._together is not None and all(job.done for job in self._together.jobs):
            self._together = None  # its caches are as large as all the requests' together
        return self._finish(painting, state.sampling)

    def _begin(self, request_id: str, prompt: Any, sampling: Any) -> Painting | DiffusionOutput:
        """A request with its prompt read: images to paint, or its answer if there are none."""
        check_request_cancellation()
        _settle_dummy_run(request_id, sampling)
        try:
            handed_over = sampling.past_key_values is not None
            asked = read_request(prompt, sampling, self.bagel.config, handed_over=handed_over)
            sources = noise_sources(sampling, asked.num_images)
            if asked.request is None:
                prepared = self._from_caches(asked, sampling, sources)
            else:
                prepared = self._core.prepare(asked.request, noise=sources[0])
            if not prepared.jobs:
                return text_answer(prepared.text or "", self._durations())
            self._set_noise(prepared.jobs, sampling, sources)
        except OmniClientError as error:
            return DiffusionOutput.from_exception(error)
        except Exception as error:
            return self._failed(request_id, error)
        return Painting(
            prepared,
            keeps_trajectory=sampling.return_trajectory_latents,
            scheduler=self.scheduler,
            scheduler_options=self.scheduler_kwargs,
        )

    def _from_caches(self, asked: Asked, sampling: Any, sources: Sequence[Noise]) -> Prepared:
        """A request whose prompt another stage has read."""
        contexts = contexts_from(self.bagel, self.tokenizer, sampling, asked.negative_prompt)
        config = self.bagel.config
        height, width = asked.size or handed_over_size(sampling) or (None, None)
        with client_errors():
            height, width = image_size(config, height, width, None)
        unit = config.latent_token_pixels
        grid = (height // unit, width // unit)
        noise = sources[0].normal(grid[0] * grid[1], config.latent_token_dim)
        jobs = [ImageJob(contexts, noise, grid, asked.settings) for _ in sources]
        return Prepared(jobs, list(range(len(jobs))), None)

    def _set_noise(self, jobs: Sequence[ImageJob], sampling: Any, sources: Sequence[Noise]) -> None:
        """The noise that came with the request, or further numbers for all images but the first."""
        unit = self.bagel.config.latent_token_pixels
        size = (jobs[0].grid[0] * unit, jobs[0].grid[1] * unit)
        given = initial_latents(sampling.latents, size, len(jobs), self.bagel.config)
        for i, (job, source) in enumerate(zip(jobs, sources, strict=True)):
            if given is not None:
                job.latents = given[i]
            elif i:
                job.latents = source.normal(*job.latents.shape)

    def _finish(self, painting: Painting, sampling: Any) -> DiffusionOutput:
        decoded = None
        if sampling.return_trajectory_latents and sampling.return_trajectory_decoded:
            decoded = [
                list(self._core.finish(Prepared(jobs, [0] * len(jobs), None)).images)
                for jobs in painting.snapshots()
            ]
        images = list(self._core.finish(painting.prepared).images)
        return image_answer(painting, images, decoded, self._durations())

    def _finished(self, painting: Painting, request: OmniDiffusionRequest) -> DiffusionOutput:
        """`_finish`, for one of several requests."""
        try:
            return self._finish(painting, request.sampling_params)
        except Exception as error:
            return self._failed(request.request_id, error)

    def _failed(self, request_id: str, error: Exception) -> DiffusionOutput:
        if self._parallel.config.world_size > 1 or isinstance(error, DiffusionRequestAbortedError):
            raise error
        logger.error("request %s failed, its neighbours go on", request_id, exc_info=error)
        return DiffusionOutput.from_exception(error)

    def _durations(self) -> dict[str, float] | None:
        return self.stage_durations if self.enable_diffusion_pipeline_profiler else None


def _settle_dummy_run(request_id: str, sampling: Any) -> None:
    """Before 0.30 vLLM-Omni starts up with a request for one step: in BAGEL's counting, none."""
    if OmniDiffusionRequest.is_dummy_run_request_id(request_id):
        sampling.num_inference_steps = max(sampling.num_inference_steps or 2, 2)
