"""A quantised format of the tests' own, for which there is no routed kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from layer_cases import Layer, load
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class HalvesLinearMethod(LinearMethodBase):
    """A stand-in for a quantised format: another layout (K, N), and a scale to undo in `apply`."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        UnquantizedLinearMethod().create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight_scale = 2.0
        layer.weight = Parameter(layer.weight.data.t().contiguous() / 2, requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert x.shape[0] and x.is_contiguous()
        return F.linear(x, layer.weight.t() * layer.weight_scale, bias)


class HalvesConfig(QuantizationConfig):
    """Quantises everything except the layers whose prefix holds `ignored`."""

    def __init__(self, ignored: str = "?") -> None:
        super().__init__()
        self.ignored = ignored
        self.prefixes: list[str] = []

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        self.prefixes.append(prefix)
        return UnquantizedLinearMethod() if self.ignored in prefix else HalvesLinearMethod()

    def get_name(self) -> Any:
        return "halves"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HalvesConfig:
        return cls()


def quantised(spec: Layer, ignored: str = "?", **options: Any) -> Any:
    layer = spec.build(quant_config=HalvesConfig(ignored), **options)
    load(layer, spec, spec.weights())
    for expert in (layer, layer.gen_exp):
        expert.quant_method.process_weights_after_loading(expert)
    return layer
