"""Matches the tensors of a LoRA file with the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..adapters import Adapter, Slice, Term
from ..adapters.base import Shape
from ..adapters.files import LoraFile
from ..adapters.fitting import Blame, Misfit, blame_of
from ..adapters.transposed import TransposedAdapter
from ..errors import LoraGuardError, LoraMismatchError, Message, about, reason
from ..files import shown
from .architecture import Architecture, accepts, likeliest, may_be_for
from .names import NameMap
from .routes import Route


@dataclass
class Match:
    """The terms of one file for one model, and the keys that were not used."""

    terms: dict[str, list[Term]] = field(default_factory=dict)
    """The terms by parameter name."""
    skipped: list[str] = field(default_factory=list)
    """Keys without a counterpart in the model."""
    lost: list[str] = field(default_factory=list)
    """Keys with a counterpart that cannot be applied, each with the reason."""
    misfits: list[tuple[str, Misfit]] = field(default_factory=list)
    """Keys whose tensor has another size than the parts it must be cut into."""
    entries: Mapping[str, Sequence[_Entry]] = field(default_factory=dict)
    """What the file has for each parameter."""

    def written(self, key: str) -> list[str]:
        """Returns the file's names of what is for a parameter of the model."""
        return [entry.written for entry in self.entries.get(key, ())]


def match_file(file: LoraFile, names: NameMap, shapes: Mapping[str, Shape], strength: float, origin: int = 0) -> Match:
    """Matches a whole file with a model.

    Args:
        file: The LoRA file.
        names: The model's names, made from `shapes`.
        shapes: The model's parameters and their real shapes.
        strength: The strength of the file in the stack.
        origin: The position of the file in the stack.
    """
    match = Match(skipped=[key for key in file.unknown_keys if key not in file.lost])
    match.lost += [about(key, why) for key, why in file.lost.items()]
    found: dict[str, list[_Entry]] = {}
    for (module, parameter), adapter in file.adapters.items():
        places = names.places(module, parameter)
        if not places:
            # IA3's output factors apply to the bias too, if there is one.
            if parameter != "bias" or file.adapters.get((module, "weight")) is not adapter:
                match.skipped.append(f"{module}.{parameter}")
            continue
        written = f"{module}.{parameter}"
        if places[0].route.source is not None or places[0].route.swap_halves:
            wrong = _misfit_before_cutting(adapter, [place.route for place in places], shapes[places[0].key])
            if wrong is not None:
                match.misfits.append((shown(written), wrong))
                continue
        for key, route in places:
            if key in found:
                found[key].append(_Entry(written, adapter, route))
            else:
                found[key] = [_Entry(written, adapter, route)]
    match.entries = found
    again = _said_again(found)
    match.lost += [about(written, Message("lora.said_already", {"other": other})) for written, other in again.items()]
    for key, entries in found.items():
        for written, adapter, route in entries:
            if written in again:
                continue
            try:
                pieces = [(adapter, route.part)] if route.is_plain else list(_pieces(adapter, route, shapes[key]))
            except CannotSplitError as error:
                match.lost.append(about(written, reason(error)))
                continue
            terms = [Term(piece, strength, part=part, origin=origin) for piece, part in pieces]
            if key in match.terms:
                match.terms[key] += terms
            else:
                match.terms[key] = terms
    return match


class _Entry(NamedTuple):
    """An adapter of the file for one parameter of the model."""

    written: str
    adapter: Adapter
    route: Route

    def overlaps(self, other: _Entry) -> bool:
        """True if both change the same rows."""
        one, two = self.route.part, other.route.part
        return one is None or two is None or (one.start < two.start + two.length and two.start < one.start + one.length)

    def preference(self) -> tuple[bool, bool, float]:
        """Orders entries for overlapping rows: names of diffusers first, then those for fewer rows."""
        part, source = self.route.part, self.route.source
        rows = math.inf if part is None else part.length
        return not self.written.startswith(_OF_DIFFUSERS), source is not None, rows


def _said_again(found: Mapping[str, Sequence[_Entry]]) -> dict[str, str]:
    """Finds the adapters for rows that another one of the same file changes already.

    Where a layer is there fused and in parts, diffusers takes the parts and drops the whole (lora_conversion_utils.py,
    `_convert_kohya_flux_lora_to_diffusers`, `_convert_non_diffusers_z_image_lora_to_diffusers`). Of equal ones the first
    counts.

    Returns:
        The names of these adapters, each with the one that counts.
    """
    again: dict[str, str] = {}
    for entries in found.values():
        if len(entries) == 1:
            continue
        kept: list[_Entry] = []
        in_order = entries
        if len({(entry.route.part, entry.route.source) for entry in entries}) > 1:
            in_order = sorted(entries, key=_Entry.preference)
        for entry in in_order:
            other = next((one for one in kept if one.written not in again and one.overlaps(entry)), None)
            if other is None or other.written == entry.written:
                kept.append(entry)
            else:
                again.setdefault(entry.written, other.written)
    return again


_OF_DIFFUSERS = ("transformer.", "lora_transformer_")


def foreign_to(file: LoraFile, model: Architecture | None) -> str | None:
    """Returns the reason if the file was made for another architecture than `model`; None if it may fit."""
    if model is None:
        return None
    found = may_be_for(file.shapes, file.metadata)
    made_for = likeliest(found)
    if made_for is None or any(accepts(model, architecture) for architecture in found):
        return None
    return Message("lora.made_for", {"lora": made_for.value, "model": model.value})


class CannotSplitError(LoraGuardError, ValueError):
    """An adapter for a fused weight cannot be split for a model with separate weights."""


def _misfit_before_cutting(adapter: Adapter, routes: Sequence[Route], shape: Shape) -> Misfit | None:
    """None if a tensor has the rows that the routes cut out of it."""
    sources = [route.source for route in routes if route.source is not None]
    if not sources and not any(route.swap_halves for route in routes):
        return None
    rows = max((source.start + source.length for source in sources), default=shape[0])
    if not sources and routes[0].part is not None:
        rows = routes[0].part.length
    try:
        adapter.check((rows, *shape[1:]), may_expand=False)
    except LoraMismatchError as error:
        return Misfit(reason(error), blame_of(error, adapter.stands_alone))
    except (IndexError, RuntimeError, ZeroDivisionError) as error:
        return Misfit(reason(error), Blame.FILE)
    return None


def _pieces(adapter: Adapter, route: Route, shape: Shape) -> Iterator[tuple[Adapter, Slice | None]]:
    """Yields the parts of the adapter for one route, each with its rows in a weight of `shape`."""
    if route.transposed:
        adapter = TransposedAdapter(adapter)
    if route.source is not None:
        adapter = _rows(adapter, route.source.start, route.source.length)
    if not route.swap_halves:
        yield adapter, route.part
        return
    start, half = (0, shape[0] // 2) if route.part is None else (route.part.start, route.part.length // 2)
    yield _rows(adapter, half, half), Slice(0, start, half)
    yield _rows(adapter, 0, half), Slice(0, start + half, half)


def _rows(adapter: Adapter, start: int, length: int) -> Adapter:
    part = adapter.rows(start, length)
    if part is None:
        raise CannotSplitError.of("lora.cannot_split", kind=adapter.kind)
    return part
