"""What problems of every operation are made of: random tensors and a plan."""

from __future__ import annotations

import torch
from mot_kernels import Path, RoutePlan, choose_path

from mot_bench.cases import Case


class Draw:
    """Random tensors for a case, the same in every run on a device."""

    def __init__(self, case: Case, sets: int, device: torch.device) -> None:
        self._dtype: torch.dtype = getattr(torch, case.dtype)
        self._sets = sets
        self._device = device
        # A generator of its own: a failed graph capture may leave the default one unusable.
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> list[torch.Tensor]:
        """One normal tensor per input set, in the case's dtype."""
        return [
            torch.randn(shape, device=self._device, generator=self._generator)
            .mul_(scale)
            .to(self._dtype)
            for _ in range(self._sets)
        ]


def plan_of(case: Case, device: torch.device) -> RoutePlan:
    """The case's routing as a plan."""
    routing = case.routing
    return RoutePlan.from_runs(routing.runs, num_experts=routing.num_experts, device=device)


def path_note(x: torch.Tensor) -> str:
    """Empty on the Triton path, otherwise which path our operations take and why."""
    choice = choose_path(x.device, x.dtype)
    return "" if choice.path is Path.TRITON else f"{choice.path.value} path: {choice.why}"
