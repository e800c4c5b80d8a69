"""A checkpoint becomes a model on this process's device, together with the other ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from vllm.platforms import current_platform

from bagel_mot import checkpoint
from bagel_mot.compressed import choose_formats
from bagel_mot.config import BagelConfig
from bagel_mot.model.attention_choice import choose_attention
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.vae import AutoEncoder
from bagel_mot.parallel import Parallel, ParallelConfig, start, world_size_from_environment
from bagel_mot.quantization import LayerFormats, Quantization
from bagel_mot.tiny import model_folder
from bagel_mot.tokenizer import BagelTokenizer

# torch has one for the whole process, and modules are built in it.
_DEFAULT_DTYPE = threading.Lock()


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    attention: str | None,
    parallel: ParallelConfig | None,
    quantization: str | Quantization | None,
    on_tensor: Callable[[str, int], None] | None,
) -> tuple[Bagel, BagelTokenizer, Parallel]:
    """Load a checkpoint folder; `BagelPipeline.from_pretrained` says what the arguments are."""
    folder = model_folder(path)
    dtype = parse_dtype(dtype)
    parallel = ParallelConfig() if parallel is None else parallel
    if not isinstance(parallel, ParallelConfig):
        raise TypeError(f"parallel is {parallel!r}; expected a bagel_mot.parallel.ParallelConfig")
    config = BagelConfig.from_folder(folder)
    tokenizer = BagelTokenizer.of_model(folder, config.llm.vocab_size)
    stored = checkpoint.read_headers(folder)
    config = checkpoint.config_with_grids(config, stored)
    parallel.check(config.llm, world_size_from_environment())
    formats, targets = choose_formats(folder, stored, config, quantization)
    if formats is not None:
        formats.check(config.llm, parallel.tensor)
    place = parse_device(device)
    if attention is not None:
        # A backend that cannot be used is an error before anything is loaded.
        choose_attention(attention, device=place, dtype=dtype, head_dim=config.llm.head_dim)
    # Before there is room for all of the model.
    targets |= checkpoint.vae_targets(AutoEncoder.without_weights(config.vae))
    checkpoint.check_names(stored, targets)
    joined, place = join(parallel, place)
    model = build_model(config, device=place, dtype=dtype, attention=attention, formats=formats)
    checkpoint.load_checkpoint(model, stored, targets, on_tensor)
    return model, tokenizer, joined


def join(parallel: ParallelConfig, device: torch.device) -> tuple[Parallel, torch.device]:
    """Join the other ranks; call it on every one of them, after `parallel.check`.

    Args:
        device: "cuda" is the GPU of this rank. One with a number is for a process that is alone.

    Returns:
        This process among the others, and its device, with its number.

    Raises:
        ValueError: the device has a number although there are several ranks, or this machine has
            more ranks than GPUs.
    """
    if device.type == "cuda" and parallel.world_size > 1:
        if device.index is not None:
            raise ValueError(
                f"device is {device}, but {parallel.world_size} ranks cannot share one GPU; use "
                "device='cuda', with which each takes its own (CUDA_VISIBLE_DEVICES says which)"
            )
        # torchrun and `bagel-mot --nproc` say it; who does not may show each rank its GPU alone.
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(
                f"{here} ranks run on this machine, but torch sees {gpus} of its GPUs; start one "
                "rank a GPU, or use device='cpu'"
            )
    if parallel.tensor > 1 and device.type == "cpu" and current_platform.is_cuda_alike():
        raise ValueError(
            "device is cpu, but vLLM sums tensor parallel ranks' results on the GPUs it sees; hide "
            "them (CUDA_VISIBLE_DEVICES= before the command), or use the GPUs"
        )
    joined = start(parallel, device.type)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return joined, device


def build_model(
    config: BagelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
    formats: LayerFormats | None = None,
) -> Bagel:
    """A `Bagel` with uninitialised weights; call `bagel_mot.parallel.start` first."""
    with _DEFAULT_DTYPE:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return Bagel(config, attention, formats)
        finally:
            torch.set_default_dtype(default)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that the model computes in.

    Raises:
        ValueError: it is another one.
    """
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found not in names.values():
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(names)}")
    assert isinstance(found, torch.dtype)
    return found


def usual_dtype(device: str | None) -> str:
    """What commands compute in unless they are told: bfloat16 on a GPU, float32 on a CPU.

    Raises:
        ValueError: see `parse_device`.
    """
    return "bfloat16" if parse_device(device).type == "cuda" else "float32"


def parse_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        ValueError: it is no device, or not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {name!r}; expected 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; expected 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device} but torch sees no GPU; use device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device} but torch sees {torch.cuda.device_count()} GPUs")
    return device
