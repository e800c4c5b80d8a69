"""What a BAGEL checkpoint folder says about the model's sizes.

Sources: `llm_config.json` and `vit_config.json` of the official release; what the official code
fixes in its source (VAE architecture, image size limits, grid sizes) is a default here. The field
names are the files' own, so `LlmConfig.model_validate(json)` reads a file as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    AliasChoices,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bagel_mot.json_models import Frozen, ModelT, read_json, validated

LLM_FILE = "llm_config.json"
VIT_FILE = "vit_config.json"
COMBINED_FILE = "config.json"
OVERRIDE_FILE = "oracle_config.json"

# GroupNorm of the FLUX autoencoder has 32 groups whatever the width.
VAE_NORM_GROUPS = 32


class LlmConfig(Frozen):
    """Sizes of the language model, spelled as in `llm_config.json` (Qwen2 style).

    `rope_theta` may also stand inside `rope_parameters` or `rope_scaling`, as newer Hugging Face
    files write it. `head_dim` follows from `hidden_size` and `num_attention_heads` when absent.

    Raises:
        ValueError: a key is missing or out of range, the heads do not divide, or the file asks
            for a scaled rotary embedding, which BAGEL does not have.
    """

    hidden_size: PositiveInt = Field(description="the width of the residual stream, e.g. 3584")
    intermediate_size: PositiveInt = Field(description="the width of the MLP, e.g. 18944")
    num_hidden_layers: PositiveInt = Field(description="the number of layers, e.g. 28")
    num_attention_heads: PositiveInt = Field(description="the number of query heads, e.g. 28")
    num_key_value_heads: PositiveInt = Field(description="the number of key/value heads, e.g. 4")
    vocab_size: PositiveInt = Field(description="the rows of the embedding table, e.g. 152064")
    rms_norm_eps: PositiveFloat = Field(default=1e-6, description="the RMSNorm epsilon, e.g. 1e-6")
    rope_theta: PositiveFloat = Field(
        description="the base of the rotary embedding, e.g. 1000000.0, at the top level or in "
        "'rope_parameters'"
    )
    max_position_embeddings: PositiveInt | None = Field(
        default=None, description="positions that the model was trained for, e.g. 32768"
    )
    head_dim: PositiveInt = Field(
        default=0, validate_default=True, description="the width of a head, e.g. 128"
    )

    @model_validator(mode="before")
    @classmethod
    def _lift_rope_theta(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        flat = dict(data)
        for key in ("rope_parameters", "rope_scaling"):
            nested = flat.get(key)
            if not isinstance(nested, Mapping):
                continue
            kind = nested.get("rope_type", nested.get("type", "default"))
            if kind not in (None, "default"):
                raise ValueError(
                    f"key {key!r} asks for rotary embeddings of type {kind!r}; BAGEL has plain "
                    "ones, expected 'default' or no such key"
                )
            theta, top = nested.get("rope_theta"), flat.get("rope_theta")
            if None not in (theta, top) and theta != top:
                raise ValueError(
                    f"key 'rope_theta' is {top!r} but {key}.rope_theta is {theta!r}; remove one"
                )
            flat["rope_theta"] = top if theta is None else theta
        return {key: value for key, value in flat.items() if value is not None}

    @field_validator("head_dim", mode="before")
    @classmethod
    def _derive_head_dim(cls, value: Any, info: ValidationInfo) -> Any:
        if value != 0:
            return value
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if hidden is None or heads is None:
            return 1  # never used: the keys it would follow from have reported their own errors
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; expected "
                "one that is, or a key 'head_dim'"
            )
        return hidden // heads

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; every key/value head must serve "
                "the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; expected an even number, RoPE turns pairs"
            )
        return self


class VitConfig(Frozen):
    """Sizes of the SigLIP vision encoder, spelled as in `vit_config.json`.

    `num_hidden_layers` is the file's number, one more than the layers that exist; `num_layers`
    is how many BAGEL stores and runs.

    Raises:
        ValueError: a key is missing or out of range, or the heads do not divide.
    """

    hidden_size: PositiveInt = Field(description="the width of the encoder, e.g. 1152")
    intermediate_size: PositiveInt = Field(description="the width of its MLP, e.g. 4304")
    num_attention_heads: PositiveInt = Field(description="the number of heads, e.g. 16")
    num_hidden_layers: int = Field(
        ge=2, description="one more than the number of stored layers, e.g. 27"
    )
    patch_size: PositiveInt = Field(description="the side of a patch in pixels, e.g. 14")
    image_size: PositiveInt = Field(description="the longest side in pixels, e.g. 980")
    num_channels: PositiveInt = Field(default=3, description="the channels of a picture, 3")
    layer_norm_eps: PositiveFloat = Field(default=1e-6, description="LayerNorm's epsilon, 1e-6")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; expected one that is"
            )
        return self

    @property
    def num_layers(self) -> int:
        """Encoder layers that are stored and run."""
        return self.num_hidden_layers - 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: patch_size * patch_size * channels, 588 in the release."""
        return self.patch_size**2 * self.num_channels


