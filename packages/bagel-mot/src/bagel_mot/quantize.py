"""Write a quantised copy of a checkpoint; see `compressed` for its layout."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bagel_mot import checkpoint
from bagel_mot.checkpoint import INDEX_FILE, StoredTensor
from bagel_mot.compressed import CONFIG_KEY, encode, quantization_config, quantized_matrices
from bagel_mot.config import COMBINED_FILE
from bagel_mot.copying import (
    MERGED_KEY,
    Original,
    appearing,
    check_destination,
    copy_others,
    merged_adapters,
    tensor_files,
)
from bagel_mot.loading import parse_device
from bagel_mot.quantization import Quantization
from bagel_mot.tiny import model_folder

logger = logging.getLogger(__name__)

# A file's tensors wait in memory until it is full.
SHARD_BYTES = 2 * 2**30


def quantize_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    quantization: str | Quantization,
    *,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Quantise a checkpoint folder into a new one, tensor by tensor.

    Loading the copy gives the bits that loading the original with `quantization=` gives. The folder
    appears under its name when it is complete; until then it has another name beside it, and is
    removed if anything goes wrong.

    Args:
        source: folder in the official layout, or "tiny"; its other files are copied.
        destination: must not exist; the folder it is to be in must.
        quantization: as for `BagelPipeline.from_pretrained`.
        device: what quantises.
        on_tensor: called with name and element count of each tensor that was read.

    Raises:
        FileExistsError: `destination` is there already.
        FileNotFoundError: `source`, a file of it or the folder of `destination` is missing.
        CheckpointError: the files do not hold exactly the model's tensors, or one that is to be
            quantised holds NaN or infinity.
        ValueError: the format or device is not known or does not go with the sizes, or the
            checkpoint is quantised already.
    """
    source, destination = model_folder(source), Path(destination)
    place = parse_device(device)
    quantization = Quantization.of(quantization)
    check_destination(destination)
    original = Original.read(source)
    stored, targets = original.stored, original.targets
    formats = quantization.formats(original.config.llm)
    formats.check(original.config.llm)
    matrices = {name for name, _ in quantized_matrices(targets, formats)}
    with appearing(destination) as folder:
        merged = merged_adapters(stored)
        shards = _Shards(folder, {MERGED_KEY: json.dumps(merged)} if merged else {})
        for name, tensor in _tensors(stored):
            if name in matrices:
                if not tensor.isfinite().all():
                    raise checkpoint.CheckpointError(
                        f"{stored[name].file}: {name} holds NaN or infinity, which has no scale; "
                        "is the checkpoint damaged?"
                    )
                parts = encode(tensor, formats.format, place)
                module = name.removesuffix(".weight")
                shards.add({f"{module}.{part}": own for part, own in parts.items()})
            else:
                shards.add({name: tensor})
            if on_tensor is not None:
                on_tensor(name, stored[name].elements)
        shards.finish()
        copy_others(source, folder, tensor_files(stored), but=(INDEX_FILE, COMBINED_FILE))
        _write_config(source, folder, quantization_config(formats, targets))


class _Shards:
    """Writes tensors to one file after the other, and their index in the end."""

    def __init__(self, folder: Path, metadata: dict[str, str]) -> None:
        self.folder = folder
        self.metadata = {"format": "pt", **metadata}
        self.waiting: dict[str, torch.Tensor] = {}
        self.weight_map: dict[str, str] = {}
        self.total = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.waiting |= tensors
        if sum(tensor.nbytes for tensor in self.waiting.values()) >= SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        if self.waiting:
            self._write()
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self) -> None:
        name = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        tensors = {key: tensor.contiguous() for key, tensor in self.waiting.items()}
        checkpoint.save_tensors(tensors, self.folder / name, self.metadata)
        self.weight_map |= dict.fromkeys(tensors, name)
        self.total += sum(tensor.nbytes for tensor in tensors.values())
        self.waiting = {}


def _tensors(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of `tensor_files`, one at a time."""
    for file in tensor_files(stored):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in sorted(name for name, tensor in stored.items() if tensor.file == file):
                yield name, tensors.get_tensor(name)


def _write_config(source: Path, folder: Path, entry: dict[str, Any]) -> None:
    """The source's config.json with the quantisation; a new one if that is none."""
    file = source / COMBINED_FILE
    content: Any = None
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            logger.warning("%s is not valid JSON; the copy gets a new one", file)
    if not isinstance(content, dict):
        content = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}
    content[CONFIG_KEY] = entry
    (folder / COMBINED_FILE).write_text(json.dumps(content, indent=2) + "\n")
