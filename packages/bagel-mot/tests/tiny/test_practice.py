"""Practice: many pictures at once are painted as the pipeline does, and rewards change them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from alone import denoise
from conftest import SMALL, compiles

from bagel_mot.context import Contexts
from bagel_mot.model.bagel import Bagel
from bagel_mot.pipeline import build_model
from bagel_mot.sampling import ImageSettings
from bagel_mot.tiny import practice as module
from bagel_mot.tiny.grading import are_right
from bagel_mot.tiny.language import Caption, draw_painting
from bagel_mot.tiny.policy import Asked, Policy
from bagel_mot.tiny.practice import Practice, Rounds
from bagel_mot.tiny.trainer import Loss, Schedule, Stage
from bagel_mot.tiny.training import Plan, train
from bagel_mot.tiny.weights import leaves
from bagel_mot.tokenizer import BagelTokenizer

CPU = torch.device("cpu")
TEXTS = ["a red circle", "three small blue squares and a green triangle on white", "a star"]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_paints_what_the_pipeline_paints(
    model: Bagel, tokenizer: BagelTokenizer, scale: float
) -> None:
    """Guidance off at the end and on before; texts of different lengths in one batch."""
    settings = ImageSettings(num_timesteps=8, cfg_text_scale=scale)
    assert len(set(settings.guided(settings.timesteps()))) == (1 if scale == 1 else 2)
    noise = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    asked = Asked.of(TEXTS, (64, 96), tokenizer, CPU)
    painted = Policy(model, tokenizer, settings).paint(asked, noise)
    for text, start, found in zip(TEXTS, noise, painted, strict=True):
        with torch.no_grad():
            contexts = Contexts(model, tokenizer)
            contexts.add_text(text)
            want = denoise(model, contexts, start, (4, 6), settings)
        assert float((found - want).norm()) < 1e-4 * float(want.norm())


def test_velocity_is_guided_where_the_pipeline_guides(
    model: Bagel, tokenizer: BagelTokenizer
) -> None:
    asked = Asked.of(TEXTS, (64, 64), tokenizer, CPU)
    x = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.4, 0.41])  # guided above 0.4
    settings = ImageSettings(cfg_text_scale=4.0)
    plain = Policy(model, tokenizer, replace_scale(settings, 1.0)).velocity(asked, x, t)
    guided = Policy(model, tokenizer, settings).velocity(asked, x, t)
    torch.testing.assert_close(guided[:2], plain[:2])
    assert (guided[2] - plain[2]).norm() > 1e-3 * plain[2].norm()
    guided[2].sum().backward()
    assert model.llm2vae.weight.grad is not None


def replace_scale(settings: ImageSettings, scale: float) -> ImageSettings:
    return settings.model_copy(update={"cfg_text_scale": scale})


def test_a_text_that_is_too_long(tokenizer: BagelTokenizer) -> None:
    with pytest.raises(ValueError, match=r"a text has \d+ tokens: 'a a .*expected <= 24"):
        Asked.of(["a " * 40], (64, 64), tokenizer, CPU)


def practice_of(
    model: Bagel, tokenizer: BagelTokenizer, folder: Path, rounds: Rounds, **options: int
) -> Practice:
    old = build_model(SMALL.config(folder), device=CPU, dtype=torch.float32)
    practice = Practice(model, old, tokenizer, rounds, [(64, 64)], seed=0, **options)
    practice.follows = {name: leaf.detach().clone() for name, leaf in leaves(model).items()}
    return practice


def bright(pictures: np.ndarray, captions: Sequence[Caption]) -> list[bool]:
    """Stands for the grader: right is what is brighter than half of all."""
    levels = pictures.reshape(len(captions), -1).mean(1)
    return (levels > np.median(levels)).tolist()


def test_learns_what_is_rewarded(
    model: Bagel,
    tokenizer: BagelTokenizer,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "are_right", bright)
    settings = ImageSettings(num_timesteps=5, cfg_text_scale=1.0)
    rounds = Rounds(captions=2, each=16, batch=32, steps=4, settings=settings)
    practice = practice_of(model, tokenizer, folder, rounds)
    policy = Policy(model, tokenizer, settings)
    asked = Asked.of(TEXTS, (64, 64), tokenizer, CPU)
    noise = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(1))

    def decode(size: tuple[int, int], latents: torch.Tensor) -> torch.Tensor:
        """The VAE has learnt nothing; this one shows the latents' mean."""
        return latents.mean((1, 2), keepdim=True)[..., None].expand(-1, 3, *size)

    monkeypatch.setattr(practice._learner, "decode", decode)

    def brightness() -> float:
        return float(policy.paint(asked, noise).mean())

    before = brightness()
    generator = torch.Generator()
    loss = Loss(
        practice.begin,
        lambda size: {"practice": practice.loss(size, generator)},
        generator,
        practice.notes,
    )
    schedule = Schedule(40, 2e-3, warmup=2, cooldown=0.0, average=0.8)
    stage = Stage("practice", leaves(model), loss, schedule, tmp_path, log_every=4)
    practice.follows = stage.average
    stage.run()
    after = brightness()
    assert after > before + 0.05, (before, after)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert 0.4 <= first["right"] <= 0.5


