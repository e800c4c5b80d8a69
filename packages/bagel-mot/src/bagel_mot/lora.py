"""Merge a LoRA adapter into a checkpoint, for both experts' weights and all others.

For each weight W (N, K) for which the adapter has a pair B (N, r), A (r, K),

    W' = round(W + scale * s * (B @ A)),    s = alpha / r, with rsLoRA alpha / sqrt(r)

(Hu et al., arXiv:2106.09685; rsLoRA: Kalajdzievski, arXiv:2312.03732), computed in float32 and
rounded once, to W's dtype. Everything else is copied as it is.

Adapters are folders in PEFT's format: `adapter_config.json` (see `lora_config`) and
`adapter_model.safetensors` with

| tensors | shapes |
|---|---|
| `base_model.model.MODULE.lora_A.weight`, `...lora_B.weight` | (r, K), (N, r) |
| `base_model.model.MODULE.lora_embedding_A`, `...lora_embedding_B` | (r, N), (K, r) |

of which MODULE.weight is a matrix of the checkpoint, by its name there. The prefix may be missing
or have a second `model.` after it, `module.` before it or `bagel.` behind it (data parallelism and
vLLM-Omni), and `language_model.` or `language_model.model.` may be missing, as they are when that
part alone was trained. What is neither is refused: whole layers, biases, convolutions, DoRA's
norms.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.checkpoint import PLAIN_DTYPES, CheckpointError, StoredTensor, Target
from bagel_mot.copying import (
    MERGED_KEY,
    Original,
    appearing,
    check_destination,
    copy_others,
    rewrite,
)
from bagel_mot.lora_config import WEIGHTS_FILE, AdapterConfig, AdapterError
from bagel_mot.numeric import to_float
from bagel_mot.tiny import model_folder

# Elements of a weight that are in float32 at a time.
BLOCK = 2**22

# Around a module's path: of data parallelism, PEFT and vLLM-Omni.
_WRAPPERS = re.compile(r"^(module\.)?(base_model\.model\.)?(bagel\.)?")
_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>lora_(?:[AB]\.weight|embedding_[AB]))")
# With the adapter's name, as PEFT has it in memory.
_NAMED = re.compile(r"\.lora_(?:[AB]\.\w+\.weight|embedding_[AB]\.\w+)$")
_LINEAR = ("lora_B.weight", "lora_A.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight (N, K) of the checkpoint.

    Attributes:
        up, down: names of the adapter's tensors for B (N, r) and A (r, K).
        transposed: they are stored the other way round, as an embedding's are.
        factor: alpha / r or alpha / sqrt(r).
    """

    up: str
    down: str
    transposed: bool
    factor: float

    def read(self, tensors: Any) -> tuple[Tensor, Tensor]:
        """B (N, r) and A (r, K) in float32, from the adapter's opened file."""
        up, down = (tensors.get_tensor(key).float() for key in (self.up, self.down))
        return (up.T, down.T) if self.transposed else (up, down)


