"""Models without a checkpoint: random weights at known sizes, and a tokenizer of bytes.

Speed and memory depend on sizes, not on what was learned, so this is what benchmarks and demos
of a machine run on. The scales are such that activations stay finite at any depth.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn

from bagel_mot.checkpoint import Target, fill, model_targets, vae_targets
from bagel_mot.config import BagelConfig, ImageLimits, LlmConfig, VaeConfig, VitConfig
from bagel_mot.loading import build_model, join
from bagel_mot.model.bagel import Bagel
from bagel_mot.parallel import ParallelConfig, world_size_from_environment
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.quantization import Quantization
from bagel_mot.tokenizer import BagelTokenizer

# Spread of biases, and of norm weights around 1.
_SMALL = 0.02

BAGEL_7B = BagelConfig(
    llm=LlmConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_theta=1e6,
    ),
    vit=VitConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_attention_heads=16,
        num_hidden_layers=27,
        patch_size=14,
        image_size=980,
    ),
)
"""The sizes of BAGEL-7B-MoT: 14.6 billion parameters, 27 GiB in bfloat16."""

TINY = BagelConfig(
    llm=LlmConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        rope_theta=1e6,
    ),
    vit=VitConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        patch_size=14,
        image_size=126,
    ),
    vae=VaeConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
    vae_transform=ImageLimits(max_side=96, min_side=48, stride=16),
    vit_transform=ImageLimits(max_side=126, min_side=56, stride=14),
    latent_grid=8,
    vit_grid=9,
)
"""Sizes at which a request takes less than a second anywhere."""

SIZES = MappingProxyType({"7b": BAGEL_7B, "tiny": TINY})


def random_pipeline(
    config: BagelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    parallel: ParallelConfig | None = None,
    quantization: str | Quantization | None = None,
    seed: int = 0,
    **options: Any,
) -> BagelPipeline:
    """A pipeline with random weights; nothing is read from disk or copied from the host.

    However many ranks share it, it is the same model; a quantised one is that model rounded.

    Args:
        config: for example one of `SIZES`.
        device, dtype, attention, parallel, quantization: as for `BagelPipeline.from_pretrained`.
        seed: of the weights, which also depend on the device.
        options: what else `BagelPipeline` takes.

    Raises:
        ValueError: the attention backend, a parallel size, the device (see
            `bagel_mot.loading.join`) or the format makes no sense.
    """
    parallel = parallel or ParallelConfig()
    parallel.check(config.llm, world_size_from_environment())
    formats = None
    if quantization is not None:
        formats = Quantization.of(quantization).formats(config.llm)
        formats.check(config.llm, parallel.tensor)
    joined, device = join(parallel, device)
    model = build_model(config, device=device, dtype=dtype, attention=attention, formats=formats)
    fill_randomly(model, torch.Generator(device).manual_seed(seed))
    return BagelPipeline(model, byte_tokenizer(), joined, **options)


@torch.no_grad()
def fill_randomly(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random numbers of a sane scale.

    A weight gets variance 1 / (numbers that one output sums over), so that it keeps the scale of
    what goes through it; norm weights are near 1, biases near 0.

    A `Bagel` is filled as from a checkpoint: each tensor is drawn whole, and a tensor parallel
    rank keeps its part. So all ranks draw the same numbers, and what several of them hold (norms,
    embeddings, replicated KV heads) is the same; no more than one tensor is ever whole.
    """
    parameters = dict(model.named_parameters())
    targets = [Target(name, tuple(parameter.shape)) for name, parameter in parameters.items()]
    if isinstance(model, Bagel):
        targets = [*model_targets(model.config).values(), *vae_targets(model.vae).values()]
    for target in targets:
        parameter = parameters[target.parameter]
        is_quantized = parameter.dtype.itemsize == 1  # then it is rounded as it comes
        dtype = model.dtype if is_quantized else parameter.dtype
        values = torch.empty(target.shape, dtype=dtype, device=parameter.device)
        if values.dim() > 1:
            values.normal_(0, values[0].numel() ** -0.5, generator=generator)
        else:
            centre = 0 if target.parameter.endswith("bias") else 1
            values.normal_(centre, _SMALL, generator=generator)
        fill(parameter, values, target.shard)


def byte_tokenizer() -> BagelTokenizer:
    """A tokenizer in which every byte of a text is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return BagelTokenizer(tokenizer)
