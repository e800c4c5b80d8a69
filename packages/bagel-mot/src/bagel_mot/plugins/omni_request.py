"""A vLLM-Omni request becomes one of ours, checked; what its sender got wrong is a 4xx.

Fields that a request leaves out have vLLM-Omni's defaults for BAGEL, not the official ones: every
image, painted or edited, has an image scale of 1.5, the interval 0.4..1 and the renormalisation
"global". Pictures are resized as in the official code.
"""

from __future__ import annotations

import functools
import logging
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm_omni.errors import OmniClientError

from bagel_mot.config import BagelConfig
from bagel_mot.images import patchify, resized_size, to_rgb
from bagel_mot.request import MOST_IMAGES, MOST_TEXT_TOKENS, Part, Request, checked_temperature
from bagel_mot.sampling import MOST_TIMESTEPS, ImageSettings
from bagel_mot.tokenizer import BOS_TOKEN, EOS_TOKEN

logger = logging.getLogger("bagel_mot")

# Where the pre-process leaves the size that was asked for, see `set_size_apart`.
_SIZE_APART = "bagel_mot_size"
# What vLLM-Omni itself adds to `extra_args`, for its transfer between stages.
_NOT_OURS = frozenset({"kv_transfer_params"})
# Stand for a picture in prompts made for the two-stage deployment.
_PLACEHOLDERS = ("<|fim_middle|>", "<|image_pad|>")


class _Extras(BaseModel):
    """What `extra_args` may hold for BAGEL, with vLLM-Omni's defaults.

    Other keys are ignored with a warning: vLLM-Omni mixes in some that it has for all models.
    """

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    cfg_text_scale: float = Field(4.0, ge=0)
    cfg_img_scale: float = Field(1.5, ge=0)
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_type: str = "global"
    cfg_renorm_min: float = 0.0
    timestep_shift: float = 3.0
    negative_prompt: str = ""
    think: bool = False
    max_think_tokens: int | None = Field(None, ge=1, le=MOST_TEXT_TOKENS)
    do_sample: bool = False
    text_temperature: float = 0.3
    taylorseer: bool = False
    bagel_mot_size: tuple[int | None, int | None] = (None, None)

    @property
    def temperature(self) -> float | None:
        """What text is sampled at; None where the likeliest is written."""
        if not self.do_sample:
            return None
        return checked_temperature("text_temperature", self.text_temperature)


