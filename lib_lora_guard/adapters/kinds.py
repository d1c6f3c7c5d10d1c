"""The registry of adapter kinds: how LoRA files and Forge's patches write each of them.

A kind lives in one module of this package. Its class answers for itself (fit, patch, cheap form, costs); at its end the
module calls `register` with what must be known before there is an adapter. `adapters/__init__.py` imports the module.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

from .base import Adapter, Shape
from .file_settings import PeftSettings

Size = tuple[int | None, int | None]
"""`(outputs, inputs)` of a module; None for a number that the file does not show."""
Fields = dict[str, Any]
"""Tensors and numbers by the names of an adapter's fields."""

SHARED_KEYS = {"alpha": "alpha", "scalar": "scalar", "dora_scale": "magnitude", "magnitude": "row_magnitude"}
"""Ends of names whose tensor belongs to the adapter of the module, of any kind. ai-toolkit calls the magnitudes of the rows `magnitude`."""
SHARED_PEFT_KEYS = {"lora_magnitude_vector": "row_magnitude", "lora_magnitude_vector.weight": "row_magnitude"}
"""The same in PEFT's spelling. PEFT's magnitudes are always those of the rows, whatever their shape looks like."""
MOST_PARTS = 3
"""The longest end of a name, in parts between dots: `lora_linear_layer.up.weight`."""


@dataclass(frozen=True)
class Found:
    """Everything a file has for one module in the spelling of one kind.

    Attributes:
        module: its name as written in the file.
        fields: the tensors of the kind's own keys.
        shared: `alpha` (a number) and `magnitude` (a tensor), where the file has them.
        settings: the PEFT configuration for the module; empty if there is none.
        weight: the adapter of the module's weight, for kinds that change the bias.
    """

    module: str
    fields: Fields
    shared: Fields
    settings: PeftSettings
    weight: Adapter | None = None


@dataclass(frozen=True)
class HostTuple:
    """The layout of an adapter in a patch of Forge: the order of its fields.

    Attributes:
        adapter: the class.
        required: fields that every patch has.
        optional: fields that may be missing at the end.
    """

    adapter: type[Adapter]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def read(self, content: Sequence[Any]) -> Adapter:
        """Makes the adapter of a patch's content.

        Raises:
            TypeError: there are too few fields, or more than the kind has.
        """
        names = (*self.required, *self.optional)
        # LayerDiffuse's patches are lists of 16 places, the unused ones None (`load_frozen_patcher` in Forge
        # `backend/patcher/unet.py`).
        if all(place is None for place in content[len(names) :]):
            content = content[: len(names)]
        if not len(self.required) <= len(content) <= len(names):
            wanted = f"{len(self.required)} to {len(names)}" if self.optional else str(len(names))
            raise TypeError(f"{wanted} are expected, found {len(content)}")
        values = dict(zip(names, content, strict=False))
        if values.get("alpha") is not None:
            values["alpha"] = float(values["alpha"])
        return self.adapter(**values)

    def write(self, adapter: Adapter) -> tuple[Any, ...] | None:
        """The patch's content for `adapter`; None if it has a field in use that Forge has no place for."""
        names = (*self.required, *self.optional)
        beside = (f for f in fields(adapter) if f.name not in names and f.default is not MISSING)
        beside = (f for f in beside if not f.metadata.get("beside_the_host"))
        if any(getattr(adapter, f.name) != f.default for f in beside):
            return None
        return tuple(getattr(adapter, name) for name in names)


