"""The autoencoder against the recorded moments, latents and decoded pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from golden_data import GOLDEN, assert_recorded, relative_error
from mot_kernels import Path, use_path
from safetensors.torch import load_file

from bagel_mot.config import BagelConfig, VaeConfig
from bagel_mot.model import vae as vae_module
from bagel_mot.model.vae import AttentionBlock, AutoEncoder
from bagel_mot.synthetic import fill_randomly

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


@pytest.mark.parametrize("most_bytes", [1, 20_000, 400_000], ids=lambda size: f"{size}bytes")
def test_strips_make_no_difference(
    vae: AutoEncoder, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips of one row, of several, and at the largest level only: the recorded picture."""
    strips: list[int] = []

    def counted(x: torch.Tensor, scale: int) -> int:
        strips.append(count(x, scale))
        return strips[-1]

    count = vae_module._strips
    monkeypatch.setattr(vae_module, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(vae_module, "_strips", counted)
    for name in ("b2", "b3"):
        tensors = GOLDEN.case(name).tensors
        picture = vae.decode(tensors["gen.vae_input"])
        assert_recorded("gen.image_float", picture[0], tensors["gen.image_float"])
        moments = vae.moments(tensors["seg0.padded_image"])
        assert_recorded("seg0.moments", moments, tensors["seg0.moments"])
    assert max(strips) > 1
    assert most_bytes > 1 or min(strips) > 1


def test_activations_are_channels_last(vae: AutoEncoder) -> None:
    """Every convolution reads what the one before it wrote, without a copy to another layout."""
    seen: list[bool] = []

    def look(_module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for x in (*inputs, output):
            if x.shape[1] > vae.cfg.z_channels:  # pictures and latents come from elsewhere
                seen.append(x.is_contiguous(memory_format=torch.channels_last))

    convolutions = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    handles = [module.register_forward_hook(look) for module in convolutions]
    try:
        tensors = GOLDEN.case("b2").tensors
        vae.decode(tensors["gen.vae_input"])
        vae.moments(tensors["seg0.padded_image"])
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) > len(convolutions)
    assert all(seen)
    for module in convolutions:
        assert module.weight.is_contiguous(memory_format=torch.channels_last)


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
    # Counted in the released ae.safetensors.
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


@pytest.fixture(scope="module")
def official() -> AutoEncoder:
    """The official architecture with random weights, on the GPU in float32."""
    with torch.device("cuda"):
        model = AutoEncoder(VaeConfig()).eval().requires_grad_(False)
    fill_randomly(model, torch.Generator("cuda").manual_seed(0))
    return model


def in_float32(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What something returns if no product is computed in TF32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        return run()


def peak_bytes(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """What something returns, and the memory it takes on the GPU beyond what was taken before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_reserved() - before


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["decode", "moments"])
def test_large_picture(official: AutoEncoder, direction: str) -> None:
    """1024 x 1024 in bfloat16: less than 3 GiB, and as near to float32 as torch's operations."""
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (1, 16, 128, 128) if direction == "decode" else (1, 3, 1024, 1024)
    x = torch.randn(shape, generator=draw, device="cuda")
    truth = in_float32(lambda: getattr(official, direction)(x))
    narrow = copy.deepcopy(official).to(torch.bfloat16)
    ours, peak = peak_bytes(lambda: getattr(narrow, direction)(x))
    print(f"{direction}: {peak / 2**30:.2f} GiB")
    assert peak < 3 << 30
    with use_path(Path.REFERENCE):
        theirs = getattr(narrow, direction)(x)
    assert relative_error(ours.float(), truth) <= 1.5 * relative_error(theirs.float(), truth)


@pytest.mark.gpu
def test_attention_holds_no_scores() -> None:
    """All scores of a 1024 x 1024 picture would take 512 MiB, in bfloat16."""
    with torch.device("cuda"):
        block = AttentionBlock(512).to(torch.bfloat16, memory_format=torch.channels_last)
    block.requires_grad_(False)
    fill_randomly(block, torch.Generator("cuda").manual_seed(0))
    x = torch.randn(1, 512, 128, 128, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    _, peak = peak_bytes(lambda: block(x))
    assert peak < 256 << 20


@pytest.mark.gpu
def test_strips_on_a_gpu(official: AutoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips give the same picture, in less memory."""
    narrow = copy.deepcopy(official).to(torch.bfloat16)
    draw = torch.Generator("cuda").manual_seed(0)
    latent = torch.randn((1, 16, 128, 96), generator=draw, device="cuda")
    whole, peak = peak_bytes(lambda: narrow.decode(latent))
    monkeypatch.setattr(vae_module, "_MOST_BYTES", 1 << 26)
    stripped, less = peak_bytes(lambda: narrow.decode(latent))
    print(f"{peak / 2**30:.2f} GiB whole, {less / 2**30:.2f} GiB in strips")
    assert less < peak
    truth = in_float32(lambda: official.decode(latent))
    error = relative_error(whole.float(), truth)
    assert relative_error(stripped.float(), truth) <= 1.1 * error
