"""`BagelPipeline`: text to image, editing, questions about pictures, and free mixtures of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NoReturn, ParamSpec, Self, TypeVar

import torch
from PIL import Image

from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.images import to_image, unpatchify
from bagel_mot.loading import build_model as build_model
from bagel_mot.loading import load
from bagel_mot.model.bagel import Bagel
from bagel_mot.parallel import ALONE, Parallel, ParallelConfig
from bagel_mot.quantization import Quantization
from bagel_mot.reading import Prepared, Reading, read_prompt
from bagel_mot.request import Noise, Part, Request, Result
from bagel_mot.sampling import ImageJob, ImageSettings, Step
from bagel_mot.text import fed_tokens, generate_texts
from bagel_mot.tokenizer import BagelTokenizer

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Packed rows at which images are no longer denoised together: a GPU is full with fewer, and the
# activations of more would only take memory.
_ROWS_TOGETHER = 16384


class Cancelled(RuntimeError):
    """The caller's `cancel` event was set; nothing was kept."""


def _on_its_own(
    method: Callable[Concatenate[BagelPipeline, P], T],
) -> Callable[Concatenate[BagelPipeline, P], T]:
    """One thread at a time, and without what callers may have set for their own tensors.

    The model knows what it computes in and where: autocast would mix in another dtype, a default
    device would have tables made there that belong to the host.
    """

    @functools.wraps(method)
    def run(self: BagelPipeline, /, *args: P.args, **kwargs: P.kwargs) -> T:
        moved = torch.get_default_device().type != "cpu"
        with (
            self._lock,
            torch.autocast(self.model.device.type, enabled=False),
            torch.device("cpu") if moved else contextlib.nullcontext(),
        ):
            return method(self, *args, **kwargs)

    return run


