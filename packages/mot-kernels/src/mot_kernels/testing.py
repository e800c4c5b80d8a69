"""What tests of routed operations need: the routes that break kernels, a truth, and a judge.

Routed operations fail in ways whole-tensor measures do not see. A denoising step has 2 und rows
among 4,098: if both are entirely wrong, the whole tensor still has a cosine of 0.9995 and an RMS
error of 3 %, which passes most published tolerances. So `assert_close` judges each expert's rows
by themselves, and `poisoned` outputs show rows that were never written. What counts as close is
not chosen but measured, on the same inputs, from torch's own computation in the same dtype.

The `looped_*` functions say once more what each operation computes, in the plainest way: one mask
per expert. They share nothing with `mot_kernels.reference`, which is itself under test here. Call
them with float64 copies for the truth, and with the inputs themselves for the baseline.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from mot_kernels.epilogue import AddResidual, Epilogue, SiluMul
from mot_kernels.plan import RoutePlan


@dataclass(frozen=True)
class Route:
    """One way to route packed rows, by name; `str()` of it is a test id.

    Attributes:
        name: words, joined by underscores.
        num_experts: E.
        runs: (expert, length) pairs in row order.
    """

    name: str
    num_experts: int
    runs: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return self.name

    @property
    def num_rows(self) -> int:
        """M."""
        return sum(length for _, length in self.runs)

    @property
    def labels(self) -> list[int]:
        """The expert of each row."""
        return [expert for expert, length in self.runs for _ in range(length)]

    def plan(self, device: torch.device | str = "cpu") -> RoutePlan:
        """The `RoutePlan` of this route."""
        return RoutePlan.from_runs(self.runs, num_experts=self.num_experts, device=device)


def _scattered(num_experts: int, rows: int) -> tuple[tuple[int, int], ...]:
    """Every row's expert drawn at random, the same on every machine."""
    draw = random.Random(0)
    labels = [draw.randrange(num_experts) for _ in range(rows)]
    return tuple((expert, len(list(run))) for expert, run in groupby(labels))


def _branches(count: int, image_tokens: int) -> tuple[tuple[int, int], ...]:
    """CFG branches of one image: start marker, its latents, end marker."""
    return ((0, 1), (1, image_tokens), (0, 1)) * count


_ROUTES = (
    Route("no_rows", 2, ()),
    Route("no_und_rows", 2, ((1, 40),)),
    Route("no_gen_rows", 2, ((0, 40),)),
    Route("one_row", 2, ((1, 1),)),
    Route("first_and_last_row", 2, ((0, 1), (1, 38), (0, 1))),
    Route("every_second_row", 2, ((0, 1), (1, 1)) * 70),
    Route("scattered", 2, _scattered(2, 150)),
    # One row under a tile, a full tile, one row over: for the smallest tile, and for the largest
    # that the computed defaults use.
    *(Route(f"gen{rows}", 2, ((0, 2), (1, rows))) for rows in (15, 16, 17, 127, 128, 129)),
    # 257 is the largest tile and a row; short ones keep interpreted tests short.
    Route("one_branch", 2, _branches(1, 257)),
    Route("two_branches", 2, _branches(2, 70)),
    Route("three_branches", 2, _branches(3, 70)),
    # Runs just over and just under the length that gets tiles of its own, for one expert.
    Route("long_and_short_runs", 2, ((1, 70), (0, 1), (1, 3), (0, 65), (1, 64), (0, 1), (1, 63))),
    Route("one_expert", 1, ((0, 33),)),
    Route("three_experts", 3, _scattered(3, 60)),
    Route("four_experts_one_empty", 4, ((3, 20), (0, 5), (1, 17), (0, 2))),
)

ROUTES: dict[str, Route] = {route.name: route for route in _ROUTES}
"""The routing edge cases, one list for every operation: `parametrize(ROUTES.values(), ids=str)`."""


