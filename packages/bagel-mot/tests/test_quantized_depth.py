"""What number formats cost random models of 4 and of 28 layers; `pytest -s` prints the table of
docs/formats.md."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from bagel_mot import ImageSettings
from bagel_mot.quantization import Keep, Quantization
from bagel_mot.synthetic import TINY, random_pipeline

SETTINGS = ImageSettings(num_timesteps=2, cfg_text_scale=1.0)
ENDS = Keep(first=1, last=1)


@cache
def first_velocity(layers: int, quantization: Quantization | str | None) -> Tensor:
    """Of the first step of a 96x96 picture, (36, 64)."""
    llm = TINY.llm.model_copy(
        update={
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        }
    )
    pipeline = random_pipeline(
        TINY.model_copy(update={"llm": llm}),
        device=torch.device("cpu"),
        dtype=torch.float32,
        quantization=quantization,
    )
    seen: list[Tensor] = []
    pipeline.model.llm2vae.register_forward_hook(lambda _, x, y: seen.append(y.clone()))
    pipeline.generate("a red circle", settings=SETTINGS, height=96, width=96, seed=0)
    return seen[0]


@pytest.mark.parametrize(
    ("quantization", "least", "least_of_28"),
    [
        ("fp8", 0.995, 0.97),
        ("int8", 0.999, 0.995),
        ("w8a16", 0.999, 0.998),
        ("w4a16", 0.97, 0.85),
        ("w4a16:32", 0.975, 0.88),
        (Quantization(format="fp8", keep=ENDS), 0.998, 0.98),
        (Quantization(format="w4a16", keep=ENDS), 0.985, 0.89),
    ],
    ids=str,
)
def test_cosine_of_the_first_velocity(
    quantization: Quantization | str, least: float, least_of_28: float
) -> None:
    for layers, bound in ((4, least), (28, least_of_28)):
        plain, rounded = first_velocity(layers, None), first_velocity(layers, quantization)
        cosine = float(torch.cosine_similarity(rounded.flatten(), plain.flatten(), dim=0))
        print(f"{quantization}, {layers} layers: {cosine:.4f}")
        assert cosine >= bound
