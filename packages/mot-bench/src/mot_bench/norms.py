"""`mot_rms_norm` and `mot_qk_norm_rope`, and the ways people compute the same without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mot_kernels import RoutePlan, mot_qk_norm_rope, mot_rms_norm
from mot_kernels.testing import looped_qk_norm_rope, looped_rms_norm

from mot_bench.cases import NormCase, QkCase
from mot_bench.inputs import Draw, path_note, plan_of
from mot_bench.registry import Operation, Outputs, Ready

_EPS = 1e-6
_ONE_WEIGHT = "one expert's weight for all rows"


@dataclass(frozen=True)
class NormProblem:
    """An RMSNorm case with its inputs; each list holds one tensor per input set.

    Attributes:
        case: what it was made from.
        plan: routing of the M rows to E experts, on the device.
        x: (M, D) each.
        residual: (M, D) each, added to x before the norm, or None.
        weight: (E, D) each.
    """

    case: NormCase
    plan: RoutePlan
    x: list[torch.Tensor]
    residual: list[torch.Tensor] | None
    weight: list[torch.Tensor]

    @property
    def outputs(self) -> tuple[str, ...]:
        """y, and with a residual the sum that was normalised."""
        return ("y",) if self.residual is None else ("y", "sum")

    @property
    def sets(self) -> int:
        """Input sets."""
        return len(self.x)

    def residual_of(self, index: int) -> torch.Tensor | None:
        """(M, D), or None."""
        return None if self.residual is None else self.residual[index]

    def truth(self, index: int) -> Outputs:
        """In float64."""
        return self._looped(index, torch.float64)

    def own(self, index: int) -> Outputs:
        """In the inputs' dtype."""
        return self._looped(index, self.x[0].dtype)

    def _looped(self, index: int, dtype: torch.dtype) -> Outputs:
        residual = self.residual_of(index)
        y, summed = looped_rms_norm(
            self.x[index].to(dtype),
            self.weight[index].to(dtype),
            self.plan.expert_ids,
            eps=_EPS,
            residual=None if residual is None else residual.to(dtype),
        )
        return (y,) if residual is None else (y, summed)


