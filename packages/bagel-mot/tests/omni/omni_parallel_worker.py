"""One of two processes: the golden requests under each kind of parallelism of vLLM-Omni.

Usage: python omni_parallel_worker.py RANK PORT..., one port for each kind.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from golden_data import GOLDEN
from omni_harness import (
    assert_recorded_image,
    batch,
    golden_request,
    image_of,
    single_process_world,
)

KINDS: dict[str, dict[str, int]] = {
    "tensor": {"tensor_parallel_size": 2},
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "allgather": {"allgather_degree": 2},
    "cfg": {"cfg_parallel_size": 2},
}


def paint(rank: int, kind: str) -> None:
    """All requests in one batch, and one stepwise; every rank has the images."""
    from test_omni_steps import run_steps
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    config = DiffusionParallelConfig(**KINDS[kind])
    groups: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "tensor_parallel_size",
            "sequence_parallel_size",
            "ulysses_degree",
            "ring_degree",
            "allgather_degree",
            "cfg_parallel_size",
        )
    }
    with single_process_world(2, rank, **groups) as world:
        runner = world.runner(parallel_config=config, num_gpus=2)
        cases = [GOLDEN.case(name) for name in ("a7", "b1")]
        outputs = runner.pipeline.forward(batch(*map(golden_request, cases)))
        for case, output in zip(cases, outputs, strict=True):
            assert_recorded_image(case, image_of(output))
        answer = run_steps(runner, {0: [golden_request(cases[0], kind)]})[kind]
        assert_recorded_image(cases[0], image_of(answer))
    print(f"{kind} done", flush=True)


if __name__ == "__main__":
    for kind, port in zip(KINDS, sys.argv[2:], strict=True):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        paint(int(sys.argv[1]), kind)
