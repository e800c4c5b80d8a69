"""What the scripts share that are one rank of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bagel_mot.launch import leave
from bagel_mot.parallel import ParallelConfig


def sizes_of(way: str) -> ParallelConfig:
    """A script's argument WAY, which is TENSOR/SEQUENCE/CFG: 2/ring:2/1, 2//1."""
    tensor, sequence, cfg = way.split("/")
    return ParallelConfig.parse(int(tensor), sequence or None, int(cfg))


@contextmanager
def leaving_on_failure() -> Iterator[None]:
    """Ends the rank at once if the block fails, as the others may wait for it."""
    try:
        yield
    except BaseException as error:
        leave(1, error)
        raise
