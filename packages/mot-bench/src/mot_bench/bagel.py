"""The model that `step` and `e2e` measure: all that mot-bench asks of bagel-mot is asked here."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bagel_mot.checkpoint import config_with_grids, model_targets, read_headers, vae_targets
from bagel_mot.config import BagelConfig
from bagel_mot.context import Context, Contexts
from bagel_mot.denoising import Denoising
from bagel_mot.graphs import Workspace
from bagel_mot.model.layout import LARGE_PICTURE
from bagel_mot.parallel import ParallelConfig
from bagel_mot.pipeline import BagelPipeline
from bagel_mot.quantization import Quantization
from bagel_mot.request import Noise, image_size
from bagel_mot.sampling import ImageJob, ImageSettings
from bagel_mot.synthetic import SIZES, random_pipeline
from bagel_mot.text import TextJob, generate_texts
from bagel_mot.tiny import FOLDER as TINY_FOLDER
from bagel_mot.tokenizer import BagelTokenizer

from mot_bench.environment import version_of
from mot_bench.errors import UsageError
from mot_bench.model_options import NOTHING_TO_KEEP
from mot_bench.model_results import Subject

SHIPPED = "tiny, trained"
"""What results call the weights of bagel-mot's own small model."""

_WORDS = ("a", "red", "fox", "in", "the", "deep", "snow", "under", "tall", "trees")


@dataclass(frozen=True)
class Choice:
    """Which model to measure, and how it is to run.

    Attributes:
        folder: checkpoint, or None for random weights.
        size: of the random weights, a key of `bagel_mot.synthetic.SIZES`.
        dtype: name of the dtype.
        attention: backend, None for the model's own choice.
        cuda_graphs: None for the pipeline's own choice.
        quantization: format of the decoder layers' weights; None leaves them as they are.
        keep: what of them stays in 16 bits, in the words of `bagel_mot.quantization.Keep.parse`.
    """

    folder: Path | None
    size: str
    dtype: str
    attention: str | None = None
    cuda_graphs: bool | None = None
    quantization: str | None = None
    keep: str = ""

    @property
    def weights(self) -> str:
        """The format and what is kept, in words."""
        kept = f", {self.keep} kept" if self.keep else ""
        return f"{self.quantization or 'none'}{kept}"


def variants(
    choice: Choice, formats: Sequence[str], keep: str, backends: Sequence[str | None]
) -> list[Choice]:
    """A model as it is, then in each format, each with every attention backend.

    Args:
        choice: the model as it is.
        formats: of the decoder layers' weights; "none" adds nothing.
        keep: what of them stays in 16 bits.
        backends: of attention.

    Raises:
        UsageError: a format is not known, the model's sizes do not go with it, nothing is left
            to be kept, or there is one variant only.
    """
    llm = config_of(choice).llm
    quantized = [name for name in dict.fromkeys(formats) if name != "none"]
    if keep and not quantized:
        raise UsageError(NOTHING_TO_KEEP.format(keep))
    for name in quantized:
        try:
            Quantization.parse(name, keep).formats(llm).check(llm)
        except ValueError as error:
            raise UsageError(f"--quantization is {name!r}: {error}") from error
    plain = dataclasses.replace(choice, quantization=None, keep="")
    weights = [plain, *(dataclasses.replace(plain, quantization=n, keep=keep) for n in quantized)]
    found = [
        dataclasses.replace(each, attention=backend)
        for each in weights
        for backend in dict.fromkeys(backends)
    ]
    if len(found) < 2:
        raise UsageError(
            "--quantization and --attention leave nothing to compare the model with; give a "
            "format, or two backends"
        )
    return found


def config_of(choice: Choice) -> BagelConfig:
    """The sizes of the model, which is not loaded.

    Raises:
        UsageError: the checkpoint says nothing about them.
    """
    if choice.folder is None:
        return SIZES[choice.size]
    try:
        config = BagelConfig.from_folder(choice.folder)
        return config_with_grids(config, read_headers(choice.folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"the model cannot be loaded: {error}") from error


def load(
    choice: Choice, device: torch.device, parallel: ParallelConfig | None = None
) -> BagelPipeline:
    """The pipeline.

    Args:
        choice: which model.
        device: where to; for several ranks only its type counts.
        parallel: how several ranks share it; None for this process alone.

    Raises:
        UsageError: the checkpoint, the attention backend, a parallel size or the wish for graphs
            makes no sense.
    """
    dtype = getattr(torch, choice.dtype)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "attention": choice.attention}
    if parallel is not None and parallel.world_size > 1:
        options |= {"parallel": parallel, "device": torch.device(device.type)}
    if choice.cuda_graphs is not None:
        options["cuda_graphs"] = choice.cuda_graphs
    try:
        if choice.quantization is not None:
            options["quantization"] = Quantization.parse(choice.quantization, choice.keep)
        if choice.folder is not None:
            return BagelPipeline.from_pretrained(choice.folder, **options)
        return random_pipeline(SIZES[choice.size], **options)
    except TypeError as error:
        if "cuda_graphs" not in options or "cuda_graphs" not in str(error):
            raise
        raise UsageError("--cuda-graphs: this bagel-mot knows no CUDA graphs") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"the model cannot be loaded: {error}") from error


