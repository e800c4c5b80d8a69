"""Runs and compiles Triton kernels on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def run_checks(script: str, how: str) -> None:
    """Run a script of checks as a program of its own, with the argument "interpret" or "compile".

    What Triton runs on is decided when it is imported.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for helpers in other folders
    if how == "interpret":
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, how],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(script).parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all checked"


def compile_everywhere(
    kernels: Iterable[tuple[Any, Mapping[str, Any]]],
    type_of: Callable[[str], str],
    *,
    cuda: Iterable[int] = (80, 89, 90, 100),
    hip: Iterable[str] = ("gfx942",),
) -> None:
    """Compile kernels for every kind of GPU.

    Args:
        kernels: each with its constants.
        type_of: from the name of any other argument to its type.
        cuda, hip: the kinds, if some have no need of the kernels.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    targets = [GPUTarget("cuda", arch, 32) for arch in cuda]
    targets += [GPUTarget("hip", arch, 64) for arch in hip]
    kernels = list(kernels)
    for target in targets:
        for kernel, constants in kernels:
            types = {
                name: "constexpr" if name in constants else type_of(name)
                for name in kernel.arg_names
            }
            compile(ASTSource(kernel, types, constants), target=target)
