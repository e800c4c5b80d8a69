"""The plainest of captions, which a model that computes rightly hardly ever gets wrong."""

from __future__ import annotations

from bagel_mot import BagelPipeline, ImageSettings, Request
from bagel_mot.tiny.grading import Grade, grade_painting
from bagel_mot.tiny.language import Caption
from bagel_mot.tiny.scenes import Kind

CAPTIONS = [
    Caption(f"a {colour} {shape} on a white background", (Kind(colour, shape),), "white")
    for colour in ("red", "blue")
    for shape in ("circle", "square", "star")
]


def paint_plain(pipeline: BagelPipeline) -> list[Grade]:
    """A grade for each of `CAPTIONS`."""
    requests = [
        Request(
            [caption.text],
            "image",
            height=64,
            width=64,
            settings=ImageSettings(num_timesteps=20),
            seed=seed,
        )
        for seed, caption in enumerate(CAPTIONS)
    ]
    results = pipeline.run(requests)
    return [grade_painting(r.image, c) for r, c in zip(results, CAPTIONS, strict=True)]
