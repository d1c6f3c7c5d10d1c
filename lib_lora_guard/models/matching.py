"""Matches the tensors of a LoRA file with the parameters of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters import Adapter, Slice, Term
from ..adapters.base import Shape
from ..adapters.files import LoraFile
from ..adapters.fitting import Blame, Misfit, blame_of
from ..errors import LoraGuardError, LoraMismatchError, Message, about, reason
from ..files import shown
from .architecture import Architecture, accepts, detect_lora
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
    written: dict[str, list[str]] = field(default_factory=dict)
    """The keys of the file by parameter name."""


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
    taken: dict[tuple[str, Slice | None], str] = {}
    for (module, parameter), adapter in file.adapters.items():
        written = f"{module}.{parameter}"
        routes = []
        for route in names.routes(module):
            # The model may have the module without a bias.
            with contextlib.suppress(LoraMismatchError):
                routes.append((route, names.parameter(route.module, parameter)))
        if not routes:
            # IA3's output factors apply to the bias too, if there is one.
            if parameter != "bias" or file.adapters.get((module, "weight")) is not adapter:
                match.skipped.append(written)
            continue
        wrong = _misfit_before_cutting(adapter, [route for route, _ in routes], shapes[routes[0][1]])
        if wrong is not None:
            match.misfits.append((shown(written), wrong))
            continue
        for route, key in routes:
            match.written.setdefault(key, []).append(written)
            if (key, route.part) in taken:
                match.lost.append(about(written, Message("lora.said_already", {"other": taken[key, route.part]})))
                continue
            taken[key, route.part] = written
            try:
                pieces = list(_pieces(adapter, route, shapes[key][0]))
            except CannotSplitError as error:
                match.lost.append(about(written, reason(error)))
                continue
            match.terms.setdefault(key, []).extend(Term(a, strength, part=p, origin=origin) for a, p in pieces)
    return match


def foreign_to(file: LoraFile, model: Architecture | None) -> str | None:
    """Returns the reason if the file was made for another architecture than `model`; None if it may fit."""
    made_for = detect_lora(file.shapes, file.metadata)
    if made_for is None or model is None or accepts(model, made_for):
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


def _pieces(adapter: Adapter, route: Route, rows: int) -> Iterator[tuple[Adapter, Slice | None]]:
    """Yields the parts of the adapter for one route, each with its rows in a weight of `rows` rows."""
    if route.source is not None:
        adapter = _rows(adapter, route.source.start, route.source.length)
    if not route.swap_halves:
        yield adapter, route.part
        return
    start, half = (0, rows // 2) if route.part is None else (route.part.start, route.part.length // 2)
    yield _rows(adapter, half, half), Slice(0, start, half)
    yield _rows(adapter, 0, half), Slice(0, start + half, half)


def _rows(adapter: Adapter, start: int, length: int) -> Adapter:
    part = adapter.rows(start, length)
    if part is None:
        raise CannotSplitError.of("lora.cannot_split", kind=adapter.kind)
    return part
