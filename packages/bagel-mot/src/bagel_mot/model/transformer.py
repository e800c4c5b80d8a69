"""The two-expert Qwen2 decoder: every linear and norm routed, attention shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from mot_kernels import (
    SILU_MUL,
    AddResidual,
    Fp8W8A8,
    QuantizedRows,
    RoutePlan,
    mot_qk_norm_rope,
    mot_rms_norm,
)
from mot_kernels.formats import BLOCK
from mot_layers import (
    FormatConfig,
    MoTMergedColumnParallelLinear,
    MoTQKVParallelLinear,
    MoTRMSNorm,
    MoTRowParallelLinear,
)
from torch import nn

from bagel_mot.config import LlmConfig
from bagel_mot.model.attention import Backend, RoundedQ
from bagel_mot.model.kv_cache import KVCache
from bagel_mot.model.layout import DecodeLayout, Layout
from bagel_mot.quantization import LayerFormats, Projection

Formats = Callable[[Projection], FormatConfig | None]
"""How each projection of one layer is quantised."""


class Attention(nn.Module):
    """QKV projection, per-head norm and RoPE into the cache, attention, output projection."""

    def __init__(self, config: LlmConfig, prefix: str, formats: Formats) -> None:
        super().__init__()
        heads, kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.eps = config.rms_norm_eps
        self.qkv = MoTQKVParallelLinear(
            config.hidden_size,
            head_dim,
            heads,
            kv_heads,
            bias=True,
            return_bias=False,
            quant_config=formats("qkv_proj"),
            prefix=f"{prefix}.qkv",
        )
        self.q_norm = MoTRMSNorm(head_dim, eps=self.eps)
        self.k_norm = MoTRMSNorm(head_dim, eps=self.eps)
        self.o = MoTRowParallelLinear(
            heads * head_dim,
            config.hidden_size,
            bias=False,
            return_bias=False,
            quant_config=formats("o_proj"),
            prefix=f"{prefix}.o",
        )

    def forward(
        self,
        x: torch.Tensor | QuantizedRows,
        residual: torch.Tensor | None,
        layout: Layout | DecodeLayout,
        kv: torch.Tensor | None,
        rope: torch.Tensor,
        backend: Backend,
    ) -> torch.Tensor:
        """x (M, D) -> attention output, plus the residual (M, D) if there is one; (M, D)."""
        own, own_rows = kv, layout.kv_rows
        if kv is not None and layout.exchange is not None:
            own, own_rows = layout.exchange.place(kv, layout.kv_rows, self.qkv.num_kv_heads)
        rounds_q = kv is not None and layout.rounds_q(backend)
        q_scale = layout.positions.new_empty(1, dtype=torch.float32) if rounds_q else None
        q, k, v = mot_qk_norm_rope(
            self.qkv(x, layout.plan),
            self.q_norm.stacked_weight,
            self.k_norm.stacked_weight,
            rope,
            layout.positions,
            layout.plan,
            num_heads=self.qkv.num_heads,
            num_kv_heads=self.qkv.num_kv_heads,
            eps=self.eps,
            k_out=None if own is None else own[:, 0],
            v_out=None if own is None else own[:, 1],
            kv_rows=None if own is None else own_rows,
            q_scale=q_scale,
        )
        if own is None:
            own = kv = torch.stack([k, v], dim=1)
        format = None if layout.plan is None else self.o.rounds_to
        queries = q if q_scale is None else RoundedQ(q, q_scale)
        y = layout.attend(queries, own, kv, backend, format)
        epilogue = None if residual is None else AddResidual(residual)
        return self.o(y, layout.plan, epilogue=epilogue)


class MLP(nn.Module):
    """SwiGLU; where rows are routed, the activation is in the first projection's epilogue."""

    def __init__(self, config: LlmConfig, prefix: str, formats: Formats) -> None:
        super().__init__()
        self.gate_up = MoTMergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            return_bias=False,
            quant_config=formats("gate_up_proj"),
            prefix=f"{prefix}.gate_up",
        )
        self.down = MoTRowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            return_bias=False,
            quant_config=formats("down_proj"),
            prefix=f"{prefix}.down",
        )

    def forward(
        self,
        x: torch.Tensor | QuantizedRows,
        residual: torch.Tensor,
        layout: Layout | DecodeLayout,
    ) -> torch.Tensor:
        """x, residual (M, D) -> residual + MLP output, (M, D)."""
        if layout.plan is None:
            # Rounded between the two, unlike in an epilogue, but half the passes over memory.
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            h = F.silu(gate).mul_(up)
        else:
            rounds_to = self.down.rounds_to
            # A row's scale would need the whole row; those of groups are found in the epilogue.
            fp8 = rounds_to if isinstance(rounds_to, Fp8W8A8) else None
            h = self.gate_up(
                x,
                layout.plan,
                epilogue=SILU_MUL,
                quantize=fp8,
                group_size=None if fp8 is None else BLOCK,
            )
        return self.down(h, layout.plan, epilogue=AddResidual(residual))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each adding to the residual stream."""

    def __init__(self, config: LlmConfig, prefix: str, formats: Formats) -> None:
        super().__init__()
        self.input_norm = MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, f"{prefix}.attn", formats)
        self.post_norm = MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, f"{prefix}.mlp", formats)

    def forward(
        self,
        x: torch.Tensor,
        layout: Layout | DecodeLayout,
        kv: torch.Tensor | None,
        rope: torch.Tensor,
        backend: Backend,
    ) -> torch.Tensor:
        """x (M, D) residual stream; kv (S, 2, Hkv, head size), this layer's cache, or None."""
        h = _normed_for(self.attn.qkv, self.input_norm, x, layout.plan)
        if layout.plan is None:
            # Dense products have no epilogues: the residual joins in the norm.
            h = self.attn(h, None, layout, kv, rope, backend)
            h, x = mot_rms_norm(
                h, self.post_norm.stacked_weight, eps=self.post_norm.variance_epsilon, residual=x
            )
        else:
            x = self.attn(h, x, layout, kv, rope, backend)
            h = _normed_for(self.mlp.gate_up, self.post_norm, x, layout.plan)
        return self.mlp(h, x, layout)


