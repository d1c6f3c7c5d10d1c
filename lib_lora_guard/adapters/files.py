"""Reads LoRA files into adapters, one per weight. The file is closed again before any adapter is made.

Files are safetensors only: a pickle can run any code. `file_keys` knows the names, `file_settings` the settings beside
the tensors, and each kind makes its own adapters (`kinds`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

from ..errors import FileFormatError, Joined, LoraFileError, LoraMismatchError, Message, about, reason
from ..files import (
    LARGE_FILE_BYTES,
    ComingInOnePiece,
    FileHeader,
    TableLimits,
    TensorEntry,
    container_of,
    open_header,
    prepare_tensors,
    read_tensors,
    read_unchanged,
    shown,
)
from ..files.header_tensor import header_tensors
from ..lazy_torch import torch
from ..units import GB, MB
from .base import Adapter, check_values
from .file_groups import Group, Tensors, group
from .file_keys import meaning_of
from .file_settings import FileSettings, settings_of
from .finite import PATTERNS, may_not_be_finite
from .kinds import Fields, Found, Kind
from .lora import LoraAdapter
from .other_kinds import other_kind
from .ranked import RankedAdapter
from .stated_alpha import notes_on_alpha, with_ranks
from .whole_weights import whole_weights

log = logging.getLogger(__name__)

Room = Callable[[int], "int | None"]
"""Takes the bytes that a file needs; returns the RAM in bytes that it may take, None where the system does not say."""

LARGEST_TABLE = TableLimits(tensors=1 << 14, characters=4_000_000)
"""Real LoRAs have up to 9000 tensors (eight for each of 1120 modules), named and described in 1 MB. A tensor takes up to 3.5 KB
beside its values."""
LONGEST_SETTINGS = 1 << 20
"""Characters of PEFT's settings in the metadata. With a rank and an alpha for each of 1120 modules they have 200,000."""
UNCOUNTED_BYTES = 64 * MB
"""Smaller files are read without asking for the RAM that is free, which takes milliseconds."""
NO_NUMBERS = ("F4", "F6_E2M3", "F6_E3M2")
"""Formats that torch cannot calculate with."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The content of one file.

    Attributes:
        path: the file.
        adapters: by module name as written in the file, and "weight" or "bias".
        unknown_keys: names of tensors that are not used.
        shapes: of all tensors, by their names in the file. They tell which model the file was made for.
        metadata: the text entries of its header.
        lost: those of `unknown_keys` that change the model where they are heeded, each with the reason.
        notes: sentences for users on what the file says and how it was taken.
        keys: names of tensors by module, both as written in the file.
        coming: the values that are still being read; None for a file that was there whole.
    """

    path: Path
    adapters: Mapping[tuple[str, str], Adapter]
    unknown_keys: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, Message] = field(default_factory=dict)
    notes: tuple[Message, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    coming: ComingInOnePiece | None = None

    def wait(self) -> None:
        """Waits until all values are there.

        Raises:
            LoraFileError: the file cannot be read, was changed meanwhile, or has a value that is not finite.
        """
        if self.coming is not None:
            _wait_for(self.coming)

    def waiting(self) -> Callable[[], None] | None:
        """Returns what does as `wait` for who must not keep the file; None if the values are there."""
        coming = self.coming
        return None if coming is None or (coming.is_done and not coming.has_failed) else partial(_wait_for, coming)

    def adapters_by_module(self) -> list[str]:
        """The modules that have adapters, in the order of the file."""
        return list(dict.fromkeys(module for module, _ in self.adapters))

    def spelled(self, written: str) -> str:
        """A name that is in the file, for a module and its parameter (`lora_unet_x.weight`)."""
        return next(iter(self.keys.get(written.rpartition(".")[0], ())), written)


def _wait_for(coming: ComingInOnePiece) -> None:
    with _as_lora_errors():
        coming.wait()


def read_lora_file(
    path: str | Path, as_trained: bool = False, room: Room | None = None, *, values_may_follow: bool = False
) -> LoraFile:
    """Reads a LoRA file into memory of our own and closes it.

    The header is judged first: a file that is no LoRA, contradicts itself or is larger than `room` costs no more than its
    header. Tensors that no kind knows are not read. A file that is written to meanwhile is read again.

    Args:
        path: a safetensors file.
        as_trained: DoRA in the meaning of its trainer where the host's differs.
        room: asked for files of `UNCOUNTED_BYTES` and more.
        values_may_follow: threads may still read the values of a large file of plain LoRAs. Whoever needs them calls
            `LoraFile.wait`. `LORA_GUARD_READ_AHEAD=0` in the environment: never.

    Raises:
        LoraFileError: the file is missing, broken, no LoRA or too large; the message names it and says what to do.
    """
    with _as_lora_errors():
        file = read_unchanged(Path(path), lambda: _read(path, as_trained, room, values_may_follow))
    for note in file.notes:
        log.warning("%s", about(shown(file.path.name), note))
    return file


def _read(path: str | Path, as_trained: bool, room: Room | None, values_may_follow: bool) -> LoraFile:
    header = open_lora(path)
    settings = settings_of(header.path, header.metadata)
    if values_may_follow and (file := _with_values_that_follow(header, settings, room)) is not None:
        return file
    tensors = _without_values(header)
    unknown = _parsed(header, tensors, settings=settings).unknown_keys
    wanted = header.tensors.keys() - set(unknown)
    check_room(header, sum(header.tensors[name].bytes for name in wanted), room)
    # Of the others the shapes are enough: they tell which model the file was made for.
    return _parsed(header, {**tensors, **read_tensors(header, wanted)}, as_trained, settings)


def _with_values_that_follow(header: FileHeader, settings: FileSettings, room: Room | None) -> LoraFile | None:
    """Makes the adapters of a large file of plain LoRAs, whose values are being read when it returns; None for others.

    Raises:
        LoraFileError: the file contradicts itself, or there is no room for it.
    """
    numbers = dict.fromkeys(name for name, entry in header.tensors.items() if _is_number(name, entry.shape))
    following = [entry for entry in header.tensors.values() if entry.name not in numbers]
    size = sum(entry.bytes for entry in following)
    if size < LARGE_FILE_BYTES or os.environ.get("LORA_GUARD_READ_AHEAD") == "0":
        return None
    formats = {entry.format for entry in following}
    if len(formats) > 1 or not formats <= PATTERNS.keys():
        return None
    if not all(_is_plain_factor(entry.name, header.tensors) for entry in following):
        return None
    check_room(header, size, room)
    names = [entry.name for entry in following]
    found = prepare_tensors(header, names, lambda piece, raw: _check(header.path, piece, raw, values))
    if found is None:
        return None
    values, coming = found
    there = _numbers_of(header, numbers)
    try:
        # In the order of the header.
        tensors = {name: there[name] if name in there else values[name] for name in header.tensors}
        file = _parsed(header, tensors, settings=settings, unread=values.keys())
    except LoraFileError:
        # Said by the usual way, which has looked at everything.
        return None
    if file.unknown_keys or not holds_only_views(file.adapters.values(), coming):
        return None
    coming.start()
    return replace(file, coming=coming)


def _is_plain_factor(name: str, names: Container[str]) -> bool:
    """True for `up` and `down` of a LoRA: no adapter is made otherwise for the values that they have."""
    meaning = meaning_of(name, names)
    return (
        meaning is not None
        and meaning.kind is not None
        and meaning.kind.name == LoraAdapter.kind
        and meaning.field in ("up", "down")
    )


def holds_only_views(adapters: Iterable[Adapter], coming: ComingInOnePiece) -> bool:
    """True if adapters have nothing that was computed from values that were not there yet.

    Args:
        adapters: of one file, or of its terms on a model.
        coming: the file's.
    """
    adapters = list(adapters)
    are_plain = all(type(one) is LoraAdapter and not one.is_dora for one in adapters)
    return are_plain and coming.holds(tensor for one in adapters for tensor in one.tensors())


def _check(path: Path, piece: Sequence[TensorEntry], raw: torch.Tensor, values: Tensors) -> None:
    """Raises LoraFileError for the first tensor of a piece that has a value that is not finite."""
    if not may_not_be_finite(raw, piece[0].format):
        return
    for entry in piece:
        try:
            check_values(values[entry.name])
        except LoraMismatchError as error:
            raise _refusal(shown(path.name), about(shown(entry.name), reason(error))) from None


def check_room(header: FileHeader, needed_bytes: int, room: Room | None) -> None:
    """Compares what is about to be read with the RAM that there is for it.

    Args:
        header: the file's header.
        needed_bytes: the tensors' bytes.
        room: as in `read_lora_file`.

    Raises:
        LoraFileError: the tensors do not fit.
    """
    room_bytes = None if room is None or needed_bytes < UNCOUNTED_BYTES else room(needed_bytes)
    if room_bytes is not None and needed_bytes > room_bytes:
        facts = {
            "needed_mb": needed_bytes / MB,
            "room_mb": room_bytes / MB,
            "more_gb": math.ceil((needed_bytes - room_bytes) / GB),
        }
        raise _refusal(shown(header.path.name), Message("lora.too_large", facts))


def open_lora(path: str | Path) -> FileHeader:
    """Reads the header of a LoRA file.

    Raises:
        LoraFileError: the file is missing, broken or no safetensors file, or its header is far larger than a LoRA's.
    """
    path = Path(path)
    with _as_lora_errors():
        container = container_of(path)
        if container != "safetensors":
            raise _refusal(shown(path.name), Message("lora.container", {"container": container}))
        header = open_header(path, LARGEST_TABLE)
    settings = header.metadata.get("lora_adapter_metadata", "")
    if len(settings) > LONGEST_SETTINGS:
        facts = {"found": len(settings), "most": LONGEST_SETTINGS}
        raise _refusal(shown(path.name), Message("lora.settings_too_long", facts))
    return header


def lora_of_header(header: FileHeader) -> LoraFile:
    """Makes adapters of a header, without torch: they hold `HeaderTensor`s, which have shapes and dtypes.

    Only the single numbers (alpha) are read from the file.

    Raises:
        LoraFileError: the file is no LoRA, contradicts itself or cannot be read.
    """
    return _parsed(header, _without_values(header))


def _without_values(header: FileHeader) -> Tensors:
    """The tensors of a header; those that an adapter holds as numbers have their value."""
    for name, entry in header.tensors.items():
        if entry.format in NO_NUMBERS and meaning_of(name, header.tensors) is not None:
            raise _refusal(
                shown(header.path.name), about(shown(name), Message("lora.packed", {"format": entry.format}))
            )
    numbers = [name for name, entry in header.tensors.items() if _is_number(name, entry.shape)]
    with _as_lora_errors():
        tensors = header_tensors(header, numbers)
    # Adapters take them for tensors of torch: a HeaderTensor acts as one.
    return cast(Tensors, tensors)


def _numbers_of(header: FileHeader, numbers: Iterable[str]) -> Tensors:
    """The tensors that an adapter holds as numbers, alone."""
    with _as_lora_errors():
        return cast(Tensors, header_tensors(header, numbers, only_numbers=True))


def _parsed(
    header: FileHeader,
    tensors: Tensors,
    as_trained: bool = False,
    settings: FileSettings | None = None,
    unread: Container[str] = (),
) -> LoraFile:
    settings = settings or settings_of(header.path, header.metadata)
    return replace(parse_tensors(header.path, tensors, settings, as_trained, unread), metadata=header.metadata)


@contextmanager
def _as_lora_errors() -> Iterator[None]:
    try:
        yield
    except LoraFileError:
        raise
    except FileFormatError as error:
        raise LoraFileError(reason(error)) from error


def _is_number(name: str, shape: tuple[int, ...]) -> bool:
    """True for a tensor of one value that an adapter holds as a number."""
    meaning = meaning_of(name) if math.prod(shape) == 1 else None
    return meaning is not None and (meaning.kind is None or meaning.field in meaning.kind.numbers)


def parse_tensors(
    path: Path,
    tensors: Tensors,
    settings: FileSettings | None = None,
    as_trained: bool = False,
    unread: Container[str] = (),
) -> LoraFile:
    """Makes the adapters of one file.

    Args:
        path: only its name is used, in messages.
        tensors: all of the file, by name.
        settings: the PEFT configurations that belong to it.
        as_trained: DoRA in the meaning of its trainer where the host's differs.
        unread: names of tensors whose values are not there yet, and are not looked at.

    Raises:
        LoraFileError: the file contradicts itself, or holds no LoRA.
    """
    settings = settings or FileSettings({})
    name = shown(path.name)
    groups, unknown = group(name, tensors, unread)
    why = settings.refusal() or other_kind(unknown if groups else tensors)
    if why is not None:
        raise _refusal(name, why)
    if any("alpha" in one.shared for one in groups):
        settings = settings.without_stated()
    adapters: dict[tuple[str, str], Adapter] = {}
    lost: dict[str, Message] = {}

    def put(module: str, parameter: str, adapter: Adapter) -> None:
        if (module, parameter) in adapters:
            raise _refusal(name, Message("lora.two_changes", {"module": shown(module), "parameter": parameter}))
        adapters[module, parameter] = adapter

    for one in groups:
        if not one.kinds:
            # Without these scales the module's own factors would be applied too strong.
            lost.update(dict.fromkeys(one.keys.values(), Message("lora.lonely")))
            continue
        if len(one.kinds) > 1:
            lost.update(_leave_out(name, one))
        numbers, weight, own = _shared_fields(one.shared), None, settings.of(one.module)
        # The weight's adapter comes first: kinds for the bias ask it for its scale.
        for kind in sorted(one.kinds, key=_changes_the_bias) if len(one.kinds) > 1 else one.kinds:
            adapter = _make(name, kind, Found(one.module, one.kinds[kind], numbers, own, weight))
            if "scalar" in one.shared or one.times != 1:
                adapter = _scaled(name, kind, one, adapter)
            if as_trained:
                adapter = adapter.with_dora_as_trained()
            put(one.module, kind.parameter, adapter)
            if kind.parameter == "weight":
                weight = adapter
        if weight is not None and weight.covers_bias:
            put(one.module, "bias", weight)
    if not adapters:
        raise _refusal(name, Message("lora.none", {"count": len(tensors), "first": shown(next(iter(tensors), "-"))}))
    for settle in {kind.settle for one in groups for kind in one.kinds if kind.settle is not None}:
        adapters = dict(settle(adapters))
    if (completed := with_ranks(settings, adapters)) is not settings:
        return parse_tensors(path, tensors, completed, as_trained, unread)
    whole = whole_weights(name, unknown, tensors, adapters, settings)
    adapters.update(whole.adapters)
    lost.update(whole.lost)
    unused = lost.keys() | (set(unknown) - whole.keys.keys())
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return LoraFile(
        path,
        adapters,
        tuple(key for key in tensors if key in unused) if unused else (),
        shapes,
        lost=lost,
        notes=(*settings.notes, *notes_on_alpha(settings, adapters)),
        keys={one.module: tuple(one.keys.values()) for one in groups} | whole.by_module(),
    )


def _changes_the_bias(kind: Kind) -> bool:
    return kind.parameter != "weight"


def _leave_out(name: str, one: Group) -> dict[str, Message]:
    """Leaves out what a whole tensor of the same module stands in place of; returns the keys with the reason.

    Forge and ComfyUI take the last of LoRA, difference and replacement (`load_lora`).

    Raises:
        LoraFileError: the module has two kinds of which none is whole.
    """
    weights = one.of_weight()
    if len(weights) < 2:
        return {}
    counts = next((kind for end in ("set", "diff") for kind in weights if kind.name == end), None)
    if counts is None:
        spelled = Joined(sorted(kind.name for kind in weights), "list.and")
        raise _refusal(name, Message("lora.two_kinds", {"module": shown(one.module), "kinds": spelled}))
    left = [kind for kind in weights if kind is not counts]
    why = Message("lora.difference_counts", {"kind": counts.name, "module": shown(one.module)})
    keys = {key: why for (kind, _), key in one.keys.items() if kind is None or kind in left}
    for kind in left:
        del one.kinds[kind]
    one.shared.clear()
    return keys


def _shared_fields(shared: Fields) -> Fields:
    """alpha as a number; PEFT's magnitude as one per row."""
    fields = {name: value for name, value in shared.items() if name != "scalar"}
    if "alpha" in fields:
        fields["alpha"] = float(fields["alpha"])
    rows = fields.pop("row_magnitude", None)
    if rows is not None:
        fields["magnitude"] = rows.flatten()
    return fields


def _scaled(name: str, kind: Kind, one: Group, adapter: Adapter) -> Adapter:
    """The adapter, times the `scalar` that LyCORIS trains beside its factors, and as often as PEFT adds it.

    Raises:
        LoraFileError: the adapter has no place for it.
    """
    if kind.parameter != "weight":
        return adapter
    scalar = one.shared.get("scalar")
    factor = float(one.times)
    if scalar is not None:
        factor *= float(scalar) if scalar.numel() == 1 else math.nan
    if factor == 1.0:
        return adapter
    if math.isnan(factor) or not isinstance(adapter, RankedAdapter) or not adapter.rank:
        facts = {"module": shown(one.module), "kind": kind.name, "value": factor}
        raise _refusal(name, Message("lora.scalar_unused", facts))
    return replace(adapter, alpha=adapter.scale * adapter.rank * factor)


def _make(name: str, kind: Kind, found: Found) -> Adapter:
    """The adapter of one module. Raises LoraFileError if a field is missing or has an impossible shape."""
    try:
        adapter = kind.make(found)
        if not adapter.is_whole_tensor and any(tensor.dim() == 0 for tensor in adapter.tensors()):
            raise LoraMismatchError.of("lora.single_number")
        if kind.parameter == "weight" and "magnitude" in found.shared and getattr(adapter, "magnitude", None) is None:
            raise LoraFileError.of("lora.no_dora", **_facts(kind, found))
    except LoraFileError as error:
        raise LoraFileError(about(name, reason(error))) from None
    except (TypeError, KeyError) as error:
        facts = {**_facts(kind, found), "missing": _missing(error)}
        raise _refusal(name, Message("lora.incomplete", facts)) from None
    except (LoraMismatchError, IndexError, RuntimeError, ZeroDivisionError) as error:
        shapes = str([list(tensor.shape) for tensor in found.fields.values()])
        facts = {**_facts(kind, found), "found": shapes, "why": _one_line(error)}
        raise _refusal(name, Message("lora.not_factors", facts)) from None
    return adapter


def _facts(kind: Kind, found: Found) -> dict[str, str]:
    return {"module": shown(found.module), "kind": kind.name}


def _refusal(name: str, what: Message) -> LoraFileError:
    return LoraFileError(about(name, what))


def _one_line(error: Exception) -> str:
    if isinstance(why := reason(error), Message):
        return why
    return shown(str(error).splitlines()[0]) if str(error) else type(error).__name__


def _missing(error: Exception) -> str:
    """The field that a dataclass or a dict did not find, in the words of the file."""
    text = str(error)
    return text.partition(":")[2].strip() or text
