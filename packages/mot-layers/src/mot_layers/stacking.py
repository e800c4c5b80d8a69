"""One storage for both experts' parameters: what the linears and the norm have in common.

Routed kernels read expert e's weight at `stack[e]` of one tensor; vLLM's loaders, quantisers and
savers want a parameter per module. Both get theirs: the parameters are views into the stack.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

logger = logging.getLogger("mot_layers")

WHY_NO_GRAD = (
    "{}: its parameters require grad, but with a plan they are read as one tensor, of which they "
    "are views, and would get no gradient: train stacked_weight, or turn requires_grad off"
)


class StackedExperts(nn.Module):
    """A module whose parameters, and those of its twin `gen_exp`, are rows of stacked tensors.

    A class that derives from this one sets `gen_exp` to a module of the same shape and then calls
    `_share_storage` once. The stacks are plain attributes, not buffers: a buffer would be counted,
    saved and reloaded a second time next to the parameters.
    """

    gen_exp: nn.Module

    # Per name: the addresses of the und and the gen parameter inside the stack. Empty while the
    # experts share nothing.
    _addresses: tuple[tuple[str, int | None, int | None], ...] = ()
    _stacks: tuple[torch.Tensor | None, ...] = ()

    @property
    def shares_storage(self) -> bool:
        """Whether both experts' parameters are rows of stacks."""
        return bool(self._addresses)

    def _share_storage(self, *names: str) -> None:
        """Move the parameters `names` of both experts into one (2, ...) tensor per name.

        An expert without the parameter (None) gets a row of zeros; where both lack it there is
        no stack. Values are kept, and the tensors that held them are freed.
        """
        self._addresses = tuple((name, None, None) for name in names)
        self._restack()
        self.register_load_state_dict_post_hook(_after_load_state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's parameters, which were copied one by one, are put together."""
        super().__setstate__(state)
        self._restack_if_replaced()

    @torch.no_grad()
    def _restack(self) -> None:
        self._stacks = ()  # drop the old stacks first; the parameters keep alive what they need
        stacks: list[torch.Tensor | None] = []
        addresses: list[tuple[str, int | None, int | None]] = []
        for name, _, _ in self._addresses:
            experts = [getattr(self, name), getattr(self.gen_exp, name)]
            like = next((p.data for p in experts if p is not None), None)
            if like is None:
                stacks.append(None)
                addresses.append((name, None, None))
                continue
            self._check_alike(name, experts)
            # A stack made again during inference must not turn parameters into inference tensors,
            # which could not be loaded into later; and those that are some stay so.
            with torch.inference_mode(like.is_inference()):
                stack = like.new_empty((2, *like.shape))
                pointers: list[int | None] = [None, None]
                for e, parameter in enumerate(experts):
                    if parameter is None:
                        stack[e].zero_()
                    else:
                        stack[e].copy_(parameter.data)
                        parameter.data = stack[e]
                        pointers[e] = parameter.data_ptr()
            stacks.append(stack)
            addresses.append((name, pointers[0], pointers[1]))
        self._stacks = tuple(stacks)
        self._addresses = tuple(addresses)

    def _check_alike(self, name: str, experts: list[torch.Tensor | None]) -> None:
        und, gen = experts
        if und is None or gen is None:
            return
        facts = [(tuple(p.shape), p.dtype, p.device) for p in (und, gen)]
        if facts[0] != facts[1]:
            described = [f"{shape} {dtype} on {device}" for shape, dtype, device in facts]
            raise ValueError(
                f"{type(self).__name__}: {name} is {described[0]} but gen_exp.{name} is "
                f"{described[1]}; convert or move the layer as a whole"
            )

    def _is_stacked(self) -> bool:
        """Whether the parameters still are the rows of the stacks; compares addresses only.

        The stacks keep their memory alive, so no other tensor can have these addresses.
        """
        gen_exp = self._modules["gen_exp"]
        # vLLM's parameters are tensor subclasses; without this each data_ptr() would go through
        # Python twice, and the check would take three times as long.
        with torch._C.DisableTorchFunctionSubclass():
            try:
                for name, und, gen in self._addresses:
                    if und is not None and self._parameters[name].data_ptr() != und:
                        return False
                    if gen is not None and gen_exp._parameters[name].data_ptr() != gen:
                        return False
            except KeyError as error:
                raise RuntimeError(
                    f"{type(self).__name__} has lost its parameter {error}, or its gen_exp (now a "
                    f"{type(gen_exp).__name__}) has; wrappers around one of the experts, such as "
                    "LoRA adapters, have no part in a routed operation"
                ) from None
        return True

    def _restack_if_replaced(self) -> None:
        if not self._is_stacked():
            self._restack()

    def _stacked(self) -> tuple[torch.Tensor | None, ...]:
        """The stacks, in the order of `_share_storage`'s names, holding what the parameters hold.

        Parameters that someone replaced (assigned, moved one by one, offloaded) are stacked again.
        That costs a copy, so a warning tells of it; but the result is right, and most of these
        happen once, after loading. A compiled graph has no addresses to compare: call the layer
        once without it, if parameters were replaced by hand. What `load_state_dict` replaced, or a
        copy, is stacked already.

        Raises:
            RuntimeError: parameters were replaced and a CUDA graph is being captured: it would
                replay with the addresses of tensors that are gone. Or `gen_exp` is wrapped.
        """
        if torch.compiler.is_compiling() or self._is_stacked():
            return self._stacks
        name = type(self).__name__
        device = next(self.parameters()).device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a parameter of {name} was replaced after construction, so the experts' stacked "
                "weights are out of date, and they cannot be rebuilt while a CUDA graph is "
                "captured; run the layer once before the capture"
            )
        _warn_restacked(name)
        self._restack()
        return self._stacks

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """`Module.to` and its like replace each parameter on its own; put them together again."""
        super()._apply(fn, recurse)
        self._restack_if_replaced()
        return self


def _after_load_state_dict(layer: StackedExperts, incompatible_keys: object) -> None:
    """`assign=True` replaces parameters."""
    layer._restack_if_replaced()


@functools.cache
def _warn_restacked(name: str) -> None:
    logger.warning(
        "%s: parameters were replaced after construction (assigned, copied or offloaded?). The "
        "experts' weights were copied into one tensor again; with weight offloading that happens "
        "in every call and keeps them on the device.",
        name,
    )