class Transformer(nn.Module):
    """All decoder layers and the final norm."""

    def __init__(self, config: LlmConfig, formats: LayerFormats | None = None) -> None:
        super().__init__()
        formats = formats or LayerFormats.none()
        self.layers = nn.ModuleList(
            DecoderLayer(config, f"layers.{i}", partial(formats.config, i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = MoTRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        layout: Layout | DecodeLayout,
        cache: KVCache | None,
        rope: torch.Tensor,
        backend: Backend,
    ) -> torch.Tensor:
        """Run the packed rows through all layers.

        Args:
            x: (M, D) input embeddings.
            layout: routing, positions and attention segments of the M rows.
            cache: holds the segments' prefixes; each layer writes the rows' own K and V there.
                None, for training: nothing is kept, `layout.attend` gets K and V of the M rows in
                row order, and gradients flow.
            rope: (P, head size) float32, see `rope_table`; P above every position in `layout`.
            backend: attention backend.

        Returns:
            (M, D), after the final norm.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, layout, None if cache is None else cache.kv[i], rope, backend)
        return _normed(self.norm, x, layout.plan)


def _normed(norm: MoTRMSNorm, x: torch.Tensor, plan: RoutePlan | None) -> torch.Tensor:
    """One launch, also where all rows are und: vLLM's own forward may be written out in torch."""
    return mot_rms_norm(x, norm.stacked_weight, plan, eps=norm.variance_epsilon)


def _normed_for(
    linear: MoTQKVParallelLinear | MoTMergedColumnParallelLinear,
    norm: MoTRMSNorm,
    x: torch.Tensor,
    plan: RoutePlan | None,
) -> torch.Tensor | QuantizedRows:
    """For this linear: routed rows are rounded in passing, if it would round them."""
    format = linear.rounds_to
    if plan is None or format is None:
        return _normed(norm, x, plan)
    return mot_rms_norm(x, norm.stacked_weight, plan, eps=norm.variance_epsilon, quantize=format)
