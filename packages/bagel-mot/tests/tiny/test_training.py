"""Training on a CPU in small: losses fall, runs resume, the result is an ordinary checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alone import denoise
from conftest import SMALL, compiles
from golden_data import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_mot import BagelPipeline, ImageSettings
from bagel_mot.context import Contexts
from bagel_mot.images import patchify
from bagel_mot.launch import run_ranks
from bagel_mot.model.bagel import Bagel
from bagel_mot.tiny import trainer
from bagel_mot.tiny.drawing import draw
from bagel_mot.tiny.objectives import Objectives
from bagel_mot.tiny.pool import make_pools
from bagel_mot.tiny.practice import Rounds
from bagel_mot.tiny.recipe import Recipe
from bagel_mot.tiny.trainer import Loss, Schedule, Stage
from bagel_mot.tiny.training import Plan, train
from bagel_mot.tiny.weights import leaves, save_checkpoint, vae_leaves
from bagel_mot.tokenizer import BagelTokenizer

CPU = torch.device("cpu")
PLAN = Plan(
    recipe=SMALL,
    sizes=((64, 64),),
    samples=12,
    vae=Schedule(4, 1e-3, warmup=2),
    model=Schedule(8, 3e-3, warmup=2),
    practice=Schedule(3, 1e-3, warmup=2),
    rounds=Rounds(captions=2, each=2, batch=3, steps=2, settings=ImageSettings(num_timesteps=3)),
    pixels=2 * 64 * 64,
    rows=(100, 150, 150),
)


def each_step(compute: Callable[[int], dict[str, Tensor]]) -> Loss:
    """A loss of the step's number: on a CPU a kind of step may be used once."""
    return Loss(lambda step: step, compute, torch.Generator())


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_train_from_nothing_to_a_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    assert not train(tmp_path, PLAN, device=CPU, deadline=0, say=said.append)
    assert "time is up" in said[-1]
    assert train(tmp_path, PLAN, device=CPU, say=said.append)
    assert "done: practice, step 3 of 3" in said[-1]
    assert [line["stage"] for line in lines(tmp_path)] == ["vae", "model", "practice"]
    losses = {"paint", "edit", "ask", "gradient", "rate", "seconds"}
    assert losses <= lines(tmp_path)[-2].keys()
    assert losses | {"practice", "right"} <= lines(tmp_path)[-1].keys()
    pipeline = BagelPipeline.from_pretrained(tmp_path / "checkpoint", device="cpu", dtype="float32")
    settings = ImageSettings(num_timesteps=3)
    image = pipeline.generate("a circle", height=64, width=96, settings=settings, seed=0).image
    assert image.size == (96, 64)
    assert isinstance(pipeline.ask(image, "what?", max_text_tokens=3), str)
    # A run that is done stays done.
    before = (tmp_path / "checkpoint" / "ema.safetensors").read_bytes()
    assert train(tmp_path, PLAN, device=CPU, say=said.append)
    assert (tmp_path / "checkpoint" / "ema.safetensors").read_bytes() == before


def test_start_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, PLAN, device=CPU, say=lambda _: None)
    weights = first / "checkpoint"
    schedule = replace(PLAN.model, steps=1, rate=0.0)
    said: list[str] = []
    for _ in range(2):  # and again, as a run that is resumed
        plan = replace(PLAN, model=schedule, practice=replace(PLAN.practice, steps=0))
        assert train(second, plan, device=CPU, start_from=weights, say=said.append)
    assert not any("vae" in line.lower() for line in said)
    with pytest.raises(ValueError, match="with starts_from True, not False"):
        train(second, plan, device=CPU, say=said.append)
    other = tmp_path / "other"
    shutil.copytree(weights, other)
    vae = load_file(other / "ae.safetensors")
    save_file({name: tensor + 1 for name, tensor in vae.items()}, other / "ae.safetensors")
    with pytest.raises(ValueError, match=r"run\.json is of a run with vae "):
        train(second, plan, device=CPU, start_from=other, say=said.append)
    for name in ("ae.safetensors", "ema.safetensors"):
        want = load_file(weights / name)
        for key, tensor in load_file(second / "checkpoint" / name).items():
            assert torch.equal(tensor, want[key]), key


