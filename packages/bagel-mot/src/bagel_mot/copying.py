"""A checkpoint folder made from another one: what `quantize` and `lora` share.

The source is checked before anything is written. The new folder is complete or not there: it is
filled under another name beside its own, and removed if anything goes wrong.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bagel_mot import checkpoint
from bagel_mot.checkpoint import VAE_FILE, CheckpointError, StoredTensor, Target
from bagel_mot.compressed import stored_formats
from bagel_mot.config import BagelConfig
from bagel_mot.files import naming, open_to_others
from bagel_mot.model.vae import AutoEncoder

MERGED_KEY = "bagel_mot.merged_lora"
"""In the metadata of weight files: a JSON list with an entry for each merged adapter, in order:
`adapter` (its folder's name), `sha256` (of its tensors' file), `scale`."""

METADATA = "__metadata__"
"""Key of a safetensors header under which its file's metadata stands, strings by names."""


@dataclass(frozen=True)
class Original:
    """A checkpoint that holds exactly the model's tensors, none of them quantised.

    Attributes:
        config: with grid sizes as the position tables have them.
        stored: every tensor in the files, the VAE's included.
        targets: see `checkpoint.model_targets`; without the VAE.
    """

    config: BagelConfig
    stored: dict[str, StoredTensor]
    targets: dict[str, Target]

    @classmethod
    def read(cls, source: Path) -> Original:
        """Read configs and headers, and check them.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            CheckpointError: the files do not hold exactly the model's tensors.
            ValueError: a config cannot be read, or the checkpoint is quantised.
        """
        config = BagelConfig.from_folder(source)
        stored = checkpoint.read_headers(source)
        config = checkpoint.config_with_grids(config, stored)
        if (found := stored_formats(source, stored, config)) is not None:
            raise ValueError(f"{source} is quantised already, in {found.format}; take the original")
        targets = checkpoint.model_targets(config)
        vae = AutoEncoder.without_weights(config.vae)
        checkpoint.check_names(stored, targets | checkpoint.vae_targets(vae))
        return cls(config, stored, targets)


def elements_to_read(source: Path) -> int:
    """How many elements there are outside a VAE file of its own, for a progress bar.

    Returns:
        0 where there is no folder: who then copies it says so.

    Raises:
        FileNotFoundError, CheckpointError: see `checkpoint.read_headers`.
    """
    if not source.is_dir():
        return 0
    stored = checkpoint.read_headers(source).values()
    return sum(tensor.elements for tensor in stored if tensor.file.name != VAE_FILE)


def merged_adapters(stored: Mapping[str, StoredTensor]) -> list[dict[str, Any]]:
    """The adapters merged into a checkpoint, as its files say (`MERGED_KEY`)."""
    for file in tensor_files(stored):
        with checkpoint.opened(file) as tensors:
            if (said := (tensors.metadata() or {}).get(MERGED_KEY)) is not None:
                try:
                    merged: list[dict[str, Any]] = json.loads(said)
                    if not all(
                        isinstance(each["adapter"], str) and isinstance(each["scale"], int | float)
                        for each in merged
                    ):
                        raise TypeError("an adapter is a name, a scale a number")
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(
                        f"{file}: {MERGED_KEY} in its metadata is {said!r}; expected what `merge` "
                        "wrote"
                    ) from error
                return merged
    return []


def tensor_files(stored: Mapping[str, StoredTensor]) -> list[Path]:
    """The files to read tensors from: all but a VAE file of its own, which is copied as it is."""
    return sorted({tensor.file for tensor in stored.values() if tensor.file.name != VAE_FILE})


def rewrite(
    source: Path,
    destination: Path,
    change: Callable[[str, Tensor], Tensor],
    annotate: Callable[[dict[str, str]], dict[str, str]],
) -> None:
    """Copy a safetensors file with other values: same names, shapes, dtypes and order.

    One tensor at a time is in memory.

    Args:
        change: from a tensor's name and itself to what takes its place, of its shape and dtype.
        annotate: from the file's metadata to the copy's.

    Raises:
        CheckpointError: `source` is no complete safetensors file.
    """
    with (
        checkpoint.opened(source) as tensors,
        naming(destination),
        destination.open("wb") as copy,
    ):
        with source.open("rb") as file:  # it has been opened: the header is sound
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header[METADATA] = annotate(header.get(METADATA, {}))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        copy.write(len(text).to_bytes(8, "little") + text)
        names = sorted(header.keys() - {METADATA}, key=lambda name: header[name]["data_offsets"])
        for name in names:
            copy.write(_bytes(change(name, tensors.get_tensor(name))))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def copy_others(
    source: Path, folder: Path, weights: Collection[Path], but: Collection[str] = ()
) -> None:
    """Copy configs, tokenizer and the like, but for some names; of weights, the VAE's own file.

    Args:
        weights: files of weights, whatever their names end in.
    """
    read = {file.resolve() for file in weights}
    for file in sorted(source.iterdir()):
        is_weights = file.resolve() in read or (
            file.suffix == ".safetensors" and file.name != VAE_FILE
        )
        if file.is_file() and not is_weights and file.name not in but:
            shutil.copyfile(file, folder / file.name)


def check_destination(destination: Path) -> None:
    """Nothing is there yet, and the folder it is to be in is.

    Raises:
        FileExistsError, FileNotFoundError: otherwise.
    """
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; choose a folder that does not")
    if not destination.absolute().parent.is_dir():
        raise FileNotFoundError(f"{destination.absolute().parent} is not a folder; make it first")


@contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends, and is gone if it fails."""
    destination = destination.absolute()
    try:
        folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}-"))
    except OSError as error:
        raise OSError(
            f"OUT {destination}: nothing can be written to {destination.parent} ({error.strerror})"
        ) from error
    try:
        yield folder
        open_to_others(folder)
        check_destination(destination)  # a rename would replace an empty folder
        folder.rename(destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
