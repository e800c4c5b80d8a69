"""Start the ranks of a parallel run on one machine, and end them together."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# How long ranks that are told to end may take before they are killed, in seconds.
GRACE = 10.0


# What `run_ranks` returns for ranks that took too long; `timeout` of the coreutils has it, too.
TOO_LONG = 124


def run_ranks(command: Sequence[str], ranks: int, *, seconds: float | None = None) -> int:
    """Run `command` once for each rank, with the environment torchrun would give it.

    Rank 0 writes to this process's output. What another rank writes to stderr is shown if it is
    the first to fail; the others are then ended, within `GRACE` seconds.

    Args:
        command: what each rank runs.
        ranks: their number.
        seconds: after which all are ended; None waits as long as it takes.

    Returns:
        0, or the first failed rank's exit code (128 + the signal that killed it), or `TOO_LONG`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryDirectory(prefix="bagel-mot-") as folder:
        logs = [Path(folder, f"rank{rank}") for rank in range(ranks)]
        running: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with contextlib.ExitStack() as files:
                    log = None if rank == 0 else files.enter_context(logs[rank].open("wb"))
                    running[rank] = subprocess.Popen(
                        command,
                        env=os.environ | meeting | place,
                        stdout=log and subprocess.DEVNULL,
                        stderr=log,
                    )
            failed = _wait_for_first_failure(running, seconds)
        except TimeoutError as error:
            print(error, file=sys.stderr)
            return TOO_LONG
        finally:
            _end(list(running.values()))
        if failed is None:
            return 0
        code = running[failed].returncode
        code = 128 - code if code < 0 else code
        if failed:
            print(f"rank {failed} failed (exit code {code}):", file=sys.stderr)
            print(logs[failed].read_text(errors="replace").strip(), file=sys.stderr)
        return code


def _wait_for_first_failure(
    running: dict[int, subprocess.Popen[bytes]], seconds: float | None
) -> int | None:
    waiting = dict(running)
    deadline = None if seconds is None else time.monotonic() + seconds
    while waiting:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} are not done after {seconds:g} s")
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code:
                return rank
            if code == 0:
                del waiting[rank]
        time.sleep(0.05)
    return None


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
