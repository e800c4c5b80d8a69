"""`mot-bench tune`: find the tiles that make `mot_linear` fastest for given shapes and rows.

Per problem: compile all candidates side by side, verify each against the truth, give each a
quick time, vary the order of tiles for the best, then time the very best against the computed
default in samples as long as a model keeps a GPU busy. The state is saved after every candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mot_kernels import Choice, ExpertWeight, TileConfig, choose_path
from mot_kernels import Path as KernelPath
from mot_kernels.dispatch import choose_format_path, why_not_hopper, why_not_hopper_format
from mot_kernels.formats import FORMATS
from mot_kernels.tuning.lookup import Problem, default_config, shared_memory_of

from mot_bench import formats
from mot_bench.cases import LinearCase
from mot_bench.environment import environment
from mot_bench.errors import MeasurementError
from mot_bench.kernels import describe_protocol
from mot_bench.linear import LinearProblem, make_problem, mot_variant
from mot_bench.protocol import (
    SustainedStopwatch,
    first_line,
    measure,
    rotation,
    stopwatch_for,
    sustained_stopwatch_for,
)
from mot_bench.registry import Gate, Ready
from mot_bench.space import first_candidates, regrouped
from mot_bench.tuned import State, config_key, merge_entry, result_path

# Rounds of the quick pass; candidates this many of which go on to the next step.
_QUICK_ROUNDS = 5
_BEST_REGROUPED = 4
_FINALISTS = 6


class Progress:
    """What the tuner tells while it works; this one keeps silent."""

    def begin(self, problem: str, candidates: int) -> None:
        """A problem starts, with this many candidates (more may come)."""

    def more(self, candidates: int) -> None:
        """More candidates."""

    def advance(self) -> None:
        """One candidate is done."""

    def say(self, line: str) -> None:
        """A result."""


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes:
        output: folder of the result and state files.
        resume: go on where an interrupted run stopped.
        rounds: samples of the finalists.
        jobs: threads that compile.
        device: where to measure.
    """

    output: Path
    resume: bool
    rounds: int
    jobs: int
    device: torch.device


def tune(cases: Sequence[LinearCase], settings: Settings, progress: Progress) -> Path:
    """Tune every case; returns the result file.

    Raises:
        UsageError: see `State.open`.
        MeasurementError: Triton's path cannot run here, a problem has no working candidate, or
            the GPU stopped answering. What was found before is in the files.
    """
    for case in cases:
        choice = _choose(case, settings.device)
        if choice.path is not KernelPath.TRITON:
            raise MeasurementError(
                f"there is nothing to tune for {case.dtype}: mot_linear takes the "
                f"{choice.path.value} path here, because {choice.why}"
            )
    conditions = environment(settings.device)
    protocol = describe_protocol(settings.device, settings.rounds)
    if settings.device.type == "cuda":
        protocol += f"; samples of {SustainedStopwatch.SECONDS} s, each after as long untimed"
    state = State.open(settings.output, conditions, protocol, resume=settings.resume)
    target = result_path(settings.output, conditions.device)
    hopeless = []
    for case in cases:
        problem = problem_of(case)
        if (entry := state.entry(problem)) is not None:
            merge_entry(target, conditions, protocol, entry)  # the result file may be gone
            progress.say(f"{case.shape}, rows {case.routing.counts}: done before")
            continue
        entry = _Tuner(case, settings, state, progress).run()
        if entry is None:
            hopeless.append(str(case))
            continue
        merge_entry(target, conditions, protocol, entry)
        state.finish(problem, entry)
    if hopeless:
        raise MeasurementError(
            f"no candidate works for {', '.join(hopeless)}; the reasons are in {settings.output}"
        )
    state.remove()
    return target


def problem_of(case: LinearCase) -> Problem:
    """A case as the config lookup sees it."""
    layer = case.layer
    dtype: torch.dtype = getattr(torch, case.dtype)
    return Problem(layer.n, layer.k, dtype, layer.epilogue, case.routing.counts, case.format)


def _choose(case: LinearCase, device: torch.device) -> Choice:
    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.format is None:
        return choose_path(device, dtype)
    return choose_format_path(FORMATS[case.format], device, dtype)


