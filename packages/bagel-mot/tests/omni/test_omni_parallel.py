"""vLLM-Omni's parallel configuration on two processes: the images of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from omni_harness import free_port, require_omni

require_omni()

WORKER = Path(__file__).with_name("omni_parallel_worker.py")


def test_parallel() -> None:
    """Tensor, sequence (three kinds) and CFG parallel; one pair of processes tries all in turn."""
    from omni_parallel_worker import KINDS

    ports = [str(free_port()) for _ in KINDS]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "VLLM_DIST_IDENT": f"omni-{ports[0]}",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *ports],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, text in zip(workers, printed, strict=True):
        assert worker.returncode == 0, text[-4000:]
        assert [kind for kind in KINDS if f"{kind} done" in text] == list(KINDS)
