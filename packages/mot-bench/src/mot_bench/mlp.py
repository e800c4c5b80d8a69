"""A gated MLP from its norm to its residual: in as few passes as there can be, or in many.

Formats that round activations do so twice in it; here that time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    ExpertWeight,
    Fp8W8A8,
    Path,
    RoutePlan,
    dequantize,
    mot_linear,
    mot_rms_norm,
    quantize_rows,
    quantize_weight,
    use_path,
)
from mot_kernels.formats import BLOCK, FORMATS, quantizes_activations
from mot_kernels.testing import looped_linear, looped_rms_norm

from mot_bench.cases import MlpCase
from mot_bench.inputs import Draw, path_note, plan_of
from mot_bench.registry import Operation, Outputs, Ready

_EPS = 1e-6


@dataclass(frozen=True)
class MlpProblem:
    """An MLP case with its inputs; each list holds one for each input set.

    Attributes:
        case: what it was made from.
        plan: routing of the M rows to E experts, on the device.
        x: (M, D) each; also the residual.
        gamma: (E, D) each, of the norm.
        gate_up: (E, 2 F, D) each, in the case's format if it has one.
        down: (E, D, F) each, alike.
    """

    case: MlpCase
    plan: RoutePlan
    x: list[torch.Tensor]
    gamma: list[torch.Tensor]
    gate_up: list[torch.Tensor] | list[ExpertWeight]
    down: list[torch.Tensor] | list[ExpertWeight]

    outputs = ("y",)

    @property
    def sets(self) -> int:
        """Input sets."""
        return len(self.x)

    @property
    def rounding(self) -> dict[str, Any]:
        """How activations are rounded, for `mot_rms_norm`; empty if they are not."""
        format = FORMATS[self.case.format] if self.case.format else None
        return {"quantize": format} if format and quantizes_activations(format) else {}

    @property
    def rounding_within(self) -> dict[str, Any]:
        """The same between the two products, for `mot_linear`: FP8 has scales of groups there."""
        fp8 = isinstance(self.rounding.get("quantize"), Fp8W8A8)
        return self.rounding | ({"group_size": BLOCK} if fp8 else {})

    def rounded(self, x: torch.Tensor, how: dict[str, Any]) -> Any:
        """`QuantizedRows` of x, or x, in a pass of its own."""
        if not how:
            return x
        return quantize_rows(x, how["quantize"], self.plan, group_size=how.get("group_size"))

    def truth(self, index: int) -> Outputs:
        """In float32, or float64 if that is the dtype of the inputs; rounded to the format."""
        dtype = self.x[0].dtype
        finer = torch.float64 if dtype is torch.float32 else torch.float32

        def seen(x: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
            return self.rounded(x.to(dtype), how).float().to(finer) if how else x

        ids, x = self.plan.expert_ids, self.x[index].to(finer)
        y, _ = looped_rms_norm(x, self.gamma[index].to(finer), ids, eps=_EPS, residual=None)
        gate_up, down = (
            dequantize(w, finer) if isinstance(w, ExpertWeight) else w.to(finer)
            for w in (self.gate_up[index], self.down[index])
        )
        h = looped_linear(seen(y, self.rounding), gate_up, ids, epilogue=SILU_MUL)
        h = seen(h, self.rounding_within)
        return (looped_linear(h, down, ids, epilogue=AddResidual(x)),)

    def own(self, index: int) -> Outputs:
        """In plain PyTorch, rounded as the format demands."""
        with use_path(Path.REFERENCE):
            return (_in_many_passes(self)(index),)


def make_problem(case: MlpCase, sets: int, device: torch.device) -> MlpProblem:
    """Random inputs of a size that keeps results near 1."""
    routing, d, f = case.routing, case.hidden, case.intermediate
    draw = Draw(case, sets, device)
    x, gamma = draw.normal(routing.rows, d), draw.normal(routing.num_experts, d)

    def weights(n: int, k: int) -> Any:
        plain = draw.normal(routing.num_experts, n, k, scale=k**-0.5)
        if case.format is None:
            return plain
        return [quantize_weight(w, FORMATS[case.format]) for w in plain]

    plan = plan_of(case, device)
    return MlpProblem(case, plan, x, gamma, weights(2 * f, d), weights(d, f))


MLP = Operation("mlp", MlpProblem, make_problem)


@MLP.provider("mot", label="three launches, rounding in passing where it can be")
def mot(problem: MlpProblem) -> Ready:
    """As the model runs it."""
    plan, rounding, within = problem.plan, problem.rounding, problem.rounding_within

    def run(index: int) -> torch.Tensor:
        x, gamma = problem.x[index], problem.gamma[index]
        y: Any = mot_rms_norm(x, gamma, plan, eps=_EPS, **rounding)
        h: Any = mot_linear(y, problem.gate_up[index], plan, epilogue=SILU_MUL, **within)
        out: torch.Tensor = mot_linear(h, problem.down[index], plan, epilogue=AddResidual(x))
        return out

    return Ready(run, note=path_note(problem.x[0]))


@MLP.provider("apart", label="every step a pass of its own", baseline=True)
def apart(problem: MlpProblem) -> Ready:
    """Norm, rounding, product, SiLU*mul, rounding, product, sum."""
    return Ready(_in_many_passes(problem))


def _in_many_passes(problem: MlpProblem) -> Callable[[int], torch.Tensor]:
    plan, rounded = problem.plan, problem.rounded

    def run(index: int) -> torch.Tensor:
        x = problem.x[index]
        y = rounded(mot_rms_norm(x, problem.gamma[index], plan, eps=_EPS), problem.rounding)
        gate, up = mot_linear(y, problem.gate_up[index], plan).chunk(2, dim=-1)
        h = rounded(F.silu(gate) * up, problem.rounding_within)
        return x + mot_linear(h, problem.down[index], plan)

    return run
