"""Reads and writes the patch tuples that Forge and ComfyUI hand to their patchers.

Format, from Forge `backend/patcher/lora.py` and `backend/patcher/base.py`: a patch is
`[strength, value, strength_model, offset, function]`; `value` is `(tensor,)` for a difference, `(kind, (..., ...))`
for a named kind, or a list `[base, patch, patch, ...]` for a nested stack; `offset` is `(dim, start, length)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import LoraMismatchError
from .base import Adapter, Slice, Term
from .kinds import KINDS
from .whole import DiffAdapter, ForeignAdapter, NestedAdapter

if TYPE_CHECKING:
    import torch

PatchValue: TypeAlias = Any
"""Tuples and lists of many forms, and objects of other extensions."""

Read: TypeAlias = Callable[[PatchValue], Adapter]
Wait: TypeAlias = Callable[[], None]

Calculators = Mapping[str, Callable[["torch.Tensor", float, Any], "torch.Tensor"]]
"""The host's functions for the kinds of other extensions, by name (`extra_weight_calculators`)."""

OWN_KIND = "lora_guard"
"""The name of a patch that carries an adapter for which the host has no tuple."""


class AdapterTuple(tuple[Any, ...]):
    """A patch value that remembers the adapter it was made from, so that it need not be read.

    To the host and to other extensions it is the tuple that it is equal to. Slices, copies and pickles of it are plain
    tuples, which have to be read: their tensors may be others.
    """

    adapter: Adapter

    def __new__(cls, value: tuple[Any, ...], adapter: Adapter) -> AdapterTuple:
        """Makes the value of `adapter`."""
        made = super().__new__(cls, value)
        made.adapter = adapter
        return made

    @property
    def wait(self) -> Wait | None:
        """Waits for the values of the tensors; None where they are there."""
        content = self[-1]
        return content.wait if isinstance(content, ComingTuple) else None

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[tuple[Any, ...]]]:
        return tuple, (tuple(self),)


class ComingTuple(tuple[Any, ...]):
    """The content of a patch value whose tensors are still being read: whoever looks inside waits for them.

    What looks inside a tuple in C goes by its exact class, or asks as Python does.
    """

    wait: Wait

    def __new__(cls, content: tuple[Any, ...], wait: Wait) -> ComingTuple:
        """Makes the content; `wait` is called each time, and raises what keeps the values from coming."""
        made = super().__new__(cls, content)
        made.wait = wait
        return made

    def _there(self) -> tuple[Any, ...]:
        self.wait()
        return tuple(super().__iter__())

    def __radd__(self, other: tuple[Any, ...]) -> tuple[Any, ...]:
        return other + self._there()

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[tuple[Any, ...]]]:
        return tuple, (self._there(),)


def _waits_first(name: str) -> Callable[..., Any]:
    def method(content: ComingTuple, *args: Any) -> Any:
        return getattr(content._there(), name)(*args)

    return method


for _name in (
    "__getitem__",
    "__iter__",
    "__contains__",
    "__add__",
    "__mul__",
    "__rmul__",
    "__eq__",
    "__ne__",
    "__repr__",
    "index",
    "count",
):
    setattr(ComingTuple, _name, _waits_first(_name))


def parse_term(patch: Sequence[Any], calculators: Calculators, origin: int = 0) -> Term:
    """Reads one patch of the host.

    Args:
        patch: in the host's format.
        calculators: the host's functions for kinds of other extensions.
        origin: the LoRA's place in the user's order.

    Raises:
        LoraMismatchError: the patch has none of the known forms.
    """
    return term_of(patch, lambda value: parse_value(value, calculators), origin)


def term_of(patch: Sequence[Any], read: Read, origin: int = 0) -> Term:
    """Makes the term of one patch of the host, with the adapter that `read` returns for its value.

    Args:
        patch: in the host's format.
        read: returns the adapter of a value.
        origin: the LoRA's place in the user's order.

    Raises:
        LoraMismatchError: the patch has too few fields.
    """
    if len(patch) < 5:
        raise LoraMismatchError.of("lora.patch_fields", count=len(patch))
    strength, value, strength_model, offset, function = patch[:5]
    return Term(
        adapter=read(value),
        strength=float(strength),
        strength_model=float(strength_model),
        part=None if offset is None else Slice(*(int(n) for n in offset)),
        function=function,
        origin=origin,
    )


def parse_value(value: Any, calculators: Calculators) -> Adapter:
    """Reads the adapter in the value of a patch. Takes and raises what `parse_term` does."""
    if isinstance(value, list):
        return NestedAdapter(base=value[0], terms=tuple(parse_term(p, calculators) for p in value[1:]))
    if isinstance(value, tuple) and len(value) == 1:
        return DiffAdapter(value[0])
    if not (isinstance(value, tuple) and len(value) == 2):
        raise LoraMismatchError.of("lora.patch_value", kind=type(value).__name__)
    kind, content = value
    if kind == OWN_KIND:
        adapter: Adapter = content[0]
        return adapter
    if kind in KINDS.host:
        try:
            return KINDS.host[kind].read(content)
        except TypeError as error:
            raise LoraMismatchError.of("lora.patch_content", kind=kind, error=str(error)) from None
    if kind in calculators:
        return ForeignAdapter(name=kind, value=content, calculate=calculators[kind])
    raise LoraMismatchError.of("lora.patch_kind", kind=kind)


def value_of(adapter: Adapter, wait: Wait | None = None) -> AdapterTuple:
    """The value of a patch for `adapter`.

    It is the host's own tuple if that is exact, so that other extensions find what they know; else
    `(OWN_KIND, (adapter,))`.

    Args:
        adapter: what the patch does.
        wait: waits for the values of its tensors, and raises what keeps them from coming; None where they are there.
    """
    name = KINDS.host_name(adapter)
    content = None if name is None else KINDS.host[name].write(adapter)
    if name is None or content is None:
        name, content = OWN_KIND, (adapter,)
    return AdapterTuple((name, content if wait is None else ComingTuple(content, wait)), adapter)


def calculate_own_kind(weight: torch.Tensor, strength: float, value: tuple[Adapter]) -> torch.Tensor:
    """Patches `weight` for the host, which calls this for OWN_KIND when it has to patch by itself.

    Meant for the host's `extra_weight_calculators`.
    """
    return value[0].patch(weight, strength, None)
