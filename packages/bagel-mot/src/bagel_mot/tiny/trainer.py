"""One stage of training: Adam, an average of the weights, a log, and a state to go on from.

The random numbers of a step come from the seed and the step's number, so a run that was stopped
and resumed ends with the very weights of one that was not (on one device; GPUs sum in any order;
and unless its loss keeps something between steps, as `practice` does).
"""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel_mot.tiny.replicas import Replicas


@dataclass(frozen=True)
class Schedule:
    """How a stage learns.

    The rate rises over the first `warmup` steps, stays, and falls to zero over the last `cooldown`
    share of `steps`: so a stage can be prolonged until it has begun to cool down. Most of what is
    learned shows only while it falls, hence the long way down.
    """

    steps: int
    rate: float
    warmup: int = 200
    cooldown: float = 0.75
    average: float = 0.999
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        cooling = max(self.cooldown * self.steps, 1)
        left = (self.steps - step) / cooling
        return self.rate * min((step + 1) / self.warmup, left, 1.0)


@dataclass(frozen=True)
class Loss:
    """What a stage minimises.

    Attributes:
        choose: step number -> its kind, one of a few; seeds `generator`, so that all of a step
            follows from its number.
        compute: kind -> named losses, whose sum is minimised. Steps of a kind launch the same work
            on the same tensors, and nothing waits for the device.
        generator: where `compute` gets its random numbers, all of them.
        notes: what else a line of the log says, of the time since the last one.
    """

    choose: Callable[[int], int]
    compute: Callable[[int], Mapping[str, Tensor]]
    generator: torch.Generator
    notes: Callable[[], Mapping[str, float]] = dict


_ALONE = Replicas()
# Between saves, at most: on a slow device `save_every` steps are too many to lose.
_SAVE_SECONDS = 600


class StepGraphs:
    """CUDA graphs of steps, one for each kind.

    Args:
        generator: of all random numbers in a step; a replay takes those that follow its seed.
    """

    _WARM = 2  # steps of a kind that run as they are: they compile, choose algorithms, allocate

    def __init__(self, generator: torch.Generator) -> None:
        self._stream = torch.cuda.Stream(generator.device)
        self._generator = generator
        self._pool = torch.cuda.graph_pool_handle()
        self._done: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """All steps must be inside: on the stream that graphs are captured on, behind what was
        launched before, and before what follows."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)
            # They hold exchanges between processes, whose groups wait for them to go.
            self._graphs.clear()

    def run(self, kind: int, update: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`update()`, from a graph as soon as there is one; what it returns is valid until the
        next step of the kind."""
        self._done[kind] += 1
        if self._done[kind] <= self._WARM:
            return update()
        if kind not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            # Other threads, NCCL's among them, may go on asking the device.
            mode = "thread_local"
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode=mode
            ):
                found = update()
            self._graphs[kind] = graph, found
        graph, found = self._graphs[kind]
        graph.replay()
        return found


