"""`mot_linear` and the ways people compute the same without it.

Every provider computes the layer with its epilogue. A residual is added in place where that is
the faster way; each provider then adds to a copy of its own, which grows from call to call: the
speed does not depend on the values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Epilogue,
    QuantizedRows,
    RoutePlan,
    TileConfig,
    mot_linear,
)
from mot_kernels.testing import linear_in_order, looped_linear

from mot_bench.cases import LinearCase
from mot_bench.compiled import compiled_per_shape
from mot_bench.inputs import Draw, path_note, plan_of
from mot_bench.protocol import Variant, first_line, measure, stopwatch_for
from mot_bench.registry import Operation, Outputs, Ready, Unavailable

# Rounds to find out which of two ways to add a residual is the faster one.
_PICK_ROUNDS = 5


@dataclass(frozen=True)
class LinearProblem:
    """A linear case with its inputs; each list holds one tensor per input set.

    Attributes:
        case: what it was made from.
        plan: routing of the M rows to E experts, on the device.
        x: (M, K) each.
        weight: (E, N, K) each.
        bias: (E, N) each, or None.
        residual: (M, N) each for the epilogue "add_residual", or None.
    """

    case: LinearCase
    plan: RoutePlan
    x: list[torch.Tensor]
    weight: list[torch.Tensor]
    bias: list[torch.Tensor] | None
    residual: list[torch.Tensor] | None

    outputs = ("y",)

    @property
    def sets(self) -> int:
        """Input sets."""
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.x[0].device

    def epilogue(self, index: int) -> Epilogue | None:
        """The epilogue as `mot_linear` takes it."""
        if self.residual is not None:
            return AddResidual(self.residual[index])
        return SILU_MUL if self.case.layer.epilogue == "silu_mul" else None

    def bias_of(self, index: int, expert: int) -> torch.Tensor | None:
        """(N,) of one expert, or None."""
        return None if self.bias is None else self.bias[index][expert]

    def operands(self, index: int) -> tuple[torch.Tensor | QuantizedRows, Any]:
        """x and weight as `mot_linear` takes them."""
        return self.x[index], self.weight[index]

    def numbers(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices (M, K) and (E, N, K) that the operands stand for."""
        return self.x[index], self.weight[index]

    def truth(self, index: int) -> Outputs:
        """In float32, or float64 if that is the dtype of the inputs."""
        finer = torch.float64 if self.x[0].dtype is torch.float32 else torch.float32
        return (self._looped(index, finer, F.linear),)

    def own(self, index: int) -> Outputs:
        """In the inputs' dtype."""
        in_order = self.x[0].dtype is torch.float32  # see `linear_in_order`
        linear = linear_in_order if in_order else F.linear
        return (self._looped(index, self.x[0].dtype, linear),)

    def _looped(
        self, index: int, dtype: torch.dtype, linear: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        epilogue = self.epilogue(index)
        if isinstance(epilogue, AddResidual):
            epilogue = AddResidual(epilogue.residual.to(dtype))
        x, weight = self.numbers(index)
        return looped_linear(
            x.to(dtype),
            weight.to(dtype),
            self.plan.expert_ids,
            bias=None if self.bias is None else self.bias[index].to(dtype),
            epilogue=epilogue,
            linear=linear,
        )


def make_problem(case: LinearCase, sets: int, device: torch.device) -> LinearProblem:
    """Random inputs of a size that keeps outputs near 1."""
    layer, rows, experts = case.layer, case.routing.rows, case.routing.num_experts
    draw = Draw(case, sets, device)
    return LinearProblem(
        case,
        plan_of(case, device),
        x=draw.normal(rows, layer.k),
        weight=draw.normal(experts, layer.n, layer.k, scale=layer.k**-0.5),
        bias=draw.normal(experts, layer.n) if layer.bias else None,
        residual=draw.normal(rows, layer.n) if layer.epilogue == "add_residual" else None,
    )


LINEAR = Operation("linear", LinearProblem, make_problem)


def mot_variant(problem: LinearProblem, config: TileConfig | None = None) -> Variant:
    """`mot_linear` with these tiles; None looks them up."""

    def run(index: int) -> torch.Tensor:
        return mot_linear(
            *problem.operands(index),
            problem.plan,
            bias=None if problem.bias is None else problem.bias[index],
            epilogue=problem.epilogue(index),
            config=config,
        )

    return run


@LINEAR.provider("mot", label="mot_linear")
def mot(problem: LinearProblem) -> Ready:
    """Ours."""
    return Ready(mot_variant(problem), note=path_note(problem.x[0]))


@LINEAR.provider(
    "dense",
    label="dense cuBLAS, one expert",
    baseline=True,
    exempt="one expert's weight for all rows",
)
def dense(problem: LinearProblem) -> Ready:
    """The layer of a model without experts: what routing would ideally cost."""
    counts = problem.plan.counts
    expert = counts.index(max(counts))
    return _in_slices(problem, problem.x, problem.residual, [(expert, slice(0, sum(counts)))])


@LINEAR.provider("gather_scatter", label="gather, linear, scatter")
def gather_scatter(problem: LinearProblem) -> Ready:
    """Per expert: pick its rows, run its layer, put the rows back."""
    rows = [problem.plan.rows_of(e).long() for e in range(problem.plan.num_experts)]
    activate = _activation(problem)
    sums = _copies(problem.residual)

    def run(index: int) -> torch.Tensor:
        x = problem.x[index]
        y = x.new_empty(x.shape[0], problem.case.layer.n_out)
        for expert, own in enumerate(rows):
            if len(own):
                weight, bias = problem.weight[index][expert], problem.bias_of(index, expert)
                y.index_copy_(0, own, activate(F.linear(x.index_select(0, own), weight, bias)))
        return y if sums is None else sums[index].add_(y)

    return Ready(run)


@LINEAR.provider("presorted", label="rows sorted beforehand, two GEMMs")
def presorted(problem: LinearProblem) -> Ready:
    """Per expert a linear on a slice, had the model kept its rows sorted (not timed)."""
    order = problem.plan.row_ids.long()
    x = [each[order] for each in problem.x]
    residual = None if problem.residual is None else [each[order] for each in problem.residual]
    ready = _in_slices(problem, x, residual, _expert_slices(problem.plan))
    return Ready(ready.run, _unsort(order), ready.note)


@LINEAR.provider("grouped_mm", label="rows sorted beforehand, torch._grouped_mm")
def grouped_mm(problem: LinearProblem) -> Ready:
    """PyTorch's own grouped GEMM; bias, activation and residual are separate kernels."""
    grouped = getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise Unavailable(f"torch {torch.__version__} has no _grouped_mm")
    order = problem.plan.row_ids.long()
    x = [each[order] for each in problem.x]
    ends = torch.tensor(problem.plan.counts).cumsum(0).to(problem.device, torch.int32)
    activate = _activation(problem)
    slices = _expert_slices(problem.plan)
    sums = None if problem.residual is None else [each[order] for each in problem.residual]

    def run(index: int) -> torch.Tensor:
        y: torch.Tensor = grouped(x[index], problem.weight[index].transpose(1, 2), offs=ends)
        if problem.bias is not None:
            for expert, part in slices:
                y[part] += problem.bias[index][expert]
        y = activate(y)
        return y if sums is None else sums[index].add_(y)

    try:
        run(0)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
    except (RuntimeError, TypeError) as error:
        raise Unavailable(f"torch._grouped_mm: {first_line(error)}") from error
    if sums is not None and problem.residual is not None:
        for mine, original in zip(sums, problem.residual, strict=True):
            mine.copy_(original[order])
    return Ready(run, _unsort(order))


def _expert_slices(plan: RoutePlan) -> list[tuple[int, slice]]:
    """(expert, its slice of the sorted rows) for experts that have rows."""
    slices, start = [], 0
    for expert, count in enumerate(plan.counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


def _unsort(order: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def in_row_order(y: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(y).index_copy_(0, order, y)

    return in_row_order


def _in_slices(
    problem: LinearProblem,
    x: list[torch.Tensor],
    residual: list[torch.Tensor] | None,
    slices: list[tuple[int, slice]],
) -> Ready:
    """One library GEMM per slice of rows, then the epilogue."""
    activate = _activation(problem)

    def product(index: int) -> torch.Tensor:
        if len(slices) == 1:
            expert = slices[0][0]
            weight = problem.weight[index][expert]
            return F.linear(x[index], weight, problem.bias_of(index, expert))
        y = x[index].new_empty(x[index].shape[0], problem.case.layer.n)
        for expert, rows in slices:
            weight = problem.weight[index][expert].t()
            bias = problem.bias_of(index, expert)
            if bias is None:
                torch.mm(x[index][rows], weight, out=y[rows])
            else:
                torch.addmm(bias, x[index][rows], weight, out=y[rows])
        return y

    if residual is None:
        return Ready(lambda index: activate(product(index)))
    sums = _copies(residual)
    assert sums is not None

    def add(index: int) -> torch.Tensor:
        return sums[index].add_(product(index))

    def addmm(index: int) -> torch.Tensor:
        for expert, rows in slices:
            sums[index][rows].addmm_(x[index][rows], problem.weight[index][expert].t())
        return sums[index]

    ways: dict[str, Variant] = {"in-place add": add}
    if problem.bias is None:
        ways["addmm"] = addmm
    times = measure(ways, problem.sets, _PICK_ROUNDS, stopwatch=stopwatch_for(problem.device))
    best = min(ways, key=lambda way: times[way].median_us)
    for mine, original in zip(sums, residual, strict=True):
        mine.copy_(original)
    return Ready(ways[best], note=f"residual by {best}")


def _copies(tensors: list[torch.Tensor] | None) -> list[torch.Tensor] | None:
    return None if tensors is None else [tensor.clone() for tensor in tensors]


def _activation(problem: LinearProblem) -> Callable[[torch.Tensor], torch.Tensor]:
    """SiLU * up as one compiled kernel, if the layer has it."""
    if problem.case.layer.epilogue != "silu_mul":
        return lambda y: y
    return _compiled_silu_mul() if problem.device.type == "cuda" else _silu_mul


def _silu_mul(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=-1)
    return F.silu(gate) * up


@functools.cache
def _compiled_silu_mul() -> Callable[[torch.Tensor], torch.Tensor]:
    return compiled_per_shape(_silu_mul)
