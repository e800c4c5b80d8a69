"""vLLM's engine on the CPU in float32 against the recordings and against our own pipeline.

The engine is made to do what is hard for it: a token budget hardly larger than a picture, so that
prompts are prefilled in chunks and pictures have to wait for room, and cache blocks smaller than a
picture, so that hits in the prefix cache end inside one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alone import generate_text
from engine_job import TEXT_CASES, Answer, Ask, run_engine
from golden_data import GOLDEN
from PIL import Image

from bagel_mot.context import Contexts
from bagel_mot.images import resize, to_rgb, to_tensor
from bagel_mot.pipeline import BagelPipeline

pytestmark = pytest.mark.engine

STREET, PORTRAIT = GOLDEN.folder / "images/street.png", GOLDEN.folder / "images/portrait.png"


def draw(path: Path, size: tuple[int, int], mode: str) -> Path:
    """A picture with a gradient, and in modes that have it some transparency."""
    width, height = size
    x = torch.linspace(0, 255, width).expand(height, width)
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    pixels = torch.stack([x, y, 255 - x, y], -1).byte().numpy()
    image = Image.frombytes("RGBA", size, pixels.tobytes())
    if mode == "P":
        image.convert("RGB").quantize(16).save(path, transparency=3)
    else:
        image.convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ask]:
    """Requests whose answers our pipeline tells."""
    home = tmp_path_factory.mktemp("pictures")
    wide = draw(home / "wide.png", (400, 25), "RGB")
    tall = draw(home / "tall.png", (20, 333), "RGBA")
    palette = draw(home / "palette.png", (64, 80), "P")
    gray = draw(home / "gray.png", (90, 90), "LA")
    return {
        "two pictures": Ask((STREET, PORTRAIT, "What differs?")),
        "text between": Ask(("First:", PORTRAIT, "Then:", STREET, "Which came first?")),
        "same twice": Ask((STREET, STREET, "Are they equal?")),
        "picture last": Ask(("Describe this.", PORTRAIT)),
        "wide": Ask((wide, "How wide is it?")),
        "tall": Ask((tall, "How tall is it?")),
        "palette": Ask((palette, "Which colours?")),
        "gray": Ask((gray, "Which colours?")),
        "long": Ask((STREET, "Count to a hundred. " * 20, PORTRAIT, "Go on.")),
        "two texts": Ask(("You should think first.", "What is two and two?")),
    }


@pytest.fixture(scope="module")
def answers(
    plugin_env: dict[str, str], asks: dict[str, Ask], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Answer]]:
    """The recorded requests alone, the others alone, and all of them at once, twice."""
    cases = [Ask.of_case(GOLDEN.case(name)) for name in TEXT_CASES]
    batches = {name: [case] for name, case in zip(TEXT_CASES, cases, strict=True)}
    batches |= {name: [ask] for name, ask in asks.items()}
    batches["together"] = [*cases, *asks.values()] * 2
    engine = {"max_num_batched_tokens": 64, "block_size": 32, "max_num_seqs": 12}
    return run_engine(plugin_env, engine, batches, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("name", TEXT_CASES)
def test_recorded_answer(answers: dict[str, list[Answer]], name: str) -> None:
    """Tokens and logits are the official model's."""
    case, (answer,) = GOLDEN.case(name), answers[name]
    assert answer.token_ids == case.tensors["text0.next_token_ids"].tolist()
    got = torch.tensor(answer.logprobs, dtype=torch.float64)
    want = case.tensors["text0.logits"].double().log_softmax(-1)
    assert (got - want).abs().max() < 1e-4


def test_answer_of_pipeline(
    answers: dict[str, list[Answer]], asks: dict[str, Ask], cpu: BagelPipeline
) -> None:
    """Several pictures, any size and mode, anywhere in the prompt: tokens as our pipeline's."""
    for name, ask in asks.items():
        assert answers[name][0].token_ids == tokens_of(cpu, ask), name


def test_together_as_alone(answers: dict[str, list[Answer]], asks: dict[str, Ask]) -> None:
    """Requests at once, with chunked prefill and prefix caching, change nothing."""
    alone = [answers[name][0].token_ids for name in (*TEXT_CASES, *asks)]
    assert [answer.token_ids for answer in answers["together"]] == alone * 2


def tokens_of(pipeline: BagelPipeline, ask: Ask) -> list[int]:
    """The tokens that our own model chooses, the end token included."""
    contexts = Contexts(pipeline.model, pipeline.tokenizer, needs_no_image=False)
    for part in ask.parts:
        if isinstance(part, str):
            contexts.add_text(part)
        else:
            resized = resize(to_rgb(Image.open(part)), pipeline.config.vae_transform)
            contexts.add_picture(None, to_tensor(resize(resized, pipeline.config.vit_transform)))
    chosen: list[int] = []
    generate_text(
        pipeline.model,
        pipeline.tokenizer,
        contexts.main,
        max_tokens=ask.max_tokens,
        on_token=chosen.append,
    )
    return chosen
