"""The short way of a layer with LoRAs on quantised storage: one pass makes its weight with the LoRAs in it, then one product
makes the output. It is for stacks that are one low-rank product or one LoKr, after a factor for each row where a DoRA needs one.

It stands in place of the host's work for the layer (a dequantised weight, the product) and of the bypass (two products with the
whole input), or of the terms that the host's call adds to its temporary weight (a LoKr). It allocates what the host's own temporary
weight takes. Whatever is out of the usual goes the long way: the host's code, with the bypass after it or the terms in it.
"""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch

from ..kernels.fused import Change, Factors, Sides, fused_weight, token_output
from ..kernels.recipes import HADAMARD, KRONECKER, ONE_TOKEN, ROW_SCALED, rank_of_sides, recipe_of
from ..kernels.stored import Bnb4, Fp8, Int8, Stored, stored_weight
from ..memory.out_of_memory import is_out_of_memory
from .forward_program import OnePass
from .forward_steps import KhatriRaoStep, KroneckerStep, LowRankStep, Parts
from .fused_choice import CHOICE, FusedChoice, Key
from .swapped_ahead import AHEAD

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """The tensors of a layer in one call.

    Attributes:
        weight: The parameter, as it is stored.
        bias: As it is added to the product.
        scale: The host multiplies the weight by it, in the dtype of the activations.
        is_one_token: The host makes no temporary weight in this call: it multiplies the stored numbers by the one token.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None
    is_one_token: bool = False


class Terms(Protocol):
    """A LoKr that the host's call adds to its temporary weight (`on_the_fly.WeightTerms`)."""

    def sides_on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Returns its left and its right side on `device` and in `dtype`, and the factor on their product."""


class RawWeight(ABC):
    """How a host's layers of one class hold their weights. It keeps nothing of a layer."""

    def scale(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Returns what the host multiplies a layer's weight by; None for weights without such a factor."""
        return None

    def stored(self, layer: torch.nn.Module, is_laid_out: bool = True) -> Stored | None:
        """Returns a layer's weight, wherever it lies now; None where no kernel will make it. `is_laid_out`: as `stored_weight` says."""
        weight = layer._parameters.get("weight")
        return None if weight is None else stored_weight(weight, self.scale(layer), is_laid_out)

    @abstractmethod
    def of(self, layer: torch.nn.Module, x: torch.Tensor, terms: Terms | None = None) -> Held | None:
        """Returns what a layer computes with, for a call with the input `x`. Asked at every call.

        None: the layer's own code has to go this time.

        Args:
            layer: The layer.
            x: Its input.
            terms: What its own code adds to the temporary weight, and nothing else. None: nothing at all.
        """


class Fused:
    """The short way of one layer.

    Nothing here keeps the memory of a weight: hosts move weights at any time, and count on the memory that they leave.
    """

    def __init__(self, raw: RawWeight, stack: OnePass | None, choice: FusedChoice | None = None) -> None:
        """
        Args:
            raw: How the host holds the layer's weight.
            stack: The LoRAs on it. None for a layer without any.
            choice: None for that of the process.
        """
        self._raw, self._stack, self._choice = raw, stack, choice or CHOICE
        self._held: dict[Key, bool] | None = None
        self._key: Key | None = None
        self._kind = ""
        """Of the weight that the key is for."""
        self._is_taken = False
        self._facts = _Facts()
        self._made: tuple[OnePass, LowRankStep | KhatriRaoStep, Parts, Factors] | None = None
        self._of_token: _OfToken | None = None

    def exchange(self, stack: OnePass | None) -> None:
        """Replaces the stack by one that differs in strengths alone, for the next call of the layer."""
        self._stack = stack

    def key(self, layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Key | None:
        """Returns the kernel for calls with activations of `dtype` on `device`; None where there is none for the weight."""
        stored = self._raw.stored(layer)
        return None if stored is None else self._key_of(stored.kind, device, dtype)

    def _key_of(self, kind: str, device: torch.device, dtype: torch.dtype) -> Key:
        stack = self._stack
        if stack is None:
            return Key(kind, device, dtype, 0)
        before = "" if stack.row_scale is None else ROW_SCALED
        if (two_pairs := stack.two_pairs(dtype)) is not None:
            return Key(before + HADAMARD + kind, device, dtype, two_pairs.form.a1.shape[1])
        if isinstance(stack.product, KroneckerStep):
            return Key(before + KRONECKER + kind, device, dtype, rank_of_sides(stack.product.columns))
        return Key(before + kind, device, dtype, stack.product.rank)

    def run(self, layer: torch.nn.Module, x: torch.Tensor, terms: Terms | None = None) -> torch.Tensor | None:
        """Returns the layer's output for `x` with the LoRAs in it; None, with nothing done, where the long way has to go.

        Args:
            layer: The layer.
            x: Its input.
            terms: The stack, where the long way is the host's call with these terms and not a bypass.
        """
        device, dtype, choice, key = x.device, x.dtype, self._choice, self._key
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton launches on the current card: a part that an extension has put on another one goes the long way.
            return None
        is_known = self._held is choice.held and key is not None and dtype is key.dtype and device == key.device
        if is_known and not self._is_taken and not is_one_token(x):
            return None
        try:
            # Weights of hosts and bitsandbytes are classes of their own: else each look at one, at its `device` too, is a call of Python.
            with torch._C.DisableTorchFunctionSubclass():
                held, product = self._raw.of(layer, x, terms), None
                if held is not None and held.is_one_token:
                    product = self._product(layer, device, dtype)
                    if product is None:
                        return None
                stored = None if held is None else self._facts.stored(held, dtype, device)
        except Exception as error:
            # Without room for what comes from RAM the host says so, in its own words.
            if not _gives_way(error):
                log.debug("a weight cannot be read for its short way", exc_info=True)
            return None
        if held is None or stored is None:
            return None
        if product is not None:
            return self._token_output(product, x, held, stored)
        if not is_known or key is None or stored.kind != self._kind:
            self._kind = stored.kind
            key = self._key = self._key_of(stored.kind, device, dtype)
            self._is_taken = choice.takes(key)
            self._held = choice.held if key in choice.held else None
            if not self._is_taken:
                return None
        try:
            stack = self._stack
            factors = None if stack is None else self._change(stack, stored.shape[0], device, dtype, terms)
            if factors is None and stack is not None:
                return None
            weight = fused_weight(stored, factors, dtype)
        except Exception as error:
            if not _gives_way(error):
                choice.failed(key, error)
            return None
        try:
            return torch.nn.functional.linear(x, weight, held.bias)
        except RuntimeError as error:
            # No memory, or an input that does not fit: the layer's own code says so.
            _gives_way(error)
            return None

    def _product(self, layer: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Key | None:
        """Returns the kernel that calls with one token take; None where they go the long way."""
        found, choice = self._of_token, self._choice
        if found is None or found.held is not choice.held or found.dtype is not dtype or found.device != device:
            key = None if self._stack is None else self.key(layer, device, dtype)
            if key is not None:
                # None but a plain pair of factors has that kernel.
                key = key._replace(kind=ONE_TOKEN + key.kind)
                key = None if recipe_of(key.kind) is None else key
            found = self._of_token = _OfToken(choice.held, device, dtype, key)
        return found.key if found.key is not None and choice.takes(found.key) else None

    def _token_output(self, product: Key, x: torch.Tensor, held: Held, stored: Stored) -> torch.Tensor | None:
        stack = self._stack
        try:
            factors = None if stack is None else self._change(stack, stored.shape[0], x.device, x.dtype, None)
            return token_output(stored, factors, x, held.bias) if isinstance(factors, Factors) else None
        except Exception as error:
            if not _gives_way(error):
                self._choice.failed(product, error)
            return None

    def drop_device_copies(self) -> None:
        """Frees what refers to factors on a device."""
        self._made = None
        if self._stack is not None and self._stack.row_scale is not None:
            self._stack.row_scale.drop_device_copies()

    def _change(
        self, stack: OnePass, rows: int, device: torch.device, dtype: torch.dtype, terms: Terms | None
    ) -> Change | None:
        """Returns what the kernels add; None in RAM, where several LoRAs are not joined."""
        product, made = stack.product, self._made
        if made is not None and made[0] is stack and made[1].parts_on(device, dtype) is made[2]:
            return made[3]
        if isinstance(product, KroneckerStep):
            left, right, alpha = (product if terms is None else terms).sides_on(device, dtype)
            return Sides(left, right, alpha, None if stack.row_scale is None else stack.row_scale.of_rows(rows, device))
        if (two_pairs := stack.two_pairs(dtype)) is not None:
            a1, b1, a2, b2 = two_pairs.factors_on(device, dtype)
            row_scale = None if stack.row_scale is None else stack.row_scale.of_rows(rows, device)
            return Factors(a1, b1, two_pairs.strength * two_pairs.form.scale, None, row_scale, (a2, b2))
        parts = product.parts_on(device, dtype)
        if len(parts) != 1:
            return None
        ((block, scale),) = parts
        row_scale = None if stack.row_scale is None else stack.row_scale.of_rows(rows, device)
        factors = Factors(block.whole_up(rows), block.down, scale.alpha, scale.per_rank, row_scale)
        if device.type != "cpu" and block.is_whole and product.keeps_parts:
            # In RAM the factors are made anew for each call. So is an `up` of several parts: it is larger than these, and is done with
            # before the layer's product begins.
            self._made = stack, product, parts, factors
        return factors


class _OfToken(NamedTuple):
    """The kernel that calls with one token may take, None where there is none; looked for again when the choice's answers may change."""

    held: dict[Key, bool]
    device: torch.device
    dtype: torch.dtype
    key: Key | None


def is_one_token(x: torch.Tensor) -> bool:
    """Returns True for an input of one token, `(..., in)` with all other sizes 1."""
    return x.dim() > 0 and x.numel() == x.shape[-1]


def _gives_way(error: Exception) -> bool:
    """Returns True where memory has ended: then the long way has what the next swapped weight takes."""
    if not is_out_of_memory(error):
        return False
    AHEAD.give_way()
    return True


def _nothing() -> None:
    """Stands for a reference to a tensor, where there is none."""


class _Facts:
    """What is the same in all calls of a layer, without its tensors: to find it out takes longer than the rest of a call."""

    def __init__(self) -> None:
        self._weight: Callable[[], torch.Tensor | None] = _nothing
        self._scale: Callable[[], torch.Tensor | None] = _nothing
        self._of: tuple[torch.dtype, torch.device, torch.dtype] | None = None
        """The dtype of the weight, its device and the dtype of the activations that the facts hold for."""
        self._type: type[Stored] = Stored
        self._fields: dict[str, Any] = {}
        self.spare_bytes = 0

    def stored(self, held: Held, dtype: torch.dtype, device: torch.device) -> Stored | None:
        """Returns the weight on `device` for the kernels; None if it is stored in a way that they do not read."""
        weight: Any = held.weight
        # torch cannot move a tensor of tensors while it is referred to weakly (findings/torchao_weakref_stops_moves.sh).
        bits = getattr(weight, "_qdata", weight)
        of, scale = (weight.dtype, device, dtype), held.scale
        if self._weight() is not bits or self._scale() is not scale or self._of != of:
            if not self._look(held, dtype, device):
                return None
            self._weight, self._of = weakref.ref(bits), of
            self._scale = _nothing if scale is None else weakref.ref(scale)
        stored: Any = object.__new__(self._type)
        fields = stored.__dict__
        fields.update(self._fields)
        tensors = self._tensors_of(bits)
        for one in tensors:
            if one.device != device:
                # Swapped: the stored bytes alone, without waiting for the card.
                tensors = AHEAD.bring(self, tensors, device)
                break
        fields["data"] = tensors[0]
        if len(tensors) > 1:
            fields["absmax"] = tensors[1]
        made: Stored = stored
        return made

    def in_ram(self) -> tuple[torch.Tensor, ...] | None:
        """Returns what a call copies to the card; None while the weight lies there, or where the layer has another one by now."""
        bits = self._weight()
        return None if bits is None or bits.device.type != "cpu" else self._tensors_of(bits)

    def _tensors_of(self, bits: Any) -> tuple[torch.Tensor, ...]:
        """Returns the large tensors of a weight: its stored bytes, and the scales of four bits."""
        return (bits.data, bits.quant_state.absmax) if self._type is Bnb4 else (bits.data,)

    def _look(self, held: Held, dtype: torch.dtype, device: torch.device) -> bool:
        scale = None if held.scale is None else held.scale.to(device=device, dtype=dtype)
        stored = stored_weight(held.weight, scale)
        if stored is None:
            return False
        # Worked out once: it becomes a field.
        assert stored.kind
        fields = {**stored.__dict__, "data": None}
        if isinstance(stored, Bnb4):
            fields["absmax"] = None
            if (nested := stored.nested) is not None:
                small = {name: getattr(nested, name).to(device) for name in ("code", "scales", "offset")}
                fields["nested"] = replace(nested, **small)
        elif isinstance(stored, (Fp8, Int8)) and stored.scale is not None:
            fields["scale"] = stored.scale.to(device)
        self._type, self._fields = type(stored), fields
        stored_bytes = sum(one.nbytes for one in self._tensors_of(getattr(held.weight, "_qdata", held.weight)))
        self.spare_bytes = math.prod(stored.shape) * dtype.itemsize - stored_bytes
        return True
