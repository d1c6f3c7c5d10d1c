"""Maps rows of a tensor in a LoRA file to rows of a model's weights.

A model exists in two layouts: the authors' own (*original*) and that of diffusers. Some weights that are fused in one
layout (query, key, value in one) are separate in the other. The smallest units, the modules of the diffusers layout,
are called *atoms* here. Every name, in any spelling, stands for a sequence of atoms, top row first. A model defines
where each atom lies. Both together give the route, in either direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..adapters.base import Shape, Slice


@dataclass(frozen=True)
class Route:
    """One weight of the model that a tensor of the file addresses. The same rows hold for its bias."""

    module: str
    """The module's path in the model's own names, without ".weight"."""
    part: Slice | None = None
    """The addressed rows of the model's weight; None for all."""
    source: Slice | None = None
    """The rows of the file's (fused) tensor that belong to this module; None for all."""
    swap_halves: bool = False
    """The two halves of the rows are (scale, shift) in one layout and (shift, scale) in the other."""


@dataclass(frozen=True)
class Spelling:
    """A name and the atoms it stands for. `swapped`: rows are (shift, scale) where diffusers has (scale, shift)."""

    name: str
    atoms: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class _Place:
    """The rows of one atom in a module of the model."""

    module: str
    start: int
    length: int
    swapped: bool


def both_ways(original: str, *atoms: str, swapped: bool = False) -> Iterator[Spelling]:
    """Yields a spelling for an original name and one for each of its atoms."""
    yield Spelling(original, atoms, swapped)
    for atom in atoms:
        yield Spelling(atom, (atom,))


class Table:
    """All names of all modules of one component. Dots and underscores are equivalent unless that is ambiguous."""

    def __init__(self, prefix: str, modules: Mapping[str, Shape], spellings: Iterable[Spelling]) -> None:
        """Builds the table.

        Args:
            prefix: The component's prefix in the model.
            modules: The component's modules, without `prefix`, and the real shapes of their weights.
            spellings: The known names.
        """
        self._prefix = prefix
        self._spellings = {spelling.name: spelling for spelling in spellings}
        for name, spelling in list(self._spellings.items()):
            if name.endswith(".to_out.0"):  # diffusers' attention processors and Forge omit the ".0"
                self._spellings.setdefault(name[:-2], spelling)
        for module in modules:
            self._spellings.setdefault(module, Spelling(module, (module,)))
        self._places: dict[str, _Place] = {}
        self._rows = {module: shape[0] if shape else 0 for module, shape in modules.items()}
        for module, shape in modules.items():
            spelling, start = self._spellings[module], 0
            for atom, length in zip(spelling.atoms, _lengths(len(spelling.atoms), shape), strict=True):
                self._places[atom] = _Place(module, start, length, spelling.swapped)
                start += length
        self._flat: dict[str, Spelling | None] = {}
        own = {name: self._spellings[name] for name in modules}
        for spelled in (own, {name: s for name, s in self._spellings.items() if name not in own}):
            self._flat = {**_by_flat_name(spelled), **self._flat}

    def routes(self, name: str) -> tuple[Route, ...]:
        """Returns the routes for a name without any prefix; () if this component has no such module."""
        spelling = self._spellings.get(name) or self._flat.get(flatten(name))
        if spelling is None or any(atom not in self._places for atom in spelling.atoms):
            return ()
        places = [self._places[atom] for atom in spelling.atoms]
        total = sum(place.length for place in places)
        routes: list[Route] = []
        offset = 0
        for place, length in _runs(places):
            whole = length == self._rows[place.module]
            part = None if whole else Slice(0, place.start, length)
            source = None if length == total else Slice(0, offset, length)
            routes.append(Route(self._prefix + place.module, part, source, spelling.swapped != place.swapped))
            offset += length
        return tuple(routes)


def _by_flat_name(spelled: Mapping[str, Spelling]) -> dict[str, Spelling | None]:
    flat: dict[str, Spelling | None] = {}
    for name, spelling in spelled.items():
        # Names that differ only in dots but have different meanings are ambiguous: neither is chosen.
        known = flat.setdefault(flatten(name), spelling)
        if known is None or (known.atoms, known.swapped) != (spelling.atoms, spelling.swapped):
            flat[flatten(name)] = None
    return flat


def _runs(places: Iterable[_Place]) -> list[tuple[_Place, int]]:
    """Joins neighbouring rows of one weight; returns the first place and the number of rows of each run."""
    runs: list[tuple[_Place, int]] = []
    for place in places:
        if runs and runs[-1][0].module == place.module and runs[-1][0].start + runs[-1][1] == place.start:
            runs[-1] = runs[-1][0], runs[-1][1] + place.length
        else:
            runs.append((place, place.length))
    return runs


def _lengths(count: int, shape: Shape) -> tuple[int, ...]:
    """Returns the rows of each atom of a weight: all, equal thirds (query, key, value), or those and an MLP (Flux
    `linear1`).
    """
    rows = shape[0] if shape else 0
    if count == 4:
        return (*(shape[1],) * 3, rows - 3 * shape[1])
    return (rows // count,) * count


def flatten(name: str) -> str:
    """Replaces dots by underscores, as kohya's names have it."""
    return name.replace(".", "_")


def numbers(modules: Iterable[str], head: str) -> list[int]:
    """Returns the sorted block numbers n of all modules `head.n.*`."""
    found = {name[len(head) + 1 :].partition(".")[0] for name in modules if name.startswith(head + ".")}
    return sorted(int(number) for number in found if number.isdigit())
