"""Training the tiny model, from nothing to a checkpoint folder: the VAE, the rest, and practice.

A run lives in one folder:

- `run.json`: recipe, seed, samples and batches, which a resumed run must share;
- `vae.pt`, `model.pt`, `practice.pt`: states of the stages; `log.jsonl`: the log of all;
- `checkpoint/`: the model in the official layout, written anew when a stage or the run ends. A run
  that is interrupted goes on from what its stage saved last, every 1,000 steps or ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import torch
from mot_kernels import reference
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.pipeline import build_model
from bagel_mot.tiny.objectives import Objectives
from bagel_mot.tiny.pool import TASKS, Pool, make_pools
from bagel_mot.tiny.practice import Practice, Rounds
from bagel_mot.tiny.recipe import Recipe
from bagel_mot.tiny.replicas import Replicas
from bagel_mot.tiny.run_folder import CHECKPOINT, begin, claimed
from bagel_mot.tiny.scenes import SIZES, draw_size
from bagel_mot.tiny.trainer import Loss, Schedule, Stage
from bagel_mot.tiny.weights import initialise, leaves, save_checkpoint, vae_leaves
from bagel_mot.tokenizer import BagelTokenizer

Stages: TypeAlias = Literal["vae", "model", "practice"]


@dataclass(frozen=True)
class Plan:
    """How the tiny model is trained; docs/tiny.md says how the shipped one was.

    Attributes:
        recipe: sizes.
        seed: of the start values, the samples and all noise.
        sizes: (height, width) of the pictures.
        samples: per task and size, drawn before training; replicas divide them.
        vae, model, practice: schedules of the three stages. The average that the last one keeps
            is also the older model that paints: a few rounds old.
        rounds: of the last stage. It is short: going on at this rate it broke down after some 700
            steps (docs/log.md).
        pixels: of a VAE step's batch, on each replica.
        rows: of a step's batch of each task, on each replica; as many samples as fill them.
        weights: of the tasks' losses.
        every: one step in so many has edits and questions; each has pictures to paint, which is
            harder.
    """

    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    sizes: tuple[tuple[int, int], ...] = SIZES
    samples: int = 25_000
    vae: Schedule = field(default_factory=lambda: Schedule(5_000, 1e-3))
    model: Schedule = field(default_factory=lambda: Schedule(100_000, 1e-3, warmup=500))
    practice: Schedule = field(
        default_factory=lambda: Schedule(440, 1e-4, warmup=50, cooldown=0.5, average=0.9)
    )
    rounds: Rounds = field(default_factory=Rounds)
    pixels: int = 64 * 64 * 64
    rows: tuple[int, ...] = (16_384, 4_096, 2_048)
    weights: tuple[float, ...] = (1.0, 1.0, 0.5)
    every: int = 3


def train(
    folder: Path,
    plan: Plan,
    *,
    device: torch.device,
    start_from: Path | None = None,
    deadline: float = float("inf"),
    workers: int = 0,
    cuda_graphs: bool = True,
    say: Callable[[str], None] = print,
) -> bool:
    """Train, or go on training, until the plan is done or time is up.

    On several GPUs call it in each process that torchrun starts: they are replicas.

    Args:
        device: "cuda" is the GPU of this process.
        start_from: a checkpoint folder to begin with; its VAE stays as it is. Give it again when
            the run is resumed.
        deadline: when to stop, as `time.monotonic()` counts.
        workers: processes that draw the samples, and grade paintings; 0 does it in this one.
        cuda_graphs: see `trainer.Stage`.
        say: told in a line what goes on, in the first process.

    Returns:
        Whether the plan is done. `folder/checkpoint` holds the model either way, unless time was
        up before the VAE was done.

    Raises:
        FileNotFoundError, ValueError: `start_from` holds no checkpoint of this recipe, or the
            folder a run with another recipe, seed, samples or batches, one that is past the
            plan's steps, or one that another process is training. A run there stays as it is.
    """
    if start_from is not None:
        _check_start(plan.recipe, start_from)
    replicas, device = Replicas.find(device)
    with claimed(folder) if replicas.rank == 0 else nullcontext():
        return _train(
            folder, plan, device, replicas, start_from, deadline, workers, cuda_graphs, say
        )


def _train(
    folder: Path,
    plan: Plan,
    device: torch.device,
    replicas: Replicas,
    start_from: Path | None,
    deadline: float,
    workers: int,
    cuda_graphs: bool,
    say: Callable[[str], None],
) -> bool:
    """See `train`; nobody else trains in this folder."""
    place = folder / CHECKPOINT
    if replicas.rank > 0:
        say = _nothing
        replicas.meet()  # who finds the run's folder there checks it
    begin(folder, plan, start_from, replicas.size)
    if replicas.rank == 0:
        replicas.meet()
    tokenizer = BagelTokenizer.from_folder(place)
    samples = max(plan.samples // replicas.size, 1)
    say(f"drawing {plan.samples} samples per task and size with {workers or 1} processes")
    drawn = make_pools(
        place,
        samples,
        plan.sizes,
        first=replicas.rank * samples,
        seed=plan.seed,
        workers=workers,
    )
    pools = {task: [pool.to(device) for pool in several] for task, several in drawn.items()}

    torch.manual_seed(plan.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(plan.recipe.config(place), device=device, dtype=dtype)
    model.vae.to(torch.float32, memory_format=torch.channels_last)
    initialise(model, plan.seed)
    objectives = Objectives(model, tokenizer)
    run = _Run(folder, plan, objectives, tokenizer, pools, replicas, cuda_graphs, say)

    if start_from is not None:
        _load(model, start_from)
    elif not run.train_vae(deadline):
        return False
    stage = run.train_model(deadline)
    if stage.done and plan.practice.steps:
        stage = run.practise(stage, deadline, workers)
    if replicas.rank == 0:
        save_checkpoint(model, place, stage.average)
    replicas.meet()
    state = "done" if stage.done else "time is up; the same command goes on"
    say(f"{state}: {stage.name}, step {stage.step} of {stage.schedule.steps}; it is in {place}")
    return stage.done


@dataclass
class _Run:
    """One call of `train`, on one replica."""

    folder: Path
    plan: Plan
    objectives: Objectives
    tokenizer: BagelTokenizer
    pools: dict[str, list[Pool]]
    replicas: Replicas
    cuda_graphs: bool
    say: Callable[[str], None]
    batches: dict[tuple[str, int], int] = field(default_factory=dict)

    def train_vae(self, deadline: float) -> bool:
        """The first stage; leaves the VAE with its average weights. Returns whether it is done."""
        stage = self._stage("vae", vae_leaves(self.objectives.model), self._vae_loss())
        if not stage.run(deadline):
            self.say(f"time is up at step {stage.step} of the VAE; the same command goes on")
            return False
        with torch.no_grad():
            for name, leaf in stage.leaves.items():
                leaf.copy_(stage.average[name])
        return True

    def train_model(self, deadline: float) -> Stage:
        """The second stage, for a VAE that stays as it is; as far as it came."""
        model = self.objectives.model
        model.vae.requires_grad_(False)
        self.say("encoding the pictures")
        for task in ("paint", "edit"):
            self.pools[task] = [self.objectives.encode(task, pool) for pool in self.pools[task]]
        stage = self._stage("model", leaves(model), self._model_loss())
        before = stage.step
        with reference.compiled() if model.device.type == "cuda" else nullcontext():
            stage.run(deadline)
        practised = self.folder / "practice.pt"
        if stage.step > before and self.replicas.rank == 0 and practised.exists():
            self.say(f"the model went on, and practises anew: {practised} is discarded")
            practised.unlink()
        return stage

    def practise(self, trained: Stage, deadline: float, workers: int) -> Stage:
        """The third stage, from the averages of the second; as far as it came."""
        plan, model = self.plan, self.objectives.model
        with torch.no_grad():
            for name, leaf in trained.leaves.items():
                leaf.copy_(trained.average[name])
        config, device = model.config, model.device
        old = build_model(config, device=device, dtype=model.dtype)
        generator = torch.Generator(device)
        with Practice(
            model,
            old,
            self.tokenizer,
            plan.rounds,
            plan.sizes,
            seed=plan.seed,
            rank=self.replicas.rank,
            workers=workers,
        ) as practice:

            def choose(step: int) -> int:
                size = practice.begin(step)
                self._seed(generator, "practice", step)
                return 2 * size + (step % plan.every == 0)

            def compute(kind: int) -> dict[str, Tensor]:
                size, has_all = divmod(kind, 2)
                losses = {"practice": practice.loss(size, generator)}
                # What it is not practising, it must not forget.
                return losses | self._losses(TASKS if has_all else (), size, generator)

            loss = Loss(choose, compute, generator, practice.notes)
            stage = self._stage("practice", trained.leaves, loss)
            practice.follows = stage.average
            stage.run(deadline)
        return stage

    def _stage(self, name: Stages, learning: dict[str, Tensor], loss: Loss) -> Stage:
        stage = Stage(
            name,
            learning,
            loss,
            getattr(self.plan, name),
            self.folder,
            cuda_graphs=self.cuda_graphs,
            replicas=self.replicas,
        )
        self.say(f"{name}: step {stage.step} of {stage.schedule.steps}")
        return stage

    def _vae_loss(self) -> Loss:
        """Each step has pictures of one pool."""
        channels = self.objectives.model.config.vae.z_channels
        generator = torch.Generator(self.objectives.model.device)
        several = self.pools["paint"] + self.pools["edit"]

        def choose(step: int) -> int:
            self._seed(generator, "vae", step)
            return Random(f"{self.plan.seed}/vae/{step}").randrange(len(several))

        def compute(kind: int) -> dict[str, Tensor]:
            pool = several[kind]
            height, width = pool.size
            batch = max(self.plan.pixels // (height * width), 1)
            index = _index(len(pool), batch, generator)
            shape = (batch, channels, height // 8, width // 8)
            noise = torch.randn(shape, generator=generator, device=generator.device)
            return self.objectives.reconstruct(pool.scenes.select(index), pool.size, noise)

        return Loss(choose, compute, generator)

    def _model_loss(self) -> Loss:
        """Each step has a batch to paint, some have one of every task, all of one size.

        Large pictures hold fewer to a batch and are harder, so their turn comes more often.
        """
        plan = self.plan
        generator = torch.Generator(self.objectives.model.device)

        def choose(step: int) -> int:
            self._seed(generator, "model", step)
            size = draw_size(Random(f"{plan.seed}/model/{step}"), plan.sizes)
            return 2 * size + (step % plan.every == 0)

        def compute(kind: int) -> dict[str, Tensor]:
            size, has_all = divmod(kind, 2)
            return self._losses(TASKS if has_all else TASKS[:1], size, generator)

        return Loss(choose, compute, generator)

    def _losses(
        self, tasks: Sequence[str], size: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch of each of some tasks, with pictures of one size."""
        samples = {}
        for task in tasks:
            pool, batch = self.pools[task][size], self._batch(task, size)
            samples[task] = pool.select(_index(len(pool), batch, generator))
        if not samples:
            return {}
        losses = self.objectives.losses(samples, generator)
        weights = dict(zip(TASKS, self.plan.weights, strict=True))
        return {task: weights[task] * loss for task, loss in losses.items()}

    def _batch(self, task: str, size: int) -> int:
        """How many samples fill a step's rows."""
        if (task, size) not in self.batches:
            one = self.pools[task][size].select(torch.arange(1))
            rows = self.plan.rows[TASKS.index(task)]
            self.batches[task, size] = max(rows // self.objectives.packing(task, one).rows, 1)
        return self.batches[task, size]

    def _seed(self, generator: torch.Generator, stage: Stages, step: int) -> None:
        """For what a replica does by itself in a step."""
        seed = f"{self.plan.seed}/{stage}/{step}/noise/{self.replicas.rank}"
        generator.manual_seed(Random(seed).getrandbits(62))


def _load(model: Bagel, folder: Path) -> None:
    """Fill all weights from a checkpoint of the same recipe, see `_check_start`."""
    targets = checkpoint.model_targets(model.config) | checkpoint.vae_targets(model.vae)
    checkpoint.load_checkpoint(model, checkpoint.read_headers(folder), targets)


def _check_start(recipe: Recipe, folder: Path) -> None:
    """Refuse a checkpoint of another recipe, before anything is written."""
    with TemporaryDirectory() as place:
        recipe.write_configs(Path(place))
        config = recipe.config(Path(place))
    vae = AutoEncoder.without_weights(config.vae)
    targets = checkpoint.model_targets(config) | checkpoint.vae_targets(vae)
    checkpoint.check_names(checkpoint.read_headers(folder), targets)


def _index(length: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(length, (count,), generator=generator, device=generator.device)


def _nothing(line: str) -> None:
    """What replicas but the first say."""
