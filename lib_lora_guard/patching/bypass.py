"""Bypass: a stack's cheap forward, added in place to the output of the layer. The weight is never touched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..adapters import LowRank, Term
from ..errors import LoraGuardError
from ..planning.cheap import Forms, forms_of
from .access import plain_bias
from .device_cache import DeviceCache
from .forward_program import BiasOf, Program, compile_program
from .forward_steps import LowRankStep
from .fused import Fused
from .layer_call import LayerCall, naming_the_layer
from .low_rank import JoinedLowRank
from .operators import WEIGHT_PATCH, CallPatch, bypass, number_of, scaled_input

WAIT_SECONDS = 1.0
"""The longest time that `detach` waits for calls of the layer in other threads. One of them may wait for this thread."""

CHANGE, SCALE, FORGET = -1, -2, -3
"""The numbers of a bypass's hooks on its layer: always the same, because compiled code looks hooks up by number. torch's
own numbers begin at 0."""

CAST = "_lora_guard_cast"
"""The attribute of a layer without a LoRA that holds its short way (`host_casts.py`)."""


class Bypass(CallPatch):
    """Forward hooks for one linear or convolution layer.

    Most stacks need one hook, after the layer. One that scales the layer's input needs a second one before it; then a call
    that did not begin with the scaled input is left as it is, so that no call has a half of the stack.

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
        self._is_one_hook = self.program.input_scale is None
        self._scales: DeviceCache[torch.Tensor] = DeviceCache()
        self._said: set[str] = set()
        # By thread: two threads may run one model.
        self._unscaled: dict[int, torch.Tensor] = {}
        self._takes_calls = False
        """Whether calls that begin now get the stack, where it needs two hooks."""
        self.owns_output: bool | None = None
        """As `ModelAccess.owns_output` tells it. The attachment sets it."""
        self._traced_input: torch.Tensor | None = None
        self.fused: Fused | None = None
        """The short way of the layer, where there is one. The attachment sets it, before the hook is on the layer."""

    def __reduce__(self) -> str:
        raise LoraGuardError("a LoRA is on this model; take it off (guard.remove()) before copying or saving the model")

    def attach(self, layer: torch.nn.Module) -> None:
        """Hooks `layer`. Idempotent, also after a call that was interrupted."""
        if self.is_on(layer):
            return
        self.detach(layer)
        # First, so that the hooks of others get the output of the patched layer, as they would after a merge.
        _hook(layer, CHANGE, self, is_first=True)
        if not self._is_one_hook:
            _hook(layer, FORGET, self._forget_input)
            _hook(layer, SCALE, self.scale_input)
        self._takes_calls = True

    def detach(self, layer: torch.nn.Module) -> None:
        """Takes the hooks off `layer`. Idempotent. They are looked for on the layer: no note of them could be complete."""
        self._takes_calls = False
        table = layer._forward_hooks
        if self._is_one_hook and table.get(CHANGE) is self:
            # The usual case, in a third of the time.
            layer._forward_hooks_with_kwargs.pop(CHANGE, None)
            table.pop(CHANGE, None)
            return
        if not self._is_one_hook:
            for number in self._hooks_in(layer._forward_pre_hooks):
                layer._forward_pre_hooks_with_kwargs.pop(number, None)
                layer._forward_pre_hooks.pop(number, None)
            self._await_calls()
        for number in self._hooks_in(table):
            # The hook goes last: as long as it is there, an interrupted removal is found and finished.
            layer._forward_hooks_with_kwargs.pop(number, None)
            layer._forward_hooks_always_called.pop(number, None)
            table.pop(number, None)

    def take_place_of(self, other: Bypass, layer: torch.nn.Module) -> bool:
        """Puts this bypass on `layer` in the place of `other`, so that no call finds the layer without a LoRA.

        Returns:
            False if that cannot be done in one step; nothing has changed then.
        """
        if not (self._is_one_hook and other._is_one_hook):
            return False
        numbers = other._hooks_in(layer._forward_hooks)
        if len(numbers) != 1 or numbers[0] not in layer._forward_hooks_with_kwargs:
            return False
        layer._forward_hooks[numbers[0]] = self
        self._takes_calls = True
        return True

    def is_on(self, layer: torch.nn.Module) -> bool:
        """Returns True if every hook of this bypass is on `layer`: another extension may have taken them off."""
        after = self._hooks_in(layer._forward_hooks)
        if not after or after[0] not in layer._forward_hooks_with_kwargs:
            return False
        if self._is_one_hook:
            return len(after) == 1
        before = self._hooks_in(layer._forward_pre_hooks)
        return (
            self._takes_calls
            and len(after) == 2
            and after[1] in layer._forward_hooks_always_called
            and len(before) == 1
            and before[0] in layer._forward_pre_hooks_with_kwargs
        )

    def _hooks_in(self, table: Mapping[int, Callable[..., Any]]) -> list[int]:
        """Returns the numbers of this bypass's hooks in a layer's table of hooks."""
        if not table:
            return []
        # A list first: another thread may hook the layer meanwhile.
        return [n for n, hook in list(table.items()) if hook is self or getattr(hook, "__self__", None) is self]

    def _await_calls(self) -> None:
        """Waits until no other thread is in a call that began with a scaled input: it needs the hook after the layer."""
        end = time.monotonic() + WAIT_SECONDS
        while set(self._unscaled) - {threading.get_ident()} and time.monotonic() < end:
            time.sleep(0.0002)

    def scale_input(
        self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Scales the input per channel, before the layer's own product. The steps after it get the unscaled one.

        torch gives no `kwargs` while another thread is in the middle of `attach` or `detach`.
        """
        if is_compiling():
            number = number_of(layer)
            if number is not None and kwargs is not None:
                self._traced_input = args[0] if args else next(iter(kwargs.values()))
                return _with_input(args, kwargs, scaled_input(self._traced_input, number))
            # The rest is not compiled with the values that it has now.
            torch._dynamo.graph_break()
        if kwargs is None or not self._in_force():
            return None
        x, thread = args[0] if args else next(iter(kwargs.values())), threading.get_ident()
        # In this order: either this call sees that the stack is going, or `detach` sees the call and waits for it.
        self._unscaled[thread] = x
        if not self._takes_calls:
            self._unscaled.pop(thread, None)
            return None
        return _with_input(args, kwargs, self.scaled(x))

    def __call__(self, layer: torch.nn.Module, args: tuple[Any, ...], *more: Any) -> torch.Tensor:
        """Adds the stack to the output of a call; `more` is the call's `kwargs` and its output.

        torch gives no `kwargs` while another thread is in the middle of `attach` or `detach`.
        """
        output: torch.Tensor = more[-1]
        if is_compiling():
            number = number_of(layer)
            if number is not None and len(more) == 2:
                x, self._traced_input = self._traced_input, None
                given = args or tuple(more[0].values())
                return bypass(given[0] if x is None else x, output, number)
            # The rest is not compiled with the values that it has now.
            torch._dynamo.graph_break()
        if self._is_one_hook:
            given = args or (tuple(more[0].values()) if len(more) == 2 else ())
            if not given or not self._in_force():
                return output
            x = given[0]
        else:
            x = self._unscaled.get(threading.get_ident())
            if x is None:
                # The call began before this stack came, or while it was not in force.
                return output
        if self.owns_output is not None and not (
            self.owns_output
            and "forward" not in layer.__dict__
            and _is_first(self, layer)
            and not _global_forward_hooks
        ):
            # The layer, or a hook that came before this one, may have returned its input or something that it keeps.
            output = output.clone()
        return self.changed(layer, x, output)

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
        if is_compiling():
            if number_of(layer) is not None:
                return
            torch._dynamo.graph_break()
        self._unscaled.pop(threading.get_ident(), None)

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
        if self.fused is not None:
            self.fused.exchange(program.one_pass)
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
        if self.fused is not None:
            self.fused.drop_device_copies()
        for step in self.program.steps:
            step.drop_device_copies()

    @property
    def was_on_the_cpu(self) -> bool:
        """True if a product was calculated on the CPU, for lack of memory on the device."""
        return bool(self._said)

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


def call_of_layer(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in place of a layer's `__call__` while it has a short way: tries that, then torch's own call.

    The bypass's hook is in torch's own call alone, so that no call can get the LoRAs twice, or a half of them. It is also what says
    that the LoRAs are on the layer: a class without it, in the middle of a change, is the layer as it was. Where terms on the fly
    are the long way, their place in the host's own call says it (`RawWeight.of`).
    """
    if len(args) == 1 and not kwargs and not is_compiling():
        hooks, x = layer._forward_hooks, args[0]
        hook: Any = hooks.get(CHANGE)
        terms: Any = None
        if hook is None:
            terms = layer.__dict__.get(WEIGHT_PATCH)
            fused = None if hooks else layer.__dict__.get(CAST) if terms is None else terms.fused
        else:
            fused = hook.fused if type(hook) is Bypass and len(hooks) == 1 and hook._in_force() else None
        if (
            fused is not None
            and type(x) is torch.Tensor
            and not layer._forward_pre_hooks
            and "forward" not in layer.__dict__
            and not (_global_forward_hooks or _global_forward_pre_hooks)
            and not torch.is_grad_enabled()
            and torch._C._get_tracing_state() is None
        ):
            output = fused.run(layer, x, terms)
            if output is not None:
                return output
    return torch.nn.Module.__call__(layer, *args, **kwargs)


def _is_first(hook: object, layer: torch.nn.Module) -> bool:
    """Returns True if no other hook of the layer comes before this one."""
    # In one call of C: between two another thread may hook the layer, and the second raises.
    hooks: list[object] = list(layer._forward_hooks.values())
    return not hooks or hooks[0] is hook


def _hook(layer: torch.nn.Module, number: int, hook: Callable[..., Any], is_first: bool = False) -> None:
    """Hooks `layer` as torch's own registration does, under `number`, or a lower one if that is taken."""
    table: Any = layer._forward_hooks
    marks = layer._forward_hooks_with_kwargs
    if number == SCALE:
        table, marks = layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs
    elif number == FORGET:
        marks = layer._forward_hooks_always_called
    while number in table:
        number -= len((CHANGE, SCALE, FORGET))
    # Before the hook itself: another thread may be in a call of the layer.
    marks[number] = True
    table[number] = hook
    if is_first and len(table) > 1:
        table.move_to_end(number, last=False)


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with another input."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})
