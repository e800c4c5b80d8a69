"""Denoising images: the steps of all images and contexts in one packed forward each.

Each image's block (start marker, latent tokens, end marker) is packed once per distinct context
that guides it: a *copy*. Under CFG parallelism a rank has some of the copies, under sequence
parallelism some rows of each; in the end every rank has all velocities and makes the same step.
How a step is computed is `stepping.py`'s business.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch

from bagel_mot.context import Context
from bagel_mot.graphs import Workspace
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import to_device
from bagel_mot.parallel import ALONE, Parallel
from bagel_mot.sampling import ImageJob, Step
from bagel_mot.stepping import CopyShape, JobResult, JobShape, StepRunner, StepShape
from bagel_mot.tokenizer import BagelTokenizer

# Prefixes have rooms that are multiples of this where attention reads their lengths on the device:
# prompts of about the same length then use the same graphs.
_ROOM_STEP = 256
# Steps whose times are embedded at once.
_STEPS_AHEAD = 64


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
        workspace: buffers and CUDA graphs to use; default ones of its own, without graphs.
    """

    def __init__(
        self,
        model: Bagel,
        tokenizer: BagelTokenizer,
        jobs: Sequence[ImageJob],
        parallel: Parallel = ALONE,
        workspace: Workspace | None = None,
    ) -> None:
        self.model = model
        self.jobs = list(jobs)
        self.parallel = parallel
        self._markers = (tokenizer.vision_start, tokenizer.vision_end)
        self._workspace = workspace or Workspace(model)
        self._shape, self._contexts = _shape_of(model, self.jobs, parallel)
        # A graph that is replayed does.
        self._moves_all_at_once = self._workspace.capture and not any(
            job.extrapolation for job in self.jobs
        )
        self._token = object()
        self._runner: StepRunner | None = None
        self._views: list[torch.Tensor] = []
        self._made = 0
        # The schedules of the steps since then, from those of the jobs.
        self._ahead: tuple[torch.Tensor, torch.Tensor] | None = None
        self._ahead_since = 0
        self._ahead_from = [job.index for job in self.jobs]
        self._pace = _Pace(model.device)

    @torch.no_grad()
    def step(self) -> list[Step]:
        """Advance every unfinished job by one step; returns a `Step` for each of them.

        Does not wait for the device, but for the step before the last one. The tensors of the
        `Step`s are overwritten by the next step; `Step.kept` copies them.
        """
        counts = [len(job.branches_now) for job in self.jobs]
        if not any(counts):
            return []
        self._pace.wait()
        runner = self._moved_in()
        self._set_controls(runner)
        before = None if self._moves_all_at_once else runner.x.clone()
        try:
            results = self._results(runner, counts)
        except BaseException:
            if before is not None:
                runner.x.copy_(before)  # some images may have moved: the step can be made again
            raise
        self._pace.note()
        self._made += 1
        steps = []
        for job, view, result in zip(self.jobs, self._views, results, strict=True):
            if result is None:
                continue
            index, t = job.index, float(job.timesteps[job.index])
            job.index += 1
            job.latents = view
            if job.done:
                job.finish()
            total = len(job.guided)
            steps.append(Step(job, index, total, t, job.latents, result.branches, result.used))
        if all(job.done for job in self.jobs):
            self._workspace.leave(self._token)
        return steps

    def _results(self, runner: StepRunner, counts: list[int]) -> list[JobResult | None]:
        """Advance each job by its first `counts` branches, computed or extrapolated."""
        full = [job.is_full_now for job in self.jobs]
        computed = tuple(
            count if is_full else 0 for count, is_full in zip(counts, full, strict=True)
        )
        results: list[JobResult | None] = [None] * len(self.jobs)
        if any(computed):
            results = list(runner.run(computed, self._contexts, self._token))
        for i, (job, count) in enumerate(zip(self.jobs, counts, strict=True)):
            if job.extrapolation is None or not count:
                continue
            made = results[i]
            if made is None:
                results[i] = runner.advance(i, job.extrapolation.at(job.index, count))
            else:
                job.extrapolation.note(job.index, made.branches)
        return results

    def _moved_in(self) -> StepRunner:
        """The runner, with this batch's prefixes in the cache and its latents in the buffer."""
        workspace = self._workspace
        self.model.rope_for(1 + max(context.position for context in self._contexts))
        if workspace.enter(self._token):
            try:
                self._move_in()
            except BaseException:
                workspace.leave(self._token)  # the next step moves in anew
                raise
        assert self._runner is not None
        for job, view in zip(self.jobs, self._views, strict=True):
            if job.latents is not view and not job.done:
                if job.latents.shape != view.shape:  # it would be broadcast
                    raise ValueError(
                        f"the latents of a job are {tuple(job.latents.shape)}; expected "
                        f"{tuple(view.shape)}"
                    )
                view.copy_(to_device(job.latents, view.device))
                job.latents = view
        return self._runner

    def _move_in(self) -> None:
        shape, workspace = self._shape, self._workspace
        heads = slice(0, self.model.kv_heads)
        if self.parallel.sp is not None:
            heads = self.parallel.sp.cached_heads(self.model.kv_heads)
        self._runner = None  # an outgrown cache is to go before there is a larger one
        cache = workspace.cache(shape.cache_rows, heads.stop - heads.start)
        if self.model.attention.needs_finite_rows:
            cache.kv.zero_()  # others may have left anything
        self._runner = workspace.shaped(
            shape,
            lambda: StepRunner(workspace, self._marker_rows(), shape, cache, self.parallel),
        )
        self._views = [self._runner.x[job.tokens] for job in shape.jobs]
        for copy, context in zip(shape.copies, self._contexts, strict=True):
            if copy.cfg_place == self.parallel.cfg_rank:
                cache.copy_rows(context.cache, context.length, copy.kv_start, heads)
        workspace.on_leave = partial(
            _save_latents,
            [(weakref.ref(job), v) for job, v in zip(self.jobs, self._views, strict=True)],
        )

    def _set_controls(self, runner: StepRunner) -> None:
        """Put what the step needs of the schedules into the runner's buffers."""
        place = self._made - self._ahead_since
        # A job may have moved on elsewhere, in another batch that it is part of.
        moved = any(
            job.index != start + place
            for job, start in zip(self.jobs, self._ahead_from, strict=True)
            if not job.done
        )
        if self._ahead is None or place == _STEPS_AHEAD or moved:
            self._ahead, place = self._schedule(), 0
            self._ahead_since = self._made
            self._ahead_from = [job.index for job in self.jobs]
        times, controls = self._ahead
        runner.times.copy_(times[place])
        runner.controls.copy_(controls[place])

    def _schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded times (steps, jobs, D) and controls (steps, jobs, 4) of the next steps."""
        steps = range(_STEPS_AHEAD)
        times = torch.zeros(len(steps), len(self.jobs), dtype=torch.float32)
        controls = torch.zeros(len(steps), len(self.jobs), 4, dtype=torch.float32)
        for j, job in enumerate(self.jobs):
            settings = job.settings
            scales = (settings.cfg_text_scale, settings.cfg_img_scale, settings.cfg_renorm_min)
            ahead = job.timesteps[job.index : job.index + len(steps) + 1].double()
            dt = ahead[:-1] - ahead[1:]
            times[: len(dt), j] = ahead[:-1].float()
            controls[: len(dt), j, 0] = dt.float()
            controls[:, j, 1:] = torch.tensor(scales, dtype=torch.float32)
        device = self.model.device
        embedded = self.model.embed_times(to_device(times.flatten(), device))
        return embedded.unflatten(0, times.shape), to_device(controls, device)

    def _marker_rows(self) -> torch.Tensor:
        ids = to_device(torch.tensor(self._markers), self.model.device)
        return self.model.embed_text(ids)


def _save_latents(views: list[tuple[weakref.ref[ImageJob], torch.Tensor]]) -> None:
    """Give jobs latents of their own where they still read the buffers."""
    for reference, view in views:
        job = reference()
        if job is not None and job.latents is view:
            job.latents = view.clone()


class _Pace:
    """Keeps the host at most one step ahead of a GPU: callbacks and cancelling stay in time."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._events = [torch.cuda.Event(blocking=True) for _ in range(2)] if on_gpu else []
        self._noted = 0

    def wait(self) -> None:
        if self._events and self._noted >= 2:
            self._events[self._noted % 2].synchronize()

    def note(self) -> None:
        if self._events:
            self._events[self._noted % 2].record(torch.cuda.current_stream(self._device))
            self._noted += 1


