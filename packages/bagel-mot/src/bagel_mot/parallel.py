"""Several GPUs for one request: tensor, sequence and CFG parallelism, and any product of them.

Rank = (CFG place * sequence parallel size + sequence place) * tensor parallel size + tensor place:
the ranks that talk most are neighbours.

- Tensor parallel: every linear is split, through vLLM's groups (`mot_layers`).
- Sequence parallel: the rows of a denoised picture are split; see `model/sequence_parallel.py`.
- CFG parallel: the contexts of the guidance are split; ranks exchange velocities once a step.

Prompts are read and text is written by all ranks alike (under tensor parallelism together).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from mot_layers.runtime import init_parallel
from vllm.distributed import get_tp_group

from bagel_mot.config import LlmConfig
from bagel_mot.model.sequence_parallel import SequenceParallel
from bagel_mot.numeric import check_whole

# An environment variable that torch reads.
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks do what; their product is the number of processes.

    Attributes:
        tensor: tensor parallel ranks.
        ulysses, ring: sequence parallel ranks of each kind; they multiply.
        allgather: sequence parallel ranks that gather K and V, instead of the two.
        cfg: ranks that guidance contexts are spread over.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size below 1, or all-gather together with Ulysses or ring.
    """

    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    allgather: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for name in ("tensor", "ulysses", "ring", "allgather", "cfg"):
            size = getattr(self, name)
            check_whole(f"{name} parallel size", size)
            if size < 1:
                raise ValueError(f"{name} parallel size is {size}; expected >= 1")
        if self.allgather > 1 and self.ulysses * self.ring > 1:
            raise ValueError(
                f"allgather={self.allgather} with ulysses={self.ulysses}, ring={self.ring}: "
                "all-gather KV is used alone, Ulysses and ring may be combined"
            )

    @property
    def sequence(self) -> int:
        """Sequence parallel ranks."""
        return self.ulysses * self.ring * self.allgather

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.sequence * self.cfg

    @classmethod
    def parse(cls, tensor: int = 1, sequence: str | None = None, cfg: int = 1) -> Self:
        """From the command line's words; `sequence` is "ulysses:2", "ring:3", "ulysses:2,ring:2"
        or "allgather:2".

        Raises:
            ValueError: `sequence` is written differently, or a size makes no sense.
        """
        sizes = {"ulysses": 1, "ring": 1, "allgather": 1}
        for part in (sequence or "").split(",") if sequence else []:
            kind, _, size = part.strip().partition(":")
            if kind not in sizes or not size.isdecimal():
                raise ValueError(
                    f"sequence parallelism {part!r}; expected KIND:SIZE with KIND one of "
                    f"{', '.join(sizes)}, for example ulysses:2 or ulysses:2,ring:2"
                )
            sizes[kind] = int(size)
        return cls(tensor=tensor, cfg=cfg, **sizes)

    def check(self, llm: LlmConfig, world_size: int) -> None:
        """Refuse what the model or the number of processes does not allow.

        Raises:
            ValueError: naming the sizes that do not go together.
        """
        if self.world_size != world_size:
            raise ValueError(
                f"tensor {self.tensor} x sequence {self.sequence} x cfg {self.cfg} needs "
                f"{self.world_size} processes, but there are {world_size}; --nproc starts them "
                "here, torchrun anywhere"
            )
        if self.cfg > 3:
            raise ValueError(
                f"cfg parallel size is {self.cfg}; guidance compares at most 3 contexts, so that "
                "more ranks would have nothing to do"
            )
        heads, kv_heads = llm.num_attention_heads, llm.num_key_value_heads
        if heads % self.tensor or llm.intermediate_size % self.tensor:
            raise ValueError(
                f"tensor parallel size {self.tensor} does not divide the {heads} attention heads "
                f"and the MLP width {llm.intermediate_size}"
            )
        if max(kv_heads, self.tensor) % min(kv_heads, self.tensor):
            raise ValueError(
                f"tensor parallel size {self.tensor} and the {kv_heads} KV heads: one must divide "
                "the other"
            )
        heads, kv_heads = heads // self.tensor, max(kv_heads // self.tensor, 1)
        uneven = max(kv_heads, self.ulysses) % min(kv_heads, self.ulysses)
        if heads % self.ulysses or uneven:
            raise ValueError(
                f"Ulysses size {self.ulysses} with {heads} attention heads and {kv_heads} KV heads "
                "a rank: the first must be a multiple of it, the second a multiple or a divisor; "
                "use a ring for the rest, or allgather"
            )


