"""A request's prompt becomes contexts, a text to be written, and images to be painted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from bagel_mot.config import BagelConfig
from bagel_mot.context import Contexts
from bagel_mot.images import resize, to_rgb, to_tensor
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import to_device
from bagel_mot.request import Noise, Request, image_size
from bagel_mot.sampling import ImageJob
from bagel_mot.text import TextJob
from bagel_mot.tokenizer import BagelTokenizer

logger = logging.getLogger(__name__)

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


@dataclass
class Prepared:
    """A request whose prompt has been read (and its text written): images are left to paint.

    Attributes:
        jobs: one for each image; empty if text was asked for.
        seeds: the seed of each job.
        text: answer or thought.
    """

    jobs: list[ImageJob]
    seeds: list[int]
    text: str | None


@dataclass
class Reading:
    """A request whose prompt has been read; made by `read_prompt`.

    Attributes:
        request, contexts, noise, seed: the request, and what was made for it.
        size: (height, width) of the images, in pixels.
        on_text: called with the text so far while it is written.
        text: answer or thought, once it is written.
    """

    request: Request
    contexts: Contexts
    noise: Noise
    seed: int
    size: tuple[int, int]
    on_text: Callable[[str], None] | None
    text: str | None = None

    @property
    def writes(self) -> bool:
        """Whether there is a text to be written: an answer or a thought."""
        return self.request.think or self.request.output == "text"

    def text_job(self, tokenizer: BagelTokenizer, stop: Callable[[], None]) -> TextJob:
        """The text that is to be written.

        Args:
            tokenizer: makes strings of tokens for `on_text`.
            stop: called at each token; may raise.
        """
        tokens = [tokenizer.bos]

        def token_chosen(token: int) -> None:
            stop()
            tokens.append(token)
            # Of `max_text_tokens` chosen tokens the last is not fed, and so not in the answer.
            if self.on_text is not None and len(tokens) <= self.request.max_text_tokens:
                self.on_text(tokenizer.answer(tokens))

        return TextJob(
            self.contexts.main,
            self.request.max_text_tokens,
            self.request.temperature,
            self.noise.generator,
            token_chosen,
        )

    @torch.no_grad()
    def prepared(self, config: BagelConfig) -> Prepared:
        """The images that are left to paint, once the text is written."""
        request = self.request
        if request.output == "text":
            return Prepared([], [], self.text)
        if self.text is not None:
            self.contexts.add_thought(self.text)
        unit = config.latent_token_pixels
        grid = (self.size[0] // unit, self.size[1] // unit)
        tokens, channels = grid[0] * grid[1], config.latent_token_dim
        seeds = [self.seed + i for i in range(request.num_images)]
        sources = [self.noise, *(Noise(own) for own in seeds[1:])]
        jobs = [
            ImageJob(self.contexts, source.normal(tokens, channels), grid, request.settings)
            for source in sources
        ]
        return Prepared(jobs, seeds, self.text)


@torch.no_grad()
def read_prompt(
    model: Bagel,
    tokenizer: BagelTokenizer,
    config: BagelConfig,
    request: Request,
    *,
    seed: int,
    noise: Noise,
    on_text: Callable[[str], None] | None,
    stop: Callable[[], None],
) -> Reading:
    """Feed a request's texts and pictures to its contexts.

    Args:
        config: with the limits of pictures.
        seed: of the first image.
        noise: source of the request's random numbers.
        on_text: see `Reading`.
        stop: called before each text or picture; may raise.
    """
    wants_image = request.output == "image"
    pictures = [
        resize(to_rgb(part), config.vae_transform)
        for part in request.parts
        if not isinstance(part, str)
    ]
    size = (0, 0)
    if wants_image:
        last = pictures[-1] if pictures else None
        size = image_size(config, request.height, request.width, last)
    settings = request.settings
    guided = any(settings.guided(settings.timesteps()))
    contexts = Contexts(
        model,
        tokenizer,
        needs_no_image=wants_image and guided and settings.cfg_img_scale > 1,
    )
    if request.think:
        contexts.add_system(
            SYSTEM_PROMPT_GENERATION if wants_image else SYSTEM_PROMPT_UNDERSTANDING
        )
    remaining = iter(pictures)
    for part in request.parts:
        stop()
        if isinstance(part, str):
            contexts.add_text(part)
            continue
        picture = next(remaining)
        latent = _encoded(model, config, picture, noise) if wants_image else None
        contexts.add_picture(latent, to_tensor(resize(picture, config.vit_transform)))
    if request.negative_prompt:
        if wants_image and guided:
            contexts.add_negative(request.negative_prompt)
        else:
            why = "no image is painted" if not wants_image else "nothing guides away from it"
            logger.warning("negative_prompt has no effect: %s", why)
    if wants_image and not request.think:
        for name in ("temperature", "max_text_tokens"):
            if getattr(request, name) != getattr(Request, name):
                logger.warning("%s has no effect: no text is written", name)
    _warn_of_length(request, contexts.main.position, config.llm.max_position_embeddings)
    return Reading(request, contexts, noise, seed, size, on_text)


def _warn_of_length(request: Request, positions: int, most: int | None) -> None:
    """A picture takes one position, however large it is."""
    writes = request.think or request.output == "text"
    wanted = positions + (request.max_text_tokens if writes else 1)
    if most is not None and wanted > most:
        logger.warning(
            "the request may take %d positions%s; the model's max_position_embeddings are %d: "
            "beyond them it may make no sense",
            *(wanted, ", max_text_tokens included" if writes else "", most),
        )


def _encoded(model: Bagel, config: BagelConfig, picture: Image.Image, noise: Noise) -> torch.Tensor:
    """The VAE's latent of a picture, (16, H/8, W/8)."""
    pixels = to_device(to_tensor(resize(picture, config.vae_transform)), model.device)
    z, down = config.vae.z_channels, config.vae.downsample
    shape = (1, z, pixels.shape[1] // down, pixels.shape[2] // down)
    # Pixels, noise and latents stay float32 outside the VAE's convolutions.
    latent: torch.Tensor = model.vae.encode(pixels[None], noise.normal(*shape).to(pixels))[0]
    return latent
