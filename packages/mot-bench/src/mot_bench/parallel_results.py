"""What `mot-bench step` on several ranks found, as data; written to JSON. No torch here."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from mot_bench.model_results import Activity, Memory, Run
from mot_bench.results import Timing

ALONE = "1 rank"


@dataclass(frozen=True)
class RankUse:
    """One rank's part of a step.

    Attributes:
        rank: its number.
        rows: packed rows that it takes through the layers.
        weights: bytes of its parameters.
        memory: None on a CPU.
        worked_us: time of one step in which its GPU did something, under a profiler; on a CPU the
            step's time. None until this was observed, after all timing.
        exchange_us: of it, in exchanges with other ranks, waiting for them included. On a GPU in
            kernels that exchange data, on a CPU in calls that do.
        activity: what the profiler saw; None on a CPU.
    """

    rank: int
    rows: int
    weights: int
    memory: Memory | None
    worked_us: float | None = None
    exchange_us: float | None = None
    activity: Activity | None = None

    @property
    def exchange_share(self) -> float | None:
        """Share of the working time that exchanges take."""
        if not self.worked_us or self.exchange_us is None:
            return None
        return self.exchange_us / self.worked_us


@dataclass(frozen=True)
class ModeResult:
    """One step in one mode.

    Attributes:
        mode: "cfg:2", "ulysses:2,ring:2" ...; `ALONE` for one rank.
        cuda_graphs: whether steps were captured.
        timing: of one step, on the rank where it took longest.
        difference: of the velocities to those of one rank, relative L2, the largest of all
            ranks'; None if no single rank was measured.
        between_ranks: the same for the difference to rank 0's.
        ranks: all of them.
        alone: of the same step made by each rank by itself, in the same rounds; empty where the
            ranks split the weights, or there is only one.
    """

    mode: str
    cuda_graphs: bool
    timing: Timing
    difference: float | None
    between_ranks: float
    ranks: tuple[RankUse, ...]
    alone: tuple[Timing, ...] = ()


@dataclass(frozen=True)
class ParallelCase:
    """One step at one size.

    Attributes:
        height, width: of the images, in pixels.
        branches: contexts per image.
        batch: images.
        rows: packed rows of the step.
        prompt_tokens: of the text, without its start and end tokens.
        modes: a single rank first, then in the order they ran.
    """

    height: int
    width: int
    branches: int
    batch: int
    rows: int
    prompt_tokens: int
    modes: tuple[ModeResult, ...]

    @property
    def title(self) -> str:
        """The case in words, without what was measured."""
        return (
            f"{self.height}x{self.width}, {_count(self.branches, 'branch', 'branches')}, "
            f"{_count(self.batch, 'image', 'images')}, {self.rows:,} rows"
        )

    def speed_up(self, mode: ModeResult) -> float | None:
        """How many times the speed of one rank with its own choice of CUDA graphs."""
        alone = self.alone_us(mode)
        us = mode.timing.median_us
        return None if alone is None or not us else alone / us

    def alone_us(self, mode: ModeResult | None = None) -> float | None:
        """Microseconds of the step made by one rank; None if that was not measured.

        For a mode as it was measured in the same rounds: of the GPUs' own times the mean. Where
        there is none, or for no mode, beside any mode; else before them all, as for `ALONE` itself.
        """
        before = [each.timing.median_us for each in self.modes if each.mode == ALONE]
        if mode is not None and mode.mode == ALONE:
            return before[0]
        some = self.modes if mode is None or not mode.alone else (mode,)
        beside = [each.median_us for one in some for each in one.alone]
        if beside:
            return statistics.mean(beside)
        return before[0] if before else None


@dataclass(frozen=True)
class ParallelResults(Run):
    """A run of `mot-bench step` on several ranks.

    Attributes:
        cases: in the order they ran.
    """

    cases: tuple[ParallelCase, ...]

    KIND = "step-ranks"

    def joined(self, others: Iterable[Self]) -> Self:
        """With the modes of other runs, a single rank first."""
        cases: dict[tuple[int, int, int, int], ParallelCase] = {}
        for run in (self, *others):
            for case in run.cases:
                before = cases.setdefault(_key(case), dataclasses.replace(case, modes=()))
                modes = sorted((*before.modes, *case.modes), key=lambda each: each.mode != ALONE)
                cases[_key(case)] = dataclasses.replace(before, modes=tuple(modes))
        return dataclasses.replace(self, cases=tuple(cases.values()))


def span(values: Sequence[float | None], form: str) -> str:
    """What all ranks have, or from the least to the most; "-" if it is not known of all."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    least, most = form.format(min(known)), form.format(max(known))
    return least if least == most else f"{least}-{most}"


def ms(us: float | None) -> str:
    """Milliseconds; "-" if it is not known."""
    return "-" if us is None else f"{us / 1e3:.2f}"


def _key(case: ParallelCase) -> tuple[int, int, int, int]:
    return case.height, case.width, case.branches, case.batch


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
