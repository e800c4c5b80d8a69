"""The FLUX autoencoder: pictures to latents and back.

The modules and their names are those of `ae.safetensors`, which therefore loads as it is:
`AutoEncoder(cfg).load_state_dict(tensors)`. `norm` is GroupNorm with 32 groups and eps 1e-6,
`silu(x) = x * sigmoid(x)`. There is no random number in here: `encode` is given its noise.

Weights and activations are channels-last. An activation at 1024 x 1024 takes up to half a gigabyte
in bfloat16, so what a block owns it changes in place, and beyond that size what a convolution reads
is made strip by strip (`_convolve`). Nothing is approximated: statistics and attention are those of
the whole picture, strips overlap by what a convolution sees, and there are no seams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_mot.config import VAE_NORM_GROUPS, VaeConfig
from bagel_mot.model.group_norm import GroupNorm

# What a convolution reads is made in strips if it is larger than this. A decoder in bfloat16 comes
# to exactly this at 1024 x 1024, the largest picture of BAGEL's: it then works whole, and holds
# 1.25 GiB at a time.
_MOST_BYTES = 1 << 29


class AutoEncoder(nn.Module):
    """Encoder and decoder with the official scaling of the latents.

    Pictures are (B, 3, H, W) in [-1, 1], H and W multiples of 8; latents (B, 16, H/8, W/8).
    Computes in the dtype of its weights.
    """

    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        # The convolutions' output then is channels-last, too, whatever their input is.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def without_weights(cls, cfg: VaeConfig) -> Self:
        """For names and shapes: on the meta device."""
        with torch.device("meta"):
            return cls(cfg)

    def moments(self, x: Tensor) -> Tensor:
        """Means, then log-variances, of the latents.

        Args:
            x: (B, 3, H, W) in [-1, 1]; cast to the dtype of the weights.

        Returns:
            (B, 32, H/8, W/8) in the dtype of the weights, before the scaling of latents.

        Raises:
            ValueError: `x` has another shape, or H or W is not a multiple of 8.
        """
        channels, unit = self.cfg.in_channels, self.cfg.downsample
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % unit or x.shape[3] % unit:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (batch, {channels}, height, width) with "
                f"height and width multiples of {unit}"
            )
        moments: Tensor = self.encoder(x.to(self.encoder.conv_in.weight.dtype))
        return moments

    def encode(self, x: Tensor, noise: Tensor) -> Tensor:
        """Sample the latent of a picture, `sample(moments(x), noise)`.

        Args:
            x: (B, 3, H, W) in [-1, 1]; cast to the dtype of the weights.
            noise: (B, 16, H/8, W/8) standard normal. The official code draws it at inference too.

        Returns:
            (B, 16, H/8, W/8) in the dtype of `noise`, in which the formula is computed.

        Raises:
            ValueError: `x` or `noise` has the wrong shape.
        """
        return self.sample(self.moments(x), noise)

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A latent: scale * (mean + exp(logvar / 2) * noise - shift).

        Args:
            moments: (B, 32, H/8, W/8), as `moments` gives them.
            noise: (B, 16, H/8, W/8) standard normal.

        Returns:
            (B, 16, H/8, W/8) in the dtype of `noise`, in which the formula is computed.

        Raises:
            ValueError: `noise` has the wrong shape.
        """
        mean, log_variance = moments.to(noise.dtype).chunk(2, dim=1)
        if noise.shape != mean.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)} but the latents have {tuple(mean.shape)}; "
                "expected the latter"
            )
        z = torch.addcmul(mean, torch.exp(0.5 * log_variance), noise)
        return (z - self.cfg.shift_factor) * self.cfg.scale_factor

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a latent.

        Args:
            latent: (B, 16, h, w), as `encode` gives it; scaled in its own dtype, then cast to
                that of the weights.

        Returns:
            (B, 3, 8*h, 8*w) in the dtype of the weights, about [-1, 1] and not clamped.

        Raises:
            ValueError: `latent` has another shape.
        """
        if latent.ndim != 4 or latent.shape[1] != self.cfg.z_channels:
            raise ValueError(
                f"latent has shape {tuple(latent.shape)}; expected (batch, {self.cfg.z_channels}, "
                "height, width)"
            )
        z = latent / self.cfg.scale_factor + self.cfg.shift_factor
        picture: Tensor = self.decoder(z.to(self.decoder.conv_in.weight.dtype))
        return picture


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2*z, H/8, W/8), means then log-variances."""

    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths = [cfg.ch * factor for factor in cfg.ch_mult]
        self.conv_in = _conv3x3(cfg.in_channels, cfg.ch)
        self.down = nn.ModuleList(
            DownLevel(before, width, cfg.num_res_blocks, halve=index + 1 < len(widths))
            for index, (before, width) in enumerate(zip([cfg.ch, *widths], widths, strict=False))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3x3(widths[-1], 2 * cfg.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for stage in level.stages:
                h = stage(h)
        return _convolve_normed(self.norm_out, self.conv_out, self.mid(h), overwrite=True)


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, 8*h, 8*w). Levels are numbered as the encoder's, and run backwards."""

    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths = [cfg.ch * factor for factor in cfg.ch_mult]
        self.conv_in = _conv3x3(cfg.z_channels, widths[-1])
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(before, width, cfg.num_res_blocks + 1, double=index > 0)
            for index, (before, width) in enumerate(
                zip([*widths[1:], widths[-1]], widths, strict=True)
            )
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = _conv3x3(widths[0], cfg.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for stage in level.stages:
                h = stage(h)
        return _convolve_normed(self.norm_out, self.conv_out, h, overwrite=True)


class DownLevel(nn.Module):
    """Residual blocks, then half the sides, except at the last level."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, halve: bool) -> None:
        super().__init__()
        self.block = _res_blocks(in_channels, out_channels, blocks)
        self.downsample = Downsample(out_channels) if halve else None

    @property
    def stages(self) -> list[nn.Module]:
        """What runs one after the other. Not a `forward`: its caller would hold on to its input
        until the end, half a gigabyte at the last level."""
        return [*self.block, *([] if self.downsample is None else [self.downsample])]


class UpLevel(nn.Module):
    """Residual blocks, then twice the sides, except at the first level."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, double: bool) -> None:
        super().__init__()
        self.block = _res_blocks(in_channels, out_channels, blocks)
        self.upsample = Upsample(out_channels) if double else None

    @property
    def stages(self) -> list[nn.Module]:
        """What runs one after the other. Not a `forward`: its caller would hold on to its input
        until the end, half a gigabyte at the last level."""
        return [*self.block, *([] if self.upsample is None else [self.upsample])]


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1 x 1 convolution if it widens."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = None if same else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = _convolve_normed(self.norm1, self.conv1, x)
        h = _convolve_normed(self.norm2, self.conv2, h, overwrite=True)
        residual = x if self.nin_shortcut is None else self.nin_shortcut(x)
        out: Tensor = h.add_(residual)
        return out


class AttentionBlock(nn.Module):
    """One attention head over all positions, with a residual; scale channels ** -0.5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1 head, H*W, C). Views, as the convolutions' output is channels-last;
        # with other strides the fused kernels, which never hold all scores, would not run.
        q, k, v = (
            projection(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
            for projection in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.squeeze(1).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.proj_out(mixed).add_(x)
        return out


class Middle(nn.Module):
    """The blocks between the last level and the latents."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return h


class Downsample(nn.Module):
    """Halve both sides: 3 x 3 convolution, stride 2, zeros only on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The convolution's own padding is symmetric and would shift every window by a pixel.
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """Double both sides: every pixel four times, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self.conv, x, _double, scale=2)


def _convolve_normed(
    norm: GroupNorm, conv: nn.Conv2d, x: Tensor, *, overwrite: bool = False
) -> Tensor:
    """conv(silu(norm(x))); with `overwrite` x is not needed any more."""
    if _strips(x, scale=1) == 1:
        out: Tensor = conv(norm.silu(x, overwrite=overwrite))
        return out
    statistics = norm.scale_shift(x)
    return _convolve(conv, x, lambda strip: norm.apply_to(strip, statistics, silu=True))


def _convolve(
    conv: nn.Conv2d, x: Tensor, prepare: Callable[[Tensor], Tensor], scale: int = 1
) -> Tensor:
    """conv(prepare(x)), in strips if prepare(x) is large.

    Args:
        conv: 3 x 3 with padding 1.
        prepare: works on every row of x for itself, and makes `scale` rows and columns of one.
    """
    strips = _strips(x, scale)
    if strips == 1:
        whole: Tensor = conv(prepare(x))
        return whole
    height, width = x.shape[2:]
    shape = (x.shape[0], conv.out_channels, scale * height, scale * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows = -(-height // strips)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # With a row more on either side, where there is one. What the convolution makes of these
        # rows themselves, for which it pads with zeros, is left out.
        above, below = min(top, 1), min(height - bottom, 1)
        part = conv(prepare(x[:, :, top - above : bottom + below]))
        first = scale * above
        out[:, :, scale * top : scale * bottom] = part[:, :, first : first + scale * (bottom - top)]
    return out


def _strips(x: Tensor, scale: int) -> int:
    """How many strips of rows to cut x into, if every row becomes `scale` rows and columns."""
    size = x.numel() * x.element_size() * scale**2
    return min(-(-size // _MOST_BYTES), x.shape[2])


def _double(x: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(VAE_NORM_GROUPS, channels, eps=1e-6)


def _res_blocks(in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
    """`count` blocks in a row, of which the first changes the width."""
    return nn.ModuleList(
        ResBlock(in_channels if index == 0 else out_channels, out_channels)
        for index in range(count)
    )