class _Sampling(BaseModel):
    """The fields of `OmniDiffusionSamplingParams` that BAGEL reads."""

    model_config = ConfigDict(extra="forbid")

    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    num_inference_steps: int = Field(50, ge=2, le=MOST_TIMESTEPS)
    num_outputs_per_prompt: int = Field(1, ge=1, le=MOST_IMAGES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


@dataclass(frozen=True)
class Asked:
    """A request, as far as it can be known before its context is.

    Attributes:
        request: in our words; None if its context comes from another stage.
        settings: how its images are sampled.
        num_images: how many.
        size: (height, width) of them; None if another stage may know it.
        negative_prompt: what they are guided away from, "" for no text.
    """

    request: Request | None
    settings: ImageSettings
    num_images: int
    size: tuple[int, int] | None
    negative_prompt: str


def read_request(
    prompt: Any, sampling: Any, config: BagelConfig, *, handed_over: bool = False
) -> Asked:
    """Read a request's prompt and sampling parameters.

    Args:
        prompt: a string, or a mapping with `prompt`, `negative_prompt`, `modalities`,
            `multi_modal_data` and `mm_processor_kwargs`.
        sampling: `OmniDiffusionSamplingParams`.
        handed_over: another stage reads the prompt, or has done so; its parts do not matter here.

    Raises:
        OmniClientError: naming the field, what it was and what would be right.
    """
    with client_errors():
        fields = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        given = _given(sampling.extra_args)
        for key in sorted(given.keys() - _Extras.model_fields.keys() - _NOT_OURS):
            _warn_of_unknown(reprlib.repr(key))
        extras = _Extras.model_validate(given)
        values = _Sampling.model_validate(_sampling_values(sampling, fields, extras))
        if sampling.lora_request is not None:
            raise ValueError(
                "lora_request: this pipeline has no LoRA adapters; merge one into the checkpoint "
                "with `bagel-mot merge`"
            )
        if sampling.timesteps is not None or sampling.sigmas is not None:
            raise ValueError(
                "timesteps and sigmas cannot be given; num_inference_steps and timestep_shift "
                "make BAGEL's schedule"
            )
        settings = ImageSettings(
            num_timesteps=values.num_inference_steps,
            timestep_shift=extras.timestep_shift,
            # As vLLM-Omni has it, all scales up to 1 turn guidance off.
            cfg_text_scale=max(extras.cfg_text_scale, 1.0),
            cfg_img_scale=max(extras.cfg_img_scale, 1.0),
            cfg_interval=extras.cfg_interval,
            cfg_renorm_type=extras.cfg_renorm_type,
            cfg_renorm_min=extras.cfg_renorm_min,
            taylorseer=extras.taylorseer,
        )
        negative = fields.get("negative_prompt")
        negative = _text(extras.negative_prompt if negative is None else negative)
        size = _requested_size(values.height, values.width, config)
        if handed_over:
            largest = config.latent_grid * config.latent_token_pixels
            full = None if size is None else (size[0] or largest, size[1] or largest)
            return Asked(None, settings, values.num_outputs_per_prompt, full, negative)

        parts = _parts(fields)
        pictures = [part for part in parts if not isinstance(part, str)]
        output = _output(fields.get("modalities"))
        if output == "text" and values.num_outputs_per_prompt > 1:
            raise ValueError(
                f"num_outputs_per_prompt is {values.num_outputs_per_prompt}, but text is written "
                "once; ask several times, with do_sample and other seeds"
            )
        whole = _whole_size(size, pictures, config) if output == "image" else None
        request = Request(
            parts,
            output,
            think=extras.think,
            height=whole[0] if whole else None,
            width=whole[1] if whole else None,
            settings=settings,
            num_images=values.num_outputs_per_prompt,
            max_text_tokens=extras.max_think_tokens or _most_tokens(extras, output),
            temperature=extras.temperature,
            negative_prompt=negative or None,
        )
        if whole is not None:
            initial_latents(sampling.latents, whole, values.num_outputs_per_prompt, config)
        return Asked(request, settings, values.num_outputs_per_prompt, whole, negative)


def initial_latents(
    latents: Any, size: tuple[int, int], count: int, config: BagelConfig
) -> list[torch.Tensor] | None:
    """The noise that a request brings for each of its images, (N, 64) float32; None if none.

    Args:
        latents: (N, 64) tokens or (16, H/8, W/8) for one image; with a leading axis for several.
        size: (height, width) of the images in pixels.
        count: number of images.

    Raises:
        OmniClientError: it is no tensor, of another shape or not finite.
    """
    if latents is None:
        return None
    unit, down, channels = config.latent_token_pixels, config.vae.downsample, config.vae.z_channels
    tokens = (size[0] // unit * (size[1] // unit), config.latent_token_dim)
    planes = (channels, size[0] // down, size[1] // down)
    with client_errors():
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            kind = getattr(latents, "dtype", type(latents).__name__)
            raise TypeError(f"latents is {kind}; expected a floating-point tensor")
        shape = tuple(latents.shape)
        several = latents if shape[:-2] != () and shape != planes else latents[None]
        if tuple(several.shape) not in ((count, *tokens), (count, *planes)):
            raise ValueError(
                f"latents has shape {shape}; for {count} image(s) of {size[0]} x {size[1]} pixels "
                f"expected {(count, *tokens)} or {(count, *planes)}"
            )
        if not bool(several.isfinite().all()):
            raise ValueError("latents holds NaN or infinite numbers")
    each = [image.detach().float() for image in several]
    if several.dim() == 4:
        each = [patchify(image, config.latent_patch_size) for image in each]
    return each


def set_size_apart(sampling: Any) -> None:
    """Move the size that was asked for out of vLLM-Omni's sight, to `extra_args`.

    Its schedulers batch only requests with equal `height` and `width`; ours are denoised together
    whatever their sizes. `report_size` puts a size back for whoever reads the result.
    """
    sides = [
        None if getattr(sampling, f"{name}_not_provided") else getattr(sampling, name)
        for name in ("height", "width")
    ]
    if any(side is not None for side in sides):
        sampling.extra_args = {**(sampling.extra_args or {}), _SIZE_APART: sides}
    sampling.height = sampling.width = None


def report_size(sampling: Any, width: int, height: int) -> None:
    """Tell the size of a finished image, if `set_size_apart` has hidden the one asked for."""
    if sampling.height is None and sampling.width is None:
        sampling.height, sampling.width = height, width


@contextmanager
def client_errors() -> Iterator[None]:
    """Turn our complaints about a request into the error that vLLM-Omni answers with a 4xx."""
    try:
        yield
    except OmniClientError:
        raise
    except ValidationError as error:
        raise OmniClientError("; ".join(map(_explain, error.errors()))) from error
    except (ValueError, TypeError) as error:
        raise OmniClientError(str(error)) from error


def _explain(details: Any) -> str:
    name = ".".join(str(part) for part in details["loc"])
    cause = details.get("ctx", {}).get("error")
    if not name:
        return str(cause or details["msg"])
    return f"{name} is {reprlib.repr(details['input'])}: {cause or details['msg']}"


def _given(extra_args: Any) -> dict[str, Any]:
    """The keys that were set; an explicit None counts as left out, as it does in JSON."""
    if extra_args is None:
        return {}
    if not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args is a {type(extra_args).__name__}; expected a mapping")
    return {str(key): value for key, value in extra_args.items() if value is not None}


@functools.lru_cache(maxsize=256)  # once each, but clients may think of any number of keys
def _warn_of_unknown(key: str) -> None:
    known = sorted(_Extras.model_fields.keys() - {_SIZE_APART})
    logger.warning("extra_args has %s, which is ignored; BAGEL knows %s", key, ", ".join(known))


def _sampling_values(sampling: Any, fields: Mapping[str, Any], extras: _Extras) -> dict[str, Any]:
    values = {name: getattr(sampling, name) for name in _Sampling.model_fields}
    hints = fields.get("mm_processor_kwargs") or {}
    if not isinstance(hints, Mapping):
        raise TypeError(f"mm_processor_kwargs is a {type(hints).__name__}; expected a mapping")
    apart = extras.bagel_mot_size
    for name, hint, side in (("height", "target_h", apart[0]), ("width", "target_w", apart[1])):
        if getattr(sampling, f"{name}_not_provided"):
            # Filled in from the picture by the HTTP server, which does not know how BAGEL resizes
            # it; the hint is then of the same origin.
            values[name] = None
        elif values[name] is None:
            values[name] = hints.get(hint) if side is None else side
    return {name: value for name, value in values.items() if value is not None}


def _requested_size(
    height: int | None, width: int | None, config: BagelConfig
) -> tuple[int | None, int | None] | None:
    """The sides that were asked for, in whole latent tokens; None if none was."""
    if height is None and width is None:
        return None
    unit = config.latent_token_pixels
    sides: list[int | None] = []
    for name, side in (("height", height), ("width", width)):
        if side is not None and side > unit * config.latent_grid:
            raise ValueError(
                f"{name} is {side}; this checkpoint paints at most {unit * config.latent_grid}"
            )
        sides.append(None if side is None else max(side // unit, 1) * unit)
    if (height, width) != tuple(sides):
        logger.warning("size %s x %s becomes %s x %s: sides are multiples of %d pixels",
                       height, width, *sides, unit)  # fmt: skip
    return sides[0], sides[1]


def _whole_size(
    size: tuple[int | None, int | None] | None, pictures: list[Image.Image], config: BagelConfig
) -> tuple[int, int]:
    """Both sides: those not asked for are the last picture's, or the largest."""
    width = height = config.latent_grid * config.latent_token_pixels
    if pictures:
        width, height = resized_size(pictures[-1].size, config.vae_transform)
    return (size[0] or height, size[1] or width) if size else (height, width)


def _parts(fields: Mapping[str, Any]) -> list[Part]:
    """The request's pictures, loaded as RGB, then its text."""
    data = fields.get("multi_modal_data") or {}
    if not isinstance(data, Mapping):
        raise TypeError(f"multi_modal_data is a {type(data).__name__}; expected a mapping")
    if others := [key for key in data if key not in ("image", "img2img") and data[key] is not None]:
        raise ValueError(
            f"multi_modal_data has {', '.join(map(repr, others))}, which BAGEL has no use for; "
            "expected 'image' (what to change, of which a prompt can speak)"
        )
    found = [data[key] for key in ("image", "img2img") if not _is_empty(data.get(key))]
    if len(found) > 1:
        raise ValueError("multi_modal_data has image and img2img; give all pictures as one of them")
    images = found[0] if found else []
    several = list(images) if isinstance(images, list | tuple) else [images]
    parts: list[Part] = [_picture(image, index) for index, image in enumerate(several)]
    text = _text(unwrapped(_text(fields.get("prompt"))))
    if text.strip():
        parts.append(text)
    if not parts:
        raise ValueError("prompt is empty and there is no picture; say what you want")
    return parts


def _is_empty(images: Any) -> bool:
    return images is None or (isinstance(images, list | tuple) and not images)


def _picture(image: Any, index: int) -> Image.Image:
    try:
        if isinstance(image, str | os.PathLike):
            image = Image.open(image)
        if isinstance(image, Image.Image):
            image.load()  # which finds a truncated file
            return to_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {index} cannot be read: {error}") from error
    raise TypeError(f"picture {index} is a {type(image).__name__}; expected a PIL image or a path")


def _text(value: Any) -> str:
    """A text that can be tokenised."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"a prompt is a {type(value).__name__}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt is not valid Unicode: {error}") from error
    return value


def unwrapped(text: str) -> str:
    """A prompt without what clients put around it for vLLM-Omni's own BAGEL.

    That is the start and end tokens, which we add ourselves, the placeholder of a picture, and for
    questions the roles of a chat, which BAGEL was not trained with.
    """
    user, assistant = f"{BOS_TOKEN}user\n", f"{EOS_TOKEN}\n{BOS_TOKEN}assistant\n"
    if text.startswith(user) and text.endswith(assistant):
        return _without_placeholders(text[len(user) : -len(assistant)])
    text = _without_placeholders(text).removeprefix(BOS_TOKEN).removesuffix(EOS_TOKEN)
    return _without_placeholders(text)


def _without_placeholders(text: str) -> str:
    bare = text
    while bare.startswith(_PLACEHOLDERS):
        bare = bare[bare.index("|>") + 2 :]
    return bare.removeprefix("\n") if bare != text else text


def _output(modalities: Any) -> Literal["text", "image"]:
    named = [modalities] if isinstance(modalities, str) else list(modalities or [])
    unknown = [name for name in named if name not in ("image", "img2img", "text")]
    if unknown:
        raise ValueError(f"modalities has {unknown[0]!r}; expected 'image', 'img2img' or 'text'")
    if "text" not in named:
        return "image"
    if len(set(named)) > 1:
        raise ValueError(
            f"modalities is {named}, but a request gives a text or images; ask for one, and for "
            "the other in a request of its own that brings the first answer along"
        )
    return "text"


def _most_tokens(extras: _Extras, output: str) -> int:
    return 500 if output == "text" and not extras.think else 1000
