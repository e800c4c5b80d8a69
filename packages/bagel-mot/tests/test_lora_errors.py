"""What merging refuses, and that nothing is left then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import LAYER, PREFIX, pairs, save_adapter
from command_line import run
from golden_checkpoint import rewrite
from golden_data import GOLDEN
from torch import Tensor

from bagel_mot.checkpoint import CheckpointError
from bagel_mot.lora import AdapterError, merge_checkpoint
from bagel_mot.quantize import quantize_checkpoint

Q_GEN = f"{LAYER}.0.self_attn.q_proj_moe_gen"
X = f"{PREFIX}{Q_GEN}"
A, B = (f"{X}.lora_{half}.weight" for half in "AB")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A good one, to be spoilt."""
    return save_adapter(tmp_path / "adapter", pairs((Q_GEN,)))


def refusal(adapter: Path, error: type[Exception] = AdapterError, **options: Any) -> list[str]:
    """The lines of the error; nothing is written."""
    before = sorted(adapter.parent.iterdir())
    source = options.pop("source", GOLDEN.checkpoint)
    with pytest.raises(error) as caught:
        merge_checkpoint(source, adapter, adapter.parent / "out", **options)
    assert sorted(adapter.parent.iterdir()) == before
    return [line.strip() for line in str(caught.value).splitlines()]


def set_options(adapter: Path, **options: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


# --- options


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("peft_type", "LOHA", 'peft_type is "LOHA": other methods do not add a product'),
        ("bias", "all", 'bias is "all": trained biases would take the place'),
        ("bias", "lora_only", 'bias is "lora_only"'),
        ("use_dora", True, "use_dora is true: DoRA scales the rows"),
        ("modules_to_save", ["lm_head"], 'modules_to_save is ["lm_head"]: modules that were'),
        ("trainable_token_indices", [7], "trainable_token_indices is [7]: trained rows"),
        ("fan_in_fan_out", True, "fan_in_fan_out is true: BAGEL's weights are (out, in)"),
        ("lora_bias", True, "lora_bias is true: most of BAGEL's layers have no bias"),
        ("layer_replication", [[0, 2]], "layer_replication is [[0, 2]]: it makes a model"),
        ("target_parameters", ["x"], 'target_parameters is ["x"]'),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens is [1]: it applies to some"),
        ("use_qalora", True, "use_qalora is true: it adds to groups"),
        ("init_lora_weights", "pissa_niter_4", 'init_lora_weights is "pissa_niter_4": training'),
        ("init_lora_weights", "olora", 'init_lora_weights is "olora": training began with'),
    ],
)
def test_option(option: str, value: object, message: str, adapter: Path) -> None:
    set_options(adapter, **{option: value})
    title, problem = refusal(adapter)
    assert "adapter_config.json: only plain LoRA can be merged, a pair of matrices" in title
    assert message in problem


def test_options_are_listed(adapter: Path) -> None:
    set_options(adapter, use_dora=True, bias="all")
    _, first, second = refusal(adapter)
    assert first.startswith("bias")
    assert second.startswith("use_dora")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_harmless_options(start: object, adapter: Path) -> None:
    set_options(adapter, init_lora_weights=start, modules_to_save=None, peft_version="0.99")
    merge_checkpoint(GOLDEN.checkpoint, adapter, adapter.parent / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "key 'r' is 0: Input should be greater than 0; expected the rank"),
        ({"lora_alpha": None}, "key 'lora_alpha' is None"),
        ({"rank_pattern": {"q_(": 3}}, "'q_(' is no regular expression"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "'q_proj' is inf; expected a finite number"),
    ],
)
def test_wrong_value(options: dict[str, Any], message: str, adapter: Path) -> None:
    set_options(adapter, **options)
    (line,) = refusal(adapter, ValueError)
    assert "adapter_config.json: " in line
    assert message in line


