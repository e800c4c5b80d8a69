"""Permissions of what is written under another name first."""

from __future__ import annotations

import os
from pathlib import Path


def open_to_others(path: str | Path) -> None:
    """Give a temporary file or folder, which only its owner may read, what a new one would have."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)