def poisoned(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A tensor full of NaN, to write into.

    `torch.empty` often returns the memory of the previous, correct result; a kernel that forgets
    rows then passes. NaN stays visible, through any arithmetic that follows.
    """
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; 0 if they are equal, also where truth is zero."""
    truth = truth.double()
    distance = float((actual.double() - truth).norm())
    if distance == 0.0:
        return 0.0
    size = float(truth.norm())
    return distance / size if size else math.inf


def assert_close(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    plan: RoutePlan | None,
    baseline: torch.Tensor,
) -> None:
    """Judge each expert's rows of `actual` by themselves.

    Separately, because two wrong rows in 4,098 hide in whole-tensor measures. For every expert
    with rows, the relative L2 error of its rows against `truth` must be at most 1.5 times that of
    `baseline`, or if that is more a floor below which it is chance whose error is the larger: a
    quarter of a rounding step of the dtype, what rounding the result alone costs on average. With
    fewer than 16 rows it is a step / sqrt(rows), because all elements of a row may share one
    rounded factor, a norm's scale for instance. Their cosine must exceed 0.9999, and NaN and
    infinities must sit where truth, rounded to the dtype, has them.

    Args:
        name: what is compared, for the message.
        actual: (M, ...) the result under test.
        truth: (M, ...) the same from float64 or float32 arithmetic.
        plan: the routing of the M rows; None means all of them are expert 0.
        baseline: (M, ...) torch's own computation in actual's dtype on the same inputs. What it
            loses, a kernel may lose too.

    Raises:
        AssertionError: naming each expert that fails, its errors, the bound and the worst elements.
    """
    if not actual.shape == truth.shape == baseline.shape or actual.dtype is not baseline.dtype:
        raise AssertionError(
            f"{name}: actual is {actual.dtype} {tuple(actual.shape)}, truth {tuple(truth.shape)}, "
            f"baseline {baseline.dtype} {tuple(baseline.shape)}; they must agree"
        )
    if plan is not None and plan.num_rows != actual.shape[0]:
        raise AssertionError(f"{name}: plan has {plan.num_rows} rows, actual {actual.shape[0]}")
    experts = 1 if plan is None else plan.num_experts
    failures = []
    for expert in range(experts):
        if plan is None:
            rows = torch.arange(actual.shape[0], device=actual.device)
        else:
            rows = (plan.expert_ids == expert).nonzero().flatten()
        if len(rows):
            problem = _judge(actual[rows], truth[rows], baseline[rows], rows)
            if problem:
                failures.append(
                    f"{name}: expert {expert} ({len(rows)} of {len(actual)} rows): {problem}"
                )
    if failures:
        raise AssertionError("\n".join(failures))


def _judge(
    actual: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor, rows: torch.Tensor
) -> str | None:
    """What is wrong with one expert's rows, or None."""
    rounded = truth.to(actual.dtype)
    wrong = (actual.isnan() != rounded.isnan()) | (
        (actual.isinf() | rounded.isinf()) & (actual != rounded) & ~actual.isnan()
    )
    if wrong.any():
        return (
            f"{int(wrong.sum())} of {wrong.numel()} elements differ in being NaN or infinite\n"
            + _worst(wrong.double(), actual, truth, rows)
        )
    finite = rounded.isfinite()
    kept = torch.where(finite, actual, 0).double()
    wanted = torch.where(finite, truth, 0).double()
    error = relative_error(kept, wanted)
    cosine = _cosine(kept, wanted)
    sound = finite & baseline.isfinite()
    allowed = relative_error(torch.where(sound, baseline, 0), torch.where(sound, truth, 0))
    floor = torch.finfo(actual.dtype).eps * max(0.25, len(rows) ** -0.5)
    bound = max(1.5 * allowed, floor)
    if error <= bound and cosine > 0.9999:
        return None
    measured = f"relative error {error:.3g}, bound {bound:.3g} (baseline {allowed:.3g})"
    worst = _worst((kept - wanted).abs(), actual, truth, rows)
    return f"{measured}, cosine {cosine:.6f}, must exceed 0.9999\n{worst}"


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.any() and not b.any():
        return 1.0
    product = float(a.norm() * b.norm())
    return float((a * b).sum()) / product if product else 0.0


def _worst(
    error: torch.Tensor, actual: torch.Tensor, truth: torch.Tensor, rows: torch.Tensor
) -> str:
    """The three elements with the largest error, by their coordinates in the whole tensor."""
    lines = []
    for flat in error.flatten().topk(min(3, error.numel())).indices.tolist():
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        if error[at]:
            where = [int(rows[at[0]]), *at[1:]]
            lines.append(f"  at {where}: {float(actual[at]):.8g}, truth {float(truth[at]):.8g}")
    return "\n".join(lines)


def linear_in_order(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`, adding up the K products one after the other.

    The float32 baseline. A library's own float32 product keeps several partial sums, so its error
    depends on the library and can be half of what one accumulator per element must make, which
    grows with sqrt(K). In 16 bits the final rounding hides this; `F.linear` is the baseline there.
    """
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        y.addcmul_(x[:, k, None], weight[:, k])
    return y if bias is None else y + bias


def looped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    epilogue: Epilogue | None = None,
    linear: Callable[..., torch.Tensor] = F.linear,
) -> torch.Tensor:
    """`mot_kernels.mot_linear`, one masked `linear` per expert; rounds after every operation.

    Args:
        labels: (M,) integer, the expert of each row, on x's device.
        linear: `F.linear` or `linear_in_order`.
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        mask = labels == expert
        y[mask] = linear(x[mask], weight[expert], None if bias is None else bias[expert])
    if isinstance(epilogue, SiluMul):
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    elif isinstance(epilogue, AddResidual):
        y = y + epilogue.residual.to(y.dtype)
    return y


def looped_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mot_kernels.mot_rms_norm`, one masked norm per expert; returns (y, x + residual).

    Works on any (M, ..., D) tensor, so also on the heads of a projection.
    """
    summed = x if residual is None else x + residual
    y = torch.zeros_like(summed)
    for expert in range(weight.shape[0]):
        mask = labels == expert
        y[mask] = F.rms_norm(summed[mask], weight.shape[1:], weight[expert], eps)
    return y, summed


def looped_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    rope: torch.Tensor,
    positions: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mot_kernels.mot_qk_norm_rope` without destinations: q, k, v in row order."""
    rows, size = qkv.shape[0], q_weight.shape[1]
    heads = qkv.reshape(rows, num_heads + 2 * num_kv_heads, size)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    table = rope[positions.long(), None].to(qkv.dtype)
    cos, sin = table[..., : size // 2], table[..., size // 2 :]

    def normed_and_rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = looped_rms_norm(x, weight, labels, eps=eps)[0]
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return normed_and_rotated(q, q_weight), normed_and_rotated(k, k_weight), v.contiguous()
