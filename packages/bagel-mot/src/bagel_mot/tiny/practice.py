"""The last stage: the model paints, is told which pictures are right, and learns from all of them.

In training the model only sees right pictures; what it gets wrong, it learns here. In each round it
paints several pictures of each of some training captions. The grader says which are right, and
DiffusionNFT (Zheng et al., arXiv:2509.16117) makes a loss of that: towards those that are better
than their siblings, away from those that are worse, measured against an older model, which painted
them. What is learned, and what paints, is the velocity as the pipeline follows it, with guidance.

The grader also judges the model in the end, on other captions: what it does not look at, nobody
learns here.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Self

import torch
from torch import Tensor

from bagel_mot.images import to_levels
from bagel_mot.model.bagel import Bagel
from bagel_mot.sampling import ImageSettings
from bagel_mot.tiny.grading import are_right
from bagel_mot.tiny.language import Caption, draw_painting
from bagel_mot.tiny.objectives import draw_times
from bagel_mot.tiny.policy import Asked, Policy
from bagel_mot.tiny.scenes import draw_size
from bagel_mot.tiny.weights import leaves
from bagel_mot.tokenizer import BagelTokenizer

# Pictures that one process grades at a time.
_CHUNK = 8
# Least mean absolute error to divide by.
_LEAST_ERROR = 1e-3


@dataclass(frozen=True)
class Rounds:
    """How the model practises.

    Attributes:
        captions: of a round, on each replica.
        each: pictures of every caption.
        batch: pictures that a step learns from.
        steps: that learn from a round.
        settings: guidance and timesteps while practising; fewer timesteps than people use do.
    """

    captions: int = 96
    each: int = 8
    batch: int = 192
    steps: int = 8
    settings: ImageSettings = field(default_factory=lambda: ImageSettings(num_timesteps=16))


@dataclass
class _Round:
    """What was painted in a round, all of one size.

    Attributes:
        latents: (n, N, 64) as painted, float32.
        better: (n,) float32 in 0..1: 0.5 is as good as the caption's other pictures.
        index: (batch,) int64, what the next step learns from.
    """

    asked: Asked
    latents: Tensor
    better: Tensor
    index: Tensor

    def put(self, other: _Round) -> None:
        """Become another round, in the same memory: CUDA graphs read it there."""
        pairs = [(self.asked.tokens, other.asked.tokens), (self.asked.lengths, other.asked.lengths)]
        pairs += [(self.latents, other.latents), (self.better, other.better)]
        for mine, its in pairs:
            mine.copy_(its)


@dataclass(frozen=True)
class _Painted:
    """A round whose grades are still to come."""

    size: int
    asked: Asked
    latents: Tensor
    grades: Callable[[], list[bool]]


class Practice:
    """Rounds of painting and what is learned from them; a context that ends its processes.

    Two rounds are in work: while pictures of one are graded, the model learns from the one before.
    A resumed run paints them anew, with the model as it is then.

    Args:
        model: learns.
        old: of the same sizes; gets the values of `follows` in every round, and paints. Its VAE
            is not used.
        tokenizer: the model's.
        rounds: see there.
        sizes: (height, width) of the pictures, chosen in proportion to their areas.
        seed: of all captions and noise.
        rank: of this replica.
        workers: processes that grade; 0 grades in this one.

    Attributes:
        follows: values by name, an average of the model's weights; set it before the first step.
    """

    follows: Mapping[str, Tensor]

    def __init__(
        self,
        model: Bagel,
        old: Bagel,
        tokenizer: BagelTokenizer,
        rounds: Rounds,
        sizes: Sequence[tuple[int, int]],
        *,
        seed: int,
        rank: int = 0,
        workers: int = 0,
    ) -> None:
        self._rounds, self._sizes = rounds, list(sizes)
        self._seed, self._rank = seed, rank
        self._tokenizer, self._device = tokenizer, model.device
        self._learner = Policy(model, tokenizer, rounds.settings)
        self._painter = Policy(old, tokenizer, rounds.settings)
        self._old = leaves(old)
        self._held: dict[int, _Round] = {}
        self._size = 0
        self._coming: _Painted | None = None
        self._order: Tensor = torch.empty(0)
        self._graded, self._right = 0, 0
        self._executor: Executor | None = None
        if workers:
            # Not forked: torch's threads do not survive that.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def begin(self, step: int) -> int:
        """Make ready what this step learns from; returns the number of its size."""
        done = step % self._rounds.steps
        if done == 0 or not self._held:
            self._next_round(step)
        held, batch = self._held[self._size], self._rounds.batch
        held.index.copy_(self._order[done * batch :][:batch])
        return self._size

    def loss(self, size: int, generator: torch.Generator) -> Tensor:
        """DiffusionNFT's loss of a batch of the current round.

        With beta 1 and x0's errors divided by their own size, as in the paper.
        """
        held = self._held[size]
        asked, x0, better = (
            held.asked.select(held.index),
            held.latents[held.index],
            held.better[held.index],
        )
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        t = draw_times(len(asked), x0.shape[1], generator)
        x_t = torch.lerp(x0, eps, t[:, None, None])
        v = eps - x0
        ours = self._learner.velocity(asked, x_t, t)
        with torch.no_grad():
            old = self._painter.velocity(asked, x_t, t)
        towards = _error((ours - v) * t[:, None, None])
        away = _error((2 * old - ours - v) * t[:, None, None])
        return (better * towards + (1 - better) * away).mean()

    def notes(self) -> dict[str, float]:
        """The share of pictures that were right since it was last asked for; empty if none were."""
        graded, right = self._graded, self._right
        self._graded, self._right = 0, 0
        return {"right": right / graded} if graded else {}

    def _next_round(self, step: int) -> None:
        painted = self._coming or self._paint(step)
        right = torch.tensor(painted.grades(), dtype=torch.float32)
        self._graded += len(right)
        self._right += int(right.sum())
        better = _compared(right, self._rounds.each)
        self._order = self._draw_order(better, step).to(self._device)
        found = _Round(
            painted.asked,
            painted.latents,
            better.to(self._device),
            torch.zeros(self._rounds.batch, dtype=torch.int64, device=self._device),
        )
        self._size = painted.size
        self._held.setdefault(painted.size, found).put(found)
        self._coming = self._paint(step + self._rounds.steps)

    def _draw_order(self, better: Tensor, step: int) -> Tensor:
        """Pictures in the order in which steps learn from them: those that tell something, again
        and again; if none does, all, and the model stays as it is."""
        (useful,) = (better != 0.5).nonzero(as_tuple=True)
        if not len(useful):
            useful = torch.arange(len(better))
        generator = torch.Generator().manual_seed(self._random("order", step).getrandbits(62))
        count = self._rounds.steps * self._rounds.batch
        again = -(-count // len(useful))
        shuffled = [useful[torch.randperm(len(useful), generator=generator)] for _ in range(again)]
        return torch.cat(shuffled)[:count]

    @torch.no_grad()
    def _paint(self, step: int) -> _Painted:
        """Paint the round that begins with this step, with the old model brought up to date."""
        rounds = self._rounds
        torch._foreach_copy_(list(self._old.values()), [self.follows[name] for name in self._old])
        # All replicas paint pictures of one size.
        size = draw_size(Random(f"{self._seed}/practice/{step}"), self._sizes)
        random = self._random("captions", step)
        drawn = [
            draw_painting(random, size=self._sizes[size]).caption for _ in range(rounds.captions)
        ]
        captions = [caption for caption in drawn for _ in range(rounds.each)]
        texts = [caption.text for caption in captions]
        asked = Asked.of(texts, self._sizes[size], self._tokenizer, self._device)
        h, w = self._painter.grid(asked.size)
        generator = torch.Generator(self._device).manual_seed(random.getrandbits(62))
        noise = torch.randn((len(asked), h * w, 64), generator=generator, device=self._device)
        latents = self._painter.paint(asked, noise)
        levels = to_levels(self._learner.decode(asked.size, latents)).cpu()
        return _Painted(size, asked, latents, self._grade(levels, captions))

    def _grade(self, levels: Tensor, captions: list[Caption]) -> Callable[[], list[bool]]:
        """Begin to grade pictures, (n, H, W, 3) uint8; returns what waits for the grades."""
        pictures = levels.numpy()
        if self._executor is None:
            return lambda: are_right(pictures, captions)
        parts: list[Future[list[bool]]] = [
            self._executor.submit(are_right, pictures[i : i + _CHUNK], captions[i : i + _CHUNK])
            for i in range(0, len(captions), _CHUNK)
        ]
        return lambda: [right for part in parts for right in part.result()]

    def _random(self, what: str, step: int) -> Random:
        """Of this replica."""
        return Random(f"{self._seed}/practice/{what}/{step}/{self._rank}")


def _compared(right: Tensor, each: int) -> Tensor:
    """(n,) 0 or 1 -> (n,) in 0..1: how much better than the mean of a caption's pictures."""
    groups = right.view(-1, each)
    return (0.5 + 0.5 * (groups - groups.mean(1, keepdim=True))).flatten()


def _error(error: Tensor) -> Tensor:
    """(n, N, 64) -> (n,): mean squares by mean absolutes, whose gradient does not grow with t."""
    size = error.detach().abs().mean((1, 2)).clamp(min=_LEAST_ERROR)
    return error.square().mean((1, 2)) / size
