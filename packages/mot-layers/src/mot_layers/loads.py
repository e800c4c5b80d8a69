"""Which parameters vLLM has loaded: where nothing was, it leaves what memory held before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

Part = int | str | None
"""What vLLM's loaders call a part of a layer; None is the whole of it."""


class Loads:
    """Notes what comes through a layer's weight loaders.

    Args:
        names: of the parameters that have to be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        # Whether a part was made of another parameter's, by name.
        self._seen: dict[str, dict[Part, bool]] = {}

    @torch.no_grad()
    def watch(self, layer: nn.Module) -> None:
        """Begin to note; scales are NaN until they are loaded."""
        for name in self._names:
            parameter: Any = layer._parameters[name]
            parameter.weight_loader = self._noting(name, parameter.weight_loader)
            if "scale" in name:
                parameter.fill_(torch.nan)

    def note(self, name: str, part: Part | tuple[Part, ...], *, derived: bool = False) -> None:
        """A part of a parameter, or several, came; `derived` if made of what another was given."""
        parts = part if isinstance(part, tuple) else (part,)
        self._seen.setdefault(name, {}).update(dict.fromkeys(parts, derived))

    def forget_derived(self, part: Part | tuple[Part, ...]) -> None:
        """What was made for a part, or for the whole, is out of date."""
        parts = part if isinstance(part, tuple) else (part,)
        for seen in self._seen.values():
            for each in (*parts, None):
                if seen.get(each):
                    del seen[each]

    def check(self, layer: nn.Module) -> None:
        """Refuse a layer of which only some was loaded, and begin anew.

        One to which nothing came through loaders is let through: vLLM's dummy weights, say.

        Raises:
            ValueError: a parameter, or a part of one, was not loaded; the message names it.
        """
        seen, self._seen = self._seen, {}
        for name in self._names if seen else ():
            lacking = [part for part in _parts_of(layer) if part not in seen.get(name, ())]
            if lacking and None not in seen.get(name, ()):
                parts = (
                    "" if lacking == [None] else f" (missing: part {', '.join(map(str, lacking))})"
                )
                raise ValueError(f"{not_loaded(layer, name)}{parts}")

    def _noting(self, name: str, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)  # vLLM looks at a loader's signature
        def load(parameter: Any, loaded: Any, *shard: Any, **more: Any) -> Any:
            (part,) = shard or (more.get("loaded_shard_id"),)
            self.note(name, part)
            return loader(parameter, loaded, *shard, **more)

        return load


def not_loaded(layer: Any, name: str) -> str:
    """What to say of a parameter without which a layer cannot be."""
    return f"layer {getattr(layer, 'prefix', '')!r}: {name} was not loaded, or not all of it"


def _parts_of(layer: nn.Module) -> Sequence[Part]:
    if isinstance(layer, QKVParallelLinear):
        return ("q", "k", "v")
    if isinstance(layer, MergedColumnParallelLinear):
        return range(len(layer.output_sizes))
    return (None,)