def merge_checkpoint(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    scale: float = 1.0,
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Write a copy of a checkpoint folder with an adapter merged into it, tensor by tensor.

    The copy has the source's files, the metadata of those with the model's weights what was merged
    (`copying.MERGED_KEY`). It appears under its name when it is complete; until then it has another
    name beside it, and is removed if anything goes wrong.

    Args:
        source: folder in the official layout, or "tiny".
        adapter: folder in PEFT's format.
        destination: must not exist; the folder it is to be in must.
        scale: multiplies what is added; a negative one subtracts.
        on_tensor: called with name and element count of each tensor that was read.

    Raises:
        FileExistsError: `destination` is there already.
        FileNotFoundError: a folder or file is missing.
        AdapterError: the adapter is more than plain LoRA, or does not fit the checkpoint; all that
            is wrong is listed.
        CheckpointError: the files do not hold exactly the model's tensors, or a merged weight has
            no finite value in its dtype.
        TypeError: `scale` is no number.
        ValueError: `scale` cannot be, a config cannot be read, or the checkpoint is quantised.
    """
    source, adapter, destination = model_folder(source), Path(adapter), Path(destination)
    number = to_float("scale", scale)
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"scale is {scale}; expected a finite number other than 0")
    scale = number
    check_destination(destination)
    original = Original.read(source)
    files = sorted({original.stored[name].file for name in original.targets})
    if nested := [str(file) for file in files if file.parent != source]:
        raise CheckpointError(f"{', '.join(nested)}: expected all weights in {source} itself")
    updates = read_updates(adapter, original.targets)
    annotate = _annotation(adapter, scale)
    with appearing(destination) as folder, checkpoint.opened(adapter / WEIGHTS_FILE) as tensors:

        def change(name: str, weight: Tensor) -> Tensor:
            if (update := updates.get(name)) is not None:
                weight = merged(weight, *update.read(tensors), scale * update.factor)
                if not weight.isfinite().all():
                    raise CheckpointError(
                        f"{original.stored[name].file}: {name} would hold NaN or infinity in "
                        f"{original.stored[name].dtype}; is it damaged, or the scale too large?"
                    )
            if on_tensor is not None:
                on_tensor(name, weight.numel())
            return weight

        copy_others(source, folder, files)
        for file in files:
            rewrite(file, folder / file.name, change, annotate)


def merged(weight: Tensor, up: Tensor, down: Tensor, factor: float) -> Tensor:
    """W + factor * (B @ A), computed in float32 some rows at a time and rounded once.

    Args:
        weight: W (N, K), any floating dtype, which the result has, too.
        up, down: B (N, r) and A (r, K), float32.
    """
    result = torch.empty_like(weight)
    rows = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        added = up[part] @ down
        added *= factor
        added += weight[part]
        result[part] = added
    return result


def read_updates(folder: Path, targets: Mapping[str, Target]) -> dict[str, Update]:
    """What an adapter adds to which weight of a checkpoint; all of it fits, nothing is left out.

    Args:
        folder: in PEFT's format.
        targets: see `checkpoint.model_targets`.

    Returns:
        By names of `targets`.

    Raises:
        FileNotFoundError, ValueError: see `AdapterConfig.from_folder`; or there is no such file of
            tensors, or it is truncated.
        AdapterError: tensors match no weight, lack their counterpart, have a wrong shape or dtype,
            or hold NaN or infinity; all of them are listed.
    """
    config = AdapterConfig.from_folder(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("adapter_model*")))
        found = f"; found {others}, but tensors are read from safetensors only" if others else ""
        raise FileNotFoundError(f"{file} not found{found}")
    with checkpoint.opened(file) as tensors:
        stored = {}
        for key in tensors.keys():  # noqa: SIM118  (not a dict)
            part = tensors.get_slice(key)
            stored[key] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        updates, problems = _match(stored, config, targets)
        problems += [
            f"not finite: {key} holds NaN or infinity"
            for update in updates.values()
            for key in (update.up, update.down)
            if not tensors.get_tensor(key).isfinite().all()
        ]
    if not stored:
        problems.append("it holds no tensors")
    if problems:
        raise AdapterError(
            f"{file}: cannot be merged ({len(problems)} problems); `bagel-mot inspect --names` "
            "lists the checkpoint's names and shapes:\n  " + "\n  ".join(sorted(problems))
        )
    return updates


def _match(
    stored: Mapping[str, StoredTensor], config: AdapterConfig, targets: Mapping[str, Target]
) -> tuple[dict[str, Update], list[str]]:
    """What fits, by the checkpoint's names, and what does not: a line for each."""
    updates: dict[str, Update] = {}
    problems: list[str] = []
    kinds: dict[str, set[str]] = defaultdict(set)
    for key in stored:
        if (found := _KEY.fullmatch(key)) is None:
            problems.append(f"not plain LoRA: {key} is neither the A nor the B of a weight")
            if key.endswith(".base_layer.weight"):
                problems[-1] += "; save the adapter with save_embedding_layers=False"
            elif _NAMED.search(key):
                problems[-1] += "; save_pretrained leaves the adapter's name out of it"
        else:
            kinds[found["module"]].add(found["kind"])
    for module, present in kinds.items():
        keys = ", ".join(f"{module}.{kind}" for kind in sorted(present))
        pair = _EMBEDDING if present & {*_EMBEDDING} else _LINEAR
        path = _WRAPPERS.sub("", module)
        # The whole, or the language model, or the decoder in it may have been what was trained.
        within = ("", "language_model.", "language_model.model.")
        paths = {path.removeprefix("model."), *(f"{outer}{path}" for outer in within)}
        names = sorted({f"{each}.weight" for each in paths} & targets.keys())
        if len(names) != 1:
            matches = f"matches several: {', '.join(names)}" if names else "matches no weight"
            problems.append(f"{matches}: {keys}")
        elif present != {*pair}:
            problems.append(f"not a pair: {keys}; expected {' and '.join(pair)} of {module}")
        elif names[0] in updates:
            problems.append(f"twice: {keys} and {updates[names[0]].up} are for {names[0]}")
        else:
            up, down = (f"{module}.{kind}" for kind in pair)
            update = Update(up, down, pair is _EMBEDDING, config.factor(path))
            wrong = list(_misfits(update, stored, config.rank(path), names[0], targets[names[0]]))
            problems += wrong
            updates |= {} if wrong else {names[0]: update}
    return updates, problems


def _misfits(
    update: Update, stored: Mapping[str, StoredTensor], rank: int, name: str, target: Target
) -> Iterator[str]:
    """What is wrong with the tensors of an update, for the weight `name`."""
    if len(target.shape) != 2:
        yield f"not a matrix: {name} is {list(target.shape)}, but {update.up} is there for it"
        return
    n, k = target.shape
    for key, shape in ((update.up, (n, rank)), (update.down, (rank, k))):
        found, wanted = stored[key], shape[::-1] if update.transposed else shape
        if found.shape != wanted:
            yield (
                f"wrong shape: {key} is {list(found.shape)}, expected {list(wanted)} for rank "
                f"{rank} and {name} {[n, k]}"
            )
        if found.dtype not in PLAIN_DTYPES:
            yield f"wrong dtype: {key} is {found.dtype}, expected one of {', '.join(PLAIN_DTYPES)}"


def _annotation(adapter: Path, scale: float) -> Callable[[dict[str, str]], dict[str, str]]:
    """From a file's metadata to what it is with the adapter merged."""
    with (adapter / WEIGHTS_FILE).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {"adapter": adapter.resolve().name, "sha256": digest, "scale": scale}

    def annotate(metadata: dict[str, str]) -> dict[str, str]:
        merged = [*json.loads(metadata.get(MERGED_KEY, "[]")), entry]
        return metadata | {MERGED_KEY: json.dumps(merged)}

    return annotate