def test_start_from_another_recipe_leaves_nothing(tmp_path: Path) -> None:
    for start, error in ((GOLDEN.checkpoint, ValueError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(error):
            train(tmp_path / "run", PLAN, device=CPU, start_from=start, say=lambda _: None)
        assert not (tmp_path / "run").exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path, PLAN, device=CPU, deadline=0, say=lambda _: None)
    with pytest.raises(ValueError, match=r"with --seed 0, not 1: .* choose another folder"):
        train(tmp_path, replace(PLAN, seed=1), device=CPU, deadline=0)
    with pytest.raises(ValueError, match=r"with --samples 12, not 13; --rows \S+, not 0\.0625: "):
        train(tmp_path, replace(PLAN, samples=13, rows=(1024, 2, 3)), device=CPU, deadline=0)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ema.safetensors").write_text("not to be touched")
    with pytest.raises(ValueError, match=r"RUN .* has ema\.safetensors and no run\.json"):
        train(tmp_path, PLAN, device=CPU, deadline=0)
    assert [each.name for each in tmp_path.iterdir()] == ["ema.safetensors"]


def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another process is training in .*; wait for it"):
            train(tmp_path, PLAN, device=CPU, deadline=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    train(tmp_path, PLAN, device=CPU, deadline=0, say=lambda _: None)  # it is free again


def test_a_folder_that_is_none_or_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hi")
    with pytest.raises(ValueError, match=r"RUN .*file is a file; give a folder"):
        train(tmp_path / "file", PLAN, device=CPU, deadline=0)
    for content, message in (("[]", "holds a JSON list"), ('{"a', "is not valid JSON")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=rf"run\.json {message}"):
            train(tmp_path, PLAN, device=CPU, deadline=0)


def test_pools_do_not_depend_on_the_workers(folder: Path) -> None:
    alone = make_pools(folder, 5, [(64, 64)], seed=1)
    spread = make_pools(folder, 5, [(64, 64)], seed=1, workers=2)
    for task, (pool,) in alone.items():
        (other,) = spread[task]
        assert torch.equal(pool.tokens, other.tokens)
        assert torch.equal(pool.scenes.places, other.scenes.places)
        assert torch.equal(pool.sources.looks, other.sources.looks)
    (reseeded,) = make_pools(folder, 5, [(64, 64)], seed=2)["paint"]
    assert not torch.equal(alone["paint"][0].tokens, reseeded.tokens)


@pytest.fixture
def stage_of(model: Bagel, tokenizer: BagelTokenizer, folder: Path) -> Callable[[Path], Stage]:
    """Stages that start from the same weights, each in a folder of its own."""
    objectives = Objectives(model, tokenizer)
    learning = leaves(model)
    start = {name: leaf.detach().clone() for name, leaf in learning.items()}
    pool = make_pools(folder, 4, [(64, 64)], seed=0)["edit"][0]

    def loss(step: int) -> dict[str, Tensor]:
        return objectives.losses({"edit": pool}, torch.Generator().manual_seed(step))

    def make(place: Path) -> Stage:
        with torch.no_grad():
            for name, leaf in learning.items():
                leaf.copy_(start[name])
        schedule = Schedule(6, 1e-3, warmup=2)
        return Stage("model", learning, each_step(loss), schedule, place, log_every=2, save_every=2)

    return make


def test_resumed_is_uninterrupted(
    stage_of: Callable[[Path], Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = stage_of(tmp_path / "whole")
    assert whole.run()
    want = {name: leaf.detach().clone() for name, leaf in whole.leaves.items()}
    averages = {name: value.clone() for name, value in whole.average.items()}

    ticks = iter(range(1000))
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(ticks)))
    parts = stage_of(tmp_path / "parts")
    assert not parts.run(deadline=4)
    assert 0 < parts.step < 6
    stopped_at = parts.step
    parts = stage_of(tmp_path / "parts")  # from the start weights: all must come from the state
    assert parts.step == stopped_at
    assert parts.run()
    for name, leaf in parts.leaves.items():
        assert torch.equal(leaf, want[name]), name
        assert torch.equal(parts.average[name], averages[name]), name
    assert any(not torch.equal(want[name], averages[name]) for name in want)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError("disk full"), "^disk full"),
        (RuntimeError("unexpected pos 9 vs 3"), r"model\.pt cannot be written: unexpected pos"),
    ],
    ids=["system", "torch"],
)
def test_a_crash_while_saving_keeps_the_old_state(
    stage_of: Callable[[Path], Stage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    said: str,
) -> None:
    """And leaves nothing that takes the room of the next one."""
    stage = stage_of(tmp_path)
    stage.save()
    before, files = (tmp_path / "model.pt").read_bytes(), sorted(tmp_path.iterdir())

    def crash(state: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise raised

    monkeypatch.setattr(trainer.torch, "save", crash)
    with pytest.raises(OSError, match=said):
        stage.save()
    assert (tmp_path / "model.pt").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


def test_a_state_past_the_end_is_refused(stage_of: Callable[[Path], Stage], tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    stage.run()
    other = Schedule(5, 1e-3)
    with pytest.raises(ValueError, match=r"model\.pt is at step 6, past the 5 steps that are "):
        Stage("model", stage.leaves, each_step(lambda _: {}), other, tmp_path)


def test_a_state_whose_rate_falls_cannot_be_prolonged(
    stage_of: Callable[[Path], Stage], tmp_path: Path
) -> None:
    stage = stage_of(tmp_path)
    stage.run()
    longer = replace(stage.schedule, steps=600)
    with pytest.raises(ValueError, match="of 6, where the rate falls already: it cannot have 600"):
        Stage("model", stage.leaves, each_step(lambda _: {}), longer, tmp_path)
    level = replace(stage.schedule, cooldown=0, steps=600)
    assert Stage("model", stage.leaves, each_step(lambda _: {}), level, tmp_path).step == 6


def test_a_broken_state_is_named(stage_of: Callable[[Path], Stage], tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    stage.save()
    file = tmp_path / "model.pt"
    for content in (file.read_bytes()[:-100], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} is no whole state"):
            Stage("model", stage.leaves, each_step(lambda _: {}), stage.schedule, tmp_path)


@pytest.mark.parametrize("stage", ["vae", "model"])
def test_a_finished_run_is_not_undone(stage: str, tmp_path: Path) -> None:
    """By the same command with other steps: what it has is as it was."""
    assert train(tmp_path, PLAN, device=CPU, say=lambda _: None)
    # (vae.pt is written anew when the model is the one that is refused: the same numbers.)
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "vae.pt"]
    before = {file: file.read_bytes() for file in kept}
    longer = replace(PLAN, **{stage: replace(getattr(PLAN, stage), steps=100)})
    with pytest.raises(ValueError, match=f"{stage}.pt is at step . of ., where the rate falls"):
        train(tmp_path, longer, device=CPU, deadline=0, say=lambda _: None)
    assert {file: file.read_bytes() for file in kept} == before


def test_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    weight = torch.ones(1, requires_grad=True)
    stage = Stage(
        "model",
        {"w": weight},
        each_step(lambda _: {"x": (weight * float("nan")).sum()}),
        Schedule(5, 1e-3),
        tmp_path,
        log_every=1,
    )
    with pytest.raises(ValueError, match="stage model, step 1"):
        stage.run()


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Not even between two lines of the log, and not when time is up."""
    weight = torch.ones(1, requires_grad=True)

    def loss(step: int) -> dict[str, Tensor]:
        return {"x": (weight * (float("nan") if step >= 6 else 1.0)).sum()}

    def stage() -> Stage:
        schedule = Schedule(100, 1e-3)
        return Stage(
            "model", {"w": weight}, each_step(loss), schedule, tmp_path, log_every=50, save_every=4
        )

    with pytest.raises(ValueError, match="stage model, step 8"):
        stage().run()
    assert stage().step == 4
    ticks = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.time, "monotonic", lambda: float(next(ticks)))
        with pytest.raises(ValueError, match="stage model, step 7"):
            stage().run(deadline=6.5)
    assert stage().step == 4
    assert weight.isfinite().all()


def test_schedule() -> None:
    schedule = Schedule(100, 1.0, warmup=10, cooldown=0.25)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:75] == [1.0] * 66
    assert rates[75:] == sorted(rates[75:], reverse=True)
    assert rates[99] == pytest.approx(0.04)


def test_vae_learns(model: Bagel, tokenizer: BagelTokenizer, folder: Path, tmp_path: Path) -> None:
    objectives = Objectives(model, tokenizer)
    pool = make_pools(folder, 2, [(64, 64)], seed=0)["paint"][0]

    def loss(step: int) -> dict[str, Tensor]:
        noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(step))
        return objectives.reconstruct(pool.scenes, pool.size, noise)

    first = float(loss(0)["pixels"].detach())
    learning = vae_leaves(model)
    Stage("vae", learning, each_step(loss), Schedule(25, 2e-3, warmup=5), tmp_path).run()
    assert float(loss(0)["pixels"].detach()) < 0.6 * first


def test_overfitted_model_paints_what_it_was_shown(
    model: Bagel, tokenizer: BagelTokenizer, folder: Path, tmp_path: Path
) -> None:
    """Two captions, two pictures: sampling from noise gives each caption its own picture."""
    with torch.no_grad():  # the VAE has learnt nothing, but its latents are about as usual
        model.vae.encoder.conv_out.weight[:16] *= 3
        model.vae.encoder.conv_out.bias[16:] = -12
    objectives = Objectives(model, tokenizer)
    pool = make_pools(folder, 2, [(64, 64)], seed=5)["paint"][0]
    assert pool.scenes.ground[0].tolist() != pool.scenes.ground[1].tolist()
    many = pool.select(torch.arange(2).repeat(6))

    def loss(step: int) -> dict[str, Tensor]:
        return objectives.losses({"paint": many}, torch.Generator().manual_seed(step))

    schedule = Schedule(200, 4e-3, warmup=20)
    stage = Stage("model", leaves(model), each_step(loss), schedule, tmp_path)
    stage.run()
    with torch.no_grad():
        latents = model.vae.encode(draw(pool.scenes, 64, 64), torch.zeros(2, 16, 8, 8))
        wanted = [patchify(latent, 2) for latent in latents]
        settings = ImageSettings(num_timesteps=20, cfg_text_scale=1.0)
        for i in range(2):
            contexts = Contexts(model, tokenizer)
            contexts.add_text(tokenizer.decode(pool.tokens[i, 1 : pool.lengths[i] - 1].tolist()))
            noise = torch.randn(16, 64, generator=torch.Generator().manual_seed(i))
            painted = denoise(model, contexts, noise, (4, 4), settings)
            distances = [float((painted - other).norm()) for other in wanted]
            apart = float((wanted[0] - wanted[1]).norm())
            assert distances[i] < 0.5 * apart, (i, distances, apart)
            assert distances[1 - i] > 0.8 * apart


def test_saved_checkpoint_is_the_model(model: Bagel, folder: Path, tmp_path: Path) -> None:
    values = {name: torch.full_like(leaf, 0.5) for name, leaf in vae_leaves(model).items()}
    weight = model.lm_head.weight.detach().clone()
    before = model.vae.decoder.conv_out.weight.detach().clone()
    save_checkpoint(model, tmp_path, values)
    saved = load_file(tmp_path / "ae.safetensors")
    assert all(tensor.dtype is torch.bfloat16 for tensor in saved.values())
    assert all((tensor == 0.5).all() for tensor in saved.values())
    assert torch.equal(model.vae.decoder.conv_out.weight, before)
    rest = load_file(tmp_path / "ema.safetensors")
    assert torch.equal(rest["language_model.lm_head.weight"], weight.bfloat16())
    layer = model.transformer.layers[1]
    prefix = "language_model.model.layers.1.self_attn"
    q, k, v = (rest[f"{prefix}.{name}_proj_moe_gen.weight"] for name in "qkv")
    fused = layer.attn.qkv.gen_exp.weight
    assert torch.equal(torch.cat([q, k, v]), fused.bfloat16())


def test_recipe_fits_into_the_wheel(tmp_path: Path) -> None:
    """The shipped model is at most 24 MB: weights in bfloat16, two bytes each."""
    from bagel_mot import checkpoint
    from bagel_mot.model.vae import AutoEncoder

    recipe = Recipe()
    recipe.write_configs(tmp_path)
    config = recipe.config(tmp_path)
    with torch.device("meta"):
        vae = AutoEncoder(config.vae)
    weights = sum(parameter.numel() for parameter in vae.parameters())
    weights += sum(
        torch.Size(target.shape).numel() for target in checkpoint.model_targets(config).values()
    )
    assert 2 * weights < 23.8e6


def test_leaves_in_16_bits_learn_what_16_bits_cannot_tell(tmp_path: Path) -> None:
    """Each step moves the leaf by less than bfloat16 resolves; together they count."""
    leaf = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)

    def loss(step: int) -> dict[str, Tensor]:
        return {"all": leaf.float().sum()}

    schedule = Schedule(40, 1e-3, warmup=1, cooldown=0.0)
    stage = Stage("model", {"leaf": leaf}, each_step(loss), schedule, tmp_path)
    assert stage.run()
    assert leaf.tolist() == torch.tensor([0.96]).bfloat16().tolist() * 4
    assert stage.average["leaf"].dtype is torch.float32
    other = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    resumed = Stage("model", {"leaf": other}, each_step(loss), schedule, tmp_path)
    assert resumed.done and torch.equal(other, leaf)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_replicas_learn_from_each_other(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, torch sees {torch.cuda.device_count()}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, str(Path(__file__).with_name("replica_worker.py"))]
    assert run_ranks([*command, str(tmp_path), device], 2, seconds=120.0) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert (found[0]["stopped"], found[0]["step"]) == (0, 12)
    # Both numbers have fallen alike, though each replica sees but one.
    first, second = found[0]["weight"]
    assert first == pytest.approx(second) and first < 0.95
    # Only one of them writes.
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12]


def test_replicas_share_the_samples(folder: Path) -> None:
    whole = make_pools(folder, 5, [(64, 64)], seed=1)["paint"][0]
    part = make_pools(folder, 3, [(64, 64)], first=2, seed=1)["paint"][0]
    assert torch.equal(part.scenes.places, whole.scenes.places[2:])
    assert torch.equal(part.lengths, whole.lengths[2:])


def test_two_replicas_train_on_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--device cpu --samples 4 --rows 0.01 --workers 0 --nproc 2"
    steps = "--vae-steps 2 --steps 2 --practice-steps 2"
    command = [sys.executable, "-m", "bagel_mot", "train-tiny", str(run), *steps.split()]
    command += options.split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: practice, step 2 of 2") == 1, done.stderr
    assert json.loads((run / "run.json").read_text())["replicas"] == 2
    BagelPipeline.from_pretrained(run / "checkpoint", device="cpu", dtype="float32")
    # Half of them cannot go on alone.
    alone = subprocess.run([*command[:-2], "--nproc", "1"], capture_output=True, text=True)
    assert alone.returncode == 2 and "with replicas 2, not 1" in " ".join(alone.stderr.split())


@pytest.mark.gpu
@compiles
def test_replayed_steps_are_those_that_were_launched(tmp_path: Path) -> None:
    """Through several sizes, so that graphs take turns, and resumed, so that states go round."""
    sizes = ((64, 64), (64, 96))
    # Without the way down a stage may be prolonged.
    level = Schedule(16, 1e-3, cooldown=0)
    plan = replace(PLAN, sizes=sizes, vae=Schedule(16, 1e-3), model=level)
    plan = replace(plan, practice=replace(PLAN.practice, steps=0))  # chance decides too much there
    found = []
    for cuda_graphs in (False, True):
        place = tmp_path / str(cuda_graphs)
        options = {"device": torch.device("cuda", 0), "cuda_graphs": cuda_graphs}
        train(place, plan, say=lambda _: None, **options)
        longer = replace(plan, model=replace(level, steps=32))
        assert train(place, longer, say=lambda _: None, **options)
        found.append(load_file(place / "checkpoint" / "ema.safetensors"))
        found[-1] |= load_file(place / "checkpoint" / "ae.safetensors")
    launched, replayed = found
    for name, tensor in launched.items():
        difference = (replayed[name].float() - tensor.float()).norm()
        assert difference <= 0.02 * tensor.float().norm() + 1e-3, name
