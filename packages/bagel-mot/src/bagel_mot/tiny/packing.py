"""Many samples in one forward pass of the model, with one attention mask for all of one shape.

Every sample of a shape has the same parts in the same order: [picture's latents] [picture's ViT
tokens] [text, filled up] [image's latents], each only if its task has it. So routing is a constant,
rows reshape to (samples, rows, ...), and what a sample lacks is masked. What rows see and which
position they have is as in `bagel_mot.context`: a block sees everything before it and itself, a
text only backwards.

Between the layers' ends all rows are grouped by expert: for attention alone they go back into their
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from mot_kernels import Format, RoutePlan
from torch import Tensor

from bagel_mot.config import BagelConfig
from bagel_mot.images import grid_positions, patchify, resized_size
from bagel_mot.model.attention import Backend, RoundedQ
from bagel_mot.model.bagel import Bagel
from bagel_mot.model.layout import GEN, UND, Layout

# (B, C, H, W) -> (B, patches, p * p * C)
patchify_all = torch.vmap(patchify, in_dims=(0, None))

_LATENTS, _VIT, _TEXT, _IMAGE = range(4)
# Between the keys of two parts: no text is as long.
_PART = 1024
_UNSEEN = 4 * _PART
# SDPA's kernels want rows of the mask aligned.
_ALIGNED = 8


@dataclass(frozen=True)
class Shape:
    """What the samples of a batch have in common.

    Attributes:
        batch: samples.
        size: (height, width) of their pictures, in pixels.
        text: most tokens of a text.
        source: whether there is a picture's latents and ViT tokens before the text; "vit" for
            the latter alone, as questions have it.
        image: whether an image is painted behind the text.
    """

    batch: int
    size: tuple[int, int]
    text: int
    source: str | None = None
    image: bool = False


class Packing:
    """Positions and masks for batches of one `Shape`; made once, used every time."""

    def __init__(self, config: BagelConfig, shape: Shape, device: torch.device) -> None:
        height, width = shape.size
        unit = config.latent_token_pixels
        self.shape = shape
        self.grid = (height // unit, width // unit)
        vit_width, vit_height = resized_size((width, height), config.vit_transform)
        self.vit_size = (vit_height, vit_width)
        patch = config.vit.patch_size
        vit_grid = (vit_height // patch, vit_width // patch)
        latents = self.grid[0] * self.grid[1]
        self.vit_ids = grid_positions(*vit_grid, config.vit_grid).to(device)
        parts: list[tuple[int, int]] = []
        if shape.source == "both":
            parts.append((_LATENTS, latents + 2))
        if shape.source is not None:
            parts.append((_VIT, len(self.vit_ids) + 2))
        parts.append((_TEXT, shape.text))
        if shape.image:
            parts.append((_IMAGE, latents + 2))
        spare = -sum(rows for _, rows in parts) % _ALIGNED
        parts = [(part, rows + spare if part == _TEXT else rows) for part, rows in parts]
        self.text_rows = shape.text + spare
        self.rows = sum(rows for _, rows in parts)
        self.image_rows = slice(self.rows - latents - 1, self.rows - 1)
        before = sum(rows for part, rows in parts if part < _TEXT)
        self.text_slice = slice(before, before + self.text_rows)
        self._pictures = sum(part < _TEXT for part, _ in parts)

        runs: list[tuple[int, int]] = []
        for part, rows in parts:
            middle = GEN if part in (_LATENTS, _IMAGE) else UND
            runs += [(UND, 1), (middle, rows - 2), (UND, 1)]
        self.runs = runs * shape.batch
        part_of = torch.tensor([part for part, rows in parts for _ in range(rows)])
        place = torch.cat([torch.arange(rows) for _, rows in parts])
        # A row sees those whose key is at most its query: what came before, the whole of its own
        # picture, of its own text what came before.
        in_text = torch.where(part_of == _TEXT, place, 0)
        self._keys = (part_of * _PART + in_text).int().to(device)
        whole = torch.where(part_of == _TEXT, place, _PART - 1)
        self.queries = (part_of * _PART + whole).int().to(device)
        self._part = part_of.to(device)
        self._place = place.to(device)

    def pack(
        self,
        parts: Sequence[Tensor],
        lengths: Tensor,
        has_picture: Tensor,
        has_text: Tensor,
    ) -> Packed:
        """Make a batch ready to run.

        Args:
            parts: embedded, (B, part's rows, D) each.
            lengths: (B,) tokens of each text.
            has_picture, has_text: (B,) bool; what a sample lacks is not seen, and takes no
                positions.
        """
        keys, positions = self._keys_and_positions(lengths, has_picture, has_text)
        x = torch.cat(list(parts), dim=1)
        return Packed(self, x.flatten(0, 1), positions.flatten(), keys.flatten())

    def embed_text(self, model: Bagel, tokens: Tensor) -> Tensor:
        """(B, T) ids, filled up to the text's rows -> (B, text rows, D)."""
        tokens = F.pad(tokens, (0, self.text_rows - tokens.shape[1]))
        return model.embed_text(tokens)

    def embed_vit(self, model: Bagel, pixels: Tensor, markers: Tensor) -> Tensor:
        """(B, 3, H, W) pictures, as drawn -> (B, rows of the ViT part, D)."""
        if pixels.shape[-2:] != self.vit_size:
            pixels = F.interpolate(pixels, self.vit_size, mode="bicubic", antialias=True)
            pixels = pixels.clamp(-1, 1)  # as 8-bit pictures are
        patches = patchify_all(pixels, model.config.vit.patch_size)
        return _between(markers, model.embed_patches(patches, self.vit_ids))

    def embed_latents(self, model: Bagel, tokens: Tensor, t: Tensor, markers: Tensor) -> Tensor:
        """(B, n, 64) latent tokens at times (B,) or (1,) -> (B, n + 2, D)."""
        times = model.embed_times(t)[:, None]
        return _between(markers, model.embed_latents(tokens, times, self.grid))

    def _keys_and_positions(
        self, lengths: Tensor, has_picture: Tensor, has_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, rows) int32 each; what is not there has a key that no row sees."""
        part, place = self._part, self._place
        is_text = part == _TEXT
        said = has_text[:, None] & (place < lengths[:, None])
        there = torch.where(is_text, said, (part == _IMAGE) | has_picture[:, None])
        keys = torch.where(there, self._keys, _UNSEEN)
        pictures = self._pictures * has_picture.long()[:, None]
        spoken = (lengths * has_text)[:, None]
        positions = torch.where(part < _TEXT, self._pictures - 1 - (part == _LATENTS).long(), 0)
        positions = positions.expand(len(lengths), -1)
        positions = torch.where(is_text, pictures + place, positions)
        positions = torch.where(part == _IMAGE, pictures + spoken, positions)
        return keys, positions.int()


@dataclass(frozen=True)
class Packed:
    """A batch of one shape, as rows.

    Attributes:
        packing: how they are laid out.
        x: (B * rows, D) embeddings.
        positions: (B * rows,) int32.
        keys: (B * rows,) int32. A row sees those of its sample whose key is at most its query
            (`Packing.queries`), and itself: what sees nothing would be NaN.
    """

    packing: Packing
    x: Tensor
    positions: Tensor
    keys: Tensor

    @cached_property
    def _bias(self) -> Tensor:
        """(B, 1, rows, rows), 0 where a row (third) sees a row (fourth), else -inf."""
        keys = self.keys.view(self.packing.shape.batch, 1, -1)
        rows = keys.shape[2]
        itself = torch.eye(rows, dtype=torch.bool, device=keys.device)
        sees = (keys <= self.packing.queries[:, None]) | itself
        bias = torch.zeros(sees.shape, dtype=self.x.dtype, device=keys.device)
        return bias.masked_fill_(~sees, float("-inf")).unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within the samples; (B * rows, heads, head size) each."""
        batch, groups = self.packing.shape.batch, q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (batch, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias)
        return y.transpose(1, 2).flatten(0, 1)


class Grouping:
    """The routing of several batches that run together: all their rows, grouped by expert.

    Attributes:
        plan: of the grouped rows.
        table: (samples, most rows) int32, where the rows of each sample are; then anything.
        lengths: (samples,) int32, their rows.
        queries: (rows,) int32, see `Packed`.
    """

    def __init__(self, packings: Sequence[Packing], device: torch.device) -> None:
        runs = [run for packing in packings for run in packing.runs]
        packed = RoutePlan.from_runs(runs, num_experts=2, device=device)
        self.plan = RoutePlan.from_runs(
            list(enumerate(packed.counts)), num_experts=2, device=device
        )
        self._there = packed.row_ids.long()
        self._back = torch.argsort(self._there)
        most = max(packing.rows for packing in packings)
        tables, queries, before = [], [], 0
        for packing in packings:
            batch = packing.shape.batch
            own = self._back[before : before + batch * packing.rows].view(batch, -1)
            tables.append(F.pad(own, (0, most - packing.rows)))
            queries.append(packing.queries.repeat(batch))
            before += batch * packing.rows
        self.table = torch.cat(tables).int()
        lengths = [packing.rows for packing in packings for _ in range(packing.shape.batch)]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.queries = self.group(torch.cat(queries))

    def group(self, rows: Tensor) -> Tensor:
        """(M, ...) rows, batch after batch and sample after sample -> grouped by expert."""
        return _permute(rows, self._there, self._back)

    def ungroup(self, rows: Tensor) -> Tensor:
        """The inverse of `group`."""
        return _permute(rows, self._back, self._there)


class _Permute(torch.autograd.Function):
    """Rows in another order. Its backward is a gather, too; that of `index_select` would add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def _permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    permuted: Tensor = _Permute.apply(rows, order, inverse)
    return permuted


@dataclass(frozen=True, kw_only=True)
class Together(Layout):
    """Rows of several batches, grouped by expert; each attends within its samples.

    Attributes:
        keys: (rows,) int32, see `Packed`.
    """

    grouping: Grouping
    batches: tuple[Packed, ...]
    keys: Tensor

    @classmethod
    def of(cls, grouping: Grouping, batches: Sequence[Packed], most_positions: int) -> Together:
        """The layout of batches that `grouping` is of, in its order."""
        positions = grouping.group(torch.cat([batch.positions for batch in batches]))
        keys = grouping.group(torch.cat([batch.keys for batch in batches]))
        nothing = torch.empty(0, dtype=torch.int32, device=positions.device)  # no cache is written
        return cls(
            grouping.plan,
            positions,
            nothing,
            (),
            most_positions,
            nothing,
            grouping=grouping,
            batches=tuple(batches),
            keys=keys,
        )

    @property
    def rows(self) -> list[int]:
        """Of each batch."""
        return [len(batch.x) for batch in self.batches]

    def attend(
        self,
        q: Tensor | RoundedQ,
        own: Tensor,
        kv: Tensor,
        backend: Backend,
        format: Format | None = None,
    ) -> Tensor:
        """See `Layout.attend`; whatever the backend and format, since gradients must flow."""
        del kv, backend, format
        assert isinstance(q, Tensor)
        y = self.attend_in_place(q, own) if q.is_cuda else self.attend_in_order(q, own)
        return y.flatten(1)

    def attend_in_order(self, q: Tensor, own: Tensor) -> Tensor:
        """By torch, batch by batch, with rows copied into samples' order and a mask."""
        k, v = self.grouping.ungroup(own).unbind(1)
        q = self.grouping.ungroup(q)
        each = zip(self.batches, *(t.split(self.rows) for t in (q, k, v)), strict=True)
        return self.grouping.group(torch.cat([batch.attend(*qkv) for batch, *qkv in each]))

    def attend_in_place(self, q: Tensor, own: Tensor) -> Tensor:
        """The same by a kernel that takes all batches at once and neither copies nor mask."""
        from bagel_mot._triton.sample_attention import SampleAttention

        grouping = self.grouping
        where = grouping.table, grouping.lengths
        y: Tensor = SampleAttention.apply(q, *own.unbind(1), *where, self.keys, grouping.queries)
        return y


def run_together(
    model: Bagel, rope: Tensor, grouping: Grouping, batches: Sequence[Packed]
) -> list[Tensor]:
    """Hidden states of several batches, (B, rows, D) each, from one pass through the layers.

    Of different shapes, they differ for attention only: everything else is one operation for all.

    Args:
        rope: as `Transformer.forward` takes it.
        grouping: of these batches, in this order.
    """
    x = grouping.group(torch.cat([batch.x for batch in batches]))
    layout = Together.of(grouping, batches, rope.shape[0])
    hidden = model.transformer(x, layout, None, rope, model.attention)
    hidden = grouping.ungroup(hidden).split(layout.rows)
    return [
        part.unflatten(0, (batch.packing.shape.batch, -1))
        for batch, part in zip(batches, hidden, strict=True)
    ]


def _between(markers: Tensor, tokens: Tensor) -> Tensor:
    """Put the start and the end marker, (2, D), around each sample's tokens (B, n, D)."""
    start, end = (marker.expand(len(tokens), 1, -1) for marker in markers)
    return torch.cat([start, tokens, end], dim=1)
