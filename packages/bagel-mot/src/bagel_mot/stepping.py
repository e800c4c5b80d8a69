"""One denoising step of a batch of images as a fixed computation over fixed memory.

Everything of a step that is alike for all layers or all steps is made beforehand: embeddings of
the times, routing, places in the cache. What is left is the packed
forward, guidance and Euler update, in one call that a CUDA graph can hold; only what a step needs
of the schedule is copied into place before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from bagel_mot.context import Context
from bagel_mot.graphs import Call, Workspace
from bagel_mot.model.kv_cache import KVCache, lasting
from bagel_mot.model.layout import GEN, UND, Block, Layout, Segment, build_layout, to_device
from bagel_mot.model.sequence_parallel import all_gather, chunk
from bagel_mot.parallel import Parallel
from bagel_mot.sampling import Guidance, guide

# Columns of `StepRunner.controls`.
DT, TEXT_SCALE, IMG_SCALE, RENORM_MIN = range(4)
CONTROLS = 4


@dataclass(frozen=True)
class JobShape:
    """What of an image is baked into a step.

    Attributes:
        grid: (h, w) latent tokens.
        first_token: place of its first latent token among those of all images.
        copies: for each of its branches the copy that it reads.
        renorm: `ImageSettings.cfg_renorm_type`.
    """

    grid: tuple[int, int]
    first_token: int
    copies: tuple[int, ...]
    renorm: str

    @property
    def tokens(self) -> slice:
        """Its latent tokens among those of all images."""
        return slice(self.first_token, self.first_token + self.grid[0] * self.grid[1])


@dataclass(frozen=True)
class CopyShape:
    """An image's block (start marker, latent tokens, end marker) behind one of its contexts.

    Attributes:
        job: the image.
        tokens: latent tokens.
        room: cache rows set aside for the context.
        cfg_place: the CFG parallel rank that has it.
        kv_start: first cache row of its context on that rank.
    """

    job: int
    tokens: int
    room: int
    cfg_place: int
    kv_start: int

    @property
    def rows(self) -> int:
        """Rows of the block."""
        return self.tokens + 2

    def block(self, context: Context) -> Block:
        """The block behind this context."""
        segment = Segment(self.rows, self.kv_start, context.length, causal=False, room=self.room)
        runs = ((UND, 1), (GEN, self.tokens), (UND, 1))
        return Block(segment, runs, context.position)


@dataclass(frozen=True)
class StepShape:
    """The shape of a batch; what differs only otherwise can use the same buffers and graphs.

    Attributes:
        jobs, copies: the images, and the blocks that are packed for them.
        cache_rows: rows of KV cache the rank needs that needs the most.
    """

    jobs: tuple[JobShape, ...]
    copies: tuple[CopyShape, ...]
    cache_rows: int


@dataclass(frozen=True)
class JobResult:
    """Velocities of one image, (N, 64) float32: of each branch, and the one used."""

    branches: tuple[torch.Tensor, ...]
    used: torch.Tensor


# What each image got from a step; None if it took no part.
Results = tuple[JobResult | None, ...]


class StepRunner:
    """Buffers for a batch of one shape, and a call for each selection of its blocks.

    Args:
        workspace: whose KV cache is used.
        markers: (2, D) embeddings of the start and end marker.
        shape: of the batch.
        cache: at least `shape.cache_rows` rows.
        parallel: this process among the others.

    Attributes:
        x: (tokens of all images, 64) float32, latents as they are now.
        times: (images, D), the time each image is at, embedded.
        controls: (images, 4) float32: length of the Euler step, text scale, image scale, least
            renormalisation of each image.
    """

    def __init__(
        self,
        workspace: Workspace,
        markers: torch.Tensor,
        shape: StepShape,
        cache: KVCache,
        parallel: Parallel,
    ) -> None:
        self.shape = shape
        self.cache = cache
        self._workspace = workspace
        self._model = model = workspace.model
        self._parallel = parallel
        self._markers = markers
        device, channels = model.device, model.config.latent_token_dim
        tokens = shape.jobs[-1].tokens.stop
        self.x = torch.zeros(tokens, channels, dtype=torch.float32, device=device)
        self.times = markers.new_zeros(len(shape.jobs), markers.shape[1])
        controls = len(shape.jobs), CONTROLS
        self.controls = torch.zeros(controls, dtype=torch.float32, device=device)
        self._selections: dict[tuple[int, ...], _Selection] = {}

    def run(self, counts: tuple[int, ...], contexts: Sequence[Context], owner: object) -> Results:
        """Make a step: `x` is updated, velocities are returned.

        The tensors of the result are overwritten by the next call.

        Args:
            counts: for each image the number of its branches that are evaluated, the first ones;
                0 leaves it as it is.
            contexts: of each copy.
            owner: who asks; for another one the layouts are brought up to date.
        """
        selection = self._selections.get(counts)
        if selection is None:
            with lasting():
                selection = _Selection.build(
                    self.shape, counts, contexts, self._parallel, self._model.device
                )
            selection.owner = owner
            own = selection
            selection.call = self._workspace.call(lambda: self._step(own))
            self._selections[counts] = selection
        if selection.owner is not owner:
            selection.load(self.shape, contexts, self._parallel)
            selection.owner = owner
        assert selection.call is not None
        return selection.call()

    def advance(self, i: int, branches: tuple[torch.Tensor, ...]) -> JobResult:
        """Guidance and Euler update of image i with the velocities of its branches."""
        job = self.shape.jobs[i]
        dt, text_scale, img_scale, renorm_min = self.controls[i].unbind()
        used = branches[0]
        if len(branches) > 1:
            guidance = Guidance(job.renorm, text_scale, img_scale, renorm_min)
            v_img = branches[2] if len(branches) > 2 else None
            used = guide(guidance, branches[0], branches[1], v_img)
        self.x[job.tokens].sub_(used * dt)
        return JobResult(branches, used)

    def close(self) -> None:
        """Drop all graphs."""
        for selection in self._selections.values():
            if selection.call is not None:
                selection.call.drop()
            selection.call = None  # it refers to the selection, and to the cache
        self._selections.clear()

    def _step(self, selection: _Selection) -> Results:
        velocities = dict(zip(selection.copies, self._velocities(selection), strict=True))
        results: list[JobResult | None] = []
        for i, (job, count) in enumerate(zip(self.shape.jobs, selection.counts, strict=True)):
            if not count:
                results.append(None)
                continue
            branches = tuple(velocities[copy] for copy in job.copies[:count])
            results.append(self.advance(i, branches))
        return tuple(results)

    def _velocities(self, selection: _Selection) -> Sequence[torch.Tensor]:
        """Velocities (N, 64) of the selected copies."""
        model, parallel = self._model, self._parallel
        parts: list[torch.Tensor] = []
        if selection.layout is not None:
            # Images with the markers around them are the packed rows, in this order.
            tokens = {i: self._embedded(i) for i in {piece.job for piece in selection.pieces}}
            rows = [
                part
                for piece in selection.pieces
                for part in (
                    self._markers[: piece.starts],
                    tokens[piece.job][piece.tokens],
                    self._markers[2 - piece.ends :],
                )
            ]
            hidden = model(torch.cat(rows), selection.layout, self.cache)
            # The few und rows cost less than leaving them out.
            everything = model.velocity(hidden)
            parts = [everything[piece.gen_rows] for piece in selection.pieces]
        if parallel.peers is None:
            return parts
        padded = self.x.new_zeros(selection.most_tokens, self.x.shape[1])
        filled = sum(len(part) for part in parts)
        if parts:
            padded[:filled] = torch.cat(parts)
        everyone = dist.get_world_size(parallel.peers)
        gathered = padded.new_empty(everyone * selection.most_tokens, padded.shape[1])
        all_gather(gathered, padded, parallel.peers)
        return gathered[selection.assembly].split(selection.sizes)

    def _embedded(self, i: int) -> torch.Tensor:
        """Input embeddings of an image's latent tokens, (N, D)."""
        job = self.shape.jobs[i]
        return self._model.embed_latents(self.x[job.tokens], self.times[i : i + 1], job.grid)


