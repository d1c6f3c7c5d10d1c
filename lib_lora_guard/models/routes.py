"""Maps rows of a tensor in a LoRA file to rows of a model's weights.

A model exists in two layouts: the authors' own (*original*) and that of diffusers. Some weights that are fused in one
layout (query, key, value in one) are separate in the other. The smallest units, the modules of the diffusers layout,
are called *atoms* here. Every name, in any spelling, stands for a sequence of atoms, top row first. A model defines
where each atom lies. Both together give the route, in either direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..adapters.base import Shape, Slice


class Route(NamedTuple):
    """One weight of the model that a tensor of the file addresses. The same rows hold for its bias."""

    module: str
    """The module's path in the model's own names, without ".weight"."""
    part: Slice | None = None
    """The addressed rows of the model's weight; None for all."""
    source: Slice | None = None
    """The rows of the file's (fused) tensor that belong to this module; None for all."""
    swap_halves: bool = False
    """The two halves of the rows are (scale, shift) in one layout and (shift, scale) in the other."""
    transposed: bool = False
    """The model's matrix has inputs by outputs, as open_clip stores `text_projection`."""

    @property
    def is_plain(self) -> bool:
        """True if the tensor of the file is for the addressed rows as it is."""
        return self.source is None and not self.swap_halves and not self.transposed


class Spelling(NamedTuple):
    """A name and the atoms it stands for. `swapped`: rows are (shift, scale) where diffusers has (scale, shift)."""

    name: str
    atoms: tuple[str, ...]
    swapped: bool = False


class _Place(NamedTuple):
    """The rows of one atom in a module of the model."""

    module: str
    start: int
    length: int
    swapped: bool


def both_ways(original: str, *atoms: str, swapped: bool = False) -> list[Spelling]:
    """Returns a spelling for an original name and one for each of its atoms."""
    return [Spelling(original, atoms, swapped), *[Spelling(atom, (atom,)) for atom in atoms]]


class Table:
    """All names of all modules of one component. Dots and underscores are equivalent unless that is ambiguous."""

    def __init__(self, modules: Mapping[str, Shape], spellings: Iterable[Spelling], paths: Mapping[str, str]) -> None:
        """Builds the table.

        Args:
            modules: The component's modules, without its prefix, and the real shapes of their weights.
            spellings: The known names.
            paths: The model's own name of each module.
        """
        known = {spelling.name: spelling for spelling in spellings}
        for name, spelling in list(known.items()):
            if name.endswith(".to_out.0"):  # diffusers' attention processors and Forge omit the ".0"
                known.setdefault(name[:-2], spelling)
        self._paths = paths
        self._places: dict[str, _Place] = {}
        self._rows = {module: shape[0] if shape else 0 for module, shape in modules.items()}
        own: dict[str, Spelling] = {}
        for module, shape in modules.items():
            spelling = known.pop(module) if module in known else Spelling(module, (module,))
            own[module] = spelling
            if len(spelling.atoms) == 1:
                self._places[spelling.atoms[0]] = _Place(module, 0, self._rows[module], spelling.swapped)
                continue
            start = 0
            for atom, length in zip(spelling.atoms, _lengths(len(spelling.atoms), shape), strict=True):
                self._places[atom] = _Place(module, start, length, spelling.swapped)
                start += length
        # The model's own names have the say over all others, and names with dots over those without.
        self._names: dict[str, Spelling | None] = {
            **_by_flat_name(known),
            **known,
            **_by_flat_name(own),
            **own,
        }

    def routes(self, name: str, flat: str) -> tuple[Route, ...]:
        """Returns the routes for a name without any prefix; () if this component has no such module.

        Args:
            name: The name as written.
            flat: The same with underscores instead of dots.
        """
        spelling = self._names.get(name) or self._names.get(flat)
        if spelling is not None:
            atoms, swapped = spelling.atoms, spelling.swapped
        elif name[-1:].isdecimal():
            atoms, swapped = self._numbered(name, flat), False
        else:
            return ()
        places = []
        for atom in atoms:
            place = self._places.get(atom)
            if place is None:
                return ()
            places.append(place)
        if len(places) <= 1:
            if not places:
                return ()
            (place,) = places
            part = None if place.length == self._rows[place.module] else _rows(place.start, place.length)
            return (Route(self._paths[place.module], part, None, swapped != place.swapped),)
        total = sum(place.length for place in places)
        routes: list[Route] = []
        offset = 0
        for place, length in _runs(places):
            whole = length == self._rows[place.module]
            part = None if whole else _rows(place.start, length)
            source = None if length == total else _rows(offset, length)
            routes.append(Route(self._paths[place.module], part, source, swapped != place.swapped))
            offset += length
        return tuple(routes)

    def _numbered(self, name: str, flat: str) -> tuple[str, ...]:
        """Returns the one atom of a fused module that a number addresses; () if the name has no such meaning.

        OneTrainer writes `qkv.0` for the query and `linear1.3` for the MLP (convert_flux_lora.py, convert_sd3_lora.py).
        """
        number = name[-1]
        if name[-2:-1] not in (".", "_"):
            return ()
        whole = self._names.get(name[:-2]) or self._names.get(flat[:-2])
        if whole is None or not int(number) < len(whole.atoms) or len(whole.atoms) == 1:
            return ()
        return (whole.atoms[int(number)],)


@lru_cache(maxsize=256)
def _rows(start: int, length: int) -> Slice:
    return Slice(0, start, length)


def _by_flat_name(spelled: Mapping[str, Spelling]) -> dict[str, Spelling | None]:
    flat: dict[str, Spelling | None] = {name.replace(".", "_"): spelling for name, spelling in spelled.items()}
    if len(flat) == len(spelled):
        return flat
    flat = {}
    for name, spelling in spelled.items():
        # Names that differ only in dots but have different meanings are ambiguous: neither is chosen.
        short = flatten(name)
        known = flat.setdefault(short, spelling)
        if known is not spelling and (
            known is None or (known.atoms, known.swapped) != (spelling.atoms, spelling.swapped)
        ):
            flat[short] = None
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
    """Returns the rows of each atom of a weight: all, query, key and value, or those and an MLP (Flux `linear1`).

    The query is as wide as the input. Key and value share the rest: as much each, or less in grouped attention (Lumina).
    """
    rows = shape[0] if shape else 0
    if count == 4:
        return (*(shape[1],) * 3, rows - 3 * shape[1])
    if count == 3 and len(shape) > 1 and 0 < rows - shape[1] < 2 * shape[1]:
        return (shape[1], *((rows - shape[1]) // 2,) * 2)
    return (rows // count,) * count


def flatten(name: str) -> str:
    """Replaces dots by underscores, as kohya's names have it."""
    return name.replace(".", "_")


class Modules(dict[str, Shape]):
    """Modules of a component and their shapes, with the first parts of their names."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__(shapes)
        self.tops = {name.partition(".")[0] for name in shapes}


def numbers(modules: Iterable[str], head: str) -> list[int]:
    """Returns the sorted block numbers n of all modules `head.n.*`."""
    if isinstance(modules, Modules) and head.partition(".")[0] not in modules.tops:
        return []
    start = head + "."
    at = len(start)
    found = {name[at:].partition(".")[0] for name in modules if name.startswith(start)}
    return sorted(int(number) for number in found if number.isdecimal())