class BagelPipeline:
    """A loaded BAGEL and the requests one can make of it.

    Calls from several threads wait for each other; `run` answers several requests together.

    Args:
        model, tokenizer: belong together.
        parallel: this process among the others.
        cuda_graphs: on a GPU, capture denoising steps and text decoding in CUDA graphs, with
            what ranks exchange in them. They keep the buffers of the last few shapes of requests.
            The same on all ranks.

    Attributes:
        workspace: where steps run: buffers, and the graphs.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: BagelTokenizer,
        parallel: Parallel = ALONE,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.parallel = parallel
        self.config = model.config
        capture = cuda_graphs and model.device.type == "cuda"
        if capture and (why := parallel.why_not_captured()):
            logger.warning("steps run launch by launch, without CUDA graphs: %s", why)
            capture = False
        self.workspace = Workspace(model, capture=capture)
        self._lock = threading.RLock()  # callbacks may call the pipeline again

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a BagelPipeline cannot be copied or pickled; load another one with from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        attention: str | None = None,
        parallel: ParallelConfig | None = None,
        quantization: str | Quantization | None = None,
        cuda_graphs: bool = True,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> Self:
        """Load a checkpoint folder in the official layout.

        Args:
            path: folder with `llm_config.json`, `ema.safetensors`, `ae.safetensors`, tokenizer;
                or "tiny", the small model that is shipped with this package.
            device: default "cuda" if there is one, else "cpu".
            dtype: what the model computes in: bfloat16, float16 or float32.
            attention: attention backend, see `bagel_mot.model.attention_choice`.
            parallel: how several processes share the work; each of them makes the same calls and
                gets the same results. Default: this process alone.
            quantization: a number format for the decoder layers, "fp8", "int8", "w8a16" or "w4a16",
                or a `Quantization`, which says what is kept. Each tensor is quantised as it is
                read, so that the device never holds more than a part of it besides. None for a
                checkpoint that is quantised already: it is loaded as it is.
            cuda_graphs: see `BagelPipeline`.
            on_tensor: called with name and element count of each loaded tensor.

        Raises:
            TypeError: `parallel` or `quantization` is something else.
            FileNotFoundError: the folder or a file is missing.
            CheckpointError: the files do not hold exactly the model's tensors.
            ValueError: a config value, device, dtype, attention backend, parallel size or format
                makes no sense, or the checkpoint is quantised already.
        """
        model, tokenizer, joined = load(
            path,
            device=device,
            dtype=dtype,
            attention=attention,
            parallel=parallel,
            quantization=quantization,
            on_tensor=on_tensor,
        )
        return cls(model, tokenizer, joined, cuda_graphs=cuda_graphs)

    def generate(
        self,
        prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        settings: ImageSettings | None = None,
        think: bool = False,
        **options: Any,
    ) -> Result:
        """Paint a text. See `chat` for the options (seed, num_images, on_step, ...).

        Args:
            prompt: what to paint.
            height, width: in pixels; multiples of 16, at most 16 times the latent grid (1024 for
                BAGEL-7B). Default: the largest square.
            settings: default `ImageSettings()`.
            think: write a plan first and paint with it; it is the result's `text`.
        """
        return self.chat(
            [prompt],
            output="image",
            height=height,
            width=width,
            settings=ImageSettings() if settings is None else settings,
            think=think,
            **options,
        )

    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompt: str,
        *,
        settings: ImageSettings | None = None,
        **options: Any,
    ) -> Result:
        """Change a picture (or make one from several) as the prompt says.

        The output has the (resized) last picture's size unless `height` and `width` are given.

        Args:
            images: pictures of any size and mode, one or several.
            prompt: what to change.
            settings: default `ImageSettings.for_editing()`.
        """
        pictures = _pictures(images)
        if not pictures:
            raise ValueError("images is empty; give at least one picture to edit")
        return self.chat(
            [*pictures, prompt],
            output="image",
            settings=ImageSettings.for_editing() if settings is None else settings,
            **options,
        )

    def ask(
        self,
        images: Image.Image | Sequence[Image.Image] | None,
        question: str,
        **options: Any,
    ) -> str:
        """Answer a question, about pictures or (None or []) without. See `chat` for the options."""
        pictures = [] if images is None else _pictures(images)
        answer = self.chat([*pictures, question], output="text", **options).text
        assert answer is not None
        return answer

    def chat(
        self,
        parts: Sequence[Part],
        *,
        on_step: Callable[[Step], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
        noise: Noise | None = None,
        **options: Any,
    ) -> Result:
        """Answer any sequence of texts and pictures with a text or with images.

        Args:
            parts: strings and pictures in reading order.
            on_step: called after each denoising step.
            on_text: called with the text so far while it is written.
            cancel: set it from elsewhere to stop within a step: `Cancelled` is raised.
            noise: source of random numbers for the first image, instead of `Noise(seed)`.
            options: the other fields of `Request`; `output` must be given.

        Raises:
            TypeError, ValueError: an argument that makes no sense; the message says which.
            Cancelled: `cancel` was set.
        """
        _check_callbacks(on_step=on_step, on_text=on_text, cancel=cancel)
        prepared = self.prepare(
            Request(parts, **options), on_text=on_text, cancel=cancel, noise=noise
        )
        self.denoise(prepared.jobs, on_step=on_step, cancel=cancel)
        return self.finish(prepared, cancel=cancel)

    @_on_its_own
    def run(
        self,
        requests: Sequence[Request],
        *,
        on_step: Callable[[Step], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Result]:
        """Answer several requests; texts are written together, then images denoised together.

        Each result is what the request would give alone, but for rounding: the requests may
        differ in everything.

        Args:
            requests: in any mixture of sizes, settings and outputs.
            on_step: called after each denoising step of each image.
            cancel: see `chat`.
        """
        if isinstance(requests, Request):
            raise TypeError("requests is a Request; expected a list of them")
        requests = list(requests)
        for i, request in enumerate(requests):
            if not isinstance(request, Request):
                raise TypeError(f"requests[{i}] is a {type(request).__name__}; expected a Request")
        _check_callbacks(on_step=on_step, cancel=cancel)
        prepared = self._prepared([self._read(each, cancel=cancel) for each in requests], cancel)
        jobs = [job for each in prepared for job in each.jobs]
        self.denoise(jobs, on_step=on_step, cancel=cancel)
        return [self.finish(each, cancel=cancel) for each in prepared]

    @_on_its_own
    def prepare(
        self,
        request: Request,
        *,
        on_text: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
        noise: Noise | None = None,
    ) -> Prepared:
        """Read a request's prompt and write its text, if any; see `chat` for the arguments."""
        _check_callbacks(on_text=on_text, cancel=cancel)
        if noise is not None and not callable(getattr(noise, "normal", None)):
            raise TypeError(f"noise is {noise!r}; expected a Noise, such as Noise(seed)")
        reading = self._read(request, on_text=on_text, cancel=cancel, noise=noise)
        (prepared,) = self._prepared([reading], cancel)
        return prepared

    @_on_its_own
    def denoise(
        self,
        jobs: Sequence[ImageJob],
        *,
        on_step: Callable[[Step], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Make all steps of all jobs, as many jobs at a time as fill the device."""
        waiting = list(jobs)
        while waiting:
            together = [waiting.pop(0)]
            while waiting and sum(map(_rows, [*together, waiting[0]])) <= _ROWS_TOGETHER:
                together.append(waiting.pop(0))
            denoising = Denoising(
                self.model, self.tokenizer, together, self.parallel, self.workspace
            )
            while not all(job.done for job in together):
                self._stop_if(cancel)
                steps = denoising.step()
                if on_step is not None:
                    # All before the first call, which may use the pipeline: its buffers are shared.
                    for step in [each.kept() for each in steps]:
                        on_step(step)

    @_on_its_own
    @torch.no_grad()
    def finish(self, prepared: Prepared, *, cancel: threading.Event | None = None) -> Result:
        """Decode the images of a request whose jobs are done."""
        images = []
        for job in prepared.jobs:
            self._stop_if(cancel)
            images.append(self._decode(job))
        return Result(tuple(images), tuple(prepared.seeds), prepared.text)

    def _read(
        self,
        request: Request,
        *,
        on_text: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
        noise: Noise | None = None,
    ) -> Reading:
        """A request's prompt becomes contexts."""
        seed = request.seed
        if seed is None:
            seed = self.parallel.agree(secrets.randbelow(2**31))
        return read_prompt(
            self.model,
            self.tokenizer,
            self.config,
            request,
            seed=seed,
            noise=Noise(seed) if noise is None else noise,
            on_text=on_text,
            stop=lambda: self._stop_if(cancel),
        )

    def _prepared(
        self, readings: Sequence[Reading], cancel: threading.Event | None
    ) -> list[Prepared]:
        """Write the texts that are to be written, answers and thoughts, together."""
        writing = [
            (reading, reading.text_job(self.tokenizer, lambda: self._stop_if(cancel)))
            for reading in readings
            if reading.writes
        ]
        generate_texts(
            self.model,
            self.tokenizer,
            [job for _, job in writing],
            parallel=self.parallel,
            workspace=self.workspace,
        )
        for reading, job in writing:
            reading.text = self.tokenizer.answer(fed_tokens(self.tokenizer, job))
        return [reading.prepared(self.config) for reading in readings]

    def _stop_if(self, cancel: threading.Event | None) -> None:
        # Ranks must stop at the same place, or some would wait for the others for ever.
        if cancel is not None and self.parallel.agree(int(cancel.is_set())):
            raise Cancelled("the request was cancelled")

    def _decode(self, job: ImageJob) -> Image.Image:
        patch = self.config.latent_patch_size
        latent = unpatchify(job.latents, *job.grid, patch)[None]
        return to_image(self.model.vae.decode(latent)[0])


def _check_callbacks(*, cancel: object, **functions: object) -> None:
    """Now, not after the first step."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {function!r}; expected a function")
    if cancel is not None and not hasattr(cancel, "is_set"):
        raise TypeError(f"cancel is {cancel!r}; expected a threading.Event")


def _pictures(images: Image.Image | Sequence[Image.Image]) -> list[Image.Image]:
    """One picture or several as a list; a path would otherwise pass for a list of texts."""
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise TypeError(
            f"images is a {type(images).__name__}; expected a PIL image or a list of PIL images"
        )
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(f"images[{i}] is a {type(image).__name__}; expected a PIL image")
    return list(images)


def _rows(job: ImageJob) -> int:
    return len(job.branches) * (job.grid[0] * job.grid[1] + 2)
