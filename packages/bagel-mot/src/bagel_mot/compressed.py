"""Quantised checkpoints, in the layout of compressed-tensors, which vLLM reads too.

A quantised matrix `NAME.weight` (N, K) is stored as

| format | values | scales |
|---|---|---|
| fp8 | `NAME.weight` (N, K) float8_e4m3fn | `NAME.weight_scale` (N, 1) |
| int8 | `NAME.weight` (N, K) int8 | `NAME.weight_scale` (N, 1) |
| w8a16 | `NAME.weight_packed` (N, K / 4) int32 | `NAME.weight_scale` (N, 1) |
| w4a16 | `NAME.weight_packed` (N, K / 8) int32 | `NAME.weight_scale` (N, K / group) |

with `NAME.weight_shape` beside packed values, which are unsigned (128 or 8 is zero), the first in
the lowest bits. NAME keeps the gen expert's mark: `...q_proj_moe_gen.weight_scale`. `config.json`
says the format, under `quantization_config`; which matrices are quantised, the files do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mot_kernels import (
    Format,
    Fp8W8A8,
    Int4W4A16,
    Int8W8A8,
    Int8W8A16,
    WeightScales,
    quantize_weight,
)
from mot_layers.vllm_formats import signed_bytes

from bagel_mot.checkpoint import (
    PLAIN_DTYPES,
    CheckpointError,
    StoredTensor,
    Target,
    model_targets,
)
from bagel_mot.config import COMBINED_FILE, BagelConfig
from bagel_mot.quantization import PROJECTIONS, LayerFormats, Projection, Quantization

CONFIG_KEY = "quantization_config"

_METHOD = "compressed-tensors"
_SCALE = ".weight_scale"
_MATRIX = re.compile(r"transformer\.layers\.(\d+)\.(\w+\.\w+?)(?:\.gen_exp)?\.weight")
_INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
# The model's other linear layers; patterns are compressed-tensors'.
_NEVER = ["language_model.lm_head", "re:.*vit.*", "re:connector.*", "re:.*vae.*", "re:time_embed.*"]


def choose_formats(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    config: BagelConfig,
    quantization: str | Quantization | None,
) -> tuple[LayerFormats | None, dict[str, Target]]:
    """What a model's layers are to be in (None: nothing is quantised), and where tensors go.

    Args:
        folder, stored, config: of the checkpoint.
        quantization: what is asked for; None to load what there is.

    Raises:
        CheckpointError: see `stored_formats`.
        ValueError: the format is not known, or the checkpoint is quantised already.
    """
    targets = model_targets(config)
    found = stored_formats(folder, stored, config)
    if found is None:
        asked = None if quantization is None else Quantization.of(quantization).formats(config.llm)
        return asked, targets
    if quantization is not None:
        raise ValueError(
            f"quantization is {quantization}, but {folder} is quantised already, in "
            f"{found.format}; leave quantization out, or take the original checkpoint"
        )
    return found, stored_targets(targets, found)


def quantized_matrices(
    targets: Mapping[str, Target], formats: LayerFormats
) -> Iterator[tuple[str, Target]]:
    """Those of `model_targets` that are matrices of quantised layers: `NAME.weight`."""
    for name, target in targets.items():
        if place_of(target) in formats.quantized:
            yield name, target


def place_of(target: Target) -> tuple[int, Projection] | None:
    """The layer and projection that a matrix belongs to; None for what is never quantised."""
    found = _MATRIX.fullmatch(target.parameter)
    if found is None or found[2] not in PROJECTIONS:
        return None
    return int(found[1]), PROJECTIONS[found[2]]


def stored_targets(targets: Mapping[str, Target], formats: LayerFormats) -> dict[str, Target]:
    """`model_targets` of a checkpoint whose matrices are stored quantised."""
    found = dict(targets)
    for name, target in quantized_matrices(targets, formats):
        del found[name]
        module = name.removesuffix(".weight")
        parts = _parts(module, target, formats.format)
        found |= {f"{module}.{part}": own for part, own in parts.items()}
    return found


def _parts(module: str, target: Target, format: Format) -> dict[str, Target]:
    """Where each of the tensors goes that stand for the matrix of a module of the file."""
    n, k = target.shape
    scale = replace(target, parameter=f"{target.parameter}_scale", dtypes=PLAIN_DTYPES)
    per_row = replace(scale, shape=(n, 1), decode=lambda scales: scales.float().flatten())
    shape = replace(target, shape=(2,), dtypes=("I64",), decode=_check_shape(module, n, k))
    match format:
        case Fp8W8A8():
            return {"weight": replace(target, dtypes=("F8_E4M3",)), "weight_scale": per_row}
        case Int8W8A8():
            return {"weight": replace(target, dtypes=("I8",)), "weight_scale": per_row}
        case Int8W8A16():
            packed, scales = replace(target, shape=(n, k // 4), decode=signed_bytes), per_row
        case Int4W4A16(group_size):
            packed = replace(target, shape=(n, k // 8), decode=lambda t: t.view(torch.uint8))
            scales = replace(
                scale, shape=(n, k // group_size), decode=lambda scales: scales.float()
            )
    packed = replace(packed, dtypes=("I32",))
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}


def _check_shape(module: str, n: int, k: int) -> Callable[[torch.Tensor], None]:
    def check(tensor: torch.Tensor) -> None:
        if tensor.tolist() != [n, k]:
            raise CheckpointError(f"{module}.weight_shape is {tensor.tolist()}, expected {[n, k]}")

    return check


def encode(matrix: torch.Tensor, format: Format, device: torch.device) -> dict[str, torch.Tensor]:
    """Quantise a matrix (N, K) on `device`; the tensors that stand for it, on the CPU.

    Raises:
        ValueError: K does not go with the format, or with packing.
    """
    if isinstance(format, Int8W8A16) and matrix.shape[1] % 4:
        raise ValueError(f"w8a16 packs 4 columns in one number, but K is {matrix.shape[1]}")
    weight = quantize_weight([matrix], format, device=device)
    data, scale = weight.data[0].cpu(), weight.scales[0].cpu()
    match format:
        case Fp8W8A8() | Int8W8A8():
            return {"weight": data, "weight_scale": scale[:, None]}
        case Int8W8A16():
            packed, scale = (data.view(torch.uint8) ^ 128).view(torch.int32), scale[:, None]
        case Int4W4A16():
            packed = data.view(torch.int32)
    shape = torch.tensor(matrix.shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def stored_formats(
    folder: Path, stored: Mapping[str, StoredTensor], config: BagelConfig
) -> LayerFormats | None:
    """What is quantised in a checkpoint; None if nothing is.

    Raises:
        CheckpointError: some but not all matrices of a projection are, or `config.json` does not
            say how, or in a way that is not supported; or it names a layout other than ours.
    """
    _check_method(folder)
    found: dict[tuple[int, Projection], dict[str, bool]] = {}
    for name, target in model_targets(config).items():
        place = place_of(target)
        if place is not None:
            is_quantized = name.removesuffix(".weight") + _SCALE in stored
            found.setdefault(place, {})[name] = is_quantized
    for marks in found.values():
        if len(set(marks.values())) > 1:
            missing = ", ".join(name for name, is_quantized in marks.items() if not is_quantized)
            raise CheckpointError(
                f"{folder}: {missing} not quantised, but other parts of the same layer are; both "
                "experts and all parts of a fused projection must be in one format"
            )
    quantized = frozenset(place for place, marks in found.items() if all(marks.values()))
    if not quantized:
        return None
    return LayerFormats(_read_format(folder), quantized)


def quantization_config(formats: LayerFormats, targets: Mapping[str, Target]) -> dict[str, Any]:
    """What `config.json` says, in compressed-tensors' terms.

    Args:
        targets: see `model_targets`; its matrices that are not quantised are listed by name.
    """
    by_row = {"strategy": "channel", "dynamic": False}
    by_token = {"strategy": "token", "dynamic": True}
    activations: dict[str, Any] | None = None
    match formats.format:
        case Fp8W8A8():
            layout, weights, activations = "float-quantized", _FP8 | by_row, _FP8 | by_token
        case Int8W8A8():
            layout, weights, activations = "int-quantized", _INT8 | by_row, _INT8 | by_token
        case Int8W8A16():
            layout, weights = "pack-quantized", _INT8 | by_row
        case Int4W4A16(group_size):
            group = {"num_bits": 4, "strategy": "group", "group_size": group_size}
            layout, weights = "pack-quantized", _INT8 | by_row | group
    kept = [
        name.removesuffix(".weight")
        for name, target in targets.items()
        if (place := place_of(target)) is not None and place not in formats.quantized
    ]
    return {
        "quant_method": _METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
        "ignore": [*_NEVER, *kept],
    }


def _check_method(folder: Path) -> None:
    """Other layouts have other tensors: better one error than a list of all that are missing."""
    file = folder / COMBINED_FILE
    try:
        method = json.loads(file.read_text(encoding="utf-8"))[CONFIG_KEY]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # it says nothing of the kind
    if method != _METHOD:
        raise CheckpointError(
            f"{file}: quantised by {method!r}, which is not read here; use the original "
            "checkpoint, with quantization=... or after `bagel-mot quantize` for fewer bits"
        )


def _read_format(folder: Path) -> Format:
    file = folder / COMBINED_FILE
    where = f"{file}: {CONFIG_KEY}"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))[CONFIG_KEY]
        (group,) = config["config_groups"].values()
        weights, activations = group["weights"], group.get("input_activations")
        bits, kind, strategy = weights["num_bits"], weights["type"], weights["strategy"]
        if not isinstance(activations, dict | None):
            raise TypeError(f"input_activations is {activations!r}; expected an object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the files hold quantised tensors, and this should say how, in one config "
            f"group of compressed-tensors ({type(error).__name__}: {error})"
        ) from error
    by_token = activations is not None and (
        activations.get("num_bits"),
        activations.get("type"),
        activations.get("strategy"),
        activations.get("symmetric", True),
    ) == (8, kind, "token", True)
    packed = config.get("format") == "pack-quantized" and activations is None
    match (bits, kind, strategy):
        case _ if not weights.get("symmetric", True) or weights.get("actorder"):
            pass
        case (8, "float", "channel") if by_token:
            return Fp8W8A8(WeightScales.PER_CHANNEL)
        case (8, "int", "channel") if by_token:
            return Int8W8A8()
        case (8, "int", "channel") if packed:
            return Int8W8A16()
        case (4, "int", "group") if packed and weights.get("group_size") in (32, 64, 128):
            return Int4W4A16(weights["group_size"])
    raise CheckpointError(
        f"{where}: weights {weights} with activations {activations} cannot be loaded; expected "
        "symmetric FP8 or INT8 W8A8 by channel and token, or pack-quantized INT8 by channel or "
        "INT4 by groups of 32, 64 or 128, as `bagel-mot quantize` writes them"
    )
