"""Start the ranks of a parallel run on one machine, and end them together."""

from __future__ import annotations

import contextlib
import ctypes
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
# A rank that fails breaks its exchanges with others, which fail in turn, mostly at once. Who has
# failed by then, in seconds, has its error shown.
_TOGETHER = 0.5

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LIBC = ctypes.CDLL(None)  # loaded before a fork, not after it

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
    if os.environ.get("WORLD_SIZE", "1") == "1":
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

    Rank 0 writes to this process's output. What another rank writes to stderr is shown if it fails
    by itself: the first to fail takes others with it, which miss it, and which was first cannot be
    told. All that are left are then ended, within `GRACE` seconds. Ranks end with this process.

    Args:
        command: what each rank runs.
        ranks: their number.
        seconds: after which all are ended; None waits as long as it takes.

    Returns:
        0, or a failed rank's exit code (128 + the signal that killed it), or `TOO_LONG`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    if not {"", os.getcwd()} & {*sys.path}:
        # `python -m` would look here first, where this process does not look at all.
        meeting["PYTHONSAFEPATH"] = "1"
    with signals_raise(*ENDING), tempfile.TemporaryDirectory(prefix="bagel-mot-") as folder:
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
                        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                    )
            failed = _wait_for_failures(running, seconds)
        except TimeoutError as error:
            print(error, file=sys.stderr)
            return TOO_LONG
        finally:
            _end(list(running.values()))
        for rank, code in failed.items():
            if rank:
                print(f"rank {rank} failed (exit code {code}):", file=sys.stderr)
                print(logs[rank].read_text(errors="replace").strip(), file=sys.stderr)
        # One that was killed (for want of memory, say) brought the others down, not they it.
        return max(failed.values(), default=0)


def _end_with_parent() -> None:
    """Have the system end this process when its parent does, however that ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What asks a process to end, in order or because its terminal is gone."""


@contextlib.contextmanager
def signals_raise(*numbers: int) -> Iterator[None]:
    """Signals end the block, where this is the main thread (Python's rule).

    SIGINT raises KeyboardInterrupt, others SystemExit: what is half done is undone. Code in between
    may swallow that (torch.asarray does) and fail of something else: it is raised again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        # A second one would cut the ending short; ignored by the system instead, one that has come
        # in the meantime makes Python complain.
        signal.signal(number, lambda *_: None)
        came.append(number)
        raise _raised_by(number)

    # Who runs this under nohup wants it to go on; what is None was not set by Python.
    others = (signal.SIG_IGN, None)
    heard = [number for number in numbers if signal.getsignal(number) not in others]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    except Exception as error:
        if came:
            raise _raised_by(came[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raised_by(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def _wait_for_failures(
    running: dict[int, subprocess.Popen[bytes]], seconds: float | None
) -> dict[int, int]:
    """Exit codes of the ranks that failed, and of those that did within `_TOGETHER` of them."""
    waiting = dict(running)
    deadline = None if seconds is None else time.monotonic() + seconds
    while waiting:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(waiting)} are not done after {seconds:g} s")
        for rank, process in list(waiting.items()):
            code = process.poll()
            if code == 0:
                del waiting[rank]
            elif code is not None:
                time.sleep(_TOGETHER)
                codes = {rank: process.poll() for rank, process in running.items()}
                return {r: 128 - c if c < 0 else c for r, c in codes.items() if c}
        time.sleep(0.05)
    return {}


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
