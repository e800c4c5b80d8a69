"""What is written under another name first: its permissions, and its name in errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_to_others(path: str | Path) -> None:
    """Give a temporary file or folder, which only its owner may read, what a new one would have."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Errors of the system that name no file, such as those of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error