@dataclass(frozen=True)
class QkProblem:
    """A QK-norm + RoPE case with its inputs; each list holds one tensor per input set.

    Attributes:
        case: what it was made from.
        plan: routing of the M rows to E experts, on the device.
        qkv: (M, (H + 2 * Hkv) * D) each.
        q_weight, k_weight: (E, D) each.
        rope: (P, D) float32, cos | sin.
        positions: (M,) int64.
    """

    case: QkCase
    plan: RoutePlan
    qkv: list[torch.Tensor]
    q_weight: list[torch.Tensor]
    k_weight: list[torch.Tensor]
    rope: torch.Tensor
    positions: torch.Tensor

    outputs = ("q", "k", "v")

    @property
    def sets(self) -> int:
        """Input sets."""
        return len(self.qkv)

    def heads(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views (M, H, D), (M, Hkv, D) and (M, Hkv, D) of the projection."""
        case = self.case
        split = [case.heads, case.kv_heads, case.kv_heads]
        views = self.qkv[index].view(-1, sum(split), case.head_dim).split(split, dim=1)
        return views[0], views[1], views[2]

    def truth(self, index: int) -> Outputs:
        """In float64."""
        return self._looped(index, torch.float64)

    def own(self, index: int) -> Outputs:
        """In the inputs' dtype."""
        return self._looped(index, self.qkv[0].dtype)

    def _looped(self, index: int, dtype: torch.dtype) -> Outputs:
        return looped_qk_norm_rope(
            self.qkv[index].to(dtype),
            self.q_weight[index].to(dtype),
            self.k_weight[index].to(dtype),
            self.rope,
            self.positions,
            self.plan.expert_ids,
            num_heads=self.case.heads,
            num_kv_heads=self.case.kv_heads,
            eps=_EPS,
        )


def make_norm_problem(case: NormCase, sets: int, device: torch.device) -> NormProblem:
    """Random inputs."""
    draw = Draw(case, sets, device)
    rows, experts = case.routing.rows, case.routing.num_experts
    return NormProblem(
        case,
        plan_of(case, device),
        x=draw.normal(rows, case.width),
        residual=draw.normal(rows, case.width) if case.add else None,
        weight=draw.normal(experts, case.width),
    )


def make_qk_problem(case: QkCase, sets: int, device: torch.device) -> QkProblem:
    """Random inputs; row r has position r."""
    draw = Draw(case, sets, device)
    rows, experts = case.routing.rows, case.routing.num_experts
    positions = torch.arange(rows, device=device)
    rates = 1e6 ** -(torch.arange(case.head_dim // 2, device=device) * 2 / case.head_dim)
    angles = positions[:, None].double() * rates.double()
    return QkProblem(
        case,
        plan_of(case, device),
        qkv=draw.normal(rows, (case.heads + 2 * case.kv_heads) * case.head_dim),
        q_weight=draw.normal(experts, case.head_dim),
        k_weight=draw.normal(experts, case.head_dim),
        rope=torch.cat([angles.cos(), angles.sin()], dim=1).float(),
        positions=positions,
    )


RMS_NORM = Operation("rms_norm", NormProblem, make_norm_problem)
QK_NORM_ROPE = Operation("qk_norm_rope", QkProblem, make_qk_problem)


@RMS_NORM.provider("mot", label="mot_rms_norm")
def mot_norm(problem: NormProblem) -> Ready:
    """Ours."""

    def run(index: int) -> object:
        return mot_rms_norm(
            problem.x[index],
            problem.weight[index],
            problem.plan,
            eps=_EPS,
            residual=problem.residual_of(index),
        )

    return Ready(run, note=path_note(problem.x[0]))


@RMS_NORM.provider("torch", label="torch rms_norm, one weight", baseline=True, exempt=_ONE_WEIGHT)
def torch_norm(problem: NormProblem) -> Ready:
    """What a model without experts does."""
    expert = problem.plan.counts.index(max(problem.plan.counts))

    def run(index: int) -> object:
        x, residual = problem.x[index], problem.residual_of(index)
        summed = x if residual is None else x + residual
        y = F.rms_norm(summed, (x.shape[1],), problem.weight[index][expert], _EPS)
        return y if residual is None else (y, summed)

    return Ready(run)


@RMS_NORM.provider("gather_scatter", label="gather, norm, scatter")
def gather_scatter_norm(problem: NormProblem) -> Ready:
    """Per expert: pick its rows, normalise them, put them back."""
    routed = _routed(problem.plan)

    def run(index: int) -> object:
        x, residual = problem.x[index], problem.residual_of(index)
        summed = x if residual is None else x + residual
        y = routed(summed, problem.weight[index])
        return y if residual is None else (y, summed)

    return Ready(run)


@QK_NORM_ROPE.provider("mot", label="mot_qk_norm_rope")
def mot_qk(problem: QkProblem) -> Ready:
    """Ours."""

    def run(index: int) -> object:
        return mot_qk_norm_rope(
            problem.qkv[index],
            problem.q_weight[index],
            problem.k_weight[index],
            problem.rope,
            problem.positions,
            problem.plan,
            num_heads=problem.case.heads,
            num_kv_heads=problem.case.kv_heads,
            eps=_EPS,
        )

    return Ready(run, note=path_note(problem.qkv[0]))


@QK_NORM_ROPE.provider(
    "torch", label="torch rms_norm and eager RoPE, one weight", baseline=True, exempt=_ONE_WEIGHT
)
def torch_qk(problem: QkProblem) -> Ready:
    """What a model without experts does in eager mode."""
    expert = problem.plan.counts.index(max(problem.plan.counts))
    cos, sin = _cos_sin(problem)
    size = (problem.case.head_dim,)

    def run(index: int) -> object:
        q, k, v = problem.heads(index)
        q = F.rms_norm(q, size, problem.q_weight[index][expert], _EPS)
        k = F.rms_norm(k, size, problem.k_weight[index][expert], _EPS)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()

    return Ready(run)


@QK_NORM_ROPE.provider("gather_scatter", label="gather, norm, scatter, eager RoPE")
def gather_scatter_qk(problem: QkProblem) -> Ready:
    """Per expert: pick its rows' heads, normalise them, put them back; then rotate all."""
    routed = _routed(problem.plan)
    cos, sin = _cos_sin(problem)

    def run(index: int) -> object:
        q, k, v = problem.heads(index)
        q = routed(q, problem.q_weight[index])
        k = routed(k, problem.k_weight[index])
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()

    return Ready(run)


def _routed(plan: RoutePlan) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """RMSNorm of (M, ..., D) by each row's expert: gather, norm, scatter."""
    rows = [plan.rows_of(e).long() for e in range(plan.num_experts)]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for expert, own in enumerate(rows):
            if len(own):
                mine = F.rms_norm(x.index_select(0, own), weight.shape[1:], weight[expert], _EPS)
                y.index_copy_(0, own, mine)
        return y

    return norm


def _cos_sin(problem: QkProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, 1, D / 2) each, in the inputs' dtype; models look them up once for all layers."""
    table = problem.rope[problem.positions, None].to(problem.qkv[0].dtype)
    cos, sin = table.chunk(2, dim=-1)
    return cos, sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
