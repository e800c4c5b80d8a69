"""BAGEL on routed kernels: paint, edit and answer with one mixture-of-transformers model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bagel_mot.config import BagelConfig
    from bagel_mot.pipeline import BagelPipeline, Cancelled
    from bagel_mot.quantization import Keep, Quantization
    from bagel_mot.request import Noise, Request, Result
    from bagel_mot.sampling import ImageSettings, Step

__version__ = "0.1.0"

__all__ = [
    "BagelConfig",
    "BagelPipeline",
    "Cancelled",
    "ImageSettings",
    "Keep",
    "Noise",
    "Quantization",
    "Request",
    "Result",
    "Step",
]

# Imported on first use: vLLM imports this package in every process to find its plugins, and the
# command line answers --help, without waiting for torch and vLLM.
_HOMES = {
    "BagelConfig": "config",
    "BagelPipeline": "pipeline",
    "Cancelled": "pipeline",
    "ImageSettings": "sampling",
    "Keep": "quantization",
    "Noise": "request",
    "Quantization": "quantization",
    "Request": "request",
    "Result": "request",
    "Step": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
