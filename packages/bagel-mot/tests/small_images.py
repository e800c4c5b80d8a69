"""Small images of one text, made without the pipeline: for tests of steps."""

from __future__ import annotations

import torch
from alone import denoise
from torch import Tensor

from bagel_mot.context import Contexts
from bagel_mot.graphs import Workspace
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.sampling import ImageSettings

GRID = (3, 5)
GUIDED = ImageSettings(num_timesteps=4, cfg_interval=(0.5, 1.0))


def contexts_of(pipeline: BagelPipeline, text: str) -> Contexts:
    contexts = Contexts(pipeline.model, pipeline.tokenizer)
    contexts.add_text(text)
    return contexts


def noise_of(seed: int, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(seed))


def paint(
    pipeline: BagelPipeline,
    text: str,
    seed: int = 0,
    *,
    grid: tuple[int, int] = GRID,
    settings: ImageSettings = GUIDED,
    workspace: Workspace | None = None,
) -> Tensor:
    contexts = contexts_of(pipeline, text)
    return denoise(
        pipeline.model, contexts, noise_of(seed, grid), grid, settings, workspace=workspace
    )