class Stage:
    """Trains some tensors until its schedule's end, or until time is up.

    What a leaf learns is smaller than bfloat16 can tell, and there are many leaves: the optimiser
    changes masters, all in one float32 tensor, and the leaves follow.

    Args:
        name: of the stage; its state is `NAME.pt` in `folder`.
        leaves: what learns, by name.
        loss: see `Loss`.
        log: JSON lines go there: step, rate, losses (means since the last line), seconds.
        log_every, save_every: steps.
        cuda_graphs: on a GPU, capture the third step of each kind in a CUDA graph and replay it
            from then on: thousands of small kernels would wait for Python.
        replicas: who trains the same model; `loss` chooses equal kinds on each, and computes on
            samples of its own. The first one writes state and log, with its own losses.
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
        cuda_graphs: bool = True,
        replicas: Replicas = _ALONE,
    ) -> None:
        self.name = name
        self.leaves = leaves
        self.schedule = schedule
        self.step = 0
        self._loss = loss
        self._replicas = replicas
        self._log = folder / "log.jsonl"
        self._state = folder / f"{name}.pt"
        self._log_every, self._save_every = log_every, save_every
        self._saved = time.monotonic()
        joined = torch.cat([leaf.detach().flatten().float() for leaf in leaves.values()])
        self._joined = torch.nn.Parameter(joined)
        self._joined.grad = torch.zeros_like(joined)
        self._joined_average = joined.clone()
        self._masters = self._by_leaf(joined)
        self._gradients = self._by_leaf(self._joined.grad)
        self.average = self._by_leaf(self._joined_average)
        device = joined.device
        on_gpu = device.type == "cuda"
        # What a graph reads anew each time has to be in a tensor: also the rate.
        rate: Any = torch.tensor(schedule.rate, device=device) if on_gpu else schedule.rate
        self._options = {"fused": on_gpu, "capturable": on_gpu}
        self._optimizer = torch.optim.Adam(
            [self._joined], lr=rate, betas=(0.9, 0.95), **self._options
        )
        self._blend = torch.zeros((), device=device)
        self._step_graphs = StepGraphs(loss.generator) if on_gpu and cuda_graphs else None
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
        if self._step_graphs is None:
            return self._run(deadline)
        with self._step_graphs.running():
            return self._run(deadline)

    def _run(self, deadline: float) -> bool:
        tally = _Tally()
        while not self.done and not self._late(deadline):
            self._set_rate(self.schedule.rate_at(self.step))
            # Early on the average must not hold on to the start values.
            keep = min(self.schedule.average, (1 + self.step) / (10 + self.step))
            self._blend.fill_(1 - keep)
            kind = self._loss.choose(self.step)
            update = functools.partial(self._update, kind)
            found = update() if self._step_graphs is None else self._step_graphs.run(kind, update)
            tally.add(found)
            self.step += 1
            saves = self.step % self._save_every == 0 or self._save_is_due()
            if tally.steps == self._log_every or saves:
                self._report(tally)
                tally = _Tally()
            if saves and not self.done:
                self.save()
        self._report(tally)
        self.save()
        return self.done

    def _save_is_due(self) -> bool:
        """By time. Replicas would have to agree on it."""
        return self._replicas.size == 1 and time.monotonic() - self._saved > _SAVE_SECONDS

    def _late(self, deadline: float) -> bool:
        """Whether time is up. Replicas stop at the same step, so they ask now and then."""
        if self._replicas.size > 1 and self.step % self._log_every:
            return False
        return self._replicas.agree(time.monotonic() >= deadline)

    def _update(self, kind: int) -> dict[str, Tensor]:
        """A step: losses, gradients, weights and their average. Nothing waits for the device."""
        losses = self._loss.compute(kind)
        torch.stack(list(losses.values())).sum().backward()
        gradient = self._take_gradients()
        self._replicas.average(gradient)
        norm = torch.nn.utils.clip_grad_norm_(self._joined, self.schedule.clip)
        self._optimizer.step()
        self._follow_masters()
        with torch.no_grad():
            self._joined_average.lerp_(self._joined, self._blend)
        return {key: value.detach() for key, value in {**losses, "gradient": norm}.items()}

    def _by_leaf(self, joined: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor of all leaves, as views."""
        parts = joined.split([leaf.numel() for leaf in self.leaves.values()])
        return {
            key: part.view_as(leaf)
            for (key, leaf), part in zip(self.leaves.items(), parts, strict=True)
        }

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _take_gradients(self) -> Tensor:
        """The masters' gradient, from the leaves; zero where a loss does not reach."""
        gradient = self._joined.grad
        assert gradient is not None
        gradient.zero_()
        found = {key: leaf.grad for key, leaf in self.leaves.items() if leaf.grad is not None}
        torch._foreach_copy_([self._gradients[key] for key in found], list(found.values()))
        for leaf in self.leaves.values():
            leaf.grad = None
        return gradient

    @torch.no_grad()
    def _follow_masters(self) -> None:
        torch._foreach_copy_(list(self.leaves.values()), list(self._masters.values()))

    def save(self) -> None:
        """Write the state beside the old one, then rename: it is whole or the old one."""
        if self._replicas.rank > 0:
            return
        self._saved = time.monotonic()
        self._state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._state.with_suffix(".tmp")
        state = {
            "step": self.step,
            "steps": self.schedule.steps,
            "leaves": self._masters,
            "average": self.average,
            "optimizer": self._optimizer.state_dict(),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, self._state)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):  # torch's own words for a full disk
                raise OSError(f"{self._state} cannot be written: {error}") from error
            raise

    @torch.no_grad()
    def _resume(self) -> None:
        device = next(iter(self.leaves.values())).device
        try:
            state = torch.load(self._state, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{self._state} is no whole state ({' '.join(str(error).split())}): remove it to "
                "begin this stage again, or choose another folder"
            ) from error
        step, wanted = state["step"], self.schedule.steps
        if step > wanted:
            raise ValueError(
                f"{self._state} is at step {step}, past the {wanted} steps that are wanted: give "
                "as many or more, or choose another folder"
            )
        planned = state.get("steps", wanted)  # states of before 2026-11-30 do not say
        if planned != wanted and step > (1 - self.schedule.cooldown) * planned:
            raise ValueError(
                f"{self._state} is at step {step} of {planned}, where the rate falls already: it "
                f"cannot have {wanted} steps any more; give {planned} as before, or choose another "
                "folder"
            )
        if state["leaves"].keys() != self.leaves.keys():
            raise ValueError(f"{self._state} holds other tensors than this model has")
        for key, master in self._masters.items():
            master.copy_(state["leaves"][key])
            self.average[key].copy_(state["average"][key])
        self._follow_masters()
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        # The state may come from another device: it says how far Adam is, not how Adam runs.
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group.update(self._options, lr=rate)
        self.step = step

    def _report(self, tally: _Tally) -> None:
        """Write a line of the log. Whatever is saved after this is finite.

        Raises:
            ValueError: a loss or the gradient is not.
        """
        if not tally.steps:
            return
        # Reading a loss waits for the device: only here.
        means = {key: float(value) / tally.counts[key] for key, value in tally.sums.items()}
        seconds = time.monotonic() - tally.began
        line = {
            "stage": self.name,
            "step": self.step,
            "rate": float(f"{self.schedule.rate_at(self.step - 1):.4g}"),
            **{
                key: float(f"{value:.5g}") for key, value in {**means, **self._loss.notes()}.items()
            },
            "seconds": round(seconds, 3),
            "steps_per_second": round(tally.steps / max(seconds, 1e-9), 2),
        }
        if self._replicas.rank == 0:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if not all(map(math.isfinite, means.values())):
            last = "no state was saved yet: begin again with a lower rate"
            if self._state.is_file():
                last = f"the last state is in {self._state}, lower the rate and resume from it"
            raise ValueError(f"stage {self.name}, step {self.step}: {means} is not finite; {last}")


class _Tally:
    """Sums of losses over some steps."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.steps = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()  # a step need not have all losses

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Those of one more step."""
        self.steps += 1
        for key, value in losses.items():
            # A sum of its own: the next replay of the step's graph overwrites the losses.
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
            self.counts[key] += 1
