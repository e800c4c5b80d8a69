"""Linear layers of two experts under tensor parallelism: QKV, merged column and row.

All three work alike, in `_MoTLinear`:

- The layer itself is vLLM's layer and holds the und expert's parameters; the submodule `gen_exp`
  is a plain vLLM layer of the same arguments and holds the gen expert's.
- Unquantised weights are rows of one (2, N, K) tensor, N and K of this rank's shard, and
  `mot_kernels.mot_linear` runs over it. So are weights in a number format, and their scales:
  those that `FormatConfig` asks for, and those of vLLM's quantisation that `vllm_formats` reads.
- With other quantised weights each expert's rows are gathered and go through its own quantisation
  method. That is right, but slow.
- An epilogue works on what this rank computed, before results of several ranks are gathered or
  summed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeAlias

import torch
import torch.nn.functional as F
from mot_kernels import (
    AddResidual,
    Epilogue,
    ExpertWeight,
    Format,
    QuantizedRows,
    RoutePlan,
    SiluMul,
    mot_linear,
    quantize_rows,
    stack_bias,
)
from mot_kernels.checks import check_out, check_plan
from mot_kernels.formats import quantizes_activations
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.platforms import current_platform

from mot_layers.formats import WEIGHT, FormatLinearMethod, check_conversion
from mot_layers.result_checks import check_rounding, check_silu_mul
from mot_layers.slow_ways import finish, warn_gathered
from mot_layers.stacking import WHY_NO_GRAD, StackedExperts
from mot_layers.vllm_formats import ConvertedLinearMethod, NotReadable, is_converted, reading_of

Result: TypeAlias = torch.Tensor | QuantizedRows | tuple[torch.Tensor, torch.Tensor | None]


class StackedLinearMethod(UnquantizedLinearMethod):
    """vLLM's unquantised method, except that the weights stay as they were loaded.

    On CPU vLLM repacks them for its own matrix product and removes them from the layer, which
    would leave nothing to route. It takes the place of vLLM's method after construction: by then
    the weight loader is chosen, by the name of vLLM's class.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave everything in place."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x (..., K) times the layer's own weight (N, K)."""
        if current_platform.is_cpu():
            return F.linear(x, layer.weight, bias)
        return super().apply(layer, x, bias)


class _MoTLinear(StackedExperts, LinearBase):
    """What the three layers share; each class below adds vLLM's layer as its second base."""

    gen_exp: LinearBase
    expert_class: ClassVar[type[LinearBase]]
    gather_output: bool

    # Both experts' weights as `mot_linear` takes them; None while they are not stacked.
    _routed_weight: torch.Tensor | ExpertWeight | None = None
    _why_gathered = ""

    def __init__(self, *args: Any, gen_bias: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        signature = inspect.signature(self.expert_class.__init__)
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        arguments.arguments["prefix"] = f"{self.prefix}.gen_exp" if self.prefix else "gen_exp"
        if gen_bias is not None:
            arguments.arguments["bias"] = gen_bias
        self.gen_exp = self.expert_class(*arguments.args[1:], **arguments.kwargs)
        for expert in self._experts:
            if expert.bias is not None:
                # vLLM 0.26 leaves this on by mistake; a gathered output then fails in grad mode.
                expert.bias.requires_grad_(False)
        methods = [e.quant_method for e in self._experts]
        # Exactly vLLM's own method: one derived from it (of a hardware plugin, say) may keep
        # other weights, and then runs on its own.
        if all(type(method) is UnquantizedLinearMethod for method in methods):
            for expert in self._experts:
                expert.quant_method = StackedLinearMethod()
            self._share_storage(WEIGHT, "bias")
        elif all(isinstance(method, FormatLinearMethod) for method in methods):
            self._share_parts()
        elif all(method is not None for method in methods):
            self._read_vllms_formats()

    def _read_vllms_formats(self) -> None:
        """Have both experts' parameters read into one format once they are loaded, if possible."""
        if any(type(expert.quant_method) is UnquantizedLinearMethod for expert in self._experts):
            names = " and for ".join(repr(expert.prefix) for expert in self._experts)
            self._why_gathered = (
                f"only one of its experts is quantised: the configuration was asked for {names}"
            )
            return
        try:
            readings = [reading_of(expert) for expert in self._experts]
        except NotReadable as why:
            self._why_gathered = str(why)
            return
        if readings[0] != readings[1]:
            self._why_gathered = "its experts are in different formats"
            return
        for expert, reading in zip(self._experts, readings, strict=True):
            expert.quant_method = ConvertedLinearMethod(
                reading, expert.quant_method, self._share_parts_if_read
            )
            expert.quant_method.loads.watch(expert)
            # vLLM (0.32) says so where its kernel takes rows that a norm has quantised.
            expert.__dict__.pop("_input_quant_key", None)

    def _share_parts_if_read(self) -> None:
        if all(is_converted(expert) for expert in self._experts):
            self._share_parts()

    def _share_parts(self) -> None:
        und, gen = (e.quant_method for e in self._experts)
        if (und.format, und.part_names) != (gen.format, gen.part_names):
            raise ValueError(
                f"layer {self.prefix!r}: the und expert is in {und.format} and the gen expert in "
                f"{gen.format}; both must be in one format"
            )
        self._share_storage(*und.part_names, "bias")

    def _restack(self) -> None:
        super()._restack()
        names = [name for name, _, _ in self._addresses]
        parts = dict(zip(names, self._stacks, strict=True))
        if isinstance(self.quant_method, FormatLinearMethod):
            self._routed_weight = self.quant_method.expert_weight(parts)
        else:
            self._routed_weight = parts[WEIGHT]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """`Module.to` and its like; what a format's dtypes rule out is refused beforehand."""
        check_conversion(self, fn)
        return super()._apply(fn, recurse)

    @property
    def _experts(self) -> tuple[LinearBase, LinearBase]:
        return self, self.gen_exp

    @property
    def routed_weight(self) -> torch.Tensor | ExpertWeight:
        """Both experts' weights of this rank's shard, (2, N, K): und, gen.

        Raises:
            RuntimeError: the layer is quantised in a way that has no format, or not loaded yet.
        """
        if not self.shares_storage:
            method = type(self.quant_method).__name__
            if isinstance(self.quant_method, FormatLinearMethod):
                raise RuntimeError(
                    f"layer {self.prefix!r} still has its weights as they were loaded; call "
                    "quant_method.process_weights_after_loading(...) for it and its gen_exp"
                )
            raise RuntimeError(
                f"layer {self.prefix!r} has no stacked weight: its quantisation method {method} "
                f"keeps each expert's weights in its own format ({self._why_gathered})"
            )
        self._stacked()
        assert self._routed_weight is not None
        return self._routed_weight

    @property
    def stacked_weight(self) -> torch.Tensor:
        """`routed_weight` of a layer that is not quantised, a tensor.

        Raises:
            RuntimeError: the layer is quantised.
        """
        weight = self.routed_weight
        if isinstance(weight, ExpertWeight):
            raise RuntimeError(
                f"layer {self.prefix!r} is quantised in {weight.format}; its routed_weight has "
                "data and scales"
            )
        return weight

    @property
    def rounds_to(self) -> Format | None:
        """The format that rows are rounded to, each by a scale of its own; None if they are not.

        What comes before may then round them in passing, `MoTRMSNorm` by `quantize=` for one, and
        give the layer `QuantizedRows`.
        """
        if not (self.shares_storage and isinstance(self.quant_method, FormatLinearMethod)):
            return None
        format = self.quant_method.format
        dynamic = quantizes_activations(format) and not self.quant_method.has_input_scale
        return format if dynamic else None

    @property
    def stacked_bias(self) -> torch.Tensor | None:
        """Both experts' biases, (2, N) of this rank's shard, zeros for an expert without one.

        None if neither has a bias.
        """
        if not self.shares_storage:
            return stack_bias([self.bias, self.gen_exp.bias])
        return self._stacked()[-1]

    def forward(
        self,
        x: torch.Tensor | QuantizedRows,
        plan: RoutePlan | None = None,
        *,
        epilogue: Epilogue | None = None,
        quantize: Format | None = None,
        group_size: int | None = None,
    ) -> Result:
        """y[r] = epilogue(x[r] @ weight[e]^T + bias[e]), where e is the expert of row r.

        Args:
            x: (M, K) in the weights' dtype; without a plan (..., K). With a plan also rows that
                are rounded already, to the format `rounds_to`, of this rank's columns.
            plan: routing of the M rows to the two experts, 0 und and 1 gen. None means every row
                is und's: vLLM's own forward runs, then the epilogue in plain torch operations.
            epilogue: None, `SILU_MUL` (merged gate and up projection only) or
                `AddResidual(residual)`. The residual has the shape of this rank's output; a row
                layer, whose ranks sum their outputs, adds it on rank 0 only.
            quantize: the format `rounds_to` of the layer that takes y, to have y rounded as
                `mot_linear(quantize=)` does; with a plan, in a column layer that returns its own
                shard and no bias.
            group_size: 128 gives each 128 columns of a row their own scale (FP8 only).

        Returns:
            As vLLM: (y, output bias), or y alone with `return_bias=False`. y is (M, N) of this
            rank's shard, gathered or summed over the ranks where the layer does that. The output
            bias is None unless `skip_bias_add`; with a plan it is the rows' bias, so that
            y + bias is right: (M, N) or None. With `quantize` y is `QuantizedRows`.

        Raises:
            TypeError: a dtype differs from x's, x is rounded but the layer takes no such rows, or
                the epilogue is none of these.
            ValueError: shapes do not fit, or this layer cannot do `SILU_MUL` or `quantize`.
        """
        if isinstance(x, QuantizedRows) and (plan is None or self.rounds_to is None):
            raise TypeError(
                f"x is QuantizedRows, but layer {self.prefix!r} takes them with a plan only"
                if plan is None
                else f"x is QuantizedRows, but layer {self.prefix!r} does not round rows to 8 bits"
            )
        if isinstance(epilogue, SiluMul):
            check_silu_mul(self)
        check_rounding(self, plan, quantize, group_size)
        if plan is None and epilogue is None:
            return super().forward(x)
        adds = self._adds_bias_and_residual
        if isinstance(epilogue, AddResidual) and not adds:
            # As where it is added: the rank that fails alone leaves the others waiting in the sum.
            shape = (*x.shape[:-1], self.output_size_per_partition)
            check_out("epilogue.residual", epilogue.residual, shape, x)
            epilogue = None
        y = self._multiply(
            x if isinstance(x, QuantizedRows) else self._shard_of(x),
            plan,
            add_bias=adds and not self.skip_bias_add,
            epilogue=epilogue,
            quantize=quantize,
            group_size=group_size,
        )
        if isinstance(y, QuantizedRows):
            return y
        y = self._collect(y)
        if not self.return_bias:
            return y
        if not self.skip_bias_add:
            return y, None
        if plan is None:
            return y, self.bias
        bias = self.stacked_bias
        return y, None if bias is None else self._gather(bias.index_select(0, plan.expert_ids))

    def _multiply(
        self,
        x: torch.Tensor | QuantizedRows,
        plan: RoutePlan | None,
        *,
        add_bias: bool,
        epilogue: Epilogue | None,
        quantize: Format | None,
        group_size: int | None,
    ) -> torch.Tensor | QuantizedRows:
        """This rank's output for its shard of x, by the fastest way the weights allow."""
        if plan is None:
            y = self.quant_method.apply(self, x, self.bias if add_bias else None)
            return finish(y, epilogue)
        if not (self.shares_storage or isinstance(self.quant_method, FormatLinearMethod)):
            assert isinstance(x, torch.Tensor)
            y = finish(self._multiply_gathered(x, plan, add_bias), epilogue)
            return y if quantize is None else quantize_rows(y, quantize, group_size=group_size)
        weight = self.routed_weight
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise RuntimeError(WHY_NO_GRAD.format(f"layer {self.prefix!r}"))
        bias = self._stacks[-1] if add_bias else None  # as new as the weight
        if quantize is None:
            return mot_linear(x, weight, plan, bias=bias, epilogue=epilogue)
        return mot_linear(
            x, weight, plan, bias=bias, epilogue=epilogue, quantize=quantize, group_size=group_size
        )

    def _multiply_gathered(self, x: torch.Tensor, plan: RoutePlan, add_bias: bool) -> torch.Tensor:
        """Each expert's rows through its own quantisation method; (M, K) -> (M, N)."""
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (M, K), one row per token")
        check_plan(plan, x.shape[0], 2, x.device)
        warn_gathered(type(self.quant_method).__name__, self.prefix, self._why_gathered)
        # Kernels of quantised formats need not bear zero rows.
        parts = [
            expert.quant_method.apply(
                expert, x.index_select(0, plan.rows_of(e)), expert.bias if add_bias else None
            )
            for e, expert in enumerate(self._experts)
            if plan.counts[e]
        ]
        if not parts:
            return x.new_empty(0, self.output_size_per_partition)
        y = torch.cat(parts)
        return torch.empty_like(y).index_copy_(0, plan.row_ids.long(), y)

    # What follows is how a column layer treats its shard; the row layer overrides it.

    @property
    def _adds_bias_and_residual(self) -> bool:
        return True

    def _shard_of(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _gather(self, y: torch.Tensor) -> torch.Tensor:
        if self.gather_output and self.tp_size > 1:
            return tensor_model_parallel_all_gather(y)
        return y

    def _collect(self, y: torch.Tensor) -> torch.Tensor:
        return self._gather(y)


class MoTQKVParallelLinear(_MoTLinear, QKVParallelLinear):
    """Projection to query, key and value heads, split over the ranks by heads.

    Args: those of vLLM's `QKVParallelLinear`, which the gen expert gets too, and
        gen_bias: whether the gen expert has a bias; None means the same as `bias`.

    Load `weight`, `bias`, `gen_exp.weight` and `gen_exp.bias` through their `weight_loader` with
    shard id "q", "k" or "v", or None for a tensor that holds all three.
    """

    expert_class = QKVParallelLinear


class MoTMergedColumnParallelLinear(_MoTLinear, MergedColumnParallelLinear):
    """Several projections of one input in one, each split over the ranks by its columns.

    Args: those of vLLM's `MergedColumnParallelLinear`, which the gen expert gets too, and
        gen_bias: whether the gen expert has a bias; None means the same as `bias`.

    Load through `weight_loader` with the projection's number as shard id, or None for a tensor
    that holds all. A rank's shard is [gate shard | up shard], so `SILU_MUL` needs no other rank.
    """

    expert_class = MergedColumnParallelLinear


class MoTRowParallelLinear(_MoTLinear, RowParallelLinear):
    """Projection whose input is split over the ranks; their partial outputs are summed.

    Args: those of vLLM's `RowParallelLinear`, which the gen expert gets too, and
        gen_bias: whether the gen expert has a bias; None means the same as `bias`.

    Bias and residual are added on rank 0, before the sum, so that it holds them once. With
    `reduce_results=False` each rank returns its part of the sum, and rank 0's part holds the
    residual.
    """

    expert_class = RowParallelLinear
    gather_output = False

    @property
    def _adds_bias_and_residual(self) -> bool:
        return self.tp_rank == 0

    def _shard_of(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_is_parallel or self.tp_size == 1:
            return x
        k = self.input_size_per_partition
        return x.narrow(-1, self.tp_rank * k, k).contiguous()

    def _collect(self, y: torch.Tensor) -> torch.Tensor:
        if self.reduce_results and self.tp_size > 1:
            return tensor_model_parallel_all_reduce(y)
        return y
