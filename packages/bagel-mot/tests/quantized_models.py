"""The golden model in a format, and the same in plain floating point: what it should compute.

The second needs nothing of mot-kernels' formats: matrices are rounded here, in the plainest way,
and loaded as a checkpoint that is not quantised.
"""

from __future__ import annotations

import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alone import generate_text
from golden_data import GOLDEN, GoldenCase
from golden_requests import RecordedNoise, pipeline_for, request_parts, settings_of
from mot_layers import MoTMergedColumnParallelLinear, MoTQKVParallelLinear, MoTRowParallelLinear
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bagel_mot.context import Contexts
from bagel_mot.images import resize, to_rgb, to_tensor
from bagel_mot.pipeline import BagelPipeline

FORMATS = ("fp8", "int8", "w8a16", "w4a16:32")
LINEARS = (MoTQKVParallelLinear, MoTMergedColumnParallelLinear, MoTRowParallelLinear)
IMAGE_CASE, TEXT_CASE = "b1", "c1"
# One matrix of each expert, and what --keep may say.
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj"
GEN_DOWN = "language_model.model.layers.2.mlp_moe_gen.down_proj"
KEEP = "first,o_proj"


def rounded(x: Tensor, format: str) -> Tensor:
    """Rows of float32, each rounded to 8 bits with its own scale and back."""
    most = 448 if format == "fp8" else 127
    scale = x.abs().amax(-1, keepdim=True) / most
    ratio = x / scale
    return (ratio.to(torch.float8_e4m3fn).float() if format == "fp8" else ratio.round()) * scale


def rounded_weight(weight: Tensor, format: str) -> Tensor:
    """A matrix in a format and back, float32."""
    if format != "w4a16:32":
        return rounded(weight, format)
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high >= -low, high, low)
    scales = [
        largest.abs() / 7,
        *(-largest / 8 * (percent / 100) for percent in range(100, 70, -5)),
    ]
    tried = torch.stack([(groups / scale).round().clamp(-8, 7) * scale for scale in scales])
    best = (tried - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return tried.gather(0, best.expand(1, *groups.shape))[0].flatten(1)


def is_matrix(name: str) -> bool:
    """Whether a tensor of the checkpoint is one that is quantised."""
    return (name.startswith("language_model.model.layers.") and name.endswith("proj.weight")) or (
        name.endswith("proj_moe_gen.weight")
    )


def load(folder: Path = GOLDEN.checkpoint, **options: Any) -> BagelPipeline:
    return BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32", **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint that was written quantised."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        found |= load_file(file)
    return found


def floating_twin(folder: Path, format: str) -> BagelPipeline:
    """A model of floats with the weights that the quantised one has; `folder` is made."""
    shutil.copytree(GOLDEN.checkpoint, folder)
    file = folder / "ema.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    for name in filter(is_matrix, tensors):
        tensors[name] = rounded_weight(tensors[name], format)
    save_file(tensors, file)
    return load(folder)


@dataclass(frozen=True)
class Results:
    """What one request of each kind gives.

    Attributes:
        velocities: of the first step, before guidance, one for each branch: the gen expert's rows.
        guided: the same after guidance, which enlarges differences between branches.
        logits: of the first token of an answer about a picture: the und expert's rows.
    """

    velocities: tuple[Tensor, ...]
    guided: Tensor
    logits: Tensor


def results(pipeline: BagelPipeline) -> Results:
    case, found = GOLDEN.case(IMAGE_CASE), []
    pipeline_for(pipeline, case).chat(
        request_parts(case),
        output="image",
        settings=settings_of(case),
        noise=RecordedNoise(case),
        on_step=lambda step: found.append((step.velocities, step.velocity)),
    )
    return Results(*found[0], first_logits(pipeline, GOLDEN.case(TEXT_CASE)))


def first_logits(pipeline: BagelPipeline, case: GoldenCase) -> Tensor:
    """(1, vocabulary) after a prompt of a picture and a question."""
    own, logits = pipeline_for(pipeline, case), []
    contexts = Contexts(own.model, own.tokenizer, needs_no_image=False)
    for part in request_parts(case):
        if isinstance(part, str):
            contexts.add_text(part)
        else:
            picture = resize(to_rgb(part), own.config.vae_transform)
            contexts.add_picture(None, to_tensor(resize(picture, own.config.vit_transform)))
    generate_text(own.model, own.tokenizer, contexts.main, max_tokens=1, on_logits=logits.append)
    return logits[0]


def recorded() -> Results:
    """The official model's, float32."""
    case = GOLDEN.case(IMAGE_CASE).tensors
    names = ("v_main", "v_cfg_text", "v_cfg_img")
    velocities = tuple(case[f"step0.{name}"] for name in names)
    return Results(velocities, case["step0.v"], GOLDEN.case(TEXT_CASE).tensors["text0.logits"][:1])


class LiveFloats(TorchDispatchMode):
    """Counts the bytes of floating-point tensors of 16 bits and more that are alive.

    Attributes:
        now: after the last operation of torch's.
        most: the largest that this has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._tensors: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _is_wide(tensor):
                self._tensors[id(tensor)] = weakref.ref(tensor)
        alive = {key: ref() for key, ref in self._tensors.items()}
        self._tensors = {key: self._tensors[key] for key, each in alive.items() if each is not None}
        # Storages, not tensors: views share them, and a parameter may have been given another.
        storages = [each.untyped_storage() for each in alive.values() if each is not None]
        self.now = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
        self.most = max(self.most, self.now)
        return result


def _is_wide(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.is_floating_point() and tensor.dtype.itemsize > 1
