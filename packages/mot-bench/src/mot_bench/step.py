"""`mot-bench step`: one denoising step, ours and the gather-scatter baseline in the same run."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageJob, Step

from mot_bench.activity import observe, peak_memory
from mot_bench.bagel import denoising, image_job, prompt_of
from mot_bench.environment import environment
from mot_bench.errors import MeasurementError
from mot_bench.floor import attention_rates, step_work
from mot_bench.gather_scatter import GatherScatter, NoRoutedOperations
from mot_bench.model_results import (
    SCHEMA,
    Memory,
    StepCase,
    StepProvider,
    StepResults,
    Subject,
)
from mot_bench.protocol import (
    CpuStopwatch,
    Stopwatch,
    StreamStopwatch,
    Variant,
    ceilings,
    measure,
)

OURS, BASELINE = "mot", "gather-scatter"
PROVIDERS = (OURS, BASELINE)

# A sample on a GPU takes about so long, within these numbers of steps. It is a loop as requests
# have it, of 20 to 50 steps: a GPU that was idle takes some tenths of a second to find the clock
# that its power allows, and short samples would measure that.
_SAMPLE_SECONDS = 1.0
_FEWEST_STEPS, _MOST_STEPS = 3, 50
STEPS_OBSERVED = 2

# Relative L2. Two implementations of a deep network in bfloat16 differ by rounding alone; that a
# row is wrong is what the tests of the kernels find out, with finer means.
_MOST_DIFFERENCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}

Sizes = Sequence[tuple[int, int]]


def run_step(
    pipeline: BagelPipeline,
    subject: Subject,
    *,
    sizes: Sizes,
    branches: Sequence[int],
    batch: int,
    prompt_tokens: int,
    providers: Sequence[str],
    rounds: int,
    command: str,
    on_case: Callable[[StepResults, StepCase], None] = lambda results, case: None,
) -> StepResults:
    """Measure a step at every size with every number of branches.

    Args:
        pipeline, subject: the model, and the facts about it.
        sizes: (height, width) of the images, in pixels.
        branches: contexts per image, 1 to 3 each.
        batch: images in a step.
        prompt_tokens: of the text.
        providers: of `PROVIDERS`.
        rounds: samples per provider.
        command: kept in the results.
        on_case: called after each case with all results so far and the new one; what a profiler
            sees is found out at the end, and is only in what is returned.

    Raises:
        MeasurementError: a provider computes something else than the others.
    """
    device = pipeline.model.device
    llm = pipeline.config.llm
    measured = ceilings(device, pipeline.model.dtype, rounds)
    attention = attention_rates(llm, device, pipeline.model.dtype, rounds)
    conditions = environment(device)
    prompt = prompt_of(pipeline.tokenizer, prompt_tokens)
    plan = [(size, count) for size in sizes for count in branches]
    done: list[StepCase] = []

    def results() -> StepResults:
        return StepResults(
            schema=SCHEMA,
            kind=StepResults.KIND,
            command=command,
            environment=conditions,
            subject=subject,
            protocol=describe_protocol(device, rounds),
            complete=len(done) == len(plan),
            ceilings=measured,
            attention=attention,
            cases=tuple(done),
        )

    cases = [Case(pipeline, size, count, batch, prompt, rounds) for size, count in plan]
    for case in cases:
        done.append(case.run(providers))
        on_case(results(), done[-1])
    # Last of all: once a profiler has been there, launches may take longer.
    done[:] = [case.observed(found) for case, found in zip(cases, done, strict=True)]
    return results()


def steps_per_sample(seconds: float) -> int:
    """Steps of a sample on a GPU, if one takes so long."""
    return min(max(math.ceil(_SAMPLE_SECONDS / seconds), _FEWEST_STEPS), _MOST_STEPS)


def describe_protocol(device: torch.device, rounds: int) -> str:
    """The protocol as a sentence, for files."""
    if device.type != "cuda":
        return f"host clock, median and 20th/80th percentile of {rounds} interleaved rounds"
    return (
        f"samples of about {_SAMPLE_SECONDS:g} s, {_FEWEST_STEPS} to {_MOST_STEPS} steps one after "
        "the other from an idle device, timed with events; median and 20th/80th percentile of "
        f"{rounds} interleaved rounds, order reversed every other one"
    )


class Case:
    """One size and number of branches.

    Attributes:
        sets: steps of a sample; `settle` finds them.
        stopwatch: for steps, started from Python.
    """

    def __init__(
        self,
        pipeline: BagelPipeline,
        size: tuple[int, int],
        branches: int,
        batch: int,
        prompt: str,
        rounds: int,
    ) -> None:
        self._pipeline = pipeline
        self._device = pipeline.model.device
        self._size, self._branches, self._batch = size, branches, batch
        self._prompt = prompt
        self._rounds = rounds
        on_gpu = self._device.type == "cuda"
        self.sets = _FEWEST_STEPS if on_gpu else 1
        self.stopwatch: Stopwatch = StreamStopwatch(self._device) if on_gpu else CpuStopwatch()

    def run(self, providers: Sequence[str]) -> StepCase:
        """Check the providers against each other, then time them against each other."""
        if BASELINE in providers:
            self._check_baseline()
        velocities: dict[str, torch.Tensor] = {}
        memory: dict[str, Memory | None] = {}
        # Ours last: its CUDA graphs, once captured, would count as the baseline's memory.
        for name in sorted(providers, key=PROVIDERS.index, reverse=True):
            velocities[name], memory[name] = self.first_steps(name)
        differences = self._differences(providers[0], velocities)
        self.sets = self.settle(providers[0])
        steps = {name: self.start(name) for name in providers}
        timings = measure(
            {name: ignoring_index(step) for name, step in steps.items()},
            self.sets,
            self._rounds,
            stopwatch=self.stopwatch,
        )
        blocks = self.blocks()
        model = self._pipeline.model
        return StepCase(
            height=self._size[0],
            width=self._size[1],
            branches=self._branches,
            batch=self._batch,
            rows=sum(rows for rows, _ in blocks),
            prompt_tokens=len(self._pipeline.tokenizer.encode(self._prompt)),
            work=step_work(self._pipeline.config.llm, blocks, model.dtype.itemsize),
            providers=tuple(
                StepProvider(
                    name,
                    name == BASELINE,
                    timings[name],
                    memory[name],
                    None,
                    differences[name],
                )
                for name in providers
            ),
        )

    def observed(self, case: StepCase) -> StepCase:
        """The case with what a profiler sees of each provider."""
        providers = []
        for provider in case.providers:
            seen = observe(self.warm(provider.name), STEPS_OBSERVED, self._device)
            providers.append(dataclasses.replace(provider, activity=seen))
        return dataclasses.replace(case, providers=tuple(providers))

    def settle(self, name: str) -> int:
        """How many steps of this provider a sample has; it has made two already."""
        if self._device.type != "cuda":
            return 1
        step = self.start(name)
        for _ in range(2):  # the second one is captured, if any is
            step()
        torch.cuda.synchronize(self._device)
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize(self._device)
        return steps_per_sample(time.perf_counter() - begin)

    def warm(self, name: str) -> Callable[[], None]:
        """What makes `STEPS_OBSERVED` steps, which have been made once already; see `start`."""
        repeat = functools.partial(_repeat, self.start(name))
        repeat()
        return repeat

    def blocks(self) -> list[tuple[int, int]]:
        """(rows, keys that they attend to) of each image and context."""
        return [
            (rows, context.length + rows)
            for job in self.jobs()
            for rows in [job.grid[0] * job.grid[1] + 2]
            for context in job.branches
        ]

    def jobs(self) -> list[ImageJob]:
        """A fresh set of images."""
        # Enough steps for everything that is done with one set of jobs.
        steps = max((self._rounds + 3) * self.sets, 2 * STEPS_OBSERVED)
        return [
            image_job(
                self._pipeline,
                self._size,
                branches=self._branches,
                prompt=self._prompt,
                steps=steps,
                seed=seed,
            )
            for seed in range(self._batch)
        ]

    def start(self, name: str, *, eagerly: bool = False) -> Callable[[], list[Step]]:
        """A fresh set of images; returns what makes one step of all of them.

        Args:
            name: of the provider.
            eagerly: without CUDA graphs; the baseline never has any.
        """
        own = denoising(self._pipeline, self.jobs(), eagerly=eagerly or name == BASELINE)
        place: Callable[[], AbstractContextManager[None]] = nullcontext
        if name == BASELINE:
            place = GatherScatter(compiled=self._device.type == "cuda").installed

        def step() -> list[Step]:
            with place():
                made = own.step()
            if len(made) != self._batch:  # a finished image costs nothing
                raise MeasurementError(f"{len(made)} of {self._batch} images made a step")
            return made

        return step

    def first_steps(self, name: str) -> tuple[torch.Tensor, Memory | None]:
        """The velocities of the first step, and the peak memory of the first two."""
        found: list[torch.Tensor] = []

        def run() -> None:
            step = self.start(name)
            found.extend(each.clone() for made in step() for each in made.velocities)
            step()

        memory = peak_memory(run, self._device)
        return torch.cat(found), memory

    def _check_baseline(self) -> None:
        own = denoising(self._pipeline, self.jobs(), eagerly=True)
        operations = GatherScatter(compiled=False)  # compiled ones would not be looked into
        with operations.installed(), NoRoutedOperations():
            own.step()

    def _differences(self, first: str, velocities: dict[str, torch.Tensor]) -> dict[str, float]:
        truth = velocities[first]
        most = _MOST_DIFFERENCE[str(self._pipeline.model.dtype).removeprefix("torch.")]
        found = {}
        for name, own in velocities.items():
            found[name] = float((own - truth).norm() / truth.norm())
            if not found[name] <= most:  # NaN included
                raise MeasurementError(
                    f"the velocities of {name} differ from those of {first} by {found[name]:.2g} "
                    f"(relative L2); at most {most:g} is rounding"
                )
        return found


def ignoring_index(step: Callable[[], object]) -> Variant:
    """A step as `measure` wants it: every call is made alike."""
    return lambda index: step()


def _repeat(step: Callable[[], object]) -> None:
    for _ in range(STEPS_OBSERVED):
        step()
