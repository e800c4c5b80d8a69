"""The command `bagel-mot train-tiny`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bagel_mot.cli_io import console, find_model, require_folder, user_errors
from bagel_mot.model_options import NprocOption, check_nproc, run_on_ranks


def train_tiny(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of the run; one that is there goes on.")
    ],
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long; the same command goes on.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Of the model; may be changed in the first quarter. Default: 100,000."
        ),
    ] = None,
    practice_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Of learning from its own paintings, after that. Default: 440."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Highest learning rate of the model. Default: 0.001."),
    ] = None,
    vae_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the VAE, before that. Default: 5,000.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Samples drawn per task and size of picture. Default: 25,000."),
    ] = None,
    rows: Annotated[
        float, typer.Option(min=0, max=100, help="Scales the batches; 1 is meant for a large GPU.")
    ] = 1.0,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            callback=find_model,
            help="Checkpoint folder (or tiny) to begin with; its VAE stays as it is.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that draw samples. Default: the cores.")
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option(help="Replay steps on a GPU instead of launching their kernels.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="E.g. cuda:0 or cpu. Default: a GPU if there is one.")
    ] = None,
    nproc: NprocOption = None,
) -> None:
    """Train the tiny model that paints coloured shapes; see docs/tiny.md.

    With --nproc 2, two GPUs train it together, each on samples of its own.
    """
    began = time.monotonic()  # before torch and vLLM are imported, which may take a minute
    with user_errors():
        from bagel_mot.loading import parse_device
        from bagel_mot.tiny.training import Plan, train

        if start_from is not None:
            require_folder(start_from, "--from")
        check_nproc(nproc)
        run_on_ranks(nproc)
        place = parse_device(device)
        plan = Plan(seed=seed)
        plan = replace(
            plan,
            samples=samples or plan.samples,
            vae=replace(plan.vae, steps=vae_steps or plan.vae.steps),
            model=replace(
                plan.model,
                steps=plan.model.steps if steps is None else steps,
                rate=plan.model.rate if rate is None else rate,
            ),
            practice=replace(
                plan.practice,
                steps=plan.practice.steps if practice_steps is None else practice_steps,
            ),
            pixels=max(int(plan.pixels * rows), 1),
            rows=tuple(max(int(each * rows), 1) for each in plan.rows),
            rounds=replace(
                plan.rounds,
                captions=max(int(plan.rounds.captions * rows), 1),
                batch=max(int(plan.rounds.batch * rows), 1),
            ),
        )
        train(
            run,
            plan,
            device=place,
            start_from=start_from,
            deadline=float("inf") if minutes is None else began + 60 * minutes,
            cuda_graphs=cuda_graphs,
            workers=(os.cpu_count() or 1) if workers is None else workers,
            say=lambda line: console.print(line, markup=False, highlight=False),
        )
