"""The denoising step: velocities of all images and contexts in one packed forward.

Each image's block (start marker, latent tokens, end marker) is packed once per distinct context
that guides it: a *copy*. Under CFG parallelism a rank has some of the copies, under sequence
parallelism some rows of each; in the end every rank has all velocities and makes the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist

from bagel_mot.context import Context, Contexts
from bagel_mot.images import grid_positions
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import GEN, UND, Block, Layout, Segment, build_layout, to_device
from bagel_mot.model.sequence_parallel import all_gather, chunk
from bagel_mot.parallel import ALONE, Parallel
from bagel_mot.sampling import ImageJob, ImageSettings, Step
from bagel_mot.tokenizer import BagelTokenizer


@dataclass(frozen=True)
class _Copy:
    """An image's block behind one of its contexts.

    Attributes:
        context: what the block attends to.
        first_token: place of its first latent token among those of all images.
        tokens: latent tokens.
        cfg_place: the CFG parallel rank that has it.
        kv_start: first cache row of its prefix, on that rank.
    """

    context: Context
    first_token: int
    tokens: int
    cfg_place: int
    kv_start: int = -1

    @property
    def rows(self) -> int:
        return self.tokens + 2

    @property
    def block(self) -> Block:
        segment = Segment(self.rows, self.kv_start, self.context.length, causal=False)
        runs = ((UND, 1), (GEN, self.tokens), (UND, 1))
        return Block(segment, runs, self.context.position)

    def sources(self) -> torch.Tensor:
        """(rows,) where each row comes from: 0 start marker, 1 end marker, 2 + token."""
        tokens = torch.arange(self.tokens) + self.first_token + 2
        return torch.cat([torch.tensor([0]), tokens, torch.tensor([1])])


class Denoising:
    """Images denoised together.

    The images may differ in everything: contexts, sizes, settings, progress. Make a new
    `Denoising` when one joins or leaves; the jobs hold their own state.

    Branches of a job with equal contexts have equal velocities and are computed once: plain
    text-to-image with an image scale has three branches and two copies.

    Args:
        model, tokenizer: what the jobs' contexts were made with.
        jobs: the same ones, in the same order, on every rank.
        parallel: this process among the others.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: BagelTokenizer,
        jobs: Sequence[ImageJob],
        parallel: Parallel = ALONE,
    ) -> None:
        self.model = model
        self.jobs = list(jobs)
        self.parallel = parallel
        self._copies, self._copy_of_branch = _copies_of(self.jobs, parallel.config.cfg)
        self._place_in_cache()
        ids = torch.tensor([tokenizer.vision_start, tokenizer.vision_end], device=model.device)
        self._markers = model.embed_text(ids)
        grids = [grid_positions(*job.grid, model.config.latent_grid) for job in self.jobs]
        self._grid_ids = torch.cat(grids).to(model.device)
        sizes = torch.tensor([len(grid) for grid in grids])
        self._job_of_token = torch.arange(len(grids)).repeat_interleave(sizes).to(model.device)
        self._packings: dict[tuple[int, ...], _Packing] = {}

    @torch.no_grad()
    def step(self) -> list[Step]:
        """Advance every unfinished job by one step; returns a `Step` for each of them."""
        now = [
            places[: len(job.branches_now)]
            for job, places in zip(self.jobs, self._copy_of_branch, strict=True)
        ]
        active = tuple(sorted({copy for places in now for copy in places}))
        velocities = dict(zip(active, self._velocities(active), strict=True))
        return [
            job.advance(tuple(velocities[copy] for copy in places))
            for job, places in zip(self.jobs, now, strict=True)
            if places
        ]

    def _velocities(self, active: tuple[int, ...]) -> Sequence[torch.Tensor]:
        """Velocities (N, 64) of the given copies."""
        if active not in self._packings:
            copies = [self._copies[i] for i in active]
            self._packings[active] = _Packing.build(copies, self.parallel, self.model.device)
        packing = self._packings[active]
        device = self.model.device
        channels = self.jobs[0].latents.shape[1]
        own = torch.empty(0, channels, device=device)
        if packing.layout is not None:
            latents = torch.cat([job.latents.to(device) for job in self.jobs])
            # A finished job's tokens are embedded but not packed: its last time does no harm.
            now = torch.stack([job.timesteps[job.index] for job in self.jobs]).to(device)
            tokens = self.model.embed_latents(latents, now, self._grid_ids, self._job_of_token)
            rows = torch.cat([self._markers, tokens])[packing.sources]
            hidden = self.model(rows, packing.layout, self._cache)
            own = self.model.velocity(hidden[packing.gen_rows])
        if self.parallel.peers is not None:
            padded = torch.zeros(packing.most_tokens, channels, device=device)
            padded[: len(own)] = own
            everyone = dist.get_world_size(self.parallel.peers)
            gathered = padded.new_empty(everyone * packing.most_tokens, channels)
            all_gather(gathered, padded, self.parallel.peers)
            own = gathered[packing.assembly]
        return own.split(packing.sizes)

    def _place_in_cache(self) -> None:
        """Give each of this rank's copies its cache rows and copy its prefix there."""
        sp = self.parallel.sp
        length = 0
        for i, copy in enumerate(self._copies):
            if copy.cfg_place == self.parallel.cfg_rank:
                self._copies[i] = replace(copy, kv_start=length)
                length += copy.context.length + (sp.cache_rows(copy.rows) if sp else copy.rows)
        heads = slice(0, self.model.kv_heads)
        if sp is not None:
            heads = sp.cached_heads(self.model.kv_heads)
        self._cache = self.model.new_cache(length, heads.stop - heads.start)
        for copy in self._copies:
            if copy.kv_start >= 0:
                prefix = copy.context
                self._cache.copy_rows(prefix.cache, prefix.length, copy.kv_start, heads)


