"""Which parameters of a model a LoRA file changes, and what is left over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..adapters import Adapter, Slice, Term
from ..adapters.base import Shape
from ..adapters.files import LoraFile
from ..errors import LoraGuardError, LoraMismatchError, Message, about, reason
from ..files import shown
from .architecture import Architecture, accepts, detect_lora
from .names import NameMap
from .routes import Route


@dataclass
class Match:
    """`terms` by parameter name; `skipped` are keys the model has no place for, `lost` those that it has and that cannot
    be applied, each with the reason."""

    terms: dict[str, list[Term]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def match_file(file: LoraFile, names: NameMap, shapes: Mapping[str, Shape], strength: float, origin: int = 0) -> Match:
    """Everything the file says about this model, as terms. `shapes`: the model's parameters, as `names` was made from.

    Raises LoraMismatchError for a fused tensor of another size than the parts it is for.
    """
    match = Match(skipped=list(file.unknown_keys))
    taken: dict[tuple[str, Slice | None], str] = {}
    for (module, parameter), adapter in file.adapters.items():
        written = f"{module}.{parameter}"
        routes = []
        for route in names.routes(module):
            # A model may have the module without a bias.
            with contextlib.suppress(LoraMismatchError):
                routes.append((route, names.parameter(route.module, parameter)))
        if not routes:
            # IA3's output factors are for the bias too, where there is one.
            if parameter != "bias" or file.adapters.get((module, "weight")) is not adapter:
                match.skipped.append(written)
            continue
        _check_before_cutting(written, adapter, [route for route, _ in routes], shapes[routes[0][1]])
        for route, key in routes:
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
    """A sentence where the file was made for another kind of model, None where it may fit."""
    made_for = detect_lora(file.shapes, file.metadata)
    if made_for is None or model is None or accepts(model, made_for):
        return None
    return Message("lora.made_for", {"lora": made_for.value, "model": model.value})


class CannotSplitError(LoraGuardError, ValueError):
    """An adapter for a fused weight that cannot be taken apart for a model that has its parts."""


def _check_before_cutting(written: str, adapter: Adapter, routes: Sequence[Route], shape: Shape) -> None:
    """Raises LoraMismatchError unless what is to be cut into rows has these rows."""
    sources = [route.source for route in routes if route.source is not None]
    if not sources and not any(route.swap_halves for route in routes):
        return
    rows = max((source.start + source.length for source in sources), default=shape[0])
    if not sources and routes[0].part is not None:
        rows = routes[0].part.length
    try:
        adapter.check((rows, *shape[1:]), may_expand=False)
    except (LoraMismatchError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise LoraMismatchError.of("lora.other_model", key=shown(written), why=reason(error)) from None


def _pieces(adapter: Adapter, route: Route, rows: int) -> Iterator[tuple[Adapter, Slice | None]]:
    """The adapter on one route: the rows of the file's tensor, and where they go in a weight of `rows`."""
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
