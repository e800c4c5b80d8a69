"""A request while its images are denoised, what is recorded of it, and the answer made of it."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from PIL import Image
from vllm_omni.diffusion.data import DiffusionOutput

from bagel_mot.pipeline import Prepared
from bagel_mot.sampling import ImageJob, Step


class Painting:
    """The images of one request on their way.

    Args:
        prepared: the request with its prompt read.
        keeps_trajectory: record the latents after each step.
        scheduler: None for our Euler steps, or an object of a training library that makes them in
            its own way: `step(velocity, t, latents, dt, **options)` returns an object with
            `prev_sample` and maybe `log_prob`. Every image gets a copy.
        scheduler_options: the options.

    Attributes:
        latents: (N, 64) float32 of each image, as they are now.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        keeps_trajectory: bool = False,
        scheduler: Any = None,
        scheduler_options: dict[str, Any] | None = None,
    ) -> None:
        self.prepared = prepared
        self.latents = [job.latents for job in prepared.jobs]
        self.schedulers = [copy(scheduler) for _ in prepared.jobs]
        self._options = dict(scheduler_options or {})
        self._keeps_trajectory = keeps_trajectory
        self._latents_kept = [[latents] for latents in self.latents]
        self._log_probs: list[list[torch.Tensor]] = [[] for _ in prepared.jobs]

    @property
    def jobs(self) -> list[ImageJob]:
        """The images' denoising jobs."""
        return self.prepared.jobs

    def note(self, step: Step) -> bool:
        """Take notice of a step that was just made, if it was of one of these images."""
        for i, job in enumerate(self.jobs):
            if job is step.job:
                latents = step.latents
                if self.schedulers[i] is not None:
                    latents = self._moved(i, self.latents[i], step.velocity, step.index)
                self._now(i, latents)
                return True
        return False

    def set_latents(self, latents: torch.Tensor) -> None:
        """Make (images * N, 64) the latents that the next step starts from."""
        for i, (job, own) in enumerate(zip(self.jobs, latents.chunk(len(self.jobs)), strict=True)):
            self.latents[i] = job.latents = own

    def move(self, velocity: torch.Tensor, index: int) -> torch.Tensor:
        """Make step `index` with this velocity; both (images * N, 64), returns the new latents."""
        for i, own in enumerate(velocity.chunk(len(self.jobs))):
            self._now(i, self._moved(i, self.latents[i], own, index))
        return torch.cat(self.latents)

    def trajectory(self) -> dict[str, Any]:
        """What was recorded, on the CPU; tensors have a leading axis for several images.

        `latents` (T, N, 64) from the noise on, `timesteps` (T - 1,), and of an own scheduler
        `log_probs`. Empty if nothing was to be recorded.
        """
        if not self._keeps_trajectory:
            return {}
        several = [torch.stack([x.cpu() for x in kept]) for kept in self._latents_kept]
        found = {
            "latents": _one_or_all(several),
            "timesteps": self.jobs[0].timesteps[:-1].clone(),
        }
        if any(self._log_probs):
            found["log_probs"] = _one_or_all(
                [torch.stack([x.cpu() for x in own]) for own in self._log_probs]
            )
        return found

    def snapshots(self) -> list[list[ImageJob]]:
        """For each image a job for each recorded state, to be decoded."""
        return [
            [_at(job, latents) for latents in kept]
            for job, kept in zip(self.jobs, self._latents_kept, strict=True)
        ]

    def _moved(
        self, i: int, latents: torch.Tensor, velocity: torch.Tensor, index: int
    ) -> torch.Tensor:
        times = self.jobs[i].timesteps
        latents = latents.to(velocity.device)
        scheduler = self.schedulers[i]
        if scheduler is None:
            t, following = times[index : index + 2].tolist()
            return latents - velocity * (t - following)
        t = times[index].to(velocity.device)
        dt = (times[index] - times[index + 1]).to(velocity.device)
        made = scheduler.step(velocity, t, latents, dt, **self._options)
        log_prob = getattr(made, "log_prob", None)
        if log_prob is not None:
            self._log_probs[i].append(log_prob)
        moved: torch.Tensor = made.prev_sample
        return moved

    def _now(self, i: int, latents: torch.Tensor) -> None:
        self.latents[i] = self.jobs[i].latents = latents
        if self._keeps_trajectory:
            self._latents_kept[i].append(latents)


def image_answer(
    painting: Painting,
    images: list[Image.Image],
    decoded: list[list[Image.Image]] | None,
    durations: dict[str, float] | None,
) -> DiffusionOutput:
    """The answer with the finished images.

    Args:
        decoded: for each image the recorded states, decoded; None if that was not asked for.
        durations: seconds of the profiled stages.
    """
    payload: dict[str, Any] = {"image": images[0] if len(images) == 1 else images}
    metadata: dict[str, Any] = {}
    if painting.prepared.text is not None:
        metadata["text"] = {"think_text": painting.prepared.text}
    trajectory = painting.trajectory()
    if trajectory:
        if decoded is not None:
            trajectory["decoded"] = decoded[0] if len(decoded) == 1 else decoded
        payload["trajectory"] = trajectory
        metadata["trajectory"] = {"type": "denoising"}
    return _answer(payload, metadata, durations)


def text_answer(text: str, durations: dict[str, float] | None) -> DiffusionOutput:
    """The answer with a text."""
    return _answer({"text": text}, {"text": {"text_output": text}}, durations)


def _answer(
    payload: dict[str, Any], metadata: dict[str, Any], durations: dict[str, float] | None
) -> DiffusionOutput:
    output = {"payload": payload, "metadata": metadata}
    return DiffusionOutput(output=output, stage_durations=durations or {})


def _at(job: ImageJob, latents: torch.Tensor) -> ImageJob:
    snapshot = copy(job)
    snapshot.latents = latents
    return snapshot


def _one_or_all(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
