"""One of two replicas that train a few numbers: python replica_worker.py FOLDER DEVICE

Each writes what its numbers have become to FOLDER/RANK.json. The folder above must be in
PYTHONPATH, for `ranks`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from ranks import leaving_on_failure
from torch import Tensor

from bagel_mot.tiny.replicas import Replicas
from bagel_mot.tiny.trainer import Loss, Schedule, Stage


def main(folder: Path, device: str) -> None:
    replicas, place = Replicas.find(torch.device(device))
    weight = torch.ones(2, device=place, requires_grad=True)
    # Each sees one of the two numbers, so that the other one learns from the other replica alone.
    seen = (torch.arange(2, device=place) == replicas.rank).float()

    def loss(kind: int) -> dict[str, Tensor]:
        return {"own": weight @ seen}

    generator = torch.Generator(place)
    stage = Stage(
        "model",
        {"weight": weight},
        Loss(lambda step: 0, loss, generator),
        Schedule(12, 0.01, warmup=1),
        folder,
        log_every=4,
        save_every=8,
        replicas=replicas,
    )
    # The second one would go on for ever: the first one's clock counts.
    stage.run(deadline=0.0 if replicas.rank == 0 else float("inf"))
    stopped = stage.step
    stage.run()
    numbers = {"stopped": stopped, "step": stage.step, "weight": weight.tolist()}
    (folder / f"{replicas.rank}.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    with leaving_on_failure():
        main(Path(sys.argv[1]), sys.argv[2])
