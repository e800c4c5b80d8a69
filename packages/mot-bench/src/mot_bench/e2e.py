"""`mot-bench e2e`: whole requests, from prompt to PNG or text, and the phases they are made of."""

from __future__ import annotations

import functools
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from bagel_mot.images import PNG_STRATEGY
from bagel_mot.pipeline import BagelPipeline, Prepared
from bagel_mot.request import Request
from bagel_mot.sampling import ImageSettings
from PIL import Image

from mot_bench.activity import observe, peak_memory
from mot_bench.bagel import prompt_of, read_texts, write_texts
from mot_bench.environment import environment
from mot_bench.errors import MeasurementError
from mot_bench.model_results import (
    SCHEMA,
    Activity,
    E2eResults,
    Memory,
    Phase,
    RequestResult,
    Subject,
)
from mot_bench.protocol import percentile

TOTAL = "total"


class Laps:
    """Seconds of consecutive phases, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """A phase has ended."""
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Painting:
    """A request for one image.

    Args:
        name: of the request.
        parts: text and pictures.
        size: (height, width) in pixels.
    """

    batch = 1

    def __init__(
        self,
        pipeline: BagelPipeline,
        name: str,
        parts: Sequence[str | Image.Image],
        size: tuple[int, int],
        settings: ImageSettings,
    ) -> None:
        self._pipeline = pipeline
        self._request = Request(
            parts, "image", height=size[0], width=size[1], settings=settings, seed=0
        )
        self.name = name
        low, high = settings.cfg_interval
        self.what = (
            f"{size[0]}x{size[1]}, {settings.num_timesteps} timesteps, guidance "
            f"{settings.cfg_text_scale:g} and {settings.cfg_img_scale:g} where {low:g} < t <= "
            f"{high:g}"
        )
        self.steps = settings.num_timesteps - 1
        self.prompt_tokens = 0  # known once the prompt has been read

    def run(self) -> dict[str, float]:
        """Answer the request once; returns the seconds of its phases."""
        laps = Laps(self._pipeline.model.device)
        prepared = self._prepare()
        laps.lap("prefill")
        self.prompt_tokens = prepared.jobs[0].branches[0].length
        self._pipeline.denoise(prepared.jobs)
        laps.lap("denoise")
        image = self._pipeline.finish(prepared).image
        laps.lap("decode")
        image.save(io.BytesIO(), format="PNG", compress_type=PNG_STRATEGY)
        laps.lap("png")
        return laps.seconds

    def observe(self) -> Activity | None:
        """What the GPU does in the denoising loop; None on a CPU."""
        jobs = self._prepare().jobs
        return observe(
            lambda: self._pipeline.denoise(jobs), self.steps, self._pipeline.model.device
        )

    def _prepare(self) -> Prepared:
        return self._pipeline.prepare(self._request)


class Writing:
    """Several requests for a text, read and written together.

    Args:
        context_tokens: rows of each context, its start and end tokens included.
        new_tokens: written for each request.
    """

    name = "text"

    def __init__(
        self, pipeline: BagelPipeline, batch: int, context_tokens: int, new_tokens: int
    ) -> None:
        self._pipeline = pipeline
        self._prompt = prompt_of(pipeline.tokenizer, context_tokens - 2)
        self.batch, self.steps = batch, new_tokens
        self.prompt_tokens = len(pipeline.tokenizer.text_segment(self._prompt))
        self.what = f"batch {batch}, {self.prompt_tokens} tokens read, {new_tokens} written"

    def run(self) -> dict[str, float]:
        """Answer the requests once; returns the seconds of the phases."""
        laps = Laps(self._pipeline.model.device)
        contexts = read_texts(self._pipeline, [self._prompt] * self.batch)
        laps.lap("prefill")
        written = write_texts(self._pipeline, contexts, self.steps)
        laps.lap("write")
        if written != self.batch * self.steps:
            raise MeasurementError(
                f"{self.batch} texts of {self.steps} tokens were asked for, but {written} tokens "
                "were written"
            )
        return laps.seconds

    def observe(self) -> None:
        """There is no denoising loop."""


@dataclass
class _Record:
    """What has been measured of one kind of request."""

    first: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)
    loop: Activity | None = None

    def run_first(self, request: Painting | Writing) -> None:
        self.first = request.run()


def painting(
    pipeline: BagelPipeline, size: tuple[int, int], timesteps: int, prompt_tokens: int
) -> Painting:
    """Text to image with the official settings."""
    prompt = prompt_of(pipeline.tokenizer, prompt_tokens)
    return Painting(pipeline, "image", [prompt], size, ImageSettings(num_timesteps=timesteps))


def editing(
    pipeline: BagelPipeline, size: tuple[int, int], timesteps: int, prompt_tokens: int
) -> Painting:
    """Editing a picture of the same size with the official settings: three branches throughout."""
    prompt = prompt_of(pipeline.tokenizer, prompt_tokens)
    picture = Image.effect_noise((size[1], size[0]), 64).convert("RGB")
    settings = ImageSettings.for_editing(num_timesteps=timesteps)
    return Painting(pipeline, "edit", [picture, prompt], size, settings)


def run_e2e(
    requests: Sequence[Painting | Writing],
    subject: Subject,
    device: torch.device,
    *,
    rounds: int,
    command: str,
    say: Callable[[str], None] = lambda line: None,
    on_round: Callable[[E2eResults], None] = lambda results: None,
) -> E2eResults:
    """Measure requests, in turns.

    Args:
        requests: what to measure.
        subject: facts about the model.
        rounds: samples of each. One more run comes first, and one under the profiler last.
        command: kept in the results.
        say: called with what is done next.
        on_round: called after each round with the results so far.
    """
    conditions = environment(device)

    def results(*, complete: bool) -> E2eResults:
        return E2eResults(
            schema=SCHEMA,
            kind=E2eResults.KIND,
            command=command,
            environment=conditions,
            subject=subject,
            protocol=(
                "host clock with the device idle at the ends of each phase, median and 20th/80th "
                f"percentile of {rounds} rounds over all requests, order reversed every other one"
            ),
            complete=complete,
            requests=tuple(map(_result, requests, records)),
        )

    records = [_Record() for _ in requests]
    for request, record in zip(requests, records, strict=True):
        say(f"{request.name}: first run")
        record.memory = peak_memory(functools.partial(record.run_first, request), device)
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        pairs = list(zip(requests, records, strict=True))
        for request, record in pairs if index % 2 == 0 else reversed(pairs):
            record.rounds.append(request.run())
        on_round(results(complete=False))
    for request, record in zip(requests, records, strict=True):
        record.loop = request.observe()
    return results(complete=True)


def _result(request: Painting | Writing, record: _Record) -> RequestResult:
    rounds = [{**phases, TOTAL: sum(phases.values())} for phases in record.rounds]
    return RequestResult(
        name=request.name,
        what=request.what,
        batch=request.batch,
        steps=request.steps,
        prompt_tokens=request.prompt_tokens,
        first_s=sum(record.first.values()),
        phases=tuple(_phase(name, rounds) for name in record.first),
        total=_phase(TOTAL, rounds),
        memory=record.memory,
        loop=record.loop,
    )


def _phase(name: str, rounds: Sequence[Mapping[str, float]]) -> Phase:
    samples = [each[name] for each in rounds]
    return Phase(name, statistics.median(samples), percentile(samples, 20), percentile(samples, 80))
