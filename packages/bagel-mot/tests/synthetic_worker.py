"""One tensor parallel rank of a random model: its parameters are its parts of the whole model's.

python synthetic_worker.py FILE      FILE holds the whole model's parameters, saved by torch
"""

from __future__ import annotations

import os
import sys

import torch
from ranks import leaving_on_failure

from bagel_mot.parallel import ParallelConfig, world_size_from_environment
from bagel_mot.synthetic import TINY, random_pipeline


def part_of(name: str, whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What this rank holds of a parameter, by the rules of tensor parallelism."""
    llm = TINY.llm
    if not name.startswith("transformer."):
        return whole
    if ".qkv." in name:
        heads, kv_heads, dim = llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim
        q, k, v = whole.split([heads * dim, kv_heads * dim, kv_heads * dim])
        own = rank * kv_heads // ranks  # of fewer KV heads than ranks several hold the same
        kv = slice(own * dim, (own + max(kv_heads // ranks, 1)) * dim)
        return torch.cat([q.chunk(ranks)[rank], k[kv], v[kv]])
    if ".gate_up." in name:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    if ".down." in name or ".o." in name:
        return whole.chunk(ranks, dim=1)[rank]
    return whole


def main(file: str) -> None:
    ranks, rank = world_size_from_environment(), int(os.environ["RANK"])
    model = random_pipeline(
        TINY,
        device=torch.device("cpu"),
        dtype=torch.float32,
        parallel=ParallelConfig(tensor=ranks),
    ).model
    whole = torch.load(file, weights_only=True)
    own = dict(model.named_parameters())
    assert own.keys() == whole.keys()
    for name, parameter in own.items():
        torch.testing.assert_close(
            parameter.data, part_of(name, whole[name], rank, ranks), rtol=0, atol=0, msg=name
        )
    smaller = [name for name, parameter in own.items() if parameter.shape != whole[name].shape]
    print("split:", len(smaller), flush=True)


if __name__ == "__main__":
    with leaving_on_failure():
        main(sys.argv[1])
