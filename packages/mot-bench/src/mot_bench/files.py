"""Writing files so that an interrupted run leaves the old one or the new one, never half."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from mot_bench.errors import UsageError


def file_stem(device_name: str) -> str:
    """A GPU's name as a file name; of tuned files `mot_kernels` finds it again."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name)


def write_json(path: Path, content: object) -> None:
    """Write beside the target, then rename: the file is whole or as it was before.

    Raises:
        UsageError: it cannot be written.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Like `write_json`, for any text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Like `write_json`, for anything."""
    try:
        _write(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
