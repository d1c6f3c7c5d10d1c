"""Bypass: the cheap forward of a stack, added in place to what the layer returns. The weight is never touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..adapters import LowRank, Term
from ..errors import LoraGuardError
from .access import plain_bias
from .device_cache import DeviceCache
from .forward_program import BiasOf, Program, compile_program
from .forward_steps import LowRankStep
from .layer_call import LayerCall, naming_the_layer
from .low_rank import JoinedLowRank


class Bypass:
    """Forward hooks for one linear or convolution layer.

    `ratios` has magnitude over norm of the DoRAs in the stack, see `patching.norms`. While `in_force` says no, the layer
    answers as it does without the hooks: someone else patches its weight.
    """

    def __init__(
        self,
        key: str,
        terms: tuple[Term, ...],
        shape: tuple[int, ...],
        ratios: Mapping[int, torch.Tensor] | None = None,
        bias_of: BiasOf = plain_bias,
        in_force: Callable[[], bool] = lambda: True,
    ) -> None:
        self.key, self.shape, self._in_force = key, shape, in_force
        self._ratios, self._bias_of = ratios or {}, bias_of
        self.program = compile_program(terms, shape, self._ratios, bias_of)
        self._scales: DeviceCache[torch.Tensor] = DeviceCache()
        self._said: set[str] = set()
        # Per thread: two threads may run one model.
        self._true_input = threading.local()

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def attach(self, layer: torch.nn.Module) -> list[Any]:
        """Hooks `layer`; returns handles to remove the hooks with."""
        handles: list[Any] = [layer.register_forward_hook(self, with_kwargs=True)]
        if self.program.input_scale is not None:
            handles.append(layer.register_forward_pre_hook(self.scale_input, with_kwargs=True))
            handles.append(layer.register_forward_hook(self._forget_input, always_call=True))
        return handles

    def scale_input(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the layer's own product: its input, scaled per channel. The true one is kept for the steps after it."""
        if not self._in_force():
            return args, kwargs
        x = args[0] if args else next(iter(kwargs.values()))
        with naming_the_layer(self.key):
            scale = self._scales.get(x.device, torch.float32, lambda: self._input_scale().to(x.device))
            per_channel = scale.view(-1, *[1] * (len(self.shape) - 2))
            self._true_input.x = x
            if x.requires_grad and torch.is_grad_enabled():
                scaled = (x * per_channel).to(x.dtype)
            else:
                # In fp32 inside the kernel, without a copy of that size.
                scaled = torch.mul(x, per_channel, out=torch.empty_like(x))
        if args:
            return (scaled, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): scaled}

    def __call__(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        if not self._in_force():
            return output
        x = getattr(self._true_input, "x", None)
        if x is None:
            x = args[0] if args else next(iter(kwargs.values()))
        without_batch = x.dim() == len(self.shape) - 1 and len(self.shape) > 2
        if without_batch:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        if x.dtype != output.dtype:
            with naming_the_layer(self.key):
                x = x.to(output.dtype)
        call = LayerCall(self.key, layer, x, output, self.shape, self._said)
        for step in self.program.steps:
            step.run(call)
        return call.output.squeeze(0) if without_batch else call.output

    def _forget_input(self, layer: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Last of all, and after an exception too: an activation must not outlive its call."""
        self._true_input.x = None

    @property
    def low_rank(self) -> JoinedLowRank | None:
        """The whole stack, where it is nothing but low-rank terms in one step: then strengths are a matter of scales."""
        steps = self.program.steps
        if len(steps) != 1 or not isinstance(steps[0], LowRankStep):
            return None
        return steps[0].joined if all(isinstance(form, LowRank) for form in self.program.forms) else None

    def at_strengths(self, terms: Sequence[Term]) -> Program:
        """The program for `terms`, which differ from the present ones in strengths alone. No factor moves: it has those on
        the device."""
        program = compile_program(terms, self.shape, self._ratios, self._bias_of, self.program.forms)
        for new, old in zip(program.steps, self.program.steps, strict=True):
            new.share_factors_with(old)
        return program

    def exchange(self, program: Program) -> Program:
        """Puts `program` (of `at_strengths`) in place, and returns the one it had: the next call of the layer runs it."""
        before, self.program = self.program, program
        self._scales.drop()
        return before

    def share_factors_with(self, older: Bypass) -> None:
        """Takes over the device copies of a stack that differs in strengths alone."""
        for mine, theirs in zip(self.program.steps, older.program.steps, strict=False):
            mine.share_factors_with(theirs)

    def drop_device_copies(self) -> None:
        self._scales.drop()
        for step in self.program.steps:
            step.drop_device_copies()

    def device_bytes(self, dtype: torch.dtype) -> int:
        return sum(step.device_bytes(dtype) for step in self.program.steps)

    @property
    def is_resident(self) -> bool:
        return any(step.is_resident for step in self.program.steps)

    def _input_scale(self) -> torch.Tensor:
        scale = self.program.input_scale
        if scale is None:
            raise TypeError("this stack leaves the input as it is")
        return scale