# --- tensors


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            renamed("q_proj_moe_gen", "qkv_proj"),
            f"matches no weight: {PREFIX}{LAYER}.0.self_attn.qkv_proj.lora_A.weight, "
            f"{PREFIX}{LAYER}.0.self_attn.qkv_proj.lora_B.weight",
            id="unknown",
        ),
        pytest.param(
            renamed("layers.0", "layers.3"),
            f"matches no weight: {A}, {B}".replace("layers.0", "layers.3"),
            id="layer-too-many",
        ),
        pytest.param(
            renamed(Q_GEN, "encoder.mid.attn_1.q"),
            f"matches no weight: {A}, {B}".replace(Q_GEN, "encoder.mid.attn_1.q"),
            id="vae",
        ),
        pytest.param(
            lambda tensors: tensors.pop(B),
            f"not a pair: {A}; expected lora_B.weight and lora_A.weight of {X}",
            id="no-B",
        ),
        pytest.param(
            lambda tensors: tensors.update({A: torch.zeros(4, 63)}),
            f"wrong shape: {A} is [4, 63], expected [4, 64] for rank 4 and {Q_GEN}.weight [64, 64]",
            id="wrong-columns",
        ),
        pytest.param(
            lambda tensors: tensors.update({B: torch.zeros(4, 64)}),
            f"wrong shape: {B} is [4, 64], expected [64, 4] for rank 4 and {Q_GEN}.weight [64, 64]",
            id="transposed",
        ),
        pytest.param(
            lambda tensors: tensors.update({A: torch.zeros(4, 64, 1, 1)}),
            f"wrong shape: {A} is [4, 64, 1, 1], expected [4, 64]",
            id="convolution",
        ),
        pytest.param(
            lambda tensors: tensors.update({A: torch.zeros(4, 64, dtype=torch.float64)}),
            f"wrong dtype: {A} is F64, expected one of BF16, F16, F32",
            id="float64",
        ),
        pytest.param(
            lambda tensors: tensors[A].fill_(float("nan")),
            f"not finite: {A} holds NaN or infinity",
            id="nan",
        ),
        pytest.param(
            renamed("self_attn.q_proj_moe_gen", "input_layernorm"),
            f"not a matrix: {LAYER}.0.input_layernorm.weight is [64], but ",
            id="norm",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{X}.lora_magnitude_vector": torch.ones(64)}),
            f"not plain LoRA: {X}.lora_magnitude_vector is neither the A nor the B of a weight",
            id="dora",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{X}.weight": torch.ones(64, 64)}),
            f"not plain LoRA: {X}.weight is neither the A nor the B of a weight",
            id="whole-layer",
        ),
        pytest.param(
            lambda tensors: tensors.update({"x.base_layer.weight": torch.ones(4, 4)}),
            "not plain LoRA: x.base_layer.weight is neither the A nor the B of a weight; save the "
            "adapter with save_embedding_layers=False",
            id="whole-embedding",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{X}.lora_A.default.weight": torch.ones(4, 64)}),
            f"not plain LoRA: {X}.lora_A.default.weight is neither the A nor the B of a weight; "
            "save_pretrained leaves the adapter's name out of it",
            id="name-in-memory",
        ),
        pytest.param(
            lambda tensors: tensors.update(pairs((Q_GEN,), prefix="model.")),
            f"twice: model.{Q_GEN}.lora_A.weight",
            id="twice",
        ),
        pytest.param(lambda tensors: tensors.clear(), "it holds no tensors", id="empty"),
    ],
)
def test_tensor(change: Callable[[dict[str, Tensor]], Any], problem: str, adapter: Path) -> None:
    rewrite(adapter / "adapter_model.safetensors", change)
    title, line = refusal(adapter)
    assert "adapter_model.safetensors: cannot be merged (1 problems)" in title
    assert line.startswith(problem)


def test_rank_of_another_pattern(adapter: Path) -> None:
    set_options(adapter, rank_pattern={"q_proj_moe_gen": 2})
    _, first, second = refusal(adapter)
    assert f"{A} is [4, 64], expected [2, 64] for rank 2" in first
    assert f"{B} is [64, 4], expected [64, 2] for rank 2" in second


