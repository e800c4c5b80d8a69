"""vLLM's multimodal processor for BAGEL: official transforms, and the prompt's picture blocks.

A picture in the prompt (`PICTURE`) becomes its whole block: `<|vision_start|>`, one token for each
patch, `<|vision_end|>`. The embeddings of all of them, markers too, come from the vision side:
what vLLM gives full attention and keeps in one step is exactly what it takes from there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from mot_kernels.dispatch import warn_once
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from bagel_mot.config import BagelConfig
from bagel_mot.images import grid_positions, patchify, resize, resized_size, to_rgb, to_tensor
from bagel_mot.plugins.vllm import CHAT_TEMPLATE, PICTURE, build_prompt
from bagel_mot.plugins.vllm_config import bagel_config
from bagel_mot.tokenizer import EOS_TOKEN, VISION_END_TOKEN, VISION_START_TOKEN

logger = logging.getLogger("bagel_mot")

_MARKERS = 2


class BagelPictureProcessor:
    """Pictures to what the model takes, called by vLLM as if it were a Hugging Face processor."""

    def __init__(self, config: BagelConfig, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.markers = torch.tensor(
            [_id_of(tokenizer, VISION_START_TOKEN), _id_of(tokenizer, VISION_END_TOKEN)]
        )

    def __call__(
        self,
        text: str | None = None,
        images: Sequence[Image.Image] | Image.Image = (),
        return_tensors: str | None = None,
        **_: object,
    ) -> BatchFeature:
        """Process the pictures of a request.

        Args:
            text: vLLM up to 0.28 has its prompts tokenised here.
            images: pictures of any size and mode.
            return_tensors: ignored, the results are tensors anyway.

        Returns:
            Lists with an entry for each picture: `patches` (n, 588), `grid_ids` (n,) rows of the
            position table, `markers` (2,) token ids. With a text also `input_ids`.
        """
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        data: dict[str, Any] = {}
        if text is not None:
            data["input_ids"] = [self.tokenizer.encode(text, add_special_tokens=False)]
        if pictures:
            cut = [self._cut(picture) for picture in pictures]
            data["patches"] = [patches for patches, _ in cut]
            data["grid_ids"] = [grid_ids for _, grid_ids in cut]
            data["markers"] = [self.markers] * len(cut)
        return BatchFeature(data)

    def _cut(self, picture: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(picture, Image.Image):
            raise TypeError(f"a picture is a {type(picture).__name__}; expected a PIL image")
        config = self.config
        # In the official code the ViT, too, sees what has gone through the VAE's resizing.
        resized = resize(to_rgb(picture), config.vae_transform)
        pixels = to_tensor(resize(resized, config.vit_transform))
        patch = config.vit.patch_size
        height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
        return patchify(pixels, patch), grid_positions(height, width, config.vit_grid)


class BagelProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about pictures before it sees one."""

    @cached_property
    def config(self) -> BagelConfig:
        """Sizes and image limits of the checkpoint."""
        return bagel_config(self.ctx.model_config)

    def get_hf_processor(self, **kwargs: object) -> BagelPictureProcessor:
        for name in kwargs:
            warn_once(
                f"mm_processor_kwargs has {name}, which is ignored: pictures are cut and resized "
                "as the checkpoint says"
            )
        tokenizer = self.get_tokenizer()
        check_tokenizer(tokenizer)
        return BagelPictureProcessor(self.config, tokenizer)

    def get_data_parser(self) -> MultiModalDataParser:
        return _PictureParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": most_picture_tokens(self.config, seq_len)}


class BagelDummyInputs(BaseDummyInputsBuilder[BagelProcessingInfo]):
    """The largest pictures, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return PICTURE * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        width, height = largest_picture(self.info.config, seq_len)
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0)
        )
        return {"image": images}


class BagelMultiModalProcessor(BaseMultiModalProcessor[BagelProcessingInfo]):
    """Replaces each placeholder by the block of its picture."""

    # vLLM before 0.29 asks these two: whether our processor has put in the blocks itself, and, by
    # its being overridden, whether it can be called as it is.
    def _hf_processor_applies_updates(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _call_hf_processor(self, *args: Any, **kwargs: Any) -> BatchFeature:
        return super()._call_hf_processor(*args, **kwargs)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = ("patches", "grid_ids", "markers")
        return {name: MultiModalFieldConfig.batched("image") for name in fields}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        if "image" in mm_items and not isinstance(mm_items["image"], ImageProcessorItems):
            raise ValueError("BAGEL takes pictures, not embeddings of pictures")
        tokenizer = self.info.get_tokenizer()
        placeholder = _id_of(tokenizer, PICTURE)

        def block(index: int) -> list[int]:
            item = out_mm_kwargs["image"][index]
            start, end = item["markers"].data.tolist()
            return [start] + [placeholder] * len(item["grid_ids"].data) + [end]

        return [PromptReplacement(modality="image", target=[placeholder], replacement=block)]


class _PictureParser(MultiModalDataParser):
    """Composites transparency as officially, before vLLM makes pictures RGB in its own way."""

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, Image.Image):
            data = [data]
        if isinstance(data, list | tuple):
            data = [to_rgb(item) if isinstance(item, Image.Image) else item for item in data]
        return super()._parse_image_data(data)


def most_picture_tokens(config: BagelConfig, limit: int) -> int:
    """Tokens of the largest block a picture can have, markers included; at most `limit`."""
    return min(max(_block_sizes(config).values()), limit)


def largest_picture(config: BagelConfig, limit: int) -> tuple[int, int]:
    """(width, height) of a picture with the largest block of at most `limit` tokens."""
    blocks = _block_sizes(config)
    # As a picture given to the processor it must pass the VAE's resizing unchanged.
    stable = [size for size in blocks if resized_size(size, config.vae_transform) == size]
    fitting = [size for size in stable if blocks[size] <= limit]
    return max(fitting, key=blocks.__getitem__) if fitting else min(stable, key=blocks.__getitem__)


@cache
def _block_sizes(config: BagelConfig) -> dict[tuple[int, int], int]:
    """Tokens of a picture's block, for every (width, height) the VAE's resizing may give."""
    limits, patch = config.vae_transform, config.vit.patch_size
    sides = range(limits.stride, limits.max_side + 1, limits.stride)
    resized = {(w, h): resized_size((w, h), config.vit_transform) for w in sides for h in sides}
    return {size: (w // patch) * (h // patch) + _MARKERS for size, (w, h) in resized.items()}


def _id_of(tokenizer: Any, token: str) -> int:
    number = tokenizer.get_vocab().get(token)
    if number is None:
        raise ValueError(
            f"the checkpoint's tokenizer has no token {token!r}, which vLLM's prompts need (the "
            f"tiny model's has no {PICTURE!r})"
        )
    return int(number)


@cache
def check_tokenizer(tokenizer: Any) -> None:
    """Warn, once, of defaults of a tokenizer that are not the official use of the model."""
    end = _id_of(tokenizer, EOS_TOKEN)
    if tokenizer.eos_token_id != end:
        logger.warning(
            "The tokenizer's end token is %r, but answers end with %r: give requests "
            "stop_token_ids=[%d].",
            tokenizer.eos_token,
            EOS_TOKEN,
            end,
        )
    if tokenizer.chat_template is None:
        return
    probe = [{"role": "user", "content": "x"}]
    layout = tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True)
    if layout != build_prompt(["x"])["prompt"]:
        logger.warning(
            "The checkpoint's own chat template is not the layout that BAGEL was trained with; "
            "pass --chat-template %s for that one.",
            CHAT_TEMPLATE,
        )