class VaeConfig(Frozen):
    """Architecture of the FLUX autoencoder; the defaults are the official ones.

    Raises:
        ValueError: `downsample` is not what the levels of `ch_mult` give, or a level's width is
            not a multiple of 32, the number of groups of its GroupNorm.
    """

    ch: PositiveInt = Field(default=128, description="the channels of the first level, 128")
    ch_mult: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 4), min_length=1, description="a width factor per level, [1, 2, 4, 4]"
    )
    num_res_blocks: PositiveInt = Field(default=2, description="residual blocks per level, 2")
    z_channels: PositiveInt = Field(default=16, description="the channels of a latent, 16")
    in_channels: PositiveInt = Field(default=3, description="the channels of a picture, 3")
    out_channels: PositiveInt = Field(
        default=3,
        validation_alias=AliasChoices("out_channels", "out_ch"),
        description="the channels of a decoded picture, 3",
    )
    downsample: PositiveInt = Field(default=8, description="pixels per latent side, 8")
    scale_factor: PositiveFloat = Field(default=0.3611, description="the latent scale, 0.3611")
    shift_factor: float = Field(default=0.1159, description="the latent shift, 0.1159")

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        sides = 2 ** (len(self.ch_mult) - 1)
        if self.downsample != sides:
            raise ValueError(
                f"downsample is {self.downsample} but ch_mult has {len(self.ch_mult)} levels, "
                f"which halve a picture one time less; expected downsample {sides}"
            )
        for factor in (1, *self.ch_mult):
            if self.ch * factor % VAE_NORM_GROUPS:
                raise ValueError(
                    f"ch {self.ch} times ch_mult's {factor} is {self.ch * factor} channels; "
                    f"expected a multiple of {VAE_NORM_GROUPS}, the groups of GroupNorm"
                )
        return self


class ImageLimits(Frozen):
    """Limits, in pixels, of the official picture resizing (`images.resized_size`).

    Raises:
        ValueError: `min_side` exceeds `max_side`, or `stride` does.
    """

    max_side: PositiveInt = Field(description="the longest side allowed")
    min_side: PositiveInt = Field(description="the shortest side wanted")
    stride: PositiveInt = Field(description="what both sides become a multiple of")
    max_pixels: PositiveInt = Field(
        default=14 * 14 * 9 * 1024, description="the largest area, 1806336 in the official code"
    )

    def within(self, side: int) -> Self:
        """The same, but for no side longer than this."""
        most = min(self.max_side, side)
        least = min(self.min_side, most)
        return self.model_copy(update={"max_side": most, "min_side": least})

    @model_validator(mode="before")
    @classmethod
    def _from_triple(cls, data: Any) -> Any:
        if isinstance(data, (list, tuple)):
            if len(data) != 3:
                raise ValueError(f"got {list(data)!r}; expected [max_side, min_side, stride]")
            return dict(zip(("max_side", "min_side", "stride"), data, strict=True))
        return data

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if max(self.min_side, self.stride) > self.max_side:
            raise ValueError(
                f"max_side is {self.max_side}, min_side {self.min_side} and stride {self.stride}; "
                "expected neither of the latter to exceed max_side"
            )
        return self


