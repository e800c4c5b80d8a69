"""Start the ranks of a parallel run on one machine, and end them together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

# How long ranks that are told to end may take before they are killed, in seconds.
GRACE = 10.0


# What `run_ranks` returns for ranks that took too long; `timeout` of the coreutils has it, too.
TOO_LONG = 124


def leave(code: int, error: BaseException | None = None) -> None:
    """End a rank that has failed, at once; returns if this process has no other ranks.

    In good order it would take its process groups down, where NCCL waits for exchanges that the
    other ranks may never join: they, in turn, wait for this one, until who started all of them
    sees it end.

    Args:
        code: of the process's exit, not 0.
        error: whose traceback is printed first; None if all has been said.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    try:
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


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
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with _sigterm_raises(), tempfile.TemporaryDirectory(prefix="bagel-mot-") as folder:
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


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit within the block; Python allows that in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        # A second one would cut the ending short; ignored by the system instead, one that has come
        # in the meantime makes Python complain.
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
    finally:  # also if SIGTERM or the keyboard cuts the waiting short
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
