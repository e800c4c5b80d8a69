"""A cost model of a denoising step on several GPUs, calibrated by what `mot-bench step` measured.

    step = fixed + (step of one GPU - fixed) * share + sum over kinds of their overhead
    overhead = bytes that a rank sends * time per byte + messages * time per message

`share` is that of the rank with the most to compute: blocks under CFG parallelism, rows of each
under sequence parallelism, heads and columns under tensor parallelism. The step of one GPU and its
fixed part are fitted over rows and pairs of rows that attend to each other; the two times of each
kind over what its measured steps took beyond their share. They hold what comes with an exchange,
too: rearranged rows, merged results, norms of all rows under tensor parallelism, smaller products.

Not in it: links that are slower between some GPUs than between others, so more than one machine;
and that rounding up to tiles and waves costs more with fewer rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from bagel_mot.config import LlmConfig
from bagel_mot.parallel import ParallelConfig

from mot_bench import modes as words
from mot_bench.errors import UsageError
from mot_bench.parallel_results import ALONE, ParallelCase, ParallelResults

_ITEM = 2  # bytes of an activation and of K and V
_LATENT = 64 * 4  # bytes of a velocity
KINDS = ("cfg", "allgather", "ulysses", "ring", "tp")


@dataclass(frozen=True)
class Shape:
    """What is denoised in a step.

    Attributes:
        rows: of each block.
        branches: contexts of each image.
        batch: images, all of one size.
        size: height and width, if they are known: others may have as many rows.
    """

    rows: int
    branches: int
    batch: int
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, case: ParallelCase) -> Self:
        """A measured case's."""
        rows = case.rows // (case.branches * case.batch)
        return cls(rows, case.branches, case.batch, (case.height, case.width))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.branches * self.batch

    @property
    def work(self) -> tuple[float, float, float]:
        """What a step's time is fitted over: rows, pairs of rows that attend to each other, 1."""
        rows = float(self.rows * self.blocks)
        return rows, rows * self.rows, 1.0


@dataclass(frozen=True)
class Traffic:
    """What a rank sends in a step: bytes, and messages one after the other."""

    bytes: float
    messages: float


