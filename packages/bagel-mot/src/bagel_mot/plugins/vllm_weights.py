"""From the stream of a checkpoint's tensors to the parameters of the understanding model.

The names come from `bagel_mot.checkpoint`. Tensors of the gen expert, of the latents and of the
VAE are passed over; any other without a place is an error, and so is a place without a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

from bagel_mot.checkpoint import CheckpointError, fill, model_targets, und_targets, vae_targets
from bagel_mot.config import BagelConfig
from bagel_mot.model.vae import AutoEncoder

# vLLM's names of fused projections, by the shard that a part of them is.
_FUSED = {"q": "qkv_proj", "k": "qkv_proj", "v": "qkv_proj", 0: "gate_up_proj", 1: "gate_up_proj"}
_VISION = ("vit", "connector", "vit_pos")
# What a quantised checkpoint may leave out: GPTQ's order of rows where it is the natural one, and
# the shape, which is known.
_OPTIONAL = ("g_idx", "weight_shape")


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint tensor goes: parameter of the understanding model, part of it, shape."""

    parameter: str
    shard: str | int | None
    shape: tuple[int, ...]


class UndWeights:
    """What to do with each tensor of a checkpoint."""

    def __init__(self, config: BagelConfig) -> None:
        self._places = _places(config)
        # A quantised checkpoint has other tensors in a module than weight and bias.
        self._modules = {
            _module(name): (_module(place.parameter), place.shard)
            for name, place in self._places.items()
        }
        vae = AutoEncoder.without_weights(config.vae)
        names = model_targets(config).keys() - self._places.keys()
        names |= {target.parameter.removeprefix("vae.") for target in vae_targets(vae).values()}
        self._unused = {_module(name) for name in names}

    def is_unused(self, name: str) -> bool:
        """Whether understanding can do without a tensor."""
        return _module(name) in self._unused

    def load(
        self, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, quantized: bool
    ) -> set[str]:
        """Fill the model's parameters.

        Args:
            model: its parts that serve no request (the vision tower where pictures are not
                allowed) may be missing.
            weights: names and tensors of a checkpoint.
            quantized: whether the model has a quantisation config; its linear layers may then
                hold tensors of other names and shapes.

        Returns:
            Names of the filled parameters.

        Raises:
            CheckpointError: listing tensors without a place, places without a tensor, and wrong
                shapes.
        """
        parameters = dict(model.named_parameters())
        parts = {_part(name) for name in parameters}
        problems: list[str] = []
        filled: set[tuple[str, str | int | None]] = set()
        seen: set[str] = set()
        for name, tensor in weights:
            if self.is_unused(name):
                continue
            seen.add(name)
            parameter, shard = self._find(name, parameters)
            if name in self._places and _part(parameter) not in parts:
                continue
            if parameter not in parameters:
                # GPTQ writes biases of zeros where the model has none.
                if not (quantized and name.endswith(".bias") and not tensor.any()):
                    problems.append(f"not part of the model: {name}")
                continue
            place = self._places.get(name)
            if not quantized and place is not None and tuple(tensor.shape) != place.shape:
                problems.append(
                    f"wrong shape: {name} is {list(tensor.shape)}, expected {list(place.shape)}"
                )
                continue
            fill(parameters[parameter], tensor, shard)
            filled.add((parameter, shard))
        replaced = self._replaced(parameters) if quantized else {}
        for name, place in self._places.items():
            if name not in seen and name not in replaced and _part(place.parameter) in parts:
                problems.append(f"missing: {name} {list(place.shape)}")
        for name, wanted in replaced.items():
            for parameter in sorted(wanted):
                if (parameter, self._places[name].shard) not in filled:
                    kind = parameter.rpartition(".")[2]
                    problems.append(f"missing: {_module(name)}.{kind}")
        if problems:
            raise CheckpointError(
                f"the checkpoint does not fit the model ({len(problems)} problems):\n  "
                + "\n  ".join(sorted(problems))
            )
        return {parameter for parameter, _ in filled}

    def _replaced(self, parameters: Iterable[str]) -> dict[str, set[str]]:
        """The parameters that a quantised model has for each matrix, by its checkpoint name.

        Each of them must come from each part of a fused projection. Biases stay what they are, and
        so do matrices that are not quantised.
        """
        kinds: dict[str, set[str]] = {}
        for parameter in parameters:
            if not parameter.endswith((".bias", *(f".{kind}" for kind in _OPTIONAL))):
                kinds.setdefault(_module(parameter), set()).add(parameter)
        replaced = {}
        for name, place in self._places.items():
            wanted = kinds.get(_module(place.parameter), set())
            if name.endswith(".weight") and wanted - {place.parameter}:
                replaced[name] = wanted
        return replaced

    def _find(self, name: str, parameters: dict[str, nn.Parameter]) -> tuple[str, str | int | None]:
        """Parameter (perhaps one that does not exist) and shard of a tensor."""
        if name in self._places:
            return self._places[name].parameter, self._places[name].shard
        if _module(name) in self._modules:
            module, shard = self._modules[_module(name)]
            parameter = f"{module}.{name.rpartition('.')[2]}"
            if parameter in parameters:
                return parameter, shard
        return maybe_remap_kv_scale_name(name, parameters) or name, None


def _places(config: BagelConfig) -> dict[str, _Place]:
    """Every tensor that understanding needs, by its checkpoint name."""
    places = {}
    for name, target in und_targets(config).items():
        if target.parameter.split(".")[0] in _VISION:
            parameter = f"vision.{target.parameter}"
        else:
            # The language model's modules are named as in the checkpoint, because quantisation
            # configs speak of them by those names.
            module, _, kind = name.rpartition(".")
            if target.shard is not None:
                module = f"{_module(module)}.{_FUSED[target.shard]}"
            parameter = f"{module}.{kind}"
        places[name] = _Place(parameter, target.shard, target.shape)
    return places


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _part(parameter: str) -> str:
    return parameter.split(".")[0]
