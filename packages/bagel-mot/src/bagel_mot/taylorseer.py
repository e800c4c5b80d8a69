"""Fewer full steps: velocities between them extrapolated by their Taylor series.

TaylorSeer (Liu et al., arXiv:2503.06923), with the rules and settings of the official BAGEL code.
That one extrapolates features inside the layers; here it is the velocity of every branch.
Velocities are a linear map of the hidden states after the final norm, and so are their
extrapolations: it is the same as extrapolating those, with 64 numbers a token instead of thousands
a layer. An extrapolated step then costs a few passes over the latents, and guidance is applied to
extrapolated branches as to computed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import torch
from pydantic import BaseModel, ConfigDict, Field


class TaylorSeer(BaseModel):
    """When to extrapolate; the defaults are the official ones.

    Attributes:
        interval: every so many steps one is computed in full.
        max_order: highest derivative that is used.
        first_full: the first steps, which are all computed in full.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval: int = Field(3, ge=1)
    max_order: int = Field(6, ge=0)
    first_full: int = Field(5, ge=1)


@dataclass(frozen=True)
class _Series:
    """The Taylor series of one branch's velocity around a step.

    Attributes:
        step: the full step.
        derivatives: of order 0, 1, ... with respect to the step's number, (N, 64) float32 each,
            by backward differences.
    """

    step: int
    derivatives: tuple[torch.Tensor, ...]

    def at(self, step: int) -> torch.Tensor:
        """The series at a later step, (N, 64)."""
        ahead = step - self.step
        value = self.derivatives[0].clone()
        for order, derivative in enumerate(self.derivatives[1:], start=1):
            value.add_(derivative, alpha=ahead**order / factorial(order))
        return value


class Extrapolation:
    """The series of all branches of one image; owned by its job.

    Args:
        settings: when to extrapolate.
    """

    def __init__(self, settings: TaylorSeer) -> None:
        self.settings = settings
        self._series: dict[int, _Series] = {}
        self._last_full = -1

    def is_full(self, step: int, branches: int) -> bool:
        """Whether the first `branches` branches are to be computed in full at this step.

        Also where one of them was not computed at the last full step, since guidance was off.
        """
        if step < self.settings.first_full or step - self._last_full >= self.settings.interval:
            return True
        known = (self._series.get(branch) for branch in range(branches))
        return not all(series and series.step == self._last_full for series in known)

    def note(self, step: int, velocities: tuple[torch.Tensor, ...]) -> None:
        """Take in the branches of a full step, once; the tensors are copied."""
        for branch, velocity in enumerate(velocities):
            before = self._series.get(branch)
            if before is not None and before.step == step:  # made again, after a failure
                continue
            derivatives = [velocity.clone()]
            # Of the first steps only the last two count: earlier velocities change too fast.
            if before is not None and step > self.settings.first_full - 2:
                distance = step - before.step
                for old in before.derivatives[: self.settings.max_order]:
                    derivatives.append((derivatives[-1] - old) / distance)
            self._series[branch] = _Series(step, tuple(derivatives))
        self._last_full = step

    def at(self, step: int, branches: int) -> tuple[torch.Tensor, ...]:
        """Velocities of the first branches at a step that is not full."""
        return tuple(self._series[branch].at(step) for branch in range(branches))
