"""Golden cases as requests to the pipeline, and the check of all that happens on the way."""

from __future__ import annotations

import numpy as np
import torch
from golden_data import GOLDEN, GoldenCase, Judge
from PIL import Image

from bagel_mot.pipeline import BagelPipeline
from bagel_mot.request import Result
from bagel_mot.sampling import ImageSettings, Step


class RecordedNoise:
    """The noise of a case, in the order it was drawn: each picture's, then the image's."""

    def __init__(self, case: GoldenCase) -> None:
        self.generator = None
        self.remaining = [case.tensors[f"{seg}.noise"] for seg, _ in case.segments("vae")]
        self.remaining.append(case.tensors["gen.init_noise"])

    def normal(self, *shape: int) -> torch.Tensor:
        noise = self.remaining.pop(0)
        assert tuple(noise.shape) == shape
        return noise


def pipeline_for(pipeline: BagelPipeline, case: GoldenCase) -> BagelPipeline:
    """The pipeline with the image limits of the case."""
    limits = {name: case.json[name] for name in ("vae_transform", "vit_transform")}
    changed = type(pipeline.config).model_validate(pipeline.config.model_dump() | limits)
    own = BagelPipeline(pipeline.model, pipeline.tokenizer, pipeline.parallel)
    own.config, own.workspace = changed, pipeline.workspace
    return own


def request_parts(case: GoldenCase) -> list[str | Image.Image]:
    return [
        part["text"] if part["type"] == "text" else Image.open(GOLDEN.folder / part["file"])
        for part in case.json["inputs"]
    ]


def settings_of(case: GoldenCase) -> ImageSettings:
    # What a recording leaves out has interleave_inference's default, not ours.
    defaults = {"cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
    given = {k: v for k, v in case.json["params"].items() if k in ImageSettings.model_fields}
    return ImageSettings(**(defaults | given))


def paint_and_judge(pipeline: BagelPipeline, judge: Judge, case: GoldenCase) -> Result:
    """Paint a case and compare every velocity, every x and the image with the recording."""
    steps: list[Step] = []
    is_edit = bool(case.segments("vae"))  # its size follows from the picture
    height, width = case.json["image"]["shape"]
    result = pipeline_for(pipeline, case).chat(
        request_parts(case),
        output="image",
        settings=settings_of(case),
        height=None if is_edit else height,
        width=None if is_edit else width,
        noise=RecordedNoise(case),
        on_step=steps.append,
    )
    assert len(steps) == settings_of(case).num_timesteps - 1
    judge.check(case, "step0.x_t", case.tensors["gen.init_noise"])
    for step in steps:
        judge.check(case, f"step{step.index}.v", step.velocity)
        names = ("v_main", "v_cfg_text", "v_cfg_img")
        for key, velocity in zip(names, step.velocities, strict=False):
            judge.check(case, f"step{step.index}.{key}", velocity)
        if step.index + 1 < len(steps):
            judge.check(case, f"step{step.index + 1}.x_t", step.latents)
    judge.check(case, "gen.final_latent", steps[-1].latents)
    judge.assert_nothing_missed(case, "step", "gen.final")
    want = np.asarray(Image.open(GOLDEN.folder / "cases" / f"{case.name}.png"), dtype=np.int32)
    judge.check_pixels(case, np.asarray(result.image, dtype=np.int32) - want)
    return result
