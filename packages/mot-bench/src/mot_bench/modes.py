"""How ranks share a step, in the command line's words: `cfg:2`, `ulysses:2,ring:2`, `tp:2`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from bagel_mot.config import LlmConfig
from bagel_mot.parallel import ParallelConfig

from mot_bench import parallel_results
from mot_bench.errors import UsageError

# What the words mean: sizes of a `ParallelConfig`.
_SIZES = {
    "tp": "tensor",
    "ulysses": "ulysses",
    "ring": "ring",
    "allgather": "allgather",
    "cfg": "cfg",
}
ALONE = ParallelConfig()


def parse(text: str) -> list[ParallelConfig]:
    """The modes of --modes: separated by semicolons, each KIND:SIZE[,KIND:SIZE].

    Raises:
        UsageError: one of them is written differently or makes no sense.
    """
    found: dict[ParallelConfig, None] = {}
    for mode in text.split(";"):
        sizes: dict[str, int] = {}
        for part in mode.split(","):
            kind, _, size = part.strip().partition(":")
            if kind not in _SIZES or not size.isdecimal() or _SIZES[kind] in sizes:
                raise UsageError(
                    f"--modes is {text!r}: {mode.strip()!r} is no mode; expected KIND:SIZE with "
                    f"KIND one of {', '.join(_SIZES)}, several of them separated by commas, and "
                    "modes separated by semicolons, for example 'cfg:2;ulysses:2,ring:2;tp:2'"
                )
            sizes[_SIZES[kind]] = int(size)
        try:
            found[ParallelConfig(**sizes)] = None
        except ValueError as error:
            raise UsageError(f"--modes is {text!r}: {error}") from error
    return list(found)


def name_of(mode: ParallelConfig) -> str:
    """As `parse` reads it; `mot_bench.parallel_results.ALONE` if there is no other rank."""
    sizes = {kind: getattr(mode, name) for kind, name in _SIZES.items()}
    return (
        ",".join(f"{kind}:{size}" for kind, size in sizes.items() if size > 1)
        or parallel_results.ALONE
    )


def check(modes: Iterable[ParallelConfig], llm: LlmConfig, ranks: int | None) -> None:
    """Refuse what the model or the number of ranks (None: any) does not allow.

    Raises:
        UsageError: naming the sizes that do not go together.
    """
    for mode in modes:
        try:
            mode.check(llm, ranks or mode.world_size)
        except ValueError as error:
            raise UsageError(str(error)) from error


def groups(modes: Iterable[ParallelConfig]) -> list[list[ParallelConfig]]:
    """Modes that the same processes can take one after the other.

    vLLM's groups are made once in a process, so all have one tensor parallel size.
    """
    found: dict[tuple[int, int], list[ParallelConfig]] = {}
    for mode in modes:
        found.setdefault((mode.world_size, mode.tensor), []).append(mode)
    return list(found.values())


def written(modes: Sequence[ParallelConfig]) -> str:
    """What `parse` turns into these modes."""
    return ";".join(map(name_of, modes))


def products(gpus: int, blocks: int, llm: LlmConfig) -> list[ParallelConfig]:
    """All modes that use so many GPUs and that the model allows.

    Args:
        gpus: all of which are used.
        blocks: images times contexts; more CFG parallel ranks would be idle.
        llm: the model's sizes.
    """
    found: dict[ParallelConfig, None] = {}
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for cfg, tensor, ulysses, ring, gather in itertools.product(sizes, repeat=5):
        if cfg > blocks or cfg * tensor * ulysses * ring * gather != gpus:
            continue
        if gather > 1 and ulysses * ring > 1:
            continue
        mode = ParallelConfig(tensor, ulysses, ring, gather, cfg)
        try:
            check([mode], llm, gpus)
        except UsageError:
            continue
        found[mode] = None
    return list(found)