@dataclass(frozen=True)
class _Piece:
    """The rows of a copy's block that this rank has.

    Attributes:
        job: the image.
        tokens: which of the image's latent tokens.
        starts, ends: 1 if the start marker, the end marker is among them, else 0.
        gen_rows: the packed rows of the tokens.
    """

    job: int
    tokens: slice
    starts: int
    ends: int
    gen_rows: slice


@dataclass
class _Selection:
    """Some of the copies, packed.

    Attributes:
        counts: see `StepRunner.run`.
        copies: which copies.
        layout: of this rank's packed rows; None if it has no copy to compute.
        pieces: what they consist of.
        sizes: latent tokens of each selected copy, of all ranks.
        most_tokens: the most latent tokens a rank computes.
        assembly: int64, for each latent token of each copy its place in what all ranks computed,
            `most_tokens` each; None if there are no other ranks.
        owner: whose contexts the layout is for.
        call: the step.
    """

    counts: tuple[int, ...]
    copies: tuple[int, ...]
    layout: Layout | None
    pieces: list[_Piece]
    sizes: list[int]
    most_tokens: int
    assembly: torch.Tensor | None
    owner: object = None
    call: Call[Results] | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        shape: StepShape,
        counts: tuple[int, ...],
        contexts: Sequence[Context],
        parallel: Parallel,
        device: torch.device,
    ) -> _Selection:
        """Select the copies that the first `counts[i]` branches of image i read."""
        read = {
            copy
            for job, count in zip(shape.jobs, counts, strict=True)
            for copy in job.copies[:count]
        }
        selected = tuple(sorted(read))
        copies = [shape.copies[i] for i in selected]
        parts, sp_rank = parallel.config.sequence, parallel.sp.rank if parallel.sp else 0
        pieces, row = [], 0
        for copy in copies:
            if copy.cfg_place != parallel.cfg_rank:
                continue
            rows = chunk(copy.rows, parts, sp_rank)
            tokens = _tokens_in(copy, rows)
            starts = int(0 in rows)
            gen_rows = slice(row + starts, row + starts + len(tokens))
            ends = int(copy.rows - 1 in rows)
            pieces.append(
                _Piece(copy.job, slice(tokens.start, tokens.stop), starts, ends, gen_rows)
            )
            row += len(rows)
        made = cls(counts, selected, None, pieces, [copy.tokens for copy in copies], 0, None)
        if pieces:
            blocks = made._blocks(shape, contexts, parallel)
            if parallel.sp is None:
                made.layout = build_layout(blocks, device)
            else:
                local = parallel.sp.local(blocks)
                made.layout = build_layout(local, device, parallel.sp.exchange(blocks, device))
        if parallel.peers is not None:
            assembly, made.most_tokens = _assembly(copies, parallel)
            made.assembly = to_device(assembly, device)
        return made

    def load(self, shape: StepShape, contexts: Sequence[Context], parallel: Parallel) -> None:
        """Bring the layout up to date with other contexts."""
        if self.layout is not None:
            blocks = self._blocks(shape, contexts, parallel)
            self.layout.load(blocks if parallel.sp is None else parallel.sp.local(blocks))

    def _blocks(
        self, shape: StepShape, contexts: Sequence[Context], parallel: Parallel
    ) -> list[Block]:
        return [
            shape.copies[i].block(contexts[i])
            for i in self.copies
            if shape.copies[i].cfg_place == parallel.cfg_rank
        ]


def _tokens_in(copy: CopyShape, rows: range) -> range:
    """The latent tokens among some rows of a block; row 0 and the last one are markers."""
    start, stop = max(rows.start, 1), min(rows.stop, copy.rows - 1)
    return range(start - 1, max(stop, start) - 1)


def _assembly(copies: Sequence[CopyShape], parallel: Parallel) -> tuple[torch.Tensor, int]:
    """`_Selection.assembly` and `most_tokens`; ranks compute their copies in this order."""
    parts = parallel.config.sequence
    computed: list[list[tuple[int, range]]] = []
    for cfg_place in range(parallel.config.cfg):
        for sp_rank in range(parts):
            computed.append(
                [
                    (i, _tokens_in(copy, chunk(copy.rows, parts, sp_rank)))
                    for i, copy in enumerate(copies)
                    if copy.cfg_place == cfg_place
                ]
            )
    most = max(sum(len(tokens) for _, tokens in own) for own in computed)
    places = [torch.empty(copy.tokens, dtype=torch.int64) for copy in copies]
    for peer, own in enumerate(computed):
        at = peer * most
        for i, tokens in own:
            places[i][tokens.start : tokens.stop] = at + torch.arange(len(tokens))
            at += len(tokens)
    return torch.cat(places), most
