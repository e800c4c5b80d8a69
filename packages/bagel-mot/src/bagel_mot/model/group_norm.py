"""GroupNorm of pictures, with SiLU where wanted, whole or strip by strip.

The statistics are those of the whole picture. Once they are known as a scale and a shift of each
channel, any part of it can be normalised by itself. On the Triton path (`mot_kernels.choose_path`)
channels-last pictures are read and written where they lie: one pass for the statistics, one for
norm and SiLU together. Elsewhere torch's operations compute the same in float32. (torch's own
GroupNorm copies to another layout and back on a GPU, where it is for training only; on a CPU it
loses digits where the mean is large: 1e-2 at 300 deviations.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mot_kernels import Path, choose_path
from mot_kernels.dispatch import warn_once
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """torch's module, for pictures (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """norm(x), in new memory."""
        return self._whole(x, silu=False)

    def silu(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """silu(norm(x)).

        Args:
            overwrite: x is not needed any more; the result may take its place.
        """
        return self._whole(x, silu=True, out=x if overwrite else None)

    def _whole(self, x: Tensor, *, silu: bool, out: Tensor | None = None) -> Tensor:
        if x.is_cuda and self._needs_grad(x):
            return self._for_training(x, silu=silu)
        return self.apply_to(x, self.scale_shift(x), silu=silu, out=out)

    def _for_training(self, x: Tensor, *, silu: bool) -> Tensor:
        """torch's own, in x's dtype: a few kernels each way, where ours would be fifty."""
        with torch.autocast(x.device.type, enabled=False):
            affine = self.weight.to(x.dtype), self.bias.to(x.dtype)
            y = F.group_norm(x, self.num_groups, *affine, self.eps)
            return F.silu(y) if silu else y

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)

    def scale_shift(self, x: Tensor) -> Tensor:
        """The scale and the shift of each channel, from the statistics of the whole of x.

        Returns:
            (B, 2, C), float32 at least; norm(x) is x * scale + shift.
        """
        if self._runs_kernels(x):
            from bagel_mot._triton.group_norm import launch_scale_shift

            found = x.new_empty(x.shape[0], 2, x.shape[1], dtype=torch.float32)
            launch_scale_shift(found, _pixels(x), self.weight, self.bias, self.num_groups, self.eps)
            return found
        # Channel by channel, then each group's channels together, and in two passes: over
        # channels-last memory torch.var_mean takes 16 times as long (torch 2.13, one CPU thread).
        pixels = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        each_mean = pixels.mean(2)
        each_variance = (pixels - each_mean[:, :, None]).square_().mean(2)
        means, spread = (
            each.unflatten(1, (self.num_groups, -1)) for each in (each_mean, each_variance)
        )
        mean = means.mean(2, keepdim=True)
        variance = (spread + (means - mean).square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight.unflatten(0, (self.num_groups, -1))
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - mean * scale
        return torch.stack([scale.flatten(1), shift.flatten(1)], dim=1)

    def apply_to(
        self, x: Tensor, scale_shift: Tensor, *, silu: bool, out: Tensor | None = None
    ) -> Tensor:
        """Normalise x, or a part of the rows of what `scale_shift` was computed from.

        Args:
            x: (B, C, h, W).
            scale_shift: see `scale_shift`.
            out: where the result may go, for example x.
        """
        if self._runs_kernels(x):
            from bagel_mot._triton.group_norm import launch_apply

            if out is None:
                out = torch.empty_like(x, memory_format=torch.channels_last)
            launch_apply(_pixels(out), _pixels(x), scale_shift, silu=silu)
            return out
        scale, shift = scale_shift[..., None, None].unbind(1)
        y = torch.addcmul(shift, x.to(scale.dtype), scale)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)

    def _runs_kernels(self, x: Tensor) -> bool:
        if choose_path(x.device, x.dtype, needs_grad=self._needs_grad(x)).path is not Path.TRITON:
            return False
        _, channels, height, width = x.shape
        expected = {1: (channels, 1), 2: (height, width * channels), 3: (width, channels)}
        if all(size == 1 or x.stride(dim) == step for dim, (size, step) in expected.items()):
            return True
        warn_once(
            f"a picture of strides {x.stride()} is not channels-last: its GroupNorm runs on "
            "torch's operations, which are slower and take more memory"
        )
        return False


def _pixels(x: Tensor) -> Tensor:
    """A channels-last (B, C, H, W) as (B, H * W, C), the same memory."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])
