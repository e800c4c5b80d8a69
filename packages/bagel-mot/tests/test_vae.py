"""The autoencoder against the recorded moments, latents and decoded pictures."""

from __future__ import annotations

import pytest
import torch
from golden_data import GOLDEN, assert_recorded
from safetensors.torch import load_file

from bagel_mot.config import BagelConfig, VaeConfig
from bagel_mot.model.vae import AutoEncoder

ENCODE_CASES = ["b1", "b2", "b3"]
DECODE_CASES = ["a1", "a2", "a3", "a4", "a5", "a7", "b1", "b2", "b3"]


@pytest.fixture(scope="module")
def vae() -> AutoEncoder:
    model = AutoEncoder(BagelConfig.from_folder(GOLDEN.checkpoint).vae)
    model.load_state_dict(load_file(GOLDEN.checkpoint / "ae.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ENCODE_CASES)
def test_moments_recorded(vae: AutoEncoder, name: str) -> None:
    tensors = GOLDEN.case(name).tensors
    moments = vae.moments(tensors["seg0.padded_image"])
    assert_recorded("seg0.moments", moments, tensors["seg0.moments"])


@pytest.mark.parametrize("name", ENCODE_CASES)
def test_encode_recorded(vae: AutoEncoder, name: str) -> None:
    tensors = GOLDEN.case(name).tensors
    latent = vae.encode(tensors["seg0.padded_image"], tensors["seg0.noise"])
    assert_recorded("seg0.latent", latent, tensors["seg0.latent"])


@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_recorded(vae: AutoEncoder, name: str) -> None:
    tensors = GOLDEN.case(name).tensors
    picture = vae.decode(tensors["gen.vae_input"])
    assert_recorded("gen.image_float", picture[0], tensors["gen.image_float"])


def test_batch_is_its_pictures(vae: AutoEncoder) -> None:
    first, second = (GOLDEN.case(name).tensors for name in ("b2", "b3"))
    x = torch.cat([first["seg0.padded_image"], second["seg0.padded_image"].flip(3)])
    noise = torch.cat([first["seg0.noise"], second["seg0.noise"]])
    latents = vae.encode(x, noise)
    assert_recorded("latent 0", latents[:1], first["seg0.latent"])
    assert_recorded("latent 1", latents[1:], vae.encode(x[1:], noise[1:]))
    latents = torch.cat([tensors["gen.vae_input"] for tensors in (first, second)])
    pictures = vae.decode(latents)
    assert_recorded("picture 0", pictures[0], first["gen.image_float"])
    assert_recorded("picture 1", pictures[1], second["gen.image_float"])


def test_inputs_are_left_alone(vae: AutoEncoder) -> None:
    tensors = GOLDEN.case("b1").tensors
    inputs = [tensors[f"{key}"].clone() for key in ("seg0.padded_image", "seg0.noise")]
    vae.encode(*inputs)
    latent = tensors["gen.vae_input"].clone()
    vae.decode(latent)
    assert torch.equal(inputs[0], tensors["seg0.padded_image"])
    assert torch.equal(inputs[1], tensors["seg0.noise"])
    assert torch.equal(latent, tensors["gen.vae_input"])


def test_official_architecture() -> None:
    with torch.device("meta"):
        state = AutoEncoder(VaeConfig()).state_dict()
    # Counted in the released ae.safetensors (reference/bagel.md).
    assert len(state) == 244
    assert sum(tensor.numel() for tensor in state.values()) == 83_819_683
    assert state["encoder.down.2.block.0.nin_shortcut.weight"].shape == (512, 256, 1, 1)
    assert state["encoder.conv_out.weight"].shape == (32, 512, 3, 3)
    assert state["decoder.up.1.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert state["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in state
    assert "encoder.down.3.downsample.conv.weight" not in state


def test_dtypes() -> None:
    config = BagelConfig.from_folder(GOLDEN.checkpoint).vae
    model = AutoEncoder(config).to(torch.bfloat16)
    x, noise = torch.zeros(1, 3, 16, 24), torch.zeros(1, 16, 2, 3)
    assert model.moments(x).dtype == torch.bfloat16
    assert model.encode(x, noise).dtype == torch.float32
    assert model.decode(noise).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 60, 64), (1, 3, 64, 60)], ids=str
)
def test_moments_bad_shape(vae: AutoEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x has shape .*; expected \(batch, 3, .*multiples of 8"):
        vae.moments(torch.zeros(shape))


def test_encode_bad_noise(vae: AutoEncoder) -> None:
    with pytest.raises(ValueError, match=r"noise has shape \(1, 16, 8, 8\).*\(1, 16, 8, 12\)"):
        vae.encode(torch.zeros(1, 3, 64, 96), torch.zeros(1, 16, 8, 8))


@pytest.mark.parametrize("shape", [(16, 8, 8), (1, 64, 8, 8)], ids=str)
def test_decode_bad_shape(vae: AutoEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latent has shape .*; expected \(batch, 16, height"):
        vae.decode(torch.zeros(shape))
