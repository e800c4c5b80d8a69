"""One rank of `mot-bench step` on several: checks and times every mode that its processes can take.

All ranks run the same code and meet in the same places. Velocities are checked before anything is
timed: against those of a single rank, which each makes by itself if it can, and between the ranks.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from bagel_mot import parallel as bagel_parallel
from bagel_mot.parallel import Parallel, ParallelConfig, start
from bagel_mot.pipeline import BagelPipeline

from mot_bench.activity import observe
from mot_bench.bagel import parameter_bytes, prompt_of
from mot_bench.environment import environment
from mot_bench.errors import MeasurementError
from mot_bench.exchange import ExchangeClock
from mot_bench.model_results import SCHEMA, Subject
from mot_bench.modes import name_of
from mot_bench.parallel_results import ALONE, ModeResult, ParallelCase, ParallelResults, RankUse
from mot_bench.protocol import Prepared, Stopwatch, Variant, measure
from mot_bench.step import OURS, STEPS_OBSERVED, Case, Sizes, describe_protocol, ignoring_index

# Relative L2 between ways to share one computation: they round in another order, and that is all.
MOST_DIFFERENCE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.1}

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What to measure: see `mot_bench.step.run_step`."""

    sizes: Sizes
    branches: Sequence[int]
    batch: int
    prompt_tokens: int
    rounds: int


def run_modes(
    pipeline: BagelPipeline,
    subject: Subject,
    modes: Sequence[ParallelConfig],
    plan: Plan,
    *,
    command: str,
    velocities: Path | None = None,
    on_case: Callable[[ParallelResults, str], None] = lambda results, line: None,
) -> ParallelResults:
    """Measure a step in every mode at every size with every number of branches.

    Args:
        pipeline: loaded for the first mode.
        subject: the facts about it.
        modes: of the processes that run; all with the same tensor parallel size.
        plan: what to measure.
        command: kept in the results.
        velocities: file with those of a single rank, to be compared with; a single rank writes it.
        on_case: called after each mode and case with all results so far, and the new one in a
            line. What exchanges take is found out at the end, and is only in what is returned.

    Returns:
        The same on every rank.

    Raises:
        MeasurementError: the velocities of a mode are wrong.
    """
    device = pipeline.model.device
    others = [start(mode, device.type) for mode in modes[1:]]
    ranks = _Ranks(modes[0].world_size)
    conditions = environment(device)
    prompt = prompt_of(pipeline.tokenizer, plan.prompt_tokens)
    cases = [(size, count) for size in plan.sizes for count in plan.branches]
    runs = [
        _Run(pipeline, parallel, size, count, plan, prompt, ranks)
        for parallel in [pipeline.parallel, *others]
        for size, count in cases
    ]
    done: list[tuple[_Run, ModeResult]] = []

    def results(complete: bool) -> ParallelResults:
        return ParallelResults(
            schema=SCHEMA,
            kind=ParallelResults.KIND,
            command=command,
            environment=conditions,
            subject=subject,
            protocol=describe_protocol(device, plan.rounds)
            + "; ranks meet before every sample, and the slowest counts",
            complete=complete,
            cases=tuple(
                ParallelCase(
                    height=size[0],
                    width=size[1],
                    branches=count,
                    batch=plan.batch,
                    rows=next(run.rows for run, _ in done if run.case == (size, count)),
                    prompt_tokens=len(pipeline.tokenizer.encode(prompt)),
                    modes=tuple(mode for run, mode in done if run.case == (size, count)),
                )
                for size, count in cases
                if any(run.case == (size, count) for run, _ in done)
            ),
        )

    known = _read(velocities) if modes[0].world_size > 1 else {}
    for run in runs:
        done.append((run, run.timed(known)))
        on_case(results(False), run.describe(done[-1][1]))
    if velocities is not None and modes[0].world_size == 1:
        torch.save(known, velocities)
    # Last of all: once a profiler has been there, launches may take longer.
    done[:] = [(run, run.observed(mode)) for run, mode in done]
    return results(True)