def subject(choice: Choice, pipeline: BagelPipeline) -> Subject:
    """The facts about a model, just loaded, that belong to its results."""
    device = pipeline.model.device
    found = "as in the checkpoint" if pipeline.model.routes_und_rows else "none"
    return Subject(
        weights=_name_of(choice),
        parameters=parameter_count(pipeline),
        bytes=parameter_bytes(pipeline.model),
        dtype=choice.dtype,
        attention=pipeline.model.attention.name,
        cuda_graphs="on" if pipeline.workspace.capture else "off",
        bagel_mot=version_of("bagel-mot", "bagel_mot"),
        vllm=version_of("vllm", "vllm"),
        quantization=found if choice.quantization is None else choice.weights,
        loading=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def _name_of(choice: Choice) -> str:
    if choice.folder is None:
        return f"random, {choice.size}"
    # Where the package lies is of no interest.
    return SHIPPED if choice.folder == TINY_FOLDER else str(choice.folder)


def parameter_count(pipeline: BagelPipeline) -> int:
    """Numbers that the model has learned, however they are stored or shared among ranks.

    Counted by the shapes of a plain checkpoint: what is in memory may be packed, may hold scales
    besides, and may be one rank's part.
    """
    targets = model_targets(pipeline.config) | vae_targets(pipeline.model.vae)
    return sum(math.prod(target.shape) for target in targets.values())


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters of this rank."""
    return sum(each.numel() * each.element_size() for each in model.parameters())


def denoising(
    pipeline: BagelPipeline, jobs: Sequence[ImageJob], *, eagerly: bool = False
) -> Denoising:
    """The jobs' `Denoising` as the pipeline would make it.

    Args:
        eagerly: without CUDA graphs, for a baseline that changes what a step computes: a graph
            captured earlier would go on computing what it was captured with.
    """
    workspace = Workspace(pipeline.model) if eagerly else pipeline.workspace
    return Denoising(pipeline.model, pipeline.tokenizer, jobs, pipeline.parallel, workspace)


def check_attention(option: str, backends: Sequence[str | None], rows: int) -> None:
    """Refuse a comparison with attention in 8 bits of a picture that is too small for it."""
    if "fa3-fp8" in backends and rows < LARGE_PICTURE:
        raise UsageError(
            f"{option} names fa3-fp8, which is fa3 for pictures of fewer than {LARGE_PICTURE:,} "
            f"rows; this one has {rows:,}"
        )


def check_size(config: BagelConfig, option: str, height: int, width: int) -> None:
    """Refuse a picture that the model cannot paint."""
    try:
        image_size(config, height, width, None)
    except ValueError as error:
        raise UsageError(f"{option} is '{height}x{width}': {error}") from error


@torch.no_grad()
def image_job(
    pipeline: BagelPipeline,
    size: tuple[int, int],
    *,
    branches: int,
    prompt: str,
    steps: int,
    seed: int = 0,
) -> ImageJob:
    """An image of (height, width) that every step guides with `branches` different contexts.

    The contexts are the prompt, nothing, and (for the third) the prompt once more with a cache of
    its own: in text-to-image it would be the first one and not be computed again.
    """
    model, tokenizer = pipeline.model, pipeline.tokenizer
    contexts = Contexts(model, tokenizer)
    contexts.add_text(prompt)
    if branches == 3:
        apart = Contexts(model, tokenizer)
        apart.add_text(prompt)
        contexts.no_image = apart.main
    settings = ImageSettings(
        num_timesteps=steps + 1,
        cfg_text_scale=4.0 if branches > 1 else 1.0,
        cfg_img_scale=2.0 if branches > 2 else 1.0,
        cfg_interval=(0.0, 1.0),
    )
    unit = pipeline.config.latent_token_pixels
    grid = (size[0] // unit, size[1] // unit)
    noise = Noise(seed).normal(grid[0] * grid[1], pipeline.config.latent_token_dim)
    return ImageJob(contexts, noise, grid, settings)


def prompt_of(tokenizer: BagelTokenizer, tokens: int) -> str:
    """A text of so many tokens, or the nearest below that was found."""

    def text(words: int) -> str:
        return " ".join(itertools.islice(itertools.cycle(_WORDS), words))

    words = 1
    while words < tokens and len(tokenizer.encode(text(words + 1))) <= tokens:
        words += max(1, (tokens - len(tokenizer.encode(text(words)))) // 8)
    while words > 1 and len(tokenizer.encode(text(words))) > tokens:
        words -= 1
    found = text(words)
    for signs in range(1, tokens):
        longer = found + "." * signs
        if len(tokenizer.encode(longer)) > tokens:
            break
        found = longer if len(tokenizer.encode(longer)) == tokens else found
    return found


@torch.no_grad()
def read_texts(pipeline: BagelPipeline, texts: Sequence[str]) -> list[Context]:
    """A context for each text, to be continued."""
    found = []
    for text in texts:
        contexts = Contexts(pipeline.model, pipeline.tokenizer, needs_no_image=False)
        contexts.add_text(text)
        found.append(contexts.main)
    return found


def write_texts(pipeline: BagelPipeline, contexts: Sequence[Context], tokens: int) -> int:
    """Continue every context by so many tokens; returns how many were written in all."""
    tokenizer = copy.copy(pipeline.tokenizer)
    tokenizer.eos = -1  # no token ends a text early
    jobs = [TextJob(context, max_tokens=tokens) for context in contexts]
    generate_texts(pipeline.model, tokenizer, jobs, workspace=pipeline.workspace)
    return sum(len(job.chosen) for job in jobs)
