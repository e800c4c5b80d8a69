"""A LoRA adapter's `adapter_config.json`, as PEFT writes it: what it says, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from bagel_mot.json_models import Frozen, read_json, validated

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Options under which an adapter is something else than what is added to weights, or more than
# that: what they must be, and why.
_OFF: tuple[Any, ...] = (None, False, [], {})
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": ((None, "LORA"), "other methods do not add a product to each weight"),
    "bias": ((None, "none"), "trained biases would take the place of the model's"),
    "use_dora": (_OFF, "DoRA scales the rows of the sum, too"),
    "modules_to_save": (_OFF, "modules that were trained whole are not merged"),
    "trainable_token_indices": (_OFF, "trained rows of embeddings are not merged"),
    "fan_in_fan_out": (_OFF, "BAGEL's weights are (out, in)"),
    "lora_bias": (_OFF, "most of BAGEL's layers have no bias to add B's to"),
    "layer_replication": (_OFF, "it makes a model of other layers"),
    "target_parameters": (_OFF, "BAGEL's weights are all modules' own"),
    "alora_invocation_tokens": (_OFF, "it applies to some tokens only"),
    "arrow_config": (_OFF, "it chooses among adapters for each token"),
    "use_bdlora": (_OFF, "its matrices are stored in blocks"),
    "use_qalora": (_OFF, "it adds to groups of columns"),
    "kasa_config": (_OFF, "it changes the weights before training"),
    "monteclora_config": (_OFF, "it has more than a pair of matrices"),
}
# Ways to begin training that change the weights which the adapter is then added to.
_CHANGES_WEIGHTS = ("pissa", "corda", "olora", "loftq", "lora_ga")

_T = TypeVar("_T", bound=float)


class AdapterError(ValueError):
    """An adapter that cannot be merged; the message names file and tensors or options."""


class AdapterConfig(Frozen):
    """Ranks and factors of an adapter, spelled as in its file.

    A pattern is a regular expression for a module's name, or for the end of it after a dot; the
    first that matches counts.

    Raises:
        ValueError: a key is missing or out of range, or a pattern is no regular expression.
    """

    r: PositiveInt = Field(description="the rank, e.g. 16")
    lora_alpha: float = Field(gt=0, allow_inf_nan=False, description="a number, e.g. 32")
    use_rslora: bool = Field(default=False, description="true or false")
    rank_pattern: dict[str, PositiveInt] = Field(default={}, description="ranks by patterns")
    alpha_pattern: dict[str, float] = Field(default={}, description="numbers by patterns")

    @field_validator("use_rslora", "rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, _T]) -> dict[str, _T]:
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
            if not math.isfinite(value):
                raise ValueError(f"{pattern!r} is {value}; expected a finite number")
        return patterns

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Read an adapter's configuration.

        Raises:
            FileNotFoundError: there is no such folder or file.
            AdapterError: it asks for what cannot be merged; all such options are listed.
            ValueError: the file cannot be read.
        """
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} not found; an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
                "as PEFT saves it"
            )
        content = read_json(file)
        problems = [
            f"{key} is {json.dumps(content[key])}: {why}"
            for key, (allowed, why) in _MUST_BE.items()
            if content.get(key) not in allowed
        ]
        start = content.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
            problems.append(
                f"init_lora_weights is {json.dumps(start)}: training began with changed weights; "
                "save the adapter for the original ones (path_initial_model_for_weight_conversion "
                "in PEFT), or write true there if the checkpoint has the changed ones"
            )
        if problems:
            raise AdapterError(
                f"{file}: only plain LoRA can be merged, a pair of matrices for each weight, "
                'with "bias": "none":\n  ' + "\n  ".join(problems)
            )
        return validated(cls, content, str(file))

    def rank(self, module: str) -> int:
        """The rank r of a module, by its name in the model that was trained."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def factor(self, module: str) -> float:
        """What multiplies B A of a module: alpha / r, with rsLoRA alpha / sqrt(r)."""
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
