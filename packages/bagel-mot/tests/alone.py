"""One text or one image by itself, made from contexts: for tests of what is below the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bagel_mot.context import Context, Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.model.bagel import Bagel
from bagel_mot.sampling import ImageJob, ImageSettings, Step
from bagel_mot.text import TextJob, fed_tokens, generate_texts
from bagel_mot.tokenizer import BagelTokenizer


def generate_text(
    model: Bagel,
    tokenizer: BagelTokenizer,
    context: Context,
    *,
    workspace: Workspace | None = None,
    **options: Any,
) -> list[int]:
    """Continue a context with text; the options are those of `TextJob`.

    Returns:
        The tokens that were fed: the start token, then all chosen ones but the last.
        `tokenizer.answer` makes a string of them.
    """
    job = TextJob(context, **options)
    generate_texts(model, tokenizer, [job], workspace=workspace)
    return fed_tokens(tokenizer, job)


def denoise(
    model: Bagel,
    contexts: Contexts,
    noise: torch.Tensor,
    grid: tuple[int, int],
    settings: ImageSettings,
    on_step: Callable[[Step], None] | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Turn the noise of one image into its latent tokens; see `ImageJob` for the arguments.

    Args:
        on_step: called after each step; an exception of its ends the denoising.
        workspace: see `Denoising`.

    Returns:
        (N, 64) float32 on the model's device.
    """
    job = ImageJob(contexts, noise, grid, settings)
    denoising = Denoising(model, contexts.tokenizer, [job], workspace=workspace)
    while not job.done:
        (step,) = denoising.step()
        if on_step is not None:
            on_step(step.kept())
    return job.latents
