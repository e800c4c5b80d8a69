"""From vLLM-Omni's configuration to a checkpoint folder, our configuration, and loaded weights."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.model_executor.model_loader.weight_utils import download_weights_from_hf_specific

from bagel_mot import checkpoint
from bagel_mot.checkpoint import CheckpointError, StoredTensor, Target
from bagel_mot.compressed import choose_formats
from bagel_mot.config import BagelConfig
from bagel_mot.plugins.omni_quantization import asked_quantization
from bagel_mot.quantization import LayerFormats
from bagel_mot.tokenizer import BagelTokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the official layout, downloaded if it has to be.

    Attributes:
        config: with the grids that the position tables have.
        stored: the tensors in its files.
        formats: what decoder layers are to be in, as stored or as asked for; None if in none.
        model_targets: where the model's tensors go, the VAE's aside.
    """

    folder: Path
    config: BagelConfig
    stored: Mapping[str, StoredTensor]
    formats: LayerFormats | None
    model_targets: Mapping[str, Target]

    @classmethod
    def of(cls, od_config: Any) -> Checkpoint:
        """The checkpoint that `od_config.model` names; reads configs and file headers only.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file does not hold what it should, or `od_config.quantization_config` is
                for what is not available, is quantised already, or has no such sizes.
        """
        model = od_config.model
        if not model:
            raise ValueError("od_config.model is empty; expected a folder or a Hugging Face name")
        if not os.path.exists(model):
            model = download_weights_from_hf_specific(
                model, None, ["*"], revision=getattr(od_config, "revision", None)
            )
        folder = Path(model)
        stored = checkpoint.read_headers(folder)
        config = checkpoint.config_with_grids(BagelConfig.from_folder(folder), stored)
        asked = asked_quantization(od_config.quantization_config)
        formats, targets = choose_formats(folder, stored, config, asked)
        if formats is not None:
            formats.check(config.llm, od_config.parallel_config.tensor_parallel_size)
        return cls(folder, config, stored, formats, targets)

    def tokenizer(self) -> BagelTokenizer:
        """The folder's tokenizer.

        Raises:
            ValueError: it has tokens without a row in the embedding.
        """
        tokenizer = BagelTokenizer.from_folder(self.folder)
        rows = self.config.llm.vocab_size
        if len(tokenizer) > rows:
            raise ValueError(
                f"{self.folder}: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                f"{rows} rows; the files belong to different models"
            )
        return tokenizer

    def targets(self, vae: nn.Module) -> dict[str, Target]:
        """Where each tensor goes, after a check that the files hold exactly these.

        Raises:
            CheckpointError: listing all that is missing, not known or of another shape.
        """
        targets = {**self.model_targets, **checkpoint.vae_targets(vae)}
        checkpoint.check_names(dict(self.stored), targets)
        return targets

    def sources(self) -> list[DiffusersPipelineLoader.ComponentSource]:
        """The files, for vLLM-Omni's loader to stream.

        One source a file: the loader's own choice, by pattern or by the index, would add files
        that happen to lie there, or leave out a VAE that the index does not list. They are named
        from the folder above, because 0.26 insists on all that an index beside them lists.
        """
        folder = self.folder.absolute()
        files = sorted({tensor.file for tensor in self.stored.values()})
        return [
            DiffusersPipelineLoader.ComponentSource(
                model_or_path=str(folder.parent),
                subfolder=None,
                revision=None,
                prefix="",
                fall_back_to_pt=False,
                allow_patterns_overrides=[
                    glob.escape(str(Path(folder.name, file.relative_to(self.folder))))
                ],
            )
            for file in files
        ]


def load_stream(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], targets: Mapping[str, Target]
) -> set[str]:
    """Copy a stream of checkpoint tensors to where they belong.

    Args:
        weights: (checkpoint name, tensor), in any order.
        targets: the place of each; every one must come, and none twice.

    Returns:
        The names of the parameters of `model` that were filled: all.

    Raises:
        CheckpointError: a tensor without a place, of another shape, or coming twice; or places
            that got nothing.
    """
    parameters = dict(model.named_parameters())
    waiting = dict(targets)
    for name, tensor in weights:
        target = waiting.pop(name, None)
        if target is None:
            what = "came twice" if name in targets else "is not part of the model"
            raise CheckpointError(f"tensor {name} {what}")
        dtypes = [checkpoint.DTYPES[dtype] for dtype in target.dtypes]
        if tuple(tensor.shape) != target.shape or tensor.dtype not in dtypes:
            raise CheckpointError(
                f"tensor {name} is {list(tensor.shape)} {tensor.dtype}; expected "
                f"{list(target.shape)} in {' or '.join(map(str, dtypes))}"
            )
        checkpoint.place(parameters[target.parameter], tensor, target)
    if waiting:
        raise CheckpointError(f"missing tensors: {', '.join(sorted(waiting))}")
    return checkpoint.filled_parameters(parameters, targets)
