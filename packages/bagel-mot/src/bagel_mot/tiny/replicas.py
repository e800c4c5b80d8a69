"""Training on several GPUs: each has the whole model, and samples of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bagel_mot.loading import join
from bagel_mot.parallel import ParallelConfig, world_size_from_environment


@dataclass(frozen=True)
class Replicas:
    """The processes that train one model together (data parallelism).

    They start with equal weights and change them by equal gradients, so they stay equal.

    Attributes:
        rank, size: of this process among them.
        peers: all of them; None if this one is alone.
        meeting: the same on the host, whatever the device.
    """

    rank: int = 0
    size: int = 1
    peers: dist.ProcessGroup | None = None
    meeting: dist.ProcessGroup | None = None

    @classmethod
    def find(cls, device: torch.device) -> tuple[Replicas, torch.device]:
        """Meet the processes that torchrun (or `--nproc`) started; call it on each of them.

        Returns:
            This process among them, and its device, with its number.

        Raises:
            ValueError: see `bagel_mot.loading.join`.
        """
        size = world_size_from_environment()
        # As CFG parallelism has it: no weight is split, and all are peers.
        joined, device = join(ParallelConfig(cfg=size), device)
        if size == 1:
            return cls(), device
        return cls(joined.rank, size, joined.peers, dist.new_group(backend="gloo")), device

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.peers)
            tensor /= self.size

    def agree(self, flag: bool) -> bool:
        """What the first process says; all wait for it."""
        if self.size == 1:
            return flag
        said = torch.tensor([flag])
        dist.broadcast(said, src=0, group=self.meeting)
        return bool(said)

    def meet(self) -> None:
        """Wait until everyone is here."""
        if self.size > 1:
            dist.barrier(group=self.meeting)
