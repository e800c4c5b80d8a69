"""KV caches handed over by another stage become the contexts of an image.

In vLLM-Omni's two-stage deployment its language model reads the prompt and sends its KV cache.
What arrives in the sampling parameters is an object with `key_cache` and `value_cache`, for each
layer a tensor (tokens, KV heads of this rank, head size) with rotated keys, or None for an empty
cache: the rows of our own. `ropes` in its metadata is the position of what comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bagel_mot.context import Context, Contexts
from bagel_mot.model.bagel import Bagel
from bagel_mot.tokenizer import BagelTokenizer


@torch.no_grad()
def contexts_from(
    model: Bagel, tokenizer: BagelTokenizer, sampling: Any, negative_prompt: str
) -> Contexts:
    """The contexts whose caches came with a request.

    The one without the last text is `cfg_text_past_key_values`, without it an empty one; the one
    without pictures `cfg_img_past_key_values`, without it the main one. Both may also be entries
    `cfg_text` and `cfg_img` of `cfg_branch_past_key_values`.

    Args:
        sampling: `OmniDiffusionSamplingParams` with `past_key_values`.
        negative_prompt: text of the context without the last text, if its cache did not come.

    Raises:
        ValueError: a cache is not one of this model.
    """
    contexts = Contexts(model, tokenizer)
    contexts.main = context_from(model, sampling.past_key_values, sampling.kv_metadata)
    no_text, no_image = _branch(model, sampling, "cfg_text"), _branch(model, sampling, "cfg_img")
    contexts.no_image = no_image or contexts.main
    if no_text is not None:
        contexts.no_text = no_text
    elif negative_prompt:
        contexts.add_negative(negative_prompt)
    return contexts


def context_from(model: Bagel, kv: Any, metadata: Mapping[str, Any] | None) -> Context:
    """One context from one cache; its rows are copied.

    Raises:
        ValueError: it has other layers, heads or sizes than the model on this rank.
    """
    keys, values = _layers(kv.key_cache), _layers(kv.value_cache)
    layers = model.config.llm.num_hidden_layers
    if len(keys) != layers or len(values) != layers:
        raise ValueError(
            f"the KV cache handed over has {len(keys)} and {len(values)} layers of keys and "
            f"values; this model has {layers}"
        )
    if all(tensor is None for tensor in (*keys, *values)):
        return Context(model.new_cache(64), 0, _position(metadata, 0))
    length = 0 if keys[0] is None else len(keys[0])
    wanted = (length, model.kv_heads, model.config.llm.head_dim)
    for name, tensors in (("keys", keys), ("values", values)):
        for i, tensor in enumerate(tensors):
            shape = None if tensor is None else tuple(tensor.shape)
            if shape != wanted:
                raise ValueError(
                    f"the KV cache handed over has {name} of shape {shape} in layer {i}; expected "
                    f"{wanted}: tokens, KV heads of this rank, head size"
                )
    cache = model.new_cache(length)
    for i in range(layers):
        cache.k[i].copy_(keys[i])
        cache.v[i].copy_(values[i])
    return Context(cache, length, _position(metadata, length))


def handed_over_size(sampling: Any) -> tuple[int, int] | None:
    """(height, width) of the picture that the other stage read; None if it read none."""
    shape = (sampling.kv_metadata or {}).get("image_shape")
    return None if shape is None else (int(shape[0]), int(shape[1]))


def _branch(model: Bagel, sampling: Any, role: str) -> Context | None:
    kv = getattr(sampling, f"{role}_past_key_values")
    metadata = getattr(sampling, f"{role}_kv_metadata")
    if kv is None:
        kv = (sampling.cfg_branch_past_key_values or {}).get(role)
    if metadata is None:
        metadata = (sampling.cfg_branch_kv_metadata or {}).get(role)
    return None if kv is None else context_from(model, kv, metadata)


def _layers(cache: Any) -> list[torch.Tensor | None]:
    """A layer's tensor by its number, from a list or from a mapping."""
    return [cache[i] for i in range(len(cache))]


def _position(metadata: Mapping[str, Any] | None, length: int) -> int:
    ropes = (metadata or {}).get("ropes")
    return int(ropes[0]) if ropes is not None and len(ropes) else length
