"""Bypass: a stack's cheap forward, added in place to the output of the layer. The weight is never touched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch.compiler import is_compiling

from ..adapters import LowRank, Term
from ..errors import LoraGuardError
from ..planning.cheap import Forms, forms_of
from .access import plain_bias
from .device_cache import DeviceCache
from .forward_program import BiasOf, Program, compile_program
from .forward_steps import LowRankStep
from .layer_call import LayerCall, naming_the_layer
from .low_rank import JoinedLowRank
from .operators import CallPatch, bypass, number_of, scaled_input


class Bypass(CallPatch):
    """Forward hooks for one linear or convolution layer.

    Args:
        key: The name of the weight, for errors.
        terms: The stack on it, in order.
        shape: The shape of the weight, `(out, in, ...)`.
        ratios: Magnitude over norm of each DoRA, by place in the stack, from `norms.ratios_of`.
        bias_of: Returns the bias of a layer.
        in_force: Asked at every call. While it returns False the hooks do nothing: another extension patches the weight.
        forms: The cheap form of each term; None to derive them.

    Raises:
        TypeError: A term has no cheap form.
    """

    def __init__(
        self,
        key: str,
        terms: tuple[Term, ...],
        shape: tuple[int, ...],
        ratios: Mapping[int, torch.Tensor] | None = None,
        bias_of: BiasOf = plain_bias,
        in_force: Callable[[], bool] = lambda: True,
        forms: Forms | None = None,
    ) -> None:
        self.key, self.shape, self._in_force = key, shape, in_force
        self._ratios, self._bias_of = ratios or {}, bias_of
        self._forms = forms_of(terms, shape) if forms is None else forms
        self._is_low_rank = all(isinstance(form, LowRank) for form in self._forms)
        self.program = compile_program(terms, self._forms, shape, self._ratios, bias_of)
        self._scales: DeviceCache[torch.Tensor] = DeviceCache()
        self._said: set[str] = set()
        self.owns_output: Callable[[torch.nn.Module], bool] | None = None
        """Tells whether the output of a call may be written into; None: always. The host's access sets it."""
        self._traced_input: torch.Tensor | None = None
        # Per thread: two threads may run one model.
        self._unscaled_input = threading.local()

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def attach(self, layer: torch.nn.Module) -> list[Any]:
        """Hooks `layer` and returns handles that remove the hooks."""
        # First, so that the hooks of others get the output of the patched layer, as they would after a merge.
        handles = [_hook(layer, Role.CHANGE, self, is_first=True)]
        if self.program.input_scale is not None:
            handles.append(_hook(layer, Role.SCALE, self.scale_input))
            handles.append(_hook(layer, Role.FORGET, self._forget_input))
        return handles

    def scale_input(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Scales the input per channel, before the layer's own product. The steps after it get the unscaled one."""
        x = args[0] if args else next(iter(kwargs.values()))
        if is_compiling() and (number := number_of(layer)) is not None:
            self._traced_input = x
            scaled = scaled_input(x, number)
        elif self._in_force():
            self._unscaled_input.x = x
            scaled = self.scaled(x)
        else:
            return args, kwargs
        if args:
            return (scaled, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): scaled}

    def __call__(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        if is_compiling():
            return self._traced(layer, args, kwargs, output)
        if not self._in_force():
            return output
        x = getattr(self._unscaled_input, "x", None)
        if x is None:
            x = args[0] if args else next(iter(kwargs.values()))
        if self.owns_output is not None and not (
            next(iter(layer._forward_hooks.values()), self) is self and self.owns_output(layer)
        ):
            # The layer, or a hook that came before this one, may have returned its input or something that it keeps.
            output = output.clone()
        return self.changed(layer, x, output)

    def _traced(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """Returns what a compiled graph is to do in the place of a call of this hook."""
        number = number_of(layer)
        if number is None:
            # The rest is not compiled with the values that it has now.
            torch._dynamo.graph_break()
        x, self._traced_input = self._traced_input, None
        if x is None:
            x = args[0] if args else next(iter(kwargs.values()))
        return self.changed(layer, x, output) if number is None else bypass(x, output, number)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x` scaled per channel, as a new tensor."""
        with naming_the_layer(self.key):
            scale = self._scales.get(x.device, torch.float32, lambda: self._input_scale().to(x.device))
            per_channel = scale.view(-1, *[1] * (len(self.shape) - 2))
            if x.requires_grad and torch.is_grad_enabled():
                return (x * per_channel).to(x.dtype)
            # The kernel multiplies in fp32, without an fp32 copy of the input.
            return torch.mul(x, per_channel, out=torch.empty_like(x))

    def changed(self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns `output` with the stack in it. It may be changed in place. `x` is the layer's unscaled input."""
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
        """Runs last, and after an exception too: an activation must not outlive its call."""
        self._unscaled_input.x = None

    @property
    def low_rank(self) -> JoinedLowRank | None:
        """The whole stack, if it is low-rank terms in one step; else None. Then strengths are scales alone."""
        steps = self.program.steps
        only = steps[0] if self._is_low_rank and len(steps) == 1 else None
        return only.joined if isinstance(only, LowRankStep) else None

    def at_strengths(self, terms: Sequence[Term]) -> Program:
        """Compiles `terms`, which differ from the present ones in strengths alone. The factors on a device stay there."""
        program = compile_program(terms, self._forms, self.shape, self._ratios, self._bias_of)
        for new, old in zip(program.steps, self.program.steps, strict=True):
            new.share_factors_with(old)
        return program

    def exchange(self, program: Program) -> Program:
        """Replaces the program by one of `at_strengths`, for the next call of the layer, and returns the earlier one."""
        before, self.program = self.program, program
        self._scales.drop()
        return before

    def share_factors_with(self, older: Bypass) -> None:
        """Takes the device copies over from the bypass of a stack that differs in strengths alone."""
        for mine, theirs in zip(self.program.steps, older.program.steps, strict=False):
            mine.share_factors_with(theirs)

    @property
    def scales_input(self) -> bool:
        """True if the stack scales the layer's input too."""
        return self.program.input_scale is not None

    def drop_device_copies(self) -> None:
        """Frees the copies on devices; the next call of the layer makes them again."""
        self._scales.drop()
        for step in self.program.steps:
            step.drop_device_copies()

    def device_bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the factors on a device that computes in `dtype`."""
        return sum(step.device_bytes(dtype) for step in self.program.steps)

    @property
    def is_resident(self) -> bool:
        """True while copies on a device exist."""
        return any(step.is_resident for step in self.program.steps)

    def _input_scale(self) -> torch.Tensor:
        scale = self.program.input_scale
        if scale is None:
            raise TypeError("this stack leaves the input as it is")
        return scale


class Role(Enum):
    """The hooks of a bypass, with the number of each on its layer.

    It is the same every time, because compiled code looks hooks up by number. torch's own numbers begin at 0.
    """

    CHANGE = -1
    SCALE = -2
    FORGET = -3


def _hook(
    layer: torch.nn.Module, role: Role, hook: Callable[..., Any], is_first: bool = False
) -> torch.utils.hooks.RemovableHandle:
    """Hooks `layer` as torch's own registration does, under the number of the role, or one like it if that is taken."""
    table: Any
    if role is Role.SCALE:
        table, marks = layer._forward_pre_hooks, [layer._forward_pre_hooks_with_kwargs]
    else:
        table, marks = layer._forward_hooks, [layer._forward_hooks_with_kwargs, layer._forward_hooks_always_called]
    handle = torch.utils.hooks.RemovableHandle(table, extra_dict=marks)
    number = role.value
    while number in table:
        number -= len(Role)
    handle.id = number
    # Before the hook itself: another thread may be in a call of the layer.
    marks[-1 if role is Role.FORGET else 0][number] = True
    table[number] = hook
    if is_first and len(table) > 1:
        table.move_to_end(number, last=False)
    return handle