@dataclass(frozen=True, eq=False)
class Kind:
    """One spelling of an adapter in LoRA files. Trainers that spell one adapter differently make several kinds.

    Attributes:
        name: unique; errors about a file show it, and Forge's patches use it where there is a `host` tuple.
        make: makes the adapter of a module. It may raise TypeError or KeyError for a missing field, LoraFileError
            with a whole sentence, and for factors of impossible shapes LoraMismatchError, IndexError, RuntimeError or
            ZeroDivisionError.
        keys: the field that a tensor is, by the end of its name (`hada_w1_a`); at most three parts between dots.
        peft_keys: the same for names into which PEFT may put its adapter's name (`lora_A.style.weight`).
        claim: recognises a name that no key fits: takes it and all names of the file, returns module and field.
        numbers: fields that hold one number and may be integers; they are read with the header.
        integers: fields that hold whole numbers, in tensors of any size.
        parameter: the parameter of the module that changes, "weight" or "bias".
        host: the layout in Forge's patches; None if Forge does not have this kind.
        size: `(outputs, inputs)` of a module from the shapes of its fields; None if they do not show it.
        settle: takes all adapters of a file, by module and parameter, and returns them, with what a single one does not tell
            put right; None where each tells all.
    """

    name: str
    make: Callable[[Found], Adapter]
    keys: Mapping[str, str] = field(default_factory=dict)
    peft_keys: Mapping[str, str] = field(default_factory=dict)
    claim: Callable[[str, Container[str]], tuple[str, str] | None] | None = None
    numbers: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()
    parameter: str = "weight"
    host: HostTuple | None = None
    size: Callable[[Mapping[str, Shape]], Size] | None = None
    settle: Callable[[Mapping[tuple[str, str], Adapter]], Mapping[tuple[str, str], Adapter]] | None = None


class KeyEnd(NamedTuple):
    """The end of a tensor's name, which says what it is.

    Attributes:
        characters: its length, with the dot before it.
        kind: None for fields that belong to whichever kind the module has.
        field: of the kind's adapter.
    """

    characters: int
    kind: Kind | None
    field: str


class Registry:
    """All kinds, indexed by what readers of files and patches look for."""

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self.keys: dict[str, tuple[Kind | None, str]] = {}
        """Kind (None for shared fields) and field by the end of a name."""
        self.ends: dict[tuple[str, ...], KeyEnd | None] = {}
        """What the last parts of names mean, as `file_keys` has found; forgotten when a kind comes or goes."""
        self.peft_keys: frozenset[str] = frozenset()
        """The ends into which PEFT may put its adapter's name."""
        self.peft_heads: frozenset[str] = frozenset()
        """The first parts of these."""
        self.claims: tuple[Kind, ...] = ()
        self.host: dict[str, HostTuple] = {}
        """The layout of Forge's patches by their names. Forge's own reader knows these kinds and no others."""
        self._index()

    def register(self, kind: Kind) -> None:
        """Adds a kind.

        Raises:
            ValueError: its name or one of its keys is taken, or a key has more parts than are looked at.
        """
        for key in (*kind.keys, *kind.peft_keys):
            if key in self.keys or key.count(".") >= MOST_PARTS:
                raise ValueError(
                    f"adapter kind {kind.name!r}: the key {key!r} is taken, or longer than {MOST_PARTS} parts"
                )
        if kind.name in self._kinds:
            raise ValueError(f"an adapter kind {kind.name!r} is registered already")
        self._kinds[kind.name] = kind
        self._index()

    def unregister(self, name: str) -> None:
        """Removes a kind; its keys are unknown again.

        Raises:
            KeyError: there is none of this name.
        """
        del self._kinds[name]
        self._index()

    def host_name(self, adapter: Adapter) -> str | None:
        """The name under which Forge has adapters of this class; None if it has none."""
        return next((name for name, layout in self.host.items() if layout.adapter is type(adapter)), None)

    def _index(self) -> None:
        kinds = tuple(self._kinds.values())
        self.ends = {}
        self.keys = {key: (None, name) for key, name in (SHARED_KEYS | SHARED_PEFT_KEYS).items()}
        for kind in kinds:
            self.keys.update((key, (kind, name)) for key, name in (*kind.keys.items(), *kind.peft_keys.items()))
        self.peft_keys = frozenset(SHARED_PEFT_KEYS).union(*(kind.peft_keys for kind in kinds))
        self.peft_heads = frozenset(key.partition(".")[0] for key in self.peft_keys)
        self.claims = tuple(kind for kind in kinds if kind.claim is not None)
        self.host = {kind.name: kind.host for kind in kinds if kind.host is not None}


KINDS = Registry()
"""The one registry of the process. Imports of the kinds' modules fill it."""
register = KINDS.register
unregister = KINDS.unregister
