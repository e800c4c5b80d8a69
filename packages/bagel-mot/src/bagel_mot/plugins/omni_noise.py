"""Where a vLLM-Omni request's random numbers come from.

By the official convention: from torch's CPU generator, seeded with the request's seed, whatever
the device. vLLM-Omni makes a generator for every request that brings none, on the GPU where there
is one; such a generator is passed over. One that a client brought, or wanted on a device
(`generator_device`), is used.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch

from bagel_mot.plugins.omni_request import client_errors
from bagel_mot.request import Noise


class GivenNoise(Noise):
    """Random numbers from a generator that a client brought, on whatever device it is.

    Attributes:
        generator: on the CPU, for drawing tokens; the given one if that is there.
    """

    def __init__(self, given: torch.Generator) -> None:
        self._given = given
        on_cpu = given.device.type == "cpu"
        self.generator = given if on_cpu else torch.Generator().manual_seed(given.initial_seed())

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32 on the generator's device."""
        given = self._given
        return torch.randn(*shape, generator=given, dtype=torch.float32, device=given.device)


def noise_sources(sampling: Any, count: int) -> list[Noise]:
    """A source for each of `count` images; the first also serves the request's pictures and text.

    Image i has seed + i, or its own of a list of generators; images that share a generator which
    came without a seed draw from it in turn.

    Raises:
        OmniClientError: `generator` is no generator, or a list of another length.
    """
    given, seed = sampling.generator, sampling.seed
    with client_errors():
        listed = given if isinstance(given, list | tuple) else [given]
        for generator in listed:
            if generator is not None and not isinstance(generator, torch.Generator):
                raise TypeError(
                    f"generator is a {type(generator).__name__}; expected a torch.Generator or a "
                    "list of them"
                )
        if isinstance(given, list | tuple):
            if len(given) != count or None in given:
                raise ValueError(
                    f"generator is a list of {len(given)}; expected {count}, one for each image"
                )
            return [GivenNoise(generator) for generator in given]
    if given is not None and seed is None:
        return [GivenNoise(given)] * count
    seed = secrets.randbelow(2**31) if seed is None else seed
    if given is None or (given.device.type != "cpu" and not _wanted(given, sampling)):
        return [Noise(seed + i) for i in range(count)]
    others = [torch.Generator(given.device).manual_seed(seed + i) for i in range(1, count)]
    return [GivenNoise(generator) for generator in (given, *others)]


def _wanted(given: torch.Generator, sampling: Any) -> bool:
    """Whether a client, and not vLLM-Omni, chose this generator on a device."""
    is_seeds = (given.initial_seed() - sampling.seed) % 2**64 == 0  # it knows -1 as 2^64 - 1
    return sampling.generator_device is not None or not is_seeds