class _Run:
    """One mode at one size and number of branches."""

    def __init__(
        self,
        loaded: BagelPipeline,
        parallel: Parallel,
        size: tuple[int, int],
        branches: int,
        plan: Plan,
        prompt: str,
        ranks: _Ranks,
    ) -> None:
        self._loaded, self._parallel, self._ranks = loaded, parallel, ranks
        self._plan, self._prompt = plan, prompt
        self.case = size, branches
        self.rows = 0
        self.name = name_of(parallel.config)

    def describe(self, mode: ModeResult) -> str:
        (height, width), branches = self.case
        graphs = "with" if mode.cuda_graphs else "without"
        return (
            f"{self.name}, {height}x{width}, branches {branches}: "
            f"{mode.timing.median_us / 1e3:.2f} ms, {graphs} CUDA graphs"
        )

    def timed(self, known: dict[str, torch.Tensor]) -> ModeResult:
        """Check, then time.

        In the same rounds each rank makes the step by itself, if it has all weights: GPUs get
        slower as they warm up, and not all are equally fast, so that times of a single rank taken
        before are no fair measure.

        Args:
            known: the velocities of a single rank by case, to which those that are missing are
                added.
        """
        if self._splits_no_weights and self._key not in known:
            own, _ = self._case(bagel_parallel.ALONE).first_steps(OURS)
            known[self._key] = own.cpu()
        case = self._case(self._parallel)
        self.rows = sum(rows for rows, _ in case.blocks())
        rows = self._rows(case)
        gc.collect()  # its workspace, which would count as memory of what comes now
        velocities, memory = case.first_steps(OURS)
        of_one, of_ranks = self._differences(velocities, known)
        use = RankUse(self._parallel.rank, rows, parameter_bytes(self._loaded.model), memory)
        case.sets = max(self._ranks.everyone(case.settle(OURS)))
        steps = {self.name: case.start(OURS)}
        if self._splits_no_weights:
            single = self._case(bagel_parallel.ALONE)
            single.sets = case.sets
            steps[ALONE] = single.start(OURS)
        timings = measure(
            {name: ignoring_index(step) for name, step in steps.items()},
            case.sets,
            self._plan.rounds,
            stopwatch=_Together(case.stopwatch, self._ranks),
        )
        everyone = self._ranks.everyone((timings, use))
        own = [of_rank[self.name] for of_rank, _ in everyone]
        return ModeResult(
            self.name,
            self._loaded.workspace.capture,
            max(own, key=lambda each: each.median_us),
            of_one,
            of_ranks,
            tuple(each for _, each in everyone),
            tuple(of_rank[ALONE] for of_rank, _ in everyone) if self._splits_no_weights else (),
        )

    def observed(self, mode: ModeResult) -> ModeResult:
        """The result with what each rank spends on exchanges."""
        repeat = self._case(self._parallel).warm(OURS)
        use = self._observe(repeat, mode.ranks[self._parallel.rank])
        return dataclasses.replace(mode, ranks=tuple(self._ranks.everyone(use)))

    def _observe(self, repeat: Callable[[], None], use: RankUse) -> RankUse:
        def together() -> None:
            # Once the profiler has started, which takes its time: whoever came first would seem
            # to exchange data while it waits.
            self._ranks.meet()
            repeat()

        activity = observe(together, STEPS_OBSERVED, self._loaded.model.device)
        if activity is not None:
            return dataclasses.replace(
                use,
                worked_us=activity.gpu_us,
                exchange_us=activity.exchange_us,
                activity=activity,
            )
        clock = ExchangeClock()
        self._ranks.meet()
        with clock.running():
            begin = time.perf_counter()
            repeat()
            seconds = time.perf_counter() - begin
        if self._parallel.config.world_size > 1 and not clock.calls:
            raise MeasurementError(f"{self.name}: the ranks exchange nothing that could be timed")
        each = 1e6 / STEPS_OBSERVED
        return dataclasses.replace(use, worked_us=seconds * each, exchange_us=clock.seconds * each)

    @property
    def _splits_no_weights(self) -> bool:
        """Whether several ranks run, each of which could make the step by itself."""
        config = self._parallel.config
        return config.world_size > 1 and config.tensor == 1

    def _case(self, parallel: Parallel) -> Case:
        """A case with a workspace of its own, which captures steps if that of the model does."""
        gc.collect()  # the last case's workspace, in which things refer to each other
        pipeline = BagelPipeline(
            self._loaded.model,
            self._loaded.tokenizer,
            parallel,
            cuda_graphs=self._loaded.workspace.capture,
        )
        (size, branches), plan = self.case, self._plan
        return Case(pipeline, size, branches, plan.batch, self._prompt, plan.rounds)

    @property
    def _key(self) -> str:
        """What velocities are known by."""
        size, branches = self.case
        return f"{size[0]}x{size[1]} {branches} {self._plan.batch}"

    def _rows(self, case: Case) -> int:
        """Packed rows that this rank takes through the layers in a step."""
        step = case.start(OURS, eagerly=True)  # a replayed graph calls no module
        with _rows_of(self._loaded.model) as rows:
            step()
        return sum(rows)

    def _differences(
        self, velocities: torch.Tensor, known: dict[str, torch.Tensor]
    ) -> tuple[float | None, float]:
        """To a single rank's velocities (None: there are none) and to rank 0's, the largest."""
        velocities = velocities.cpu()
        if self._parallel.config.world_size == 1:
            known.setdefault(self._key, velocities)
        first = self._ranks.of_first(velocities)
        own: list[float | None] = [_difference(velocities, first), None]
        if self._key in known:
            own[1] = _difference(velocities, known[self._key])
        everyone = self._ranks.everyone(own)
        check_differences(self.name, everyone, self._loaded.model.dtype)
        between, single = (
            max((each for each in found if each is not None), default=None)
            for found in zip(*everyone, strict=True)
        )
        assert between is not None
        return single, between


