"""vLLM-Omni's `quantization_config` and what it means to `MoTBagelPipeline`.

| vLLM-Omni's | ours |
|---|---|
| `"fp8"`, `"int8"` (or `{"method": ...}`), without options | the format of that name |
| `{"method": "bagel_mot", "format": "w4a16:64", "keep": "first"}` | `Quantization.parse` of both |
| `{"transformer": one of these, "vae": None}` | the same: only decoder layers are ever quantised |
| what a checkpoint's config.json says, of method `compressed-tensors` | nothing: its files say it |

Everything else is refused. `omni.py` tells vLLM-Omni of the two methods that it does not know.
"""

from __future__ import annotations

from typing import Any

from mot_layers.formats import OwnConfig
from torch import nn

from bagel_mot.plugins.omni import OWN_METHOD, OWN_NAME, REPLACE_VARIABLE, STORED_METHOD
from bagel_mot.quantization import FORMATS, Quantization

# The only component in vLLM-Omni's sense that can be quantised: the decoder layers.
_COMPONENT = "transformer"
_POSSIBLE = (
    f"'fp8', 'int8', or {{'method': '{OWN_METHOD}', 'format': FORMAT, 'keep': 'first,last'}}, of "
    f"which keep may be left out and FORMAT is one of {', '.join(FORMATS)}"
)


class MoTQuantizationConfig(OwnConfig):
    """A wish that only `MoTBagelPipeline` understands; layers of other pipelines refuse it.

    Args:
        quantization: what is asked for; None for a checkpoint that is quantised already.
    """

    def __init__(self, quantization: Quantization | None) -> None:
        super().__init__()
        self.quantization = quantization

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Not possible; vLLM's interface."""
        raise ValueError(
            f"quantization_config is {self.get_name()!r}, which {OWN_NAME} understands and the "
            f"model with the layer {prefix!r} does not; leave it out, or have {REPLACE_VARIABLE}=1"
        )

    def get_name(self) -> Any:
        """The method as users write it; vLLM's interface."""
        return STORED_METHOD if self.quantization is None else OWN_METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoTQuantizationConfig:
        """From the options of our method; vLLM's interface."""
        return own_config(**{key: config[key] for key in config.keys() - {"quant_method"}})


def own_config(format: Any = None, keep: Any = "", **unknown: Any) -> MoTQuantizationConfig:
    """What `{"method": "bagel_mot", "format": ..., "keep": ...}` asks for.

    Args:
        format: "fp8", "int8", "w8a16", "w4a16" or "w4a16:GROUP".
        keep: what stays in 16 bits, as for `Keep.parse`.

    Raises:
        ValueError: there is no such format, a word of `keep` is not known, or there are other
            options.
    """
    if unknown or not isinstance(format, str) or not isinstance(keep, str):
        options = {"format": format, "keep": keep} | unknown
        raise ValueError(
            f"quantization_config is {OWN_METHOD!r} with {options}; expected {_POSSIBLE}"
        )
    return MoTQuantizationConfig(Quantization.parse(format, keep))


def stored_config(**options: Any) -> MoTQuantizationConfig:
    """What a checkpoint's config.json says; which matrices are quantised, its files do.

    Raises:
        ValueError: it does not come from a checkpoint.
    """
    if "config_groups" not in options:
        raise ValueError(
            f"quantization_config is {STORED_METHOD!r} with {options or 'no options'}: that is how "
            "checkpoints are stored, which are recognised without it. To quantise while loading: "
            f"expected {_POSSIBLE}"
        )
    return MoTQuantizationConfig(None)


def asked_quantization(config: Any) -> Quantization | None:
    """What vLLM-Omni's `quantization_config` asks our pipeline for; None: take what is stored.

    Args:
        config: a `QuantizationConfig` of vLLM or vLLM-Omni, or None.

    Raises:
        ValueError: it is for something that is not available.
    """
    components = getattr(config, "component_configs", None)
    if components is not None:
        for name, own in components.items():
            if name != _COMPONENT and own is not None:
                raise ValueError(
                    f"quantization_config is {own.get_name()!r} for {name!r}; only "
                    f"{_COMPONENT!r}, the decoder layers, can be quantised: set the others to None"
                )
        config = config.resolve(_COMPONENT)
    if config is None:
        return None
    if isinstance(config, MoTQuantizationConfig):
        return config.quantization
    name = config.get_name()
    if name not in ("fp8", "int8"):
        raise ValueError(f"quantization_config is {name!r}; expected {_POSSIBLE}")
    if options := _options(config):
        raise ValueError(
            f"quantization_config is {name!r} with {options}; expected no options (weights are "
            "quantised while loading, activations with a scale for each token), or, to leave "
            f"layers in 16 bits, the method {OWN_METHOD!r} with keep"
        )
    return Quantization.parse(name)


def _options(config: Any) -> dict[str, Any]:
    """What is set in a configuration, of whatever version, that its defaults are not."""
    default = vars(type(config)())
    # vLLM-Omni fills in the mapping, of the model's class.
    names = vars(config).keys() - {"packed_modules_mapping"}
    changed = {name for name in names if vars(config)[name] != default.get(name)}
    return {name: vars(config)[name] for name in sorted(changed)}