def test_all_problems_at_once(adapter: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["nowhere.lora_A.weight"] = torch.zeros(4, 4)
        tensors["what"] = torch.zeros(4)
        tensors[B] = torch.zeros(64, 3)

    rewrite(adapter / "adapter_model.safetensors", spoil)
    _, *lines = refusal(adapter)
    assert [line.split(":")[0] for line in lines] == [
        "matches no weight",
        "not plain LoRA",
        "wrong shape",
    ]


# --- files


def test_adapter_folder_incomplete(adapter: Path) -> None:
    (line,) = refusal(adapter.parent / "nowhere", FileNotFoundError)
    assert "adapter_config.json not found; an adapter is a folder with" in line
    (adapter / "adapter_config.json").rename(adapter / "kept")
    assert refusal(adapter, FileNotFoundError) == [line.replace("nowhere", "adapter")]
    (adapter / "kept").rename(adapter / "adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert "not a complete safetensors file" in refusal(adapter, CheckpointError)[0]
    file.rename(adapter / "adapter_model.bin")
    (line,) = refusal(adapter, FileNotFoundError)
    assert "not found; found adapter_model.bin, but tensors are read from safetensors" in line


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 10**400])
def test_scale(scale: float, adapter: Path) -> None:
    (line,) = refusal(adapter, ValueError, scale=scale)
    assert line == f"scale is {scale}; expected a finite number other than 0"


@pytest.mark.parametrize("scale", ["1", None, True])
def test_scale_of_another_type(scale: Any, adapter: Path) -> None:
    (line,) = refusal(adapter, TypeError, scale=scale)
    assert line == f"scale is {scale!r}; expected a number"


def test_destination(adapter: Path) -> None:
    (adapter.parent / "out").mkdir()
    assert "out exists; choose a folder that does not" in refusal(adapter, FileExistsError)[0]


def test_quantised_source(adapter: Path) -> None:
    source = adapter.parent / "int8"
    quantize_checkpoint(GOLDEN.checkpoint, source, "int8")
    (line,) = refusal(adapter, ValueError, source=source)
    assert line == f"{source} is quantised already, in int8_w8a8; take the original"


def test_source_does_not_fit_the_model(adapter: Path, checkpoint_copy: Path) -> None:
    rewrite(checkpoint_copy / "ema.safetensors", lambda tensors: tensors.pop("llm2vae.bias"))
    _, line = refusal(adapter, CheckpointError, source=checkpoint_copy)
    assert line == "missing: llm2vae.bias [64]"


def test_too_large_for_the_dtype(adapter: Path, checkpoint_copy: Path) -> None:
    """Seen only while writing, and still nothing is left."""

    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()

    rewrite(checkpoint_copy / "ema.safetensors", halve)
    (line,) = refusal(adapter, CheckpointError, source=checkpoint_copy, scale=1e6)
    assert f"{Q_GEN}.weight would hold NaN or infinity in F16; is it damaged, or" in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda each: each.__name__)
@pytest.mark.parametrize("after", [1, 100])
def test_interrupted(error: type[BaseException], after: int, adapter: Path) -> None:
    count = 0

    def stop(_name: str, _elements: int) -> None:
        nonlocal count
        count += 1
        assert not (adapter.parent / "out").exists()
        if count == after:
            raise error("enough")

    with pytest.raises(error):
        merge_checkpoint(GOLDEN.checkpoint, adapter, adapter.parent / "out", on_tensor=stop)
    assert count == after
    assert list(adapter.parent.iterdir()) == [adapter]


def test_command(adapter: Path) -> None:
    """Errors are told in lines, not with a traceback."""
    set_options(adapter, use_dora=True)
    done = run("merge", str(GOLDEN.checkpoint), str(adapter), str(adapter.parent / "out"))
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert "use_dora is true: DoRA scales the rows of the sum, too" in done.stderr
    assert list(adapter.parent.iterdir()) == [adapter]
