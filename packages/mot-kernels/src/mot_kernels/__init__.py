"""Triton kernels for mixture-of-transformers models: routed linear and norm operations."""

from mot_kernels.dispatch import Choice, Path, choose_path, use_path
from mot_kernels.epilogue import SILU_MUL, AddResidual, Epilogue, SiluMul
from mot_kernels.linear import mot_linear, stack_bias
from mot_kernels.norm import mot_qk_norm_rope, mot_rms_norm
from mot_kernels.plan import RoutePlan
from mot_kernels.tuning.config import TileConfig

__version__ = "0.1.0"

__all__ = [
    "SILU_MUL",
    "AddResidual",
    "Choice",
    "Epilogue",
    "Path",
    "RoutePlan",
    "SiluMul",
    "TileConfig",
    "choose_path",
    "mot_linear",
    "mot_qk_norm_rope",
    "mot_rms_norm",
    "stack_bias",
    "use_path",
]
