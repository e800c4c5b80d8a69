"""Generating text from contexts, greedily or by sampling, of several requests at a time.

The step of one token is a fixed computation over static buffers: it embeds a token of each text,
writes K and V in place behind the texts' rows in the cache, attends to as many rows as the device
says, chooses the likeliest token and moves all places on by one. A CUDA graph of it needs nothing
from the host, so the host only reads along, one token behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from mot_kernels import RoutePlan

from bagel_mot.context import Context
from bagel_mot.graphs import Call, Workspace
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.model.layout import UND, DecodeLayout, to_device
from bagel_mot.parallel import ALONE, Parallel
from bagel_mot.tokenizer import BagelTokenizer

# Room for a text in the cache comes in multiples of this: one graph for prompts of many lengths.
_ROOM_STEP = 1024
# Cache rows of the texts that are written together (of the 7B model, 2 GiB).
_ROWS_TOGETHER = 40_000
_TEXTS_TOGETHER = 16  # a power of two


@dataclass(eq=False)
class TextJob:
    """A text to write.

    Attributes:
        context: what it continues; left as it is.
        max_tokens: the most steps to take.
        temperature: None decodes greedily; otherwise tokens are drawn from
            softmax(logits / temperature).
        generator: CPU generator to draw with.
        on_token: called with each chosen token; an exception of its ends the generation.
        on_logits: called with each step's logits, (1, vocabulary) float32.
        chosen: the tokens chosen so far.
    """

    context: Context
    max_tokens: int
    temperature: float | None = None
    generator: torch.Generator | None = None
    on_token: Callable[[int], None] | None = None
    on_logits: Callable[[torch.Tensor], None] | None = None
    chosen: list[int] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Cache rows it may come to need."""
        return self.context.length + self.max_tokens

    def done(self, eos: int) -> bool:
        """Whether no token is to follow."""
        ended = bool(self.chosen) and self.chosen[-1] == eos
        return ended or len(self.chosen) >= self.max_tokens

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token, of the logits (vocabulary,)."""
        if self.temperature is None:
            return likeliest
        probabilities = torch.softmax(logits / self.temperature, dim=-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def note(self, token: int, logits: torch.Tensor | None) -> None:
        """Take in the next token, and tell who wants to know."""
        self.chosen.append(token)
        if self.on_logits is not None and logits is not None:
            self.on_logits(logits)
        if self.on_token is not None:
            self.on_token(token)


def fed_tokens(tokenizer: BagelTokenizer, job: TextJob) -> list[int]:
    """The tokens that were fed for a text: the start token, then all chosen ones but the last."""
    return [tokenizer.bos, *job.chosen[:-1]]


@torch.no_grad()
def generate_texts(
    model: Bagel,
    tokenizer: BagelTokenizer,
    jobs: Sequence[TextJob],
    *,
    parallel: Parallel = ALONE,
    workspace: Workspace | None = None,
) -> None:
    """Write texts, as many at a time as there is room for. Each is what it would be alone.

    Args:
        jobs: filled in place.
        parallel: this process among others, which write the same texts.
        workspace: buffers and CUDA graphs to use; default ones of its own, without graphs.
    """
    workspace = workspace or Workspace(model)
    # Texts of about one length together: each gets as much room as the longest one needs.
    waiting = deque(sorted(jobs, key=lambda job: -job.rows))
    while waiting:
        room = _room(waiting[0])
        most = min(max(_ROWS_TOGETHER // room, 1), _TEXTS_TOGETHER)
        most = 1 << (most.bit_length() - 1)
        together = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        # A power of two: texts that nobody wants cost less than a graph for every number.
        spare = (1 << (len(together) - 1).bit_length()) - len(together)
        together += [TextJob(together[0].context, max_tokens=0)] * spare
        _write(together, room, tokenizer, parallel, workspace)


def _room(job: TextJob) -> int:
    return -(-job.rows // _ROOM_STEP) * _ROOM_STEP


def _write(
    jobs: list[TextJob],
    room: int,
    tokenizer: BagelTokenizer,
    parallel: Parallel,
    workspace: Workspace,
) -> None:
    """Write these texts together."""
    texts = _Texts(jobs, room, tokenizer.bos, workspace)
    plain = all(job.temperature is None and job.on_logits is None for job in jobs)
    # What the host chooses, or looks at, must be there before the next step.
    lag = 1 if plain and texts.on_gpu and parallel.config.world_size == 1 else 0
    try:
        _write_steps(jobs, texts, lag, tokenizer.eos, parallel)
    finally:
        texts.close()


def _write_steps(
    jobs: list[TextJob], texts: _Texts, lag: int, eos: int, parallel: Parallel
) -> None:
    """Make steps until all are done; tokens are looked at `lag` steps after they were made."""
    steps = max(job.max_tokens for job in jobs)
    made: deque[_Tokens] = deque()
    for step in range(steps + lag):
        if step < steps:
            logits, tokens = texts.step()
            made.append(tokens)
        if len(made) <= lag and step < steps:
            continue
        likeliest = made.popleft().read()
        following = list(likeliest)
        writing = [i for i, job in enumerate(jobs) if not job.done(eos)]
        kept = {i: logits[i : i + 1].clone() for i in writing if jobs[i].on_logits is not None}
        for i in writing:
            following[i] = parallel.agree(jobs[i].choose(logits[i], likeliest[i]))
        # Callbacks may use the pipeline, and with it the logits' memory.
        for i in writing:
            jobs[i].note(following[i], kept.get(i))
        if all(job.done(eos) for job in jobs):
            return
        if following != likeliest:
            texts.replace(following)


class _Texts:
    """Texts being written, and their place in the workspace."""

    def __init__(self, jobs: Sequence[TextJob], room: int, bos: int, workspace: Workspace) -> None:
        self.on_gpu = workspace.model.device.type == "cuda"
        self._contexts = [job.context for job in jobs]
        self._room = room
        self._bos = bos
        self._workspace = workspace
        self._token = object()
        self._steps = 0
        self._runner: TextRunner | None = None
        self._saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def step(self) -> tuple[torch.Tensor, _Tokens]:
        """Feed a token of each text: logits (B, vocabulary), and the likeliest next tokens."""
        runner = self._moved_in()
        self._steps += 1
        longest = max(context.length for context in self._contexts) + self._steps
        logits = runner.run(longest)
        return logits, _Tokens(runner.tokens)

    def replace(self, tokens: Sequence[int]) -> None:
        """Feed these next, not the likeliest ones."""
        runner = self._moved_in()
        runner.tokens.copy_(to_device(torch.tensor(tokens), runner.tokens.device))

    def close(self) -> None:
        """Give the workspace up."""
        self._workspace.leave(self._token)

    def _moved_in(self) -> TextRunner:
        workspace, model, count = self._workspace, self._workspace.model, len(self._contexts)
        model.rope_for(max(context.position for context in self._contexts) + self._room)
        if not workspace.enter(self._token):
            assert self._runner is not None
            return self._runner
        cache = workspace.cache(count * self._room)
        self._runner = runner = workspace.shaped(
            ("text", count, self._room), lambda: TextRunner(workspace, count, self._room, cache)
        )
        rows = cache.kv[:, : count * self._room]
        if self._saved is not None:
            rows.copy_(self._saved[0])
            runner.tokens.copy_(self._saved[1])
            runner.places.copy_(self._saved[2])
            self._saved = None
        else:
            rows.zero_()  # masked attention multiplies what nobody wrote by 0, and 0 * NaN is NaN
            for i, context in enumerate(self._contexts):
                cache.copy_rows(context.cache, context.length, i * self._room)
            first = torch.tensor(
                [
                    [context.position for context in self._contexts],
                    [i * self._room + c.length for i, c in enumerate(self._contexts)],
                    [context.length + 1 for context in self._contexts],
                ],
                dtype=torch.int32,
            )
            runner.places.copy_(to_device(first, model.device))
            runner.tokens.fill_(self._bos)

        def save() -> None:
            self._saved = (rows.clone(), runner.tokens.clone(), runner.places.clone())

        workspace.on_leave = save
        return runner


class TextRunner:
    """Buffers for B texts with room for as many rows each, and the step of one token.

    Attributes:
        tokens: (B,) int64, what is fed next.
        places: (3, B) int32: RoPE position of the fed token, its cache row, and how many rows its
            text has with it. A text that goes on only because others do stops at its room's end.
    """

    def __init__(self, workspace: Workspace, count: int, room: int, cache: KVCache) -> None:
        self._workspace = workspace
        self._model = workspace.model
        self._room = room
        self._cache = cache
        device = workspace.model.device
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.places = torch.zeros(3, count, dtype=torch.int32, device=device)
        self._plan = RoutePlan.from_runs([(UND, count)], num_experts=2, device=device)
        last = [[2**31 - 1] * count, [(i + 1) * room - 1 for i in range(count)], [room] * count]
        self._last_places = to_device(torch.tensor(last, dtype=torch.int32), device)
        self._calls: dict[int, Call[torch.Tensor]] = {}

    def run(self, longest: int) -> torch.Tensor:
        """Make a step; logits (B, vocabulary) float32, overwritten by the next.

        Args:
            longest: the most rows a text has, the fed token included.
        """
        reach = self._model.attention.reach(longest, self._room)
        if reach not in self._calls:
            self._calls[reach] = self._workspace.call(lambda: self._step(reach))
        return self._calls[reach]()

    def close(self) -> None:
        """Drop all graphs."""
        for call in self._calls.values():
            call.drop()
        self._calls.clear()

    def _step(self, reach: int) -> torch.Tensor:
        model = self._model
        positions, kv_rows, lengths = self.places
        layout = DecodeLayout(positions, kv_rows, lengths, self._room, reach, self._plan)
        hidden = model(model.embed_text(self.tokens), layout, self._cache)
        logits = model.logits(hidden)
        self.tokens.copy_(logits.argmax(-1))
        torch.minimum(self.places + 1, self._last_places, out=self.places)
        return logits


class _Tokens:
    """Tokens on their way from the device to the host."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self._host = torch.empty(len(tokens), dtype=tokens.dtype, device="cpu", pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(tokens.device))
        else:
            self._host = tokens.clone()

    def read(self) -> list[int]:
        """The tokens, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        found: list[int] = self._host.tolist()
        return found
