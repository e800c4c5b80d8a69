"""Write a quantised copy of a checkpoint; see `compressed` for its layout."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bagel_mot import checkpoint
from bagel_mot.checkpoint import INDEX_FILE, VAE_FILE, StoredTensor
from bagel_mot.compressed import (
    CONFIG_KEY,
    encode,
    quantization_config,
    quantized_matrices,
    stored_formats,
)
from bagel_mot.config import COMBINED_FILE, BagelConfig
from bagel_mot.loading import parse_device
from bagel_mot.model.vae import AutoEncoder
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
    config = BagelConfig.from_folder(source)
    _check_destination(destination)
    stored = checkpoint.read_headers(source)
    config = checkpoint.config_with_grids(config, stored)
    if (found := stored_formats(source, stored, config)) is not None:
        raise ValueError(f"{source} is quantised already, in {found.format}; take the original")
    formats = quantization.formats(config.llm)
    formats.check(config.llm)
    targets = checkpoint.model_targets(config)
    with torch.device("meta"):
        vae = AutoEncoder(config.vae)
    checkpoint.check_names(stored, targets | checkpoint.vae_targets(vae))
    matrices = {name for name, _ in quantized_matrices(targets, formats)}
    with _appearing(destination) as folder:
        shards = _Shards(folder)
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
        _copy_others(source, folder)
        _write_config(source, folder, quantization_config(formats, targets))


class _Shards:
    """Writes tensors to one file after the other, and their index in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        save_file(tensors, self.folder / name, metadata={"format": "pt"})
        (self.folder / name).chmod(0o644)  # safetensors lets only its owner read
        self.weight_map |= dict.fromkeys(tensors, name)
        self.total += sum(tensor.nbytes for tensor in tensors.values())
        self.waiting = {}


def _tensors(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors but those of a VAE file of its own, which is copied; one at a time."""
    for file in sorted({tensor.file for tensor in stored.values() if tensor.file.name != VAE_FILE}):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in sorted(name for name, tensor in stored.items() if tensor.file == file):
                yield name, tensors.get_tensor(name)


def _copy_others(source: Path, folder: Path) -> None:
    """Configs, tokenizer and the like; of weights, only the VAE's own file."""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix == ".safetensors" and file.name != VAE_FILE
        if file.is_file() and not is_weights and file.name not in (INDEX_FILE, COMBINED_FILE):
            shutil.copyfile(file, folder / file.name)


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


def _check_destination(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; choose a folder that does not")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(f"{destination.absolute().parent} is not a folder; make it first")


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends, and is gone if it fails."""
    destination = destination.absolute()
    folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}-"))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp lets only its owner in
        _check_destination(destination)  # a rename would replace an empty folder
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