class _Tuner:
    """Tunes one case."""

    def __init__(
        self, case: LinearCase, settings: Settings, state: State, progress: Progress
    ) -> None:
        self._case = case
        self._problem = problem_of(case)
        self._settings = settings
        self._state = state
        self._progress = progress
        self._shared_memory = shared_memory_of(settings.device)
        sets = rotation(case.bytes_moved, settings.device).sets
        make = make_problem if case.format is None else formats.make_problem
        self._inputs: LinearProblem = make(case, sets, settings.device)
        self._gate = Gate(self._inputs)
        inputs = self._inputs
        bias, residual = (None if t is None else t[0] for t in (inputs.bias, inputs.residual))
        x, weight = inputs.operands(0)
        rows = inputs.x[0]
        out = rows.new_empty(len(rows), case.layer.n_out)
        if isinstance(weight, ExpertWeight):
            why = why_not_hopper_format(out, x, weight, bias, residual, has_plan=True)
        else:
            why = why_not_hopper(out, rows, weight, bias, residual)
        self._hopper = why is None

    def run(self) -> dict[str, Any] | None:
        """The entry for the result file, or None if no candidate works."""
        candidates = first_candidates(self._problem, self._shared_memory, hopper=self._hopper)
        rows = "+".join(str(count) for count in self._problem.counts)
        self._progress.begin(f"{self._case.shape}, rows {rows}", len(candidates))
        self._try_all(candidates)
        regroup = regrouped(
            self._best(candidates, _BEST_REGROUPED), self._problem, self._shared_memory
        )
        self._progress.more(len(regroup))
        self._try_all(regroup)
        candidates += regroup
        finalists = self._best(candidates, _FINALISTS)
        if not finalists:
            return None
        default = default_config(self._problem, self._shared_memory, self._hopper)
        if "us" in (self._state.tried(self._problem, default) or {}):
            finalists = list(dict.fromkeys([default, *finalists]))
        return self._entry(finalists, default, candidates)

    def _entry(
        self, finalists: list[TileConfig], default: TileConfig, candidates: list[TileConfig]
    ) -> dict[str, Any]:
        """Time the finalists against each other."""
        timings = measure(
            {config_key(each): mot_variant(self._inputs, each) for each in finalists},
            self._inputs.sets,
            self._settings.rounds,
            stopwatch=sustained_stopwatch_for(self._settings.device),
        )
        best = min(finalists, key=lambda each: timings[config_key(each)].median_us)
        best_us = timings[config_key(best)].median_us
        default_timing = timings.get(config_key(default))
        failed = [(self._record_of(c) or {}).get("failed") for c in candidates]
        reasons = [str(reason) for reason in dict.fromkeys(failed) if reason]
        against = (
            "the default does not work"
            if default_timing is None
            else f"default {default_timing.median_us:.1f} µs"
        )
        self._progress.say(
            f"{self._case.shape}, rows {self._problem.counts}: {best_us:.1f} µs ({against}) with "
            f"{config_key(best)}; {len(candidates)} candidates, "
            f"{sum(reason is not None for reason in failed)} failed"
            + "".join(f"\n  failed: {reason}" for reason in reasons)
        )
        return {
            "n": self._problem.n,
            "k": self._problem.k,
            **({} if self._problem.format is None else {"format": self._problem.format}),
            "dtype": self._problem.dtype_name,
            "epilogue": self._problem.epilogue,
            "rows": list(self._problem.counts),
            "config": asdict(best),
            "us": round(best_us, 3),
            "default_us": None if default_timing is None else round(default_timing.median_us, 3),
        }

    def _record_of(self, config: TileConfig) -> dict[str, Any] | None:
        return self._state.tried(self._problem, config)

    def _best(self, candidates: Iterable[TileConfig], count: int) -> list[TileConfig]:
        """The fastest by the quick pass."""
        records = {config: self._record_of(config) or {} for config in candidates}
        working = [config for config in records if "us" in records[config]]
        return sorted(working, key=lambda config: float(records[config]["us"]))[:count]

    def _try_all(self, candidates: Sequence[TileConfig]) -> None:
        todo = [config for config in candidates if self._record_of(config) is None]
        for _ in range(len(candidates) - len(todo)):
            self._progress.advance()
        self._compile(todo)
        for config in todo:
            record = self._try(config)
            self._state.record(self._problem, config, record)
            self._progress.advance()
            if "failed" in record:
                self._check_alive(f"with {config_key(config)}; go on with --resume")

    def _compile(self, configs: Sequence[TileConfig]) -> None:
        """Compile side by side, into Triton's cache, what is then tried one by one.

        Threads are enough: most of a compilation (LLVM, ptxas) runs outside Python's lock. The
        first launch compiles, so each config is launched once; its result is not looked at here,
        nor is an error: whoever fails here fails again when it is tried alone, or does not.
        """
        if self._settings.device.type != "cuda" or self._settings.jobs < 2:
            return

        def launch(config: TileConfig) -> None:
            with suppress(Exception):
                mot_variant(self._inputs, config)(0)

        # The first one alone: it sets up what the others share.
        for config in configs[:1]:
            launch(config)
        with ThreadPoolExecutor(self._settings.jobs) as pool:
            list(pool.map(launch, configs[1:]))
        self._check_alive("while compiling; find the candidate with --resume --jobs 1")

    def _try(self, config: TileConfig) -> dict[str, Any]:
        """Verify one candidate and time it quickly; returns its record."""
        variant = mot_variant(self._inputs, config)
        record: dict[str, Any]
        try:
            self._gate.check(Ready(variant))
            timing = measure(
                {"candidate": variant},
                self._inputs.sets,
                min(_QUICK_ROUNDS, self._settings.rounds),
                stopwatch=stopwatch_for(self._settings.device),
            )["candidate"]
            record = {"us": round(timing.median_us, 3)}
        except AssertionError as error:
            record = {"failed": "wrong: " + (str(error).splitlines() or ["?"])[0]}
        except Exception as error:  # whatever a compiler does, the other candidates go on
            record = {"failed": first_line(error)}
        return record

    def _check_alive(self, when: str) -> None:
        """A kernel that reads outside its memory leaves the process without a GPU."""
        if self._settings.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._settings.device)
        except RuntimeError as error:
            raise MeasurementError(
                f"the GPU stopped answering {when}: {first_line(error)}"
            ) from error
