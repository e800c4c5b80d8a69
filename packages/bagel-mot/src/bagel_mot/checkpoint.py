"""The official checkpoint's tensor names, and loading them straight into the model.

The only place that knows the checkpoint's spelling. `_LANGUAGE` and `_REST` say, for every tensor
of `ema.safetensors`, which parameter of `Bagel` it fills and what shape it has; the VAE's names
are our module's own. Loading is strict both ways: a tensor without a place, a place without a
tensor or a wrong shape is an error before anything is read. Tensors are then read one at a time
and copied to where they belong, so the host never holds more than one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from bagel_mot.config import BagelConfig
from bagel_mot.files import open_to_others

MODEL_FILE = "ema.safetensors"
VAE_FILE = "ae.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PLAIN_DTYPES = ("BF16", "F16", "F32")
"""Of tensors that are not quantised, and of scales; as safetensors spells them."""
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""All that tensors of the model may be stored in, by their names."""

# (checkpoint name, parameter, shape, shard). {i} is the layer; {gen} is "" and "_moe_gen", and
# with it {exp} is "" and ".gen_exp": one line stands for a tensor and its generation twin. The
# shard says which part of a fused parameter the tensor is, as vLLM's weight loaders call it.
_Row = tuple[str, str, str, str | int | None]
_LAYER = "language_model.model.layers.{i}."
_LANGUAGE: tuple[_Row, ...] = (
    (_LAYER + "input_layernorm{gen}.weight", "input_norm{exp}.weight", "hidden", None),
    (_LAYER + "self_attn.q_proj{gen}.weight", "attn.qkv{exp}.weight", "q hidden", "q"),
    (_LAYER + "self_attn.q_proj{gen}.bias", "attn.qkv{exp}.bias", "q", "q"),
    (_LAYER + "self_attn.k_proj{gen}.weight", "attn.qkv{exp}.weight", "kv hidden", "k"),
    (_LAYER + "self_attn.k_proj{gen}.bias", "attn.qkv{exp}.bias", "kv", "k"),
    (_LAYER + "self_attn.v_proj{gen}.weight", "attn.qkv{exp}.weight", "kv hidden", "v"),
    (_LAYER + "self_attn.v_proj{gen}.bias", "attn.qkv{exp}.bias", "kv", "v"),
    (_LAYER + "self_attn.q_norm{gen}.weight", "attn.q_norm{exp}.weight", "head", None),
    (_LAYER + "self_attn.k_norm{gen}.weight", "attn.k_norm{exp}.weight", "head", None),
    (_LAYER + "self_attn.o_proj{gen}.weight", "attn.o{exp}.weight", "hidden q", None),
    (_LAYER + "post_attention_layernorm{gen}.weight", "post_norm{exp}.weight", "hidden", None),
    (_LAYER + "mlp{gen}.gate_proj.weight", "mlp.gate_up{exp}.weight", "mlp hidden", 0),
    (_LAYER + "mlp{gen}.up_proj.weight", "mlp.gate_up{exp}.weight", "mlp hidden", 1),
    (_LAYER + "mlp{gen}.down_proj.weight", "mlp.down{exp}.weight", "hidden mlp", None),
)
_VIT = "vit_model.vision_model."
_VIT_LAYER = _VIT + "encoder.layers.{i}."
_VISION: tuple[_Row, ...] = (
    (_VIT_LAYER + "layer_norm1.weight", "norm1.weight", "vit", None),
    (_VIT_LAYER + "layer_norm1.bias", "norm1.bias", "vit", None),
    (_VIT_LAYER + "self_attn.q_proj.weight", "attn.qkv.weight", "vit vit", 0),
    (_VIT_LAYER + "self_attn.q_proj.bias", "attn.qkv.bias", "vit", 0),
    (_VIT_LAYER + "self_attn.k_proj.weight", "attn.qkv.weight", "vit vit", 1),
    (_VIT_LAYER + "self_attn.k_proj.bias", "attn.qkv.bias", "vit", 1),
    (_VIT_LAYER + "self_attn.v_proj.weight", "attn.qkv.weight", "vit vit", 2),
    (_VIT_LAYER + "self_attn.v_proj.bias", "attn.qkv.bias", "vit", 2),
    (_VIT_LAYER + "self_attn.out_proj.weight", "attn.out.weight", "vit vit", None),
    (_VIT_LAYER + "self_attn.out_proj.bias", "attn.out.bias", "vit", None),
    (_VIT_LAYER + "layer_norm2.weight", "norm2.weight", "vit", None),
    (_VIT_LAYER + "layer_norm2.bias", "norm2.bias", "vit", None),
    (_VIT_LAYER + "mlp.fc1.weight", "mlp.fc1.weight", "vit_mlp vit", None),
    (_VIT_LAYER + "mlp.fc1.bias", "mlp.fc1.bias", "vit_mlp", None),
    (_VIT_LAYER + "mlp.fc2.weight", "mlp.fc2.weight", "vit vit_mlp", None),
    (_VIT_LAYER + "mlp.fc2.bias", "mlp.fc2.bias", "vit", None),
)
_REST: tuple[_Row, ...] = (
    ("language_model.model.embed_tokens.weight", "embed_tokens.weight", "vocab hidden", None),
    ("language_model.model.norm{gen}.weight", "transformer.norm{exp}.weight", "hidden", None),
    ("language_model.lm_head.weight", "lm_head.weight", "vocab hidden", None),
    (_VIT + "embeddings.patch_embedding.weight", "vit.patch_embed.weight", "vit patch", None),
    (_VIT + "embeddings.patch_embedding.bias", "vit.patch_embed.bias", "vit", None),
    (_VIT + "embeddings.position_embedding.weight", "vit.pos_embed.weight", "vit_rows vit", None),
    (_VIT + "post_layernorm.weight", "vit.norm.weight", "vit", None),
    (_VIT + "post_layernorm.bias", "vit.norm.bias", "vit", None),
    ("connector.fc1.weight", "connector.fc1.weight", "hidden vit", None),
    ("connector.fc1.bias", "connector.fc1.bias", "hidden", None),
    ("connector.fc2.weight", "connector.fc2.weight", "hidden hidden", None),
    ("connector.fc2.bias", "connector.fc2.bias", "hidden", None),
    ("vit_pos_embed.pos_embed", "vit_pos.weight", "vit_rows hidden", None),
    ("latent_pos_embed.pos_embed", "latent_pos.weight", "latent_rows hidden", None),
    ("time_embedder.mlp.0.weight", "time_embedder.fc1.weight", "hidden time", None),
    ("time_embedder.mlp.0.bias", "time_embedder.fc1.bias", "hidden", None),
    ("time_embedder.mlp.2.weight", "time_embedder.fc2.weight", "hidden hidden", None),
    ("time_embedder.mlp.2.bias", "time_embedder.fc2.bias", "hidden", None),
    ("vae2llm.weight", "vae2llm.weight", "hidden latent", None),
    ("vae2llm.bias", "vae2llm.bias", "hidden", None),
    ("llm2vae.weight", "llm2vae.weight", "latent hidden", None),
    ("llm2vae.bias", "llm2vae.bias", "latent", None),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names file and tensor."""


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor goes.

    Attributes:
        parameter: name in `Bagel.named_parameters()`.
        shape: the checkpoint tensor's shape (before any tensor-parallel split).
        shard: part of a fused parameter, None for the whole.
        dtypes: what it may be stored in.
        decode: from what is stored to what the parameter takes; None if that is the same. Returns
            None for a tensor that only had to be checked.
    """

    parameter: str
    shape: tuple[int, ...]
    shard: str | int | None = None
    dtypes: tuple[str, ...] = PLAIN_DTYPES
    decode: Callable[[torch.Tensor], torch.Tensor | None] | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint file: where, shape, dtype ("BF16", ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


def model_targets(config: BagelConfig) -> dict[str, Target]:
    """Every tensor of `ema.safetensors` by its checkpoint name."""
    llm, vit = config.llm, config.vit
    sizes = {
        "hidden": llm.hidden_size,
        "q": llm.num_attention_heads * llm.head_dim,
        "kv": llm.num_key_value_heads * llm.head_dim,
        "head": llm.head_dim,
        "mlp": llm.intermediate_size,
        "vocab": llm.vocab_size,
        "vit": vit.hidden_size,
        "vit_mlp": vit.intermediate_size,
        "vit_rows": config.vit_grid**2,
        "patch": vit.patch_dim,
        "latent": config.latent_token_dim,
        "latent_rows": config.latent_grid**2,
        "time": 256,
    }
    targets: dict[str, Target] = {}

    def expand(rows: tuple[_Row, ...], prefix: str, layer: int) -> None:
        for name, parameter, shape, shard in rows:
            dims = tuple(sizes[dim] for dim in shape.split())
            for gen, exp in (("", ""), ("_moe_gen", ".gen_exp")):
                target = Target(prefix + parameter.format(exp=exp), dims, shard)
                targets[name.format(i=layer, gen=gen)] = target

    expand(_REST, "", 0)
    for i in range(llm.num_hidden_layers):
        expand(_LANGUAGE, f"transformer.layers.{i}.", i)
    for i in range(vit.num_layers):
        expand(_VISION, f"vit.layers.{i}.", i)
    return targets


def und_targets(config: BagelConfig) -> dict[str, Target]:
    """The part of `model_targets` that understanding needs: the und expert and the vision tower.

    Left out are the gen expert and what turns latents into tokens and back.
    """
    latents = {"latent_pos", "time_embedder", "vae2llm", "llm2vae"}
    return {
        name: target
        for name, target in model_targets(config).items()
        if ".gen_exp" not in target.parameter and target.parameter.split(".")[0] not in latents
    }


def vae_targets(vae: nn.Module) -> dict[str, Target]:
    """Every tensor of `ae.safetensors`: the VAE module's own names."""
    return {
        name: Target(f"vae.{name}", tuple(parameter.shape))
        for name, parameter in vae.named_parameters()
    }


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors of a checkpoint; reads no data.

    The files are `ae.safetensors`, and `ema.safetensors` or those that
    `model.safetensors.index.json` lists.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: a file is truncated or no safetensors file, or two files hold one name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in _files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                part = tensors.get_slice(name)
                if name in stored:
                    raise CheckpointError(f"tensor {name} is in {stored[name].file} and in {file}")
                stored[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
    return stored


def config_with_grids(config: BagelConfig, stored: dict[str, StoredTensor]) -> BagelConfig:
    """The config with grid sizes as the position tables have them (config.json may be wrong)."""
    tables = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
    if any(table not in stored for table in tables):
        return config  # check_names will report it along with whatever else is missing
    for table in tables:
        if not stored[table].shape:
            raise CheckpointError(f"{stored[table].file}: {table} is one number, not a table")
    latent, vit = (stored[table].shape[0] for table in tables)
    return config.with_grids(latent_rows=latent, vit_rows=vit)


def check_names(stored: dict[str, StoredTensor], targets: dict[str, Target]) -> None:
    """Every tensor has a place, every place a tensor, with the right shape and dtype.

    Raises:
        CheckpointError: listing all that is wrong.
    """
    problems = [f"missing: {name} {list(targets[name].shape)}" for name in targets.keys() - stored]
    problems += [f"not part of the model: {name}" for name in stored.keys() - targets]
    for name in stored.keys() & targets.keys():
        found, wanted = stored[name], targets[name]
        if found.shape != wanted.shape:
            problems.append(
                f"wrong shape: {name} is {list(found.shape)}, expected {list(wanted.shape)}"
            )
        if found.dtype not in wanted.dtypes:
            expected = ", ".join(wanted.dtypes)
            problems.append(
                f"wrong dtype: {name} is {found.dtype}, expected "
                + (f"one of {expected}" if len(wanted.dtypes) > 1 else expected)
            )
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model ({len(problems)} problems):\n  "
            + "\n  ".join(sorted(problems))
        )


def load_checkpoint(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    targets: dict[str, Target],
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Fill the model's parameters; call `check_names` first.

    Args:
        on_tensor: called with each name and its number of elements once it is loaded.

    Raises:
        CheckpointError: a parameter of the model has no tensor, or a file cannot be read.
    """
    parameters = dict(model.named_parameters())
    filled = filled_parameters(parameters, targets)
    if parameters.keys() != filled:
        difference = sorted(parameters.keys() ^ filled)
        raise CheckpointError(f"model and name table disagree about: {', '.join(difference)}")
    for file in sorted({tensor.file for tensor in stored.values()}):
        names = [name for name, tensor in stored.items() if tensor.file == file]
        with opened(file) as tensors:
            for name in names:
                target = targets[name]
                place(parameters[target.parameter], tensors.get_tensor(name), target)
                if on_tensor is not None:
                    on_tensor(name, stored[name].elements)


def filled_parameters(
    parameters: Mapping[str, nn.Parameter], targets: Mapping[str, Target]
) -> set[str]:
    """Names of what all of `targets` fill."""
    filled = {target.parameter for target in targets.values()}
    # A weight that is quantised as it comes fills its scales, too.
    plain = {target.parameter for target in targets.values() if target.dtypes == PLAIN_DTYPES}
    return filled | (parameters.keys() & {f"{name}_scale" for name in plain})


def place(parameter: nn.Parameter, stored: torch.Tensor, target: Target) -> None:
    """Copy a tensor as it is stored to the parameter of its target."""
    tensor = stored if target.decode is None else target.decode(stored)
    if tensor is not None:
        fill(parameter, tensor, target.shard)


@torch.no_grad()
def fill(parameter: nn.Parameter, tensor: torch.Tensor, shard: str | int | None) -> None:
    """Copy a checkpoint tensor, or the part `shard` of a fused one, to its parameter."""
    loader = getattr(parameter, "weight_loader", None)
    if loader is not None:  # a vLLM layer: it takes this rank's part
        loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)
    elif shard is None:
        parameter.copy_(tensor)
    else:
        assert isinstance(shard, int)
        rows = tensor.shape[0]
        parameter[shard * rows : (shard + 1) * rows].copy_(tensor)


@torch.no_grad()
def model_tensors(
    model: nn.Module, targets: dict[str, Target], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The model's tensors under their checkpoint names, copied to the CPU: what is to be saved.

    The reverse of `load_checkpoint`, for a model that is not split over ranks.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    taken: dict[str, int] = {}
    for name, target in targets.items():
        # The parts of a fused parameter follow each other in it as they do in the table.
        start = taken.get(target.parameter, 0)
        taken[target.parameter] = end = start + target.shape[0]
        part = parameters[target.parameter][start:end]
        tensors[name] = part.to("cpu", dtype, copy=True).contiguous()
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        try:
            listed = json.loads(index.read_text())["weight_map"].values()
            names = sorted({os.path.normpath(name) for name in listed})  # ./ae.safetensors
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{index}: expected JSON with a 'weight_map' of file names ({error})"
            ) from error
        if VAE_FILE not in names:
            files.append(folder / VAE_FILE)
    else:
        files = [folder / name for name in (MODEL_FILE, VAE_FILE)]
    if missing := [str(file) for file in files if not file.is_file()]:
        hint = ""
        if index.exists() and (folder / MODEL_FILE).is_file():
            hint = f" ({MODEL_FILE} is there: remove the index to use it)"
        raise FileNotFoundError(
            f"{', '.join(missing)} not found; a BAGEL checkpoint folder holds {VAE_FILE}, and "
            f"{MODEL_FILE} or the files its {INDEX_FILE} lists{hint}"
        )
    return files


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """A safetensors file, to read tensors from one at a time.

    Raises:
        CheckpointError: it is truncated, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); was it truncated in transfer?"
        ) from error


def save_tensors(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read, too.

    Raises:
        OSError: it cannot be written, because the disk is full for one.
    """
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error
    open_to_others(file)  # safetensors lets only its owner read