@dataclass(frozen=True)
class Parallel:
    """This process among the others; made by `start`.

    Attributes:
        config: the sizes.
        rank: of this process.
        sp: its sequence parallel ranks; None if there are no others.
        cfg_rank: its place among the CFG parallel ranks.
        peers: the ranks with the same tensor place, who exchange velocities; None if there
            is no other.
    """

    config: ParallelConfig
    rank: int
    sp: SequenceParallel | None
    cfg_rank: int
    peers: dist.ProcessGroup | None

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups that exchange data in a step, by name; none if this process is alone."""
        found = {"CFG and sequence parallel": self.peers}
        if self.sp is not None:
            found |= {
                "sequence parallel": self.sp.group,
                "Ulysses": self.sp.ulysses_group,
                "ring": self.sp.ring_group,
            }
        if self.config.tensor > 1:
            found["tensor parallel"] = get_tp_group().device_group
        return {name: group for name, group in found.items() if group is not None}

    def why_not_captured(self) -> str:
        """Why CUDA graphs cannot hold what these ranks exchange; "" if they can.

        The same on every rank, as all of them must capture, or none.
        """
        for name, group in self.groups().items():
            backends = dict(
                each.split(":") for each in dist.get_backend_config(group).split(",") if ":" in each
            )
            if (backend := backends.get("cuda", "none")) != "nccl":
                return (
                    f"the {name} group's backend for GPUs is {backend}, and only NCCL's exchanges "
                    "can be captured"
                )
        if self.groups() and os.environ.get(_BLOCKING_WAIT, "0").lower() not in ("0", "false"):
            return f"{_BLOCKING_WAIT} makes the host wait for each exchange"
        return ""

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank: for what ranks draw or decide each on their own."""
        if self.config.world_size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(tensor, src=0)
        return int(tensor)


ALONE = Parallel(ParallelConfig(), rank=0, sp=None, cfg_rank=0, peers=None)

# By their ranks, and the group of all processes, which ends with them.
_groups: tuple[object, dict[tuple[int, ...], dist.ProcessGroup]] = (None, {})


def _groups_made() -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Those that this process has made since it joined the others."""
    global _groups
    if _groups[0] is not dist.group.WORLD:
        _groups = dist.group.WORLD, {}
    return _groups[1]


def world_size_from_environment() -> int:
    """Processes torchrun (or `bagel-mot --nproc`) started."""
    return _whole_of_environment("WORLD_SIZE", "1")


def _whole_of_environment(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value or "")
    except ValueError:
        raise ValueError(f"{name} is {value!r}; expected a number, as torchrun sets it") from None


def start(config: ParallelConfig, device_type: str) -> Parallel:
    """Join the other processes; call it on every rank, after `config.check`.

    Rank and meeting place come from the environment, as torchrun sets it (RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT). One process needs none of it. On GPUs, rank r takes the machine's
    GPU r and makes it the current one.
    """
    backend = "nccl" if device_type == "cuda" else "gloo"
    world = config.world_size
    if world == 1:
        init_parallel(backend=backend)
        return ALONE
    rank = _whole_of_environment("RANK")
    init_parallel(config.tensor, rank, world, init_method="env://", backend=backend)
    place = rank // config.tensor
    sp_rank, cfg_rank = place % config.sequence, place // config.sequence

    def global_rank(cfg: int, sequence: int, tensor: int) -> int:
        return (cfg * config.sequence + sequence) * config.tensor + tensor

    # Every process creates every group, in the same order, as torch.distributed requires. The same
    # ranks share one, whatever they do in it, and for which model: connecting takes a second, and
    # some 100 MB of a GPU.
    made = _groups_made()
    mine: dict[str, dist.ProcessGroup] = {}

    def create(name: str, ranks: list[int]) -> None:
        together = tuple(ranks)
        if together not in made:
            made[together] = dist.new_group(ranks)
        if rank in ranks:
            mine[name] = made[together]

    sequences = range(config.sequence)
    for tensor in range(config.tensor):
        everyone = [global_rank(c, s, tensor) for c in range(config.cfg) for s in sequences]
        create("peers", everyone)
        for cfg in range(config.cfg):
            create("sp", [global_rank(cfg, s, tensor) for s in sequences])
            for r in range(config.ring):
                ulysses = range(r * config.ulysses, (r + 1) * config.ulysses)
                create("ulysses", [global_rank(cfg, s, tensor) for s in ulysses])
            for u in range(config.ulysses):
                ring = range(u, config.ulysses * config.ring, config.ulysses)
                create("ring", [global_rank(cfg, s, tensor) for s in ring])
    sp = None
    if config.sequence > 1:
        gathers = config.allgather > 1
        sp = SequenceParallel(
            size=config.sequence,
            rank=sp_rank,
            group=mine["sp"],
            ulysses_group=None if gathers else mine["ulysses"],
            ring_group=None if gathers else mine["ring"],
        )
    peers = mine["peers"] if config.cfg * config.sequence > 1 else None
    return Parallel(config, rank, sp, cfg_rank, peers)
