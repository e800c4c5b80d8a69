"""Triton kernels for mixture-of-transformers models: routed linear and norm operations."""

from mot_kernels.dispatch import Choice, Path, choose_path, use_path
from mot_kernels.epilogue import SILU_MUL, AddResidual, Epilogue, SiluMul
from mot_kernels.formats import (
    ExpertWeight,
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    QuantizedRows,
    WeightScales,
)
from mot_kernels.linear import mot_linear, stack_bias
from mot_kernels.norm import mot_qk_norm_rope, mot_rms_norm
from mot_kernels.plan import RoutePlan
from mot_kernels.quantize import dequantize, quantize_weight
from mot_kernels.rows import quantize_rows
from mot_kernels.tuning.config import TileConfig

__version__ = "0.1.0"

__all__ = [
    "SILU_MUL",
    "AddResidual",
    "Choice",
    "Epilogue",
    "ExpertWeight",
    "Format",
    "Fp8W8A8",
    "Int4W4A16",
    "Int8W8A8",
    "Int8W8A16",
    "Path",
    "QuantizedRows",
    "RoutePlan",
    "SiluMul",
    "TileConfig",
    "WeightScales",
    "choose_path",
    "dequantize",
    "mot_linear",
    "mot_qk_norm_rope",
    "mot_rms_norm",
    "quantize_rows",
    "quantize_weight",
    "stack_bias",
    "use_path",
]
