"""`mot_linear` with weights in a number format, against ourselves without it.

Rows of formats that round them are rounded before: that time belongs to whatever made them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from mot_kernels import (
    ExpertWeight,
    Fp8W8A8,
    QuantizedRows,
    dequantize,
    quantize_rows,
    quantize_weight,
)
from mot_kernels.formats import FORMATS, check_k, quantizes_activations

from mot_bench import linear, options
from mot_bench.cases import Layer, LinearCase
from mot_bench.errors import UsageError
from mot_bench.inputs import path_note
from mot_bench.linear import LinearProblem, mot_variant
from mot_bench.protocol import first_line
from mot_bench.registry import Operation, Ready, Unavailable


@dataclass(frozen=True)
class FormatProblem(LinearProblem):
    """A linear case with its weights in a format as well.

    Attributes:
        stored: the weights in it.
        rows: x rounded to it, or None if it keeps x.
    """

    stored: list[ExpertWeight]
    rows: list[QuantizedRows] | None

    def operands(self, index: int) -> tuple[torch.Tensor | QuantizedRows, ExpertWeight]:
        """x and weight as `mot_linear` takes them."""
        return (self.rows or self.x)[index], self.stored[index]

    def numbers(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices (M, K) and (E, N, K) that the operands stand for."""
        x = self.x[index] if self.rows is None else self.rows[index].float()
        return x, dequantize(self.stored[index])


def make_problem(case: LinearCase, sets: int, device: torch.device) -> FormatProblem:
    """Random inputs, rounded."""
    plain = linear.make_problem(case, sets, device)
    format = FORMATS[case.format or ""]
    rounds = quantizes_activations(format)
    return FormatProblem(
        **{field.name: getattr(plain, field.name) for field in fields(plain)},
        stored=[quantize_weight(weight, format) for weight in plain.weight],
        rows=[quantize_rows(x, format) for x in plain.x] if rounds else None,
    )


def check_format(format: str | None, layers: Iterable[Layer]) -> None:
    """Refuse a format that there is not, or that does not go with a layer.

    Raises:
        UsageError: naming it.
    """
    if format is None:
        return
    options.one_of("--format", format, tuple(FORMATS))
    for layer in layers:
        try:
            check_k(FORMATS[format], layer.k)
        except ValueError as error:
            raise UsageError(
                f"--format is {format!r}, but layer {layer.name} has {error}"
            ) from error


LINEAR_FORMAT = Operation("linear_format", FormatProblem, make_problem)


@LINEAR_FORMAT.provider("mot", label="mot_linear")
def mot(problem: FormatProblem) -> Ready:
    """Ours."""
    return Ready(mot_variant(problem), note=path_note(problem.x[0]))


@LINEAR_FORMAT.provider(
    "plain",
    label="mot_linear, nothing rounded",
    baseline=True,
    exempt="other numbers: the weights before they were rounded",
)
def plain(problem: FormatProblem) -> Ready:
    """What the format is to be faster than, or smaller."""
    inherited = {field.name: getattr(problem, field.name) for field in fields(LinearProblem)}
    return Ready(mot_variant(LinearProblem(**inherited)))


@LINEAR_FORMAT.provider(
    "scaled_mm",
    label="torch._scaled_mm, one expert, the product alone",
    exempt="one expert's weight for all rows",
)
def scaled_mm(problem: FormatProblem) -> Ready:
    """The FP8 product of a model without experts, with scales of rows and channels."""
    if problem.stored[0].format != Fp8W8A8():
        raise Unavailable(f"it multiplies {Fp8W8A8()}")
    assert problem.rows is not None
    counts = problem.plan.counts
    expert = counts.index(max(counts))
    x = [(rows.data, rows.scales[:, None]) for rows in problem.rows]
    w = [(each.data[expert].t(), each.scales[expert][None]) for each in problem.stored]

    def run(index: int) -> torch.Tensor:
        (a, a_scales), (b, b_scales) = x[index], w[index]
        y: torch.Tensor = torch._scaled_mm(
            a, b, scale_a=a_scales, scale_b=b_scales, out_dtype=problem.x[index].dtype
        )
        return y

    try:
        run(0)
    except (RuntimeError, ValueError) as error:
        raise Unavailable(f"torch._scaled_mm: {first_line(error)}") from error
    return Ready(run)
