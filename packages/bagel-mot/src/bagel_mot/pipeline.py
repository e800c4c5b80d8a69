"""`BagelPipeline`: text to image, editing, questions about pictures, and free mixtures of them."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from mot_layers.runtime import init_parallel
from PIL import Image

from bagel_mot import checkpoint
from bagel_mot.config import BagelConfig
from bagel_mot.context import Contexts
from bagel_mot.images import patchify, resize, to_image, to_rgb, to_tensor, unpatchify
from bagel_mot.model.bagel import Bagel
from bagel_mot.sampling import ImageSettings, Step, denoise
from bagel_mot.text import generate_text
from bagel_mot.tokenizer import BagelTokenizer

Part = str | Image.Image

# The model's own interface texts for think mode, exactly as it was trained with them.
SYSTEM_PROMPT_UNDERSTANDING = (
    "You should first think about the reasoning process in the mind and then provide the user "
    "with the answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)
SYSTEM_PROMPT_GENERATION = (
    "You should first think about the planning process in the mind and then generate the image. "
    "\nThe planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)


class Cancelled(RuntimeError):
    """The caller's `cancel` event was set; nothing was kept."""


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        images: generated images, empty if text was asked for.
        seeds: the seed of each image.
        text: the answer, or in think mode the thought before the image; None without either.
    """

    images: tuple[Image.Image, ...] = ()
    seeds: tuple[int, ...] = ()
    text: str | None = None

    @property
    def image(self) -> Image.Image:
        """The only image.

        Raises:
            ValueError: there is none, or there are several.
        """
        if len(self.images) != 1:
            raise ValueError(f"the result holds {len(self.images)} images; use .images")
        return self.images[0]


class Noise:
    """The random numbers of one request, drawn from torch's CPU generator.

    In the official order (the VAE noise of each picture, sampled tokens, then the initial noise),
    so a seed gives what the official code gives after `torch.manual_seed(seed)`, whatever the
    device and whatever else runs in the process.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, float32 on the CPU."""
        return torch.randn(*shape, generator=self.generator)


class BagelPipeline:
    """A loaded BAGEL and the requests one can make of it.

    One request at a time: the methods are not to be called from several threads at once.
    """

    def __init__(self, model: Bagel, tokenizer: BagelTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        attention: str | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> Self:
        """Load a checkpoint folder in the official layout.

        Args:
            path: folder with `llm_config.json`, `ema.safetensors`, `ae.safetensors`, tokenizer.
            device: default "cuda" if there is one, else "cpu".
            dtype: what the model computes in: bfloat16, float16 or float32.
            attention: attention backend, see `bagel_mot.model.attention`.
            on_tensor: called with name and element count of each loaded tensor.

        Raises:
            FileNotFoundError: the folder or a file is missing.
            CheckpointError: the files do not hold exactly the model's tensors.
            ValueError: a config value, device, dtype or attention backend makes no sense.
        """
        folder = Path(path)
        dtype = _parse_dtype(dtype)
        device = _parse_device(device)
        config = BagelConfig.from_folder(folder)
        tokenizer = BagelTokenizer.from_folder(folder)
        stored = checkpoint.read_headers(folder)
        config = checkpoint.config_with_grids(config, stored)
        if len(tokenizer) > config.llm.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                f"{config.llm.vocab_size} rows; the files belong to different models"
            )
        model = build_model(config, device=device, dtype=dtype, attention=attention)
        targets = checkpoint.model_targets(config) | checkpoint.vae_targets(model.vae)
        checkpoint.check_names(stored, targets)
        checkpoint.load_checkpoint(model, stored, targets, on_tensor)
        return cls(model, tokenizer)

    def generate(
        self,
        prompt: str,
        *,
        height: int = 1024,
        width: int = 1024,
        settings: ImageSettings | None = None,
        think: bool = False,
        **options: object,
    ) -> Result:
        """Paint a text. See `chat` for the options (seed, num_images, on_step, ...).

        Args:
            prompt: what to paint.
            height, width: in pixels; multiples of 16, at most 16 times the latent grid (1024).
            settings: default `ImageSettings()`.
            think: write a plan first and paint with it; it is the result's `text`.
        """
        return self.chat(
            [prompt],
            output="image",
            height=height,
            width=width,
            settings=settings or ImageSettings(),
            think=think,
            **options,  # type: ignore[arg-type]
        )

    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompt: str,
        *,
        settings: ImageSettings | None = None,
        **options: object,
    ) -> Result:
        """Change a picture (or make one from several) as the prompt says.

        The output has the (resized) last picture's size unless `height` and `width` are given.

        Args:
            images: pictures of any size and mode, one or several.
            prompt: what to change.
            settings: default `ImageSettings.for_editing()`.
        """
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        if not pictures:
            raise ValueError("images is empty; give at least one picture to edit")
        return self.chat(
            [*pictures, prompt],
            output="image",
            settings=settings or ImageSettings.for_editing(),
            **options,  # type: ignore[arg-type]
        )

    def ask(
        self,
        images: Image.Image | Sequence[Image.Image] | None,
        question: str,
        **options: object,
    ) -> str:
        """Answer a question, about pictures or (None or []) without. See `chat` for the options."""
        pictures = [images] if isinstance(images, Image.Image) else list(images or [])
        answer = self.chat([*pictures, question], output="text", **options).text  # type: ignore[arg-type]
        assert answer is not None
        return answer

    @torch.no_grad()
    def chat(
        self,
        parts: Sequence[Part],
        *,
        output: Literal["text", "image"],
        think: bool = False,
        height: int | None = None,
        width: int | None = None,
        settings: ImageSettings | None = None,
        num_images: int = 1,
        seed: int | None = None,
        max_text_tokens: int = 1000,
        temperature: float | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
        noise: Noise | None = None,
    ) -> Result:
        """Answer any sequence of texts and pictures with a text or with images.

        Args:
            parts: strings and pictures in reading order; at least one.
            output: "text" or "image".
            think: reason in writing before the answer (`text` then holds both), or plan before
                the image (`text` then holds the plan).
            height, width: of the image, multiples of 16; default the last picture's resized
                size, or the largest square if there is no picture.
            settings: how the image is sampled; default `ImageSettings()`.
            num_images: images to make; image i has seed + i. All see the first one's encoding of
                the request's pictures and its thought.
            seed: for all random numbers of the request, see `Noise`; drawn if None.
            max_text_tokens: most tokens of an answer or thought.
            temperature: None writes the most likely text; otherwise text is sampled.
            on_step: called after each denoising step.
            on_text: called with the text so far while it is written.
            cancel: set it from elsewhere to stop within a step: `Cancelled` is raised.
            noise: source of random numbers for the first image, instead of `Noise(seed)`.

        Raises:
            TypeError, ValueError: an argument that makes no sense; the message says which.
            Cancelled: `cancel` was set.
        """
        _check_parts(parts)
        if output not in ("text", "image"):
            raise ValueError(f"output is {output!r}; expected 'text' or 'image'")
        if num_images < 1 or max_text_tokens < 1:
            raise ValueError(
                f"num_images is {num_images} and max_text_tokens {max_text_tokens}; both start at 1"
            )
        if temperature is not None and temperature <= 0:
            raise ValueError(
                f"temperature is {temperature}; expected > 0, or None for the most likely text"
            )
        wants_image = output == "image"
        settings = settings or ImageSettings()
        pictures = [resize(to_rgb(p), self.config.vae_transform) for p in parts if not _is_text(p)]
        if wants_image:
            last = pictures[-1] if pictures else None
            height, width = image_size(self.config, height, width, last)
        seed = secrets.randbelow(2**31) if seed is None else seed
        noise = noise or Noise(seed)

        def check_cancelled() -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled("the request was cancelled")

        guided_by_images = wants_image and settings.cfg_img_scale > 1 and any(
            settings.guided(settings.timesteps())
        )
        contexts = Contexts(self.model, self.tokenizer, needs_no_image=guided_by_images)
        if think:
            contexts.add_system(
                SYSTEM_PROMPT_GENERATION if wants_image else SYSTEM_PROMPT_UNDERSTANDING
            )
        remaining = iter(pictures)
        for part in parts:
            check_cancelled()
            if isinstance(part, str):
                contexts.add_text(part)
            else:
                self._add_picture(contexts, next(remaining), noise, with_vae=wants_image)

        text = None
        if think or not wants_image:
            text = self._write(
                contexts, max_text_tokens, temperature, noise, on_text, check_cancelled
            )
        if not wants_image:
            return Result(text=text)
        if text is not None:
            contexts.add_thought(text)

        def step_done(step: Step) -> None:
            if on_step is not None:
                on_step(step)
            check_cancelled()

        assert height is not None and width is not None
        images, seeds = [], []
        for i in range(num_images):
            source = noise if i == 0 else Noise(seed + i)
            images.append(self._paint(contexts, source, height, width, settings, step_done))
            seeds.append(seed + i)
        return Result(tuple(images), tuple(seeds), text)

    def _add_picture(
        self, contexts: Contexts, picture: Image.Image, noise: Noise, *, with_vae: bool
    ) -> None:
        latent = None
        if with_vae:
            pixels = to_tensor(resize(picture, self.config.vae_transform))
            pixels = pixels.to(self.model.device, self.model.dtype)
            z, down = self.config.vae.z_channels, self.config.vae.downsample
            shape = (1, z, pixels.shape[1] // down, pixels.shape[2] // down)
            latent = self.model.vae.encode(pixels[None], noise.normal(*shape).to(pixels))[0]
        contexts.add_picture(latent, to_tensor(resize(picture, self.config.vit_transform)))

    def _write(
        self,
        contexts: Contexts,
        max_tokens: int,
        temperature: float | None,
        noise: Noise,
        on_text: Callable[[str], None] | None,
        check_cancelled: Callable[[], None],
    ) -> str:
        tokens = [self.tokenizer.bos]

        def token_chosen(token: int) -> None:
            tokens.append(token)
            if on_text is not None:
                on_text(self.tokenizer.answer(tokens))
            check_cancelled()

        fed = generate_text(
            self.model,
            self.tokenizer,
            contexts.main,
            max_tokens=max_tokens,
            temperature=temperature,
            generator=noise.generator,
            on_token=token_chosen,
        )
        return self.tokenizer.answer(fed)

    def _paint(
        self,
        contexts: Contexts,
        noise: Noise,
        height: int,
        width: int,
        settings: ImageSettings,
        on_step: Callable[[Step], None],
    ) -> Image.Image:
        unit, patch = self.config.latent_token_pixels, self.config.latent_patch_size
        grid = (height // unit, width // unit)
        start = noise.normal(grid[0] * grid[1], self.config.latent_token_dim)
        tokens = denoise(self.model, contexts, start, grid, settings, on_step)
        latent = unpatchify(tokens, grid[0], grid[1], patch)[None].to(self.model.dtype)
        return to_image(self.model.vae.decode(latent)[0])


def build_model(
    config: BagelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = None,
) -> Bagel:
    """A `Bagel` with uninitialised weights, its vLLM layers set up for one process."""
    init_parallel()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Bagel(config, attention)
    finally:
        torch.set_default_dtype(default)


def image_size(
    config: BagelConfig, height: int | None, width: int | None, picture: Image.Image | None
) -> tuple[int, int]:
    """The (height, width) to paint, in pixels: as given, of the picture, or the largest square.

    Args:
        picture: last picture of the request, resized; None if there is none.

    Raises:
        ValueError: a side is no multiple of a latent token or out of range, or only one is given.
    """
    unit = config.latent_token_pixels
    largest = unit * config.latent_grid
    if (height is None) != (width is None):
        raise ValueError(f"height is {height} and width {width}; give both or neither")
    if height is None or width is None:
        width, height = picture.size if picture is not None else (largest, largest)
    for name, side in (("height", height), ("width", width)):
        if side % unit or not unit <= side <= largest:
            raise ValueError(
                f"{name} is {side}; expected a multiple of {unit} in {unit}..{largest}"
            )
    return height, width


def _is_text(part: Part) -> bool:
    return isinstance(part, str)


def _check_parts(parts: Sequence[Part]) -> None:
    if isinstance(parts, str | Image.Image) or not len(parts):
        raise ValueError("parts must be a list with at least one text or picture")
    for i, part in enumerate(parts):
        if isinstance(part, str):
            if not part.strip():
                raise ValueError(f"the text at parts[{i}] is empty; say what you want")
        elif not isinstance(part, Image.Image):
            raise TypeError(
                f"parts[{i}] is a {type(part).__name__}; expected a string or a PIL image"
            )


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found not in names.values():
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(names)}")
    assert isinstance(found, torch.dtype)
    return found


def _parse_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device} but torch sees no GPU; use device='cpu'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
