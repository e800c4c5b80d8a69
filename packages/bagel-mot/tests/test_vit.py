"""The vision encoder and the connector, layer by layer, against the recordings."""

from __future__ import annotations

import pytest
import torch
from golden_data import GOLDEN, assert_recorded
from torch import Tensor

from bagel_mot.config import BagelConfig
from bagel_mot.model.vit import MlpConnector, VisionTransformer
from bagel_mot.synthetic import BAGEL_7B

# All tensors, then input and output only.
FULL_CASES = ["b1", "c1"]
CASES = [*FULL_CASES, "b2", "b3", "c2"]

LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def checkpoint_state(layers: int) -> dict[str, Tensor]:
    """The checkpoint's tensors under our names, with q, k and v fused."""
    found = GOLDEN.weights("vit_model.vision_model.")
    state = {"pos_embed.weight": found["embeddings.position_embedding.weight"]}
    for part in ("weight", "bias"):
        state[f"patch_embed.{part}"] = found[f"embeddings.patch_embedding.{part}"]
        state[f"norm.{part}"] = found[f"post_layernorm.{part}"]
        for layer in range(layers):
            theirs, ours = f"encoder.layers.{layer}", f"layers.{layer}"
            for name, stored in LAYER_NAMES.items():
                state[f"{ours}.{name}.{part}"] = found[f"{theirs}.{stored}.{part}"]
            state[f"{ours}.attn.qkv.{part}"] = torch.cat(
                [found[f"{theirs}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            )
    return state


@pytest.fixture(scope="module")
def config() -> BagelConfig:
    return BagelConfig.from_folder(GOLDEN.checkpoint)


@pytest.fixture(scope="module")
def vit(config: BagelConfig) -> VisionTransformer:
    model = VisionTransformer(config.vit, config.vit_grid)
    model.load_state_dict(checkpoint_state(config.vit.num_layers), strict=True)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def connector(config: BagelConfig) -> MlpConnector:
    model = MlpConnector(config.vit.hidden_size, config.llm.hidden_size)
    model.load_state_dict(GOLDEN.weights("connector."), strict=True)
    return model.eval().requires_grad_(False)


def recorded(name: str) -> dict[str, Tensor]:
    """The tensors of a case's ViT block, without the prefix."""
    case = GOLDEN.case(name)
    ((prefix, _),) = case.segments("vit")
    found = {key: tensor for key, tensor in case.tensors.items() if key.startswith(f"{prefix}.")}
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_vision_transformer_recorded(vit: VisionTransformer, name: str) -> None:
    want = recorded(name)
    output = vit(want["patches"], want["patch_position_ids"])
    assert_recorded("vit_output", output, want["vit_output"])


@pytest.mark.parametrize("name", FULL_CASES)
def test_vision_transformer_recorded_layers(vit: VisionTransformer, name: str) -> None:
    want = recorded(name)
    got: dict[str, Tensor] = {}
    handles = [
        vit.layers[0].register_forward_pre_hook(
            lambda module, inputs: got.update(vit_embeddings=inputs[0])
        )
    ]
    for index, layer in enumerate(vit.layers):
        key = f"vit_layer{index}"
        handles.append(
            layer.register_forward_hook(
                lambda module, inputs, output, key=key: got.update({key: output})
            )
        )
    try:
        vit(want["patches"], want["patch_position_ids"])
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(got) == ["vit_embeddings", "vit_layer0", "vit_layer1"]
    for key, tensor in got.items():
        assert_recorded(key, tensor, want[key])


@pytest.mark.parametrize("name", FULL_CASES)
def test_connector_recorded(connector: MlpConnector, name: str) -> None:
    want = recorded(name)
    output = connector(want["vit_output"])
    assert_recorded("connector_output", output, want["connector_output"])


@pytest.mark.parametrize("name", FULL_CASES)
def test_vision_transformer_and_connector_recorded(
    vit: VisionTransformer, connector: MlpConnector, name: str
) -> None:
    want = recorded(name)
    output = connector(vit(want["patches"], want["patch_position_ids"].long()))
    assert_recorded("connector_output", output, want["connector_output"])


def test_official_architecture() -> None:
    with torch.device("meta"):
        state = VisionTransformer(BAGEL_7B.vit, 70).state_dict()
        connector = MlpConnector(1152, 3584).state_dict()
    # Counted in the released ema.safetensors: 421 tensors, of which fusing makes 3 into 1.
    assert len(state) + 2 * 2 * 26 == 421
    assert state["layers.25.attn.qkv.weight"].shape == (3456, 1152)
    assert state["patch_embed.weight"].shape == (1152, 588)
    assert {name: tuple(tensor.shape) for name, tensor in connector.items()} == {
        "fc1.weight": (3584, 1152),
        "fc1.bias": (3584,),
        "fc2.weight": (3584, 3584),
        "fc2.bias": (3584,),
    }


def test_vision_transformer_dtype(config: BagelConfig) -> None:
    model = VisionTransformer(config.vit, 4).to(torch.bfloat16)
    assert model(torch.zeros(6, 588), torch.arange(6)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("patches", "positions", "error", "message"),
    [
        pytest.param(
            torch.zeros(3, 14, 14),
            torch.arange(3),
            ValueError,
            r"patches has shape \(3, 14, 14\); expected \(n, 588\)",
            id="not-patches",
        ),
        pytest.param(
            torch.zeros(3, 768),
            torch.arange(3),
            ValueError,
            r"patches has shape \(3, 768\); expected \(n, 588\)",
            id="other-patch-size",
        ),
        pytest.param(
            torch.zeros(3, 588),
            torch.arange(4),
            ValueError,
            r"position_ids has shape \(4,\) for 3 patches; expected \(3,\)",
            id="one-position-too-many",
        ),
        pytest.param(
            torch.zeros(3, 588),
            torch.zeros(3),
            TypeError,
            r"position_ids is torch\.float32; expected int32 or int64",
            id="float-positions",
        ),
    ],
)
def test_vision_transformer_bad_input(
    vit: VisionTransformer,
    patches: Tensor,
    positions: Tensor,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        vit(patches, positions)