def share(mode: ParallelConfig, shape: Shape) -> float:
    """The share of the work of the rank that has the most of it."""
    blocks = -(-shape.blocks // mode.cfg) / shape.blocks
    rows = -(-shape.rows // mode.sequence) / shape.rows
    return blocks * rows / mode.tensor


def traffic(mode: ParallelConfig, shape: Shape, llm: LlmConfig) -> dict[str, Traffic]:
    """What each kind of parallelism in a mode makes a rank send."""
    blocks = -(-shape.blocks // mode.cfg)
    rows = -(-shape.rows // mode.sequence) * blocks  # of this rank
    layers, tp = llm.num_hidden_layers, mode.tensor
    q = llm.num_attention_heads * llm.head_dim * _ITEM / tp
    kv = 2 * llm.num_key_value_heads * llm.head_dim * _ITEM / tp
    found = {}
    if mode.cfg > 1:
        gathered = rows * _LATENT * (mode.cfg - 1)
        found["cfg"] = Traffic(gathered, 1)
    if (ranks := mode.allgather) > 1:
        # All blocks' rows in one launch.
        found["allgather"] = Traffic(layers * rows * kv * (ranks - 1), layers)
    if (ranks := mode.ulysses) > 1:
        # There with q, k and v, and back with what was attended.
        each = rows * (2 * q + kv) * (ranks - 1) / ranks
        found["ulysses"] = Traffic(layers * each, layers * 2)
    if (ranks := mode.ring) > 1:
        # K and V of all rows of a Ulysses group, in this rank's heads.
        found["ring"] = Traffic(layers * rows * kv * (ranks - 1), layers * (ranks - 1))
    if tp > 1:
        # Two sums of all rows in a layer.
        each = rows * llm.hidden_size * _ITEM * 2 * (tp - 1) / tp
        found["tp"] = Traffic(layers * 2 * each, layers * 2)
    return found


def fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, with the least sum of squared errors.

    Args:
        features: a row for each value. There are few columns: all choices of those that get a
            coefficient other than 0 are tried; where several fit as well, the first and fewest.
        values: at least one.
    """
    columns = range(len(features[0]))
    best, least = [0.0 for _ in columns], sum(value**2 for value in values)
    for count in range(1, min(len(columns), len(values)) + 1):
        for chosen in itertools.combinations(columns, count):
            some = _least_squares([[row[c] for c in chosen] for row in features], values)
            if some is None or min(some) < 0:
                continue
            found = [0.0 for _ in columns]
            for column, value in zip(chosen, some, strict=True):
                found[column] = value
            error = sum(
                (sum(a * x for a, x in zip(found, row, strict=True)) - value) ** 2
                for row, value in zip(features, values, strict=True)
            )
            # More coefficients must be worth it, not only fit rounding.
            if error < least * (1 - 1e-9):
                best, least = found, error
    return best


def _least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """Without bounds, by the normal equations of columns of one length; None if they depend."""
    size = len(rows[0])
    lengths = [sum(row[i] ** 2 for row in rows) ** 0.5 for i in range(size)]
    if not all(lengths):
        return None
    scaled = [[x / length for x, length in zip(row, lengths, strict=True)] for row in rows]
    system = [
        [sum(row[i] * row[j] for row in scaled) for j in range(size)]
        + [sum(row[i] * value for row, value in zip(scaled, values, strict=True))]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(system[r][i]))
        if abs(system[pivot][i]) < 1e-9:
            return None
        system[i], system[pivot] = system[pivot], system[i]
        for r in range(size):
            if r != i:
                factor = system[r][i] / system[i][i]
                system[r] = [a - factor * b for a, b in zip(system[r], system[i], strict=True)]
    return [system[i][size] / system[i][i] / lengths[i] for i in range(size)]


def _kind(run: ParallelResults) -> str:
    """What runs must have in common to be parts of one model, in words."""
    subject = run.subject
    prompts = sorted({case.prompt_tokens for case in run.cases})
    return (
        f"{run.environment.device} with {subject.weights} in {subject.dtype}, quantization "
        f"{subject.quantization}, attention {subject.attention}, CUDA graphs {subject.cuda_graphs}"
        f", prompts of {' and '.join(map(str, prompts))} tokens"
    )


class CostModel:
    """Times of a step by mode and shape, measured where they were and modelled elsewhere.

    Args:
        runs: of one model, in one dtype and format, on one kind of GPU; at least one has a single
            rank. What several of them measured counts as the newest did.
        llm: the model's sizes.

    Attributes:
        step: microseconds of a step of one GPU: per row, per pair of rows, fixed.
        overhead: of each kind that was measured: microseconds per byte and per message.
        times: how many measured times these were fitted to.
        repeated: mode and shape of what more than one run measured.

    Raises:
        UsageError: the runs differ in one of these, or have no single rank.
    """

    def __init__(self, runs: Iterable[ParallelResults], llm: LlmConfig) -> None:
        runs = sorted(runs, key=lambda run: run.environment.date, reverse=True)
        if len(kinds := {_kind(run) for run in runs}) != 1:
            raise UsageError(
                f"the results are of {len(kinds)} devices, models or ways to run them; "
                f"expected one: {'; '.join(sorted(kinds))}"
            )
        self.llm = llm
        self._measured: dict[tuple[ParallelConfig, Shape], float] = {}
        self.repeated: set[tuple[ParallelConfig, Shape]] = set()
        for run in runs:
            own: dict[tuple[ParallelConfig, Shape], float] = {}
            for case in run.cases:
                if (alone := case.alone_us()) is not None:
                    own.setdefault((words.ALONE, Shape.of(case)), alone)
                for each in case.modes:
                    mode = words.ALONE if each.mode == ALONE else words.parse(each.mode)[0]
                    # Of two ways, with and without CUDA graphs, the first is what users get.
                    own.setdefault((mode, Shape.of(case)), each.timing.median_us)
            self.repeated |= self._measured.keys() & own.keys()
            for place, us in own.items():
                self._measured.setdefault(place, us)
        singles = {s: us for (mode, s), us in self._measured.items() if mode == words.ALONE}
        if not singles:
            raise UsageError("the results have no step of a single rank, which all is reckoned by")
        # Relative errors count, so that short steps are met as well as long ones.
        self.step = fit(
            [[x / us for x in s.work] for s, us in singles.items()], [1.0] * len(singles)
        )
        self.times: dict[str, int] = {}
        self.overhead = {kind: found for kind in KINDS if (found := self._overhead(kind, singles))}

    def _overhead(self, kind: str, alone: dict[Shape, float]) -> list[float] | None:
        features, values = [], []
        for (mode, shape), us in self._measured.items():
            sent = traffic(mode, shape, self.llm)
            if set(sent) == {kind} and shape in alone:
                features.append([sent[kind].bytes / us, sent[kind].messages / us])
                values.append((us - self._computing(mode, shape)) / us)
        self.times[kind] = len(values)
        return fit(features, values) if values else None

    def _computing(self, mode: ParallelConfig, shape: Shape) -> float:
        fixed = self.step[-1]
        whole = self._measured.get((words.ALONE, shape))
        if whole is None:
            whole = sum(a * x for a, x in zip(self.step, shape.work, strict=True))
        return fixed + (whole - fixed) * share(mode, shape)

    def measured(self, mode: ParallelConfig, shape: Shape) -> float | None:
        """Microseconds of a step as they were measured; None if they were not."""
        return self._measured.get((mode, shape))

    def modelled(self, mode: ParallelConfig, shape: Shape) -> float | None:
        """Microseconds as the model has them; None if a kind of the mode was never measured."""
        total = self._computing(mode, shape)
        for kind, sent in traffic(mode, shape, self.llm).items():
            if kind not in self.overhead:
                return None
            per_byte, per_message = self.overhead[kind]
            total += sent.bytes * per_byte + sent.messages * per_message
        return total

    def unknown(self) -> list[str]:
        """Kinds that were never measured by themselves, so that no mode with them is modelled."""
        return [kind for kind in KINDS if kind not in self.overhead]

    def modes(self) -> list[ParallelConfig]:
        """Those that were measured, in order."""
        return list(dict.fromkeys(mode for mode, _ in self._measured))

    def ranked(self, shape: Shape, gpus: int) -> list[tuple[ParallelConfig, float, bool]]:
        """Modes for so many GPUs, the fastest first: (mode, microseconds, whether measured)."""
        found = []
        for mode in words.products(gpus, shape.blocks, self.llm):
            us = self.measured(mode, shape)
            expected = us if us is not None else self.modelled(mode, shape)
            if expected is not None:
                found.append((mode, expected, us is not None))
        return sorted(found, key=lambda each: each[1])