def check_differences(
    mode: str, everyone: Sequence[Sequence[float | None]], dtype: torch.dtype
) -> None:
    """Refuse a mode that computes something else.

    Args:
        mode: its name.
        everyone: for each rank how its velocities differ from rank 0's, and from a single rank's
            (None: not known), relative L2.
        dtype: of the model.

    Raises:
        MeasurementError: one differs by more than rounding.
    """
    most = MOST_DIFFERENCE[str(dtype).removeprefix("torch.")]
    for rank, differences in enumerate(everyone):
        for difference, other in zip(differences, ("rank 0", "a single rank"), strict=True):
            if difference is not None and not difference <= most:  # NaN included
                raise MeasurementError(
                    f"{mode}: the velocities of rank {rank} differ from those of {other} by "
                    f"{difference:.2g} (relative L2); at most {most:g} is rounding"
                )


class _Ranks:
    """All processes, where they meet; make it on every rank at the same time."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        # Over gloo also where there are GPUs: a meeting is not to be seen among their kernels.
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def everyone(self, value: T) -> list[T]:
        """What each rank has."""
        if self._world_size == 1:
            return [value]
        found: list[Any] = [None] * self._world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's, on the CPU."""
        first = tensor.cpu().clone()
        if self._world_size > 1:
            dist.broadcast(first, src=0, group=self._group)
        return first

    def meet(self) -> None:
        """Wait until everyone is here."""
        if self._world_size > 1:
            dist.barrier(group=self._group)


class _Together:
    """A stopwatch whose samples all ranks begin together."""

    def __init__(self, stopwatch: Stopwatch, ranks: _Ranks) -> None:
        self._stopwatch, self._ranks = stopwatch, ranks

    def prepare(self, variants: Mapping[str, Variant], sets: int) -> dict[str, Prepared]:
        def together(prepared: Prepared) -> Prepared:
            def begin() -> Callable[[], float]:
                self._stopwatch.wait()
                self._ranks.meet()
                return prepared.start()

            return dataclasses.replace(prepared, start=begin)

        ready = self._stopwatch.prepare(variants, sets)
        return {name: together(prepared) for name, prepared in ready.items()}

    def wait(self) -> None:
        self._stopwatch.wait()


@contextmanager
def _rows_of(model: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of each forward pass inside the block."""
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


def _difference(own: torch.Tensor, truth: torch.Tensor) -> float:
    return float((own - truth).norm() / truth.norm())


def _read(file: Path | None) -> dict[str, torch.Tensor]:
    if file is None or not file.exists():
        return {}
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return found
