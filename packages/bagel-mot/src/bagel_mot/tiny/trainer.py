"""One stage of training: Adam, an average of the weights, a log, and a state to go on from.

The random numbers of a step come from the seed and the step's number, so a run that was stopped
and resumed ends with the very weights of one that was not (on one device; GPUs sum in any order).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """How a stage learns.

    The rate rises over the first `warmup` steps, stays, and falls to zero over the last `cooldown`
    share of `steps`: so a stage can be prolonged until it has begun to cool down.
    """

    steps: int
    rate: float
    warmup: int = 200
    cooldown: float = 0.25
    average: float = 0.999
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        cooling = max(self.cooldown * self.steps, 1)
        left = (self.steps - step) / cooling
        return self.rate * min((step + 1) / self.warmup, left, 1.0)


Loss = Callable[[int], Mapping[str, Tensor]]
"""Step number -> named losses; their sum is what is minimised."""


class Stage:
    """Trains some tensors until its schedule's end, or until time is up.

    What a leaf learns is smaller than bfloat16 can tell: leaves in 16 bits have a master each, in
    float32, which the optimiser changes and the leaf follows.

    Args:
        name: of the stage; its state is `NAME.pt` in `folder`.
        leaves: what learns, by name.
        loss: see `Loss`.
        log: JSON lines go there: step, rate, losses (means since the last line), seconds.
        log_every, save_every: steps.
    """

    def __init__(
        self,
        name: str,
        leaves: dict[str, Tensor],
        loss: Loss,
        schedule: Schedule,
        folder: Path,
        *,
        log_every: int = 50,
        save_every: int = 1000,
    ) -> None:
        self.name = name
        self.leaves = leaves
        self.schedule = schedule
        self.step = 0
        self._loss = loss
        self._log = folder / "log.jsonl"
        self._state = folder / f"{name}.pt"
        self._log_every, self._save_every = log_every, save_every
        self._masters = {
            key: leaf if leaf.dtype is torch.float32 else leaf.detach().float()
            for key, leaf in leaves.items()
        }
        pairs = [(leaf, self._masters[key]) for key, leaf in leaves.items()]
        self._followers = [(leaf, master) for leaf, master in pairs if master is not leaf]
        self.average = {key: each.detach().clone() for key, each in self._masters.items()}
        tensors = list(self._masters.values())
        self._optimizer = torch.optim.Adam(
            tensors, lr=schedule.rate, betas=(0.9, 0.95), fused=tensors[0].is_cuda
        )
        if self._state.is_file():
            self._resume()

    @property
    def done(self) -> bool:
        """Whether the schedule has ended."""
        return self.step >= self.schedule.steps

    def run(self, deadline: float = float("inf")) -> bool:
        """Train until the end or until `time.monotonic()` passes `deadline`; then save.

        Returns:
            Whether the stage is done.
        """
        tensors = list(self._masters.values())
        averages = list(self.average.values())
        sums: dict[str, Tensor] = {}
        began = time.monotonic()
        counted = 0
        while not self.done and time.monotonic() < deadline:
            rate = self.schedule.rate_at(self.step)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            losses = self._loss(self.step)
            torch.stack(list(losses.values())).sum().backward()
            self._take_gradients()
            norm = torch.nn.utils.clip_grad_norm_(tensors, self.schedule.clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._follow_masters()
            # Early on the average must not hold on to the start values.
            keep = min(self.schedule.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(averages, tensors, 1 - keep)
            for key, value in {**losses, "gradient": norm}.items():
                sums[key] = sums.get(key, 0) + value.detach()
            self.step += 1
            counted += 1
            if counted == self._log_every or self.done:
                # Reading a loss waits for the device: only here.
                means = {key: float(value) / counted for key, value in sums.items()}
                now = time.monotonic()
                self._write_line(rate, means, now - began, counted)
                if not all(map(_is_finite, means.values())):
                    raise FloatingPointError(
                        f"stage {self.name}, step {self.step}: {means} is not finite; the last "
                        f"state is in {self._state}, lower the rate and resume from it"
                    )
                sums, began, counted = {}, now, 0
            if self.step % self._save_every == 0 and not self.done:
                self.save()
        self.save()
        return self.done

    def _take_gradients(self) -> None:
        """Hand the gradients of leaves in 16 bits to their masters."""
        for leaf, master in self._followers:
            if leaf.grad is not None:
                master.grad, leaf.grad = leaf.grad.float(), None

    @torch.no_grad()
    def _follow_masters(self) -> None:
        if self._followers:
            leaves, masters = zip(*self._followers, strict=True)
            torch._foreach_copy_(leaves, masters)

    def save(self) -> None:
        """Write the state beside the old one, then rename: it is whole or the old one."""
        self._state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._state.with_suffix(".tmp")
        state = {
            "step": self.step,
            "leaves": {key: master.detach() for key, master in self._masters.items()},
            "average": self.average,
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, temporary)
        os.replace(temporary, self._state)

    @torch.no_grad()
    def _resume(self) -> None:
        device = next(iter(self.leaves.values())).device
        state = torch.load(self._state, map_location=device, weights_only=True)
        if state["leaves"].keys() != self.leaves.keys():
            raise ValueError(f"{self._state} holds other tensors than this model has")
        for key, master in self._masters.items():
            master.copy_(state["leaves"][key])
            self.average[key].copy_(state["average"][key])
        self._follow_masters()
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _write_line(
        self, rate: float, means: Mapping[str, float], seconds: float, steps: int
    ) -> None:
        line = {
            "stage": self.name,
            "step": self.step,
            "rate": float(f"{rate:.4g}"),
            **{key: float(f"{value:.5g}") for key, value in means.items()},
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / max(seconds, 1e-9), 2),
        }
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _is_finite(value: float) -> bool:
    return value - value == 0