def test_steps_learn_from_what_differs(
    model: Bagel, tokenizer: BagelTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three captions one is painted right now and then, the others never and always."""
    rights = [True, False, True, True, *[False] * 4, *[True] * 4]
    monkeypatch.setattr(module, "are_right", lambda pictures, captions: rights)
    settings = ImageSettings(num_timesteps=2, cfg_text_scale=1.0)
    practice = practice_of(
        model, tokenizer, folder, Rounds(captions=3, each=4, batch=6, steps=2, settings=settings)
    )
    for step in range(2):
        held = practice._held[practice.begin(step)]
        assert set(held.index.tolist()) <= {0, 1, 2, 3}
    assert held.better.tolist() == [0.625, 0.125, 0.625, 0.625, *[0.5] * 8]
    assert practice.notes() == {"right": 7 / 12}
    assert practice.notes() == {}
    # Where nothing differs, all are learned from, and pull towards the old model alone.
    rights[:4] = [True] * 4
    held = practice._held[practice.begin(2)]
    assert set(practice._order.tolist()) == set(range(12))
    loss = practice.loss(practice._size, torch.Generator().manual_seed(0))
    loss.backward()
    gradient = max(
        float(leaf.grad.abs().max()) for leaf in leaves(model).values() if leaf.grad is not None
    )
    assert gradient < 1e-5  # the old model is the model still


def test_workers_grade_alike(model: Bagel, tokenizer: BagelTokenizer, folder: Path) -> None:
    captions = [draw_painting(Random(i), size=(64, 64)).caption for i in range(9)]
    levels = torch.randint(256, (9, 64, 64, 3), dtype=torch.uint8)
    with practice_of(model, tokenizer, folder, Rounds(), workers=1) as practice:
        assert practice._grade(levels, captions)() == are_right(levels.numpy(), captions)


@pytest.mark.gpu
@compiles
def test_replayed_practice_is_what_was_launched(tmp_path: Path) -> None:
    """With a rate of 0, so that both paint the same."""
    rounds = Rounds(captions=2, each=2, batch=4, steps=2, settings=ImageSettings(num_timesteps=4))
    plan = Plan(
        recipe=SMALL,
        sizes=((64, 64), (64, 96)),
        samples=12,
        vae=Schedule(2, 1e-3),
        model=Schedule(2, 1e-3),
        practice=Schedule(100, 0.0),
        rounds=rounds,
        pixels=2 * 64 * 64,
        rows=(100, 150, 150),
    )
    found = []
    for cuda_graphs in (False, True):
        place = tmp_path / str(cuda_graphs)
        train(place, plan, device=torch.device("cuda", 0), cuda_graphs=cuda_graphs, say=str)
        log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        found.append([line["practice"] for line in log if line["stage"] == "practice"])
    launched, replayed = found
    assert len(launched) == 2 and replayed == pytest.approx(launched, rel=0.05)
