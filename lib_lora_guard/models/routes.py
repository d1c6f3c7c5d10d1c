"""Where the rows of a tensor in a LoRA file go in a model.

A model exists in two layouts: the authors' own (*original*) and that of diffusers. Where one layout has a fused weight
(query, key, value in one), the other has several. The smallest pieces, which are the modules of the diffusers layout,
are called *atoms* here. Every name, in whatever spelling, stands for a run of atoms, top row first; a model says where
each atom lies. A route follows from the two, in either direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..adapters.base import Shape, Slice


@dataclass(frozen=True)
class Route:
    """One weight of the model that a tensor of the file speaks about. The same rows hold for its bias."""

    module: str
    """Module path in the model's own names, without ".weight"."""
    part: Slice | None = None
    """The rows of the model's weight that are addressed; None for all."""
    source: Slice | None = None
    """The rows of the file's (fused) tensor that belong to this module; None for all."""
    swap_halves: bool = False
    """The two halves of the rows are (scale, shift) on one side and (shift, scale) on the other."""


@dataclass(frozen=True)
class Spelling:
    """A name and the atoms it stands for. `swapped`: rows are (shift, scale), where diffusers has (scale, shift)."""

    name: str
    atoms: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class _Place:
    module: str
    start: int
    length: int
    swapped: bool


def both_ways(original: str, *atoms: str, swapped: bool = False) -> Iterator[Spelling]:
    """An original name and the atoms it consists of, each under its own name too."""
    yield Spelling(original, atoms, swapped)
    for atom in atoms:
        yield Spelling(atom, (atom,))


class Table:
    """Every name for every module of one component. Dots and underscores count as equal where that is unambiguous."""

    def __init__(self, prefix: str, modules: Mapping[str, Shape], spellings: Iterable[Spelling]) -> None:
        """`modules`: the component's own modules, without `prefix`, and the real shapes of their weights."""
        self._prefix = prefix
        self._spellings = {spelling.name: spelling for spelling in spellings}
        for name, spelling in list(self._spellings.items()):
            if name.endswith(".to_out.0"):  # what diffusers' attention processors and Forge call it
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
        """Routes for a name without any prefix; () where this component has no such part."""
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
        # Two names that differ in dots alone and mean different things cannot be told apart: neither is guessed.
        known = flat.setdefault(flatten(name), spelling)
        if known is None or (known.atoms, known.swapped) != (spelling.atoms, spelling.swapped):
            flat[flatten(name)] = None
    return flat


def _runs(places: Iterable[_Place]) -> list[tuple[_Place, int]]:
    """Neighbours in one weight as one run: its first place and its number of rows."""
    runs: list[tuple[_Place, int]] = []
    for place in places:
        if runs and runs[-1][0].module == place.module and runs[-1][0].start + runs[-1][1] == place.start:
            runs[-1] = runs[-1][0], runs[-1][1] + place.length
        else:
            runs.append((place, place.length))
    return runs


def _lengths(count: int, shape: Shape) -> tuple[int, ...]:
    """Rows of each atom of a weight: all, equal thirds (query, key, value), or those and an MLP (Flux `linear1`)."""
    rows = shape[0] if shape else 0
    if count == 4:
        return (*(shape[1],) * 3, rows - 3 * shape[1])
    return (rows // count,) * count


def flatten(name: str) -> str:
    return name.replace(".", "_")


def numbers(modules: Iterable[str], head: str) -> list[int]:
    """The block numbers n of all modules `head.n.*`, in order."""
    found = {name[len(head) + 1 :].partition(".")[0] for name in modules if name.startswith(head + ".")}
    return sorted(int(number) for number in found if number.isdigit())