class BagelConfig(Frozen):
    """Everything the modules of `bagel_mot.model` need to know about a checkpoint.

    `latent_grid` and `vit_grid` are the sides of the two position tables. No file can be trusted
    for them (`max_latent_size` in released `config.json` files is wrong), so they start at the
    official 64 and 70, and the loader corrects them with `with_grids` from the stored tables.
    """

    llm: LlmConfig
    vit: VitConfig
    vae: VaeConfig = VaeConfig()
    vae_transform: ImageLimits = ImageLimits(max_side=1024, min_side=512, stride=16)
    vit_transform: ImageLimits = ImageLimits(max_side=980, min_side=224, stride=14)
    latent_patch_size: PositiveInt = 2
    latent_grid: PositiveInt = 64
    vit_grid: PositiveInt = 70

    @model_validator(mode="after")
    def _check_strides(self) -> Self:
        for name, limits, unit in (
            ("vae_transform", self.vae_transform, self.latent_token_pixels),
            ("vit_transform", self.vit_transform, self.vit.patch_size),
        ):
            if limits.stride % unit:
                raise ValueError(
                    f"{name}.stride is {limits.stride}; expected a multiple of {unit}, one token"
                )
        return self

    @property
    def latent_token_pixels(self) -> int:
        """Side, in pixels, of the square one latent token covers (16 in the release)."""
        return self.vae.downsample * self.latent_patch_size

    @property
    def latent_token_dim(self) -> int:
        """Numbers in one latent token: 2 * 2 * 16 = 64 in the release."""
        return self.latent_patch_size**2 * self.vae.z_channels

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Read a folder in the official layout.

        `llm_config.json` and `vit_config.json` are used where they exist; otherwise the entries
        `llm_config` and `vit_config` of `config.json`, which is not looked at when not needed (it
        was not valid JSON in some releases). `oracle_config.json`, if there, overrides the VAE's
        architecture (`vae_params`) and the size limits (`vae_transform`, `vit_transform`).

        Args:
            path: a local folder.

        Raises:
            FileNotFoundError: the folder, or a file without which the sizes are unknown, is not
                there.
            ValueError: a file is not JSON, lacks a key, or holds a value that cannot be.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"path {str(folder)!r} is not a folder; expected a local copy of a BAGEL "
                f"checkpoint, with {LLM_FILE}, {VIT_FILE}, ema.safetensors and ae.safetensors"
            )
        sections: dict[str, Any] = {
            "llm": _read_section(folder, LLM_FILE, "llm_config", LlmConfig),
            "vit": _read_section(folder, VIT_FILE, "vit_config", VitConfig),
        }
        origin, overrides = folder, folder / OVERRIDE_FILE
        if overrides.is_file():
            origin = overrides
            values = read_json(overrides)
            for key, name, model in (
                ("vae_params", "vae", VaeConfig),
                ("vae_transform", "vae_transform", ImageLimits),
                ("vit_transform", "vit_transform", ImageLimits),
            ):
                if key in values:
                    sections[name] = validated(model, values[key], f"{overrides}: {key}")
        return validated(cls, sections, str(origin))

    def with_grids(self, latent_rows: int, vit_rows: int) -> Self:
        """This config with the grid sides that the checkpoint's position tables have.

        Pictures are made small enough for them, where the limits are of larger ones.

        Args:
            latent_rows: rows of `latent_pos_embed.pos_embed` (4096 in the release).
            vit_rows: rows of `vit_pos_embed.pos_embed` (4900 in the release).

        Raises:
            ValueError: a table is not that of a square grid.
        """
        sides = {}
        for name, rows in (("latent", latent_rows), ("vit", vit_rows)):
            side = math.isqrt(max(rows, 0))
            if side == 0 or side * side != rows:
                raise ValueError(
                    f"{name}_rows is {rows}; expected a perfect square, the cells of a square grid "
                    "(4096 latent and 4900 ViT rows in BAGEL-7B-MoT)"
                )
            sides[f"{name}_grid"] = side
        return self.model_copy(
            update={
                **sides,
                "vae_transform": self.vae_transform.within(
                    sides["latent_grid"] * self.latent_token_pixels
                ),
                "vit_transform": self.vit_transform.within(sides["vit_grid"] * self.vit.patch_size),
            }
        )


def _read_section(folder: Path, file_name: str, key: str, model: type[ModelT]) -> ModelT:
    """A model from its own file, or from its entry in config.json."""
    own = folder / file_name
    if own.is_file():
        return validated(model, read_json(own), str(own))
    combined = folder / COMBINED_FILE
    remedy = f"copy {file_name} from the official checkpoint"
    try:
        entry = read_json(combined).get(key) if combined.is_file() else None
    except ValueError as error:
        raise ValueError(f"{own} is missing, and in its place {error}; {remedy}") from error
    if entry is None:
        raise FileNotFoundError(
            f"{own} is missing, and no {COMBINED_FILE} has an entry {key!r} in its place; {remedy}"
        )
    return validated(model, entry, f"{combined}: {key}")
