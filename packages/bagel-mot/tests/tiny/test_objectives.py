"""Training computes what inference computes, and its gradients reach every weight."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import SMALL
from torch import Tensor

from bagel_mot.config import BagelConfig
from bagel_mot.context import Contexts, append_text
from bagel_mot.denoising import Denoising
from bagel_mot.images import patchify, resize, to_tensor
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.embeddings import rope_table
from bagel_mot.parallel import ParallelConfig, start
from bagel_mot.pipeline import build_model
from bagel_mot.sampling import ImageJob, ImageSettings
from bagel_mot.tiny.drawing import SceneArrays, draw, draw_image
from bagel_mot.tiny.language import draw_painting
from bagel_mot.tiny.objectives import Objectives
from bagel_mot.tiny.packing import Grouping, run_together
from bagel_mot.tiny.pool import Pool, make_pools
from bagel_mot.tiny.weights import initialise, leaves
from bagel_mot.tokenizer import BagelTokenizer

SIZE = (64, 96)  # not square: rows and columns cannot be mixed up unseen


@pytest.fixture(scope="module")
def pools(folder: Path) -> dict[str, Pool]:
    return {task: pools[0] for task, pools in make_pools(folder, 6, [SIZE], seed=3).items()}


def first_velocity(
    model: Bagel, tokenizer: BagelTokenizer, contexts: Contexts, noise: Tensor, t_shift: float = 1.0
) -> tuple[Tensor, ...]:
    """The velocities of all branches at t = 1, as inference computes them."""
    settings = ImageSettings(cfg_text_scale=2.0, cfg_img_scale=2.0, timestep_shift=t_shift)
    job = ImageJob(contexts, noise, (SIZE[0] // 16, SIZE[1] // 16), settings)
    (step,) = Denoising(model, tokenizer, [job]).step()
    return step.velocities


def packed_velocity(
    model: Bagel,
    objectives: Objectives,
    task: str,
    pool: Pool,
    parts: list[Tensor],
    noise: Tensor,
    has_picture: bool,
    has_text: bool,
) -> Tensor:
    packing = objectives.packing(task, pool)
    markers = objectives._embedded_markers()
    t = torch.ones(len(pool))
    noisy = packing.embed_latents(model, noise.expand(len(pool), -1, -1), t, markers)
    everywhere = torch.ones(len(pool), dtype=torch.bool)
    rope = rope_table(64, model.config.llm.head_dim, model.config.llm.rope_theta)
    packed = packing.pack(
        [*parts, noisy], pool.lengths, everywhere & has_picture, everywhere & has_text
    )
    grouping = Grouping([packing], model.device)
    (hidden,) = run_together(model, rope, grouping, [packed])
    return model.velocity(hidden[:, packing.image_rows])


@torch.no_grad()
def test_paint_like_inference(
    model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    pool, objectives = pools["paint"], Objectives(model, tokenizer)
    noise = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    text = [objectives.packing("paint", pool).embed_text(model, pool.tokens)]
    args = (model, objectives, "paint", pool, text, noise, True)
    with_text, without = packed_velocity(*args, True), packed_velocity(*args, False)
    assert len({int(length) for length in pool.lengths}) > 1  # texts that need filling
    for i in range(len(pool)):
        contexts = Contexts(model, tokenizer)
        contexts.add_text(tokenizer.decode(pool.tokens[i, 1 : pool.lengths[i] - 1].tolist()))
        main, no_text, _ = first_velocity(model, tokenizer, contexts, noise)
        torch.testing.assert_close(with_text[i], main, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(without[i], no_text, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(main, no_text, atol=1e-3)


@torch.no_grad()
def test_edit_like_inference(
    model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    pool, objectives = pools["edit"], Objectives(model, tokenizer)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(24, 64, generator=generator)
    pixels = draw(pool.sources, *SIZE)
    packing, markers = objectives.packing("edit", pool), objectives._embedded_markers()
    latent = model.vae.encode(pixels, torch.randn(len(pool), 16, 8, 12, generator=generator))
    tokens = torch.stack([patchify(z, 2) for z in latent])
    parts = [
        packing.embed_latents(model, tokens, torch.zeros(1), markers),
        packing.embed_vit(model, pixels, markers),
        packing.embed_text(model, pool.tokens),
    ]
    args = (model, objectives, "edit", pool, parts, noise)
    got = [packed_velocity(*args, *has) for has in ((True, True), (True, False), (False, True))]
    for i in range(len(pool)):
        contexts = Contexts(model, tokenizer)
        # The ViT's picture as training resized it: Pillow would also round it to 8 bits.
        resized = torch.nn.functional.interpolate(
            pixels[i : i + 1], packing.vit_size, mode="bicubic", antialias=True
        )[0].clamp(-1, 1)
        contexts.add_picture(latent[i], resized)
        contexts.add_text(tokenizer.decode(pool.tokens[i, 1 : pool.lengths[i] - 1].tolist()))
        want = first_velocity(model, tokenizer, contexts, noise)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ask_like_inference(
    model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    pool, objectives = pools["ask"], Objectives(model, tokenizer)
    assert pool.shown.any()
    pixels = draw(pool.scenes, *SIZE)
    losses, counts = 0.0, 0
    for i in range(len(pool)):
        contexts = Contexts(model, tokenizer)
        ids = pool.tokens[i, : pool.lengths[i]].tolist()
        question, answer = ids[: pool.answers[i]], ids[pool.answers[i] :]
        if pool.shown[i]:
            resized = torch.nn.functional.interpolate(
                pixels[i : i + 1],
                objectives.packing("ask", pool).vit_size,
                mode="bicubic",
                antialias=True,
            )[0].clamp(-1, 1)
            contexts.add_picture(None, resized)
        contexts.add_text(tokenizer.decode(question[1:-1]))
        context = contexts.main
        for token, following in pairwise(answer):
            context, hidden = append_text(model, context, [token])
            target = torch.tensor([following])
            losses += float(torch.nn.functional.cross_entropy(model.logits(hidden), target))
            counts += 1
    loss = objectives.losses({"ask": pool}, torch.Generator())["ask"]
    assert float(loss) == pytest.approx(losses / counts, rel=1e-4)


def test_resizing_is_nearly_pillows() -> None:
    """What training shows the ViT is what inference shows it, but for rounding to 8 bits."""
    scene = draw_painting(Random(0), size=SIZE).scene
    limits = BagelConfig.model_fields["vit_transform"].default.model_copy(
        update={"max_side": 126, "min_side": 56}
    )
    want = to_tensor(resize(draw_image(scene), limits))
    pixels = draw(SceneArrays.of([scene]), *SIZE)
    got = torch.nn.functional.interpolate(pixels, want.shape[-2:], mode="bicubic", antialias=True)[
        0
    ].clamp(-1, 1)
    assert want.shape[-2:] != SIZE
    assert (got - want).abs().max() <= 3 / 127.5


@pytest.mark.parametrize("task", ["paint", "edit", "ask"])
def test_gradients_reach_every_weight(
    task: str, model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    learning = leaves(model)
    batch, generator = {task: pools[task]}, torch.Generator().manual_seed(0)
    loss = Objectives(model, tokenizer).losses(batch, generator)[task]
    loss.backward()
    silent = {name for name, leaf in learning.items() if leaf.grad is None or not leaf.grad.any()}
    generating = {"time_embedder", "vae2llm", "latent_pos", "llm2vae"}
    seeing = {"vit", "connector", "vit_pos"}
    unused = {
        "paint": seeing | {"lm_head"},
        "edit": {"lm_head"},
        "ask": generating,
    }[task]
    # The last layer's und rows lead nowhere but to the logits, and its gen rows to the velocity;
    # those are parts of stacks, so no stack is silent on their account.
    assert {name.split(".")[0] for name in silent} == unused


def test_tasks_together_are_tasks_alone(
    model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    """Batches that share a pass do not see each other: losses and gradients add up."""
    learning, objectives = leaves(model), Objectives(model, tokenizer)
    # One task's noise must not depend on the tasks before it.
    alone = {}
    for task, pool in pools.items():
        state = torch.Generator().manual_seed(0)
        for before in list(pools)[: list(pools).index(task)]:
            objectives.losses({before: pools[before]}, state)
        alone[task] = objectives.losses({task: pool}, state)[task]
    together = objectives.losses(pools, torch.Generator().manual_seed(0))
    for task in pools:
        torch.testing.assert_close(together[task], alone[task], rtol=1e-5, atol=1e-6)
    names, tensors = list(learning), list(learning.values())
    want = torch.autograd.grad(sum(alone.values()), tensors)
    got = torch.autograd.grad(sum(together.values()), tensors)
    for name, one, other in zip(names, got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_of_both_experts(
    model: Bagel, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    """Along a random direction, the loss changes as the gradient says."""
    learning = leaves(model)
    objectives = Objectives(model, tokenizer)

    def edit_loss() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return objectives.losses({"edit": pools["edit"]}, generator)["edit"]

    loss = edit_loss()
    loss.backward()
    generator = torch.Generator().manual_seed(7)
    stacks = {name: leaf for name, leaf in learning.items() if "stacked" in name}
    for expert in (0, 1):
        slope, step = 0.0, 2e-3
        moves = {}
        for name, leaf in stacks.items():
            move = torch.zeros_like(leaf)
            move[expert] = torch.randn(leaf[expert].shape, generator=generator) * leaf.std()
            moves[name] = move
            slope += float((leaf.grad * move).detach().sum())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, leaf in stacks.items():
                    leaf.add_(moves[name], alpha=sign * step)
                ends.append(float(edit_loss()))
                for name, leaf in stacks.items():
                    leaf.add_(moves[name], alpha=-sign * step)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_losses_in_bfloat16(
    folder: Path, tokenizer: BagelTokenizer, pools: dict[str, Pool]
) -> None:
    """What trains on a GPU computes what float32 does, up to rounding, gradients included."""
    start(ParallelConfig(), "cpu")
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = build_model(SMALL.config(folder), device=torch.device("cpu"), dtype=dtype)
        model.vae.float()
        initialise(model, 0)
        with torch.no_grad():  # zero would stop gradients
            model.llm2vae.weight.copy_(torch.randn(model.llm2vae.weight.shape) * 0.1)
        learning = leaves(model)
        objectives = Objectives(model, tokenizer)
        found = objectives.losses(pools, torch.Generator().manual_seed(0))
        torch.stack(list(found.values())).sum().backward()
        losses.append(torch.stack(list(found.values())).detach())
        assert all(leaf.dtype is dtype for leaf in learning.values())
        gradients.append(torch.cat([leaf.grad.float().flatten() for leaf in learning.values()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
