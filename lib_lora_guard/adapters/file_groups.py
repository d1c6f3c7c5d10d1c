"""Sorts the tensors of a LoRA file by module and kind, whatever spellings a module has in it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from ..errors import LoraFileError, LoraMismatchError, Message, about, reason
from ..files import shown
from ..lazy_torch import torch
from .base import check_values
from .file_keys import KeyMeaning, meaning_of
from .kinds import Fields, Kind
from .module_names import plain_name

Tensors = Mapping[str, "torch.Tensor"]
_INSIDE = ".base_layer."
_OUT_PROJECTION = ".base_layer.out_proj"
"""The output of `nn.MultiheadAttention`. PEFT adds its delta itself and lets the layer merge it once more, for every
forward pass in training too (0.21, `tuners/lora/layer.py`, `MultiheadAttention.merge`)."""


@dataclass
class Group:
    """Everything a file has for one module.

    Attributes:
        module: its name as written in the file, in the spelling of its factors.
        kinds: fields by kind.
        shared: fields that belong to whichever kind the module has.
        keys: the file's names of these tensors, by kind and field.
        times: how often PEFT adds the delta.
    """

    module: str
    kinds: dict[Kind, Fields] = field(default_factory=dict)
    shared: Fields = field(default_factory=dict)
    keys: dict[tuple[Kind | None, str], str] = field(default_factory=dict)
    times: int = 1

    def put(self, meaning: KeyMeaning, key: str, tensor: torch.Tensor) -> None:
        """Adds a tensor."""
        fields = self.shared if meaning.kind is None else self.kinds.setdefault(meaning.kind, {})
        fields[meaning.field] = tensor
        self.keys[meaning.kind, meaning.field] = key

    def of_weight(self) -> list[Kind]:
        """The kinds that change the module's weight."""
        return [kind for kind in self.kinds if kind.parameter == "weight"]


def group(name: str, tensors: Tensors, unread: Container[str] = ()) -> tuple[list[Group], list[str]]:
    """Sorts the tensors of a file.

    Args:
        name: the file's, for errors.
        tensors: all of the file, by name.
        unread: names of tensors whose values are not there yet, and are not looked at.

    Returns:
        The groups, and the names that no kind knows.

    Raises:
        LoraFileError: two tensors say the same, or a tensor holds no usable numbers.
    """
    groups: dict[str, Group] = {}
    unknown = []
    for key, tensor in tensors.items():
        meaning = meaning_of(key, tensors)
        if meaning is None:
            unknown.append(key)
            continue
        # PEFT keeps the layers inside a wrapped one (those of an attention) under `base_layer`.
        module = meaning.module.replace(_INSIDE, ".")
        found = groups.get(module)
        if found is None:
            found = groups[module] = Group(module)
            if meaning.module.endswith(_OUT_PROJECTION):
                found.times = 2
        first = found.keys.get((meaning.kind, meaning.field))
        if first is not None:
            raise _refusal(name, Message("lora.said_twice", {"first": shown(first), "second": shown(key)}))
        is_number = meaning.field in ({"alpha"} if meaning.kind is None else meaning.kind.numbers)
        try:
            if key not in unread:
                check_values(tensor, whole_numbers=is_number or _is_integer(meaning))
        except LoraMismatchError as error:
            raise _refusal(name, about(shown(key), reason(error))) from None
        if is_number and tensor.numel() != 1:
            raise _refusal(name, Message("lora.several_values", {"key": shown(key), "count": tensor.numel()}))
        found.put(meaning, key, tensor)
    return _together(name, groups.values()), unknown


def _is_integer(meaning: KeyMeaning) -> bool:
    return meaning.kind is not None and meaning.field in meaning.kind.integers


def _together(name: str, groups: Iterable[Group]) -> list[Group]:
    """Joins the groups that are one module in several spellings.

    Two that both describe the same parameter stay apart: they may be two modules, and matching with a model tells.
    """
    groups = list(groups)
    if len({tuple(one.keys) for one in groups}) < 2:
        # Every module has the same fields: none lacks what another one has.
        return groups
    by_name: dict[str, list[Group]] = {}
    for one in groups:
        by_name.setdefault(plain_name(one.module), []).append(one)
    joined = []
    for same in by_name.values():
        # The spelling of the factors stays; shared fields follow.
        same.sort(key=lambda one: not one.kinds)
        kept = same[:1]
        for one in same[1:]:
            into = next((other for other in kept if _can_join(other, one)), None)
            if into is not None:
                _join(into, one)
            elif one.kinds or not kept[0].kinds:
                kept.append(one)
            else:
                _check_equal(name, kept[0], one)
        joined += kept
    return joined


def _can_join(one: Group, other: Group) -> bool:
    if one.keys.keys() & other.keys.keys():
        return False
    return len({*one.of_weight(), *other.of_weight()}) < 2


def _join(into: Group, one: Group) -> None:
    for kind, fields in one.kinds.items():
        into.kinds.setdefault(kind, {}).update(fields)
    into.shared.update(one.shared)
    into.keys.update(one.keys)


def _check_equal(name: str, kept: Group, one: Group) -> None:
    """Raises LoraFileError unless what `one` says of a module is what `kept` says already, or is new."""
    for field_name, value in one.shared.items():
        first, second = kept.keys.get((None, field_name)), one.keys[None, field_name]
        if first is None:
            kept.shared[field_name], kept.keys[None, field_name] = value, second
        elif not _is_equal(kept.shared[field_name], value):
            raise _refusal(name, Message("lora.two_spellings", {"first": shown(first), "second": shown(second)}))


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors hold the same; where only the header was read, if they may."""
    if one.numel() == other.numel() == 1 and not (one.is_meta or other.is_meta):
        return float(one) == float(other)
    if one.is_meta or other.is_meta:
        return tuple(one.shape) == tuple(other.shape)
    return torch.equal(one, other)


def _refusal(name: str, what: Message) -> LoraFileError:
    return LoraFileError(about(name, what))