def _shape_of(
    model: Bagel, jobs: Sequence[ImageJob], parallel: Parallel
) -> tuple[StepShape, list[Context]]:
    """All jobs' copies, spread over the CFG parallel ranks and placed in the cache."""
    rounds = model.attention.device_lengths and parallel.config.world_size == 1
    job_shapes: list[JobShape] = []
    copies: list[CopyShape] = []
    contexts: list[Context] = []
    load = [0] * parallel.config.cfg  # packed rows of each rank
    used = [0] * parallel.config.cfg  # cache rows of each rank
    first_token = 0
    for i, job in enumerate(jobs):
        tokens = job.grid[0] * job.grid[1]
        first_copy = len(copies)
        places = []
        for context in job.branches:
            distinct = contexts[first_copy:]
            if context not in distinct:
                room = context.length
                if rounds:
                    room = -(-room // _ROOM_STEP) * _ROOM_STEP
                place = load.index(min(load))
                copy = CopyShape(i, tokens, room, place, used[place])
                rows = parallel.sp.cache_rows(copy.rows) if parallel.sp else copy.rows
                load[place] += copy.rows
                used[place] += room + rows
                copies.append(copy)
                contexts.append(context)
                distinct = contexts[first_copy:]
            places.append(first_copy + distinct.index(context))
        job_shapes.append(
            JobShape(job.grid, first_token, tuple(places), job.settings.cfg_renorm_type)
        )
        first_token += tokens
    # As much on every rank, whatever it has: a cache that is outgrown takes the graphs with it, and
    # ranks must replay and launch the same.
    return StepShape(tuple(job_shapes), tuple(copies), max(used)), contexts