@torch.no_grad()
def denoise(
    model: Bagel,
    contexts: Contexts,
    noise: torch.Tensor,
    grid: tuple[int, int],
    settings: ImageSettings,
    on_step: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Turn the noise of one image into its latent tokens; see `ImageJob` for the arguments.

    Args:
        on_step: called after each step; an exception of its ends the denoising.

    Returns:
        (N, 64) float32 on the model's device.
    """
    job = ImageJob(contexts, noise, grid, settings)
    denoising = Denoising(model, contexts.tokenizer, [job])
    while not job.done:
        (step,) = denoising.step()
        if on_step is not None:
            on_step(step)
    return job.latents


def _copies_of(jobs: Sequence[ImageJob], cfg_places: int) -> tuple[list[_Copy], list[list[int]]]:
    """All jobs' copies, spread over the CFG parallel ranks, and the copy each branch reads."""
    copies: list[_Copy] = []
    copy_of_branch: list[list[int]] = []
    load = [0] * cfg_places
    first_token = 0
    for job in jobs:
        tokens = job.grid[0] * job.grid[1]
        distinct: list[Context] = []
        places = []
        for context in job.branches:
            if context not in distinct:
                distinct.append(context)
                cfg_place = load.index(min(load))
                copies.append(_Copy(context, first_token, tokens, cfg_place))
                load[cfg_place] += copies[-1].rows
            places.append(len(copies) - len(distinct) + distinct.index(context))
        copy_of_branch.append(places)
        first_token += tokens
    return copies, copy_of_branch


@dataclass(frozen=True)
class _Packing:
    """How the embedded tokens of all images become packed rows, and rows become velocities.

    Attributes:
        layout: of this rank's packed rows; None if it has no copy to compute.
        sources: (M,) int64, where each row comes from, see `_Copy.sources`.
        gen_rows: (n,) int64, the rows of latent tokens.
        sizes: latent tokens of each active copy, of all ranks.
        most_tokens: the most latent tokens a rank computes.
        assembly: int64, for each latent token of each active copy its place in what all ranks
            computed, `most_tokens` each; None if there are no other ranks.
    """

    layout: Layout | None
    sources: torch.Tensor
    gen_rows: torch.Tensor
    sizes: list[int]
    most_tokens: int
    assembly: torch.Tensor | None

    @classmethod
    def build(cls, copies: Sequence[_Copy], parallel: Parallel, device: torch.device) -> Self:
        sp, parts = parallel.sp, parallel.config.sequence
        mine = [copy for copy in copies if copy.cfg_place == parallel.cfg_rank]
        sp_rank = sp.rank if sp else 0
        sources = torch.cat(
            [torch.empty(0, dtype=torch.int64)]
            + [copy.sources()[_rows_of(copy, parts, sp_rank)] for copy in mine]
        )
        layout = None
        if mine:
            blocks = [copy.block for copy in mine]
            if sp is None:
                layout = build_layout(blocks, device)
            else:
                layout = build_layout(sp.local(blocks), device, sp.exchange(blocks, device))
        assembly, most = None, 0
        if parallel.peers is not None:
            assembly, most = _assembly(copies, parallel)
            assembly = to_device(assembly, device)
        return cls(
            layout,
            to_device(sources, device),
            to_device(torch.nonzero(sources >= 2).flatten(), device),
            [copy.tokens for copy in copies],
            most,
            assembly,
        )


def _rows_of(copy: _Copy, parts: int, sp_rank: int) -> slice:
    rows = chunk(copy.rows, parts, sp_rank)
    return slice(rows.start, rows.stop)


def _assembly(copies: Sequence[_Copy], parallel: Parallel) -> tuple[torch.Tensor, int]:
    """`_Packing.assembly` and `most_tokens`; ranks compute their copies in this order."""
    parts = parallel.config.sequence
    computed: list[list[tuple[int, torch.Tensor]]] = []
    for cfg_place in range(parallel.config.cfg):
        for sp_rank in range(parts):
            computed.append(
                [
                    (i, tokens[tokens >= 2])
                    for i, copy in enumerate(copies)
                    if copy.cfg_place == cfg_place
                    for tokens in [copy.sources()[_rows_of(copy, parts, sp_rank)]]
                ]
            )
    most = max(sum(len(tokens) for _, tokens in own) for own in computed)
    places = [torch.empty(copy.tokens, dtype=torch.int64) for copy in copies]
    for peer, own in enumerate(computed):
        at = peer * most
        for i, tokens in own:
            places[i][tokens - 2 - copies[i].first_token] = at + torch.arange(len(tokens))
            at += len(tokens)
    return torch.cat(places), most
