"""Reads LoRA files into adapters, one per weight. The file is closed again before any adapter is made.

Files are safetensors only: a pickle can run any code. `file_keys` knows the names, `file_settings` the settings beside
the tensors, and each kind makes its own adapters (`kinds`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from ..errors import FileFormatError, Joined, LoraFileError, LoraMismatchError, Message, about, reason
from ..files import FileHeader, open_header, read_tensors, shown
from ..files.header_tensor import header_tensors
from ..lazy_torch import torch
from .base import Adapter, check_values
from .file_keys import KeyMeaning, meaning_of
from .file_settings import FileSettings, settings_of
from .kinds import Fields, Found, Kind

Tensors = Mapping[str, "torch.Tensor"]
Groups = dict[str, dict["Kind | None", Fields]]
"""Fields by module and kind; those under None belong to whichever kind the module has."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The content of one file.

    Attributes:
        path: the file.
        adapters: by module name as written in the file, and "weight" or "bias".
        unknown_keys: names that no kind knows.
        shapes: of all tensors, by their names in the file. They tell which model the file was made for.
        metadata: the text entries of its header.
    """

    path: Path
    adapters: Mapping[tuple[str, str], Adapter]
    unknown_keys: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_lora_file(path: str | Path, as_trained: bool = False) -> LoraFile:
    """Reads a LoRA file into memory of our own and closes it.

    Args:
        path: a safetensors file.
        as_trained: DoRA in the meaning of its trainer where the host's differs.

    Raises:
        LoraFileError: the file is missing, broken or no LoRA; the message names it and says what to do.
    """
    header = open_lora(path)
    with _as_lora_errors():
        tensors = read_tensors(header)
    return _parsed(header, tensors, as_trained)


def open_lora(path: str | Path) -> FileHeader:
    """Reads the header of a LoRA file.

    Raises:
        LoraFileError: the file is missing, broken or no safetensors file.
    """
    with _as_lora_errors():
        header = open_header(path)
    if header.container != "safetensors":
        raise _refusal(shown(header.path.name), Message("lora.container", {"container": header.container}))
    return header


def lora_of_header(header: FileHeader) -> LoraFile:
    """Makes adapters of a header, without torch: they hold `HeaderTensor`s, which have shapes and dtypes.

    Only the single numbers (alpha) are read from the file.

    Raises:
        LoraFileError: the file is no LoRA, contradicts itself or cannot be read.
    """
    numbers = [name for name, entry in header.tensors.items() if _is_number(name, entry.shape)]
    with _as_lora_errors():
        tensors = header_tensors(header, numbers)
    # Adapters take them for tensors of torch: a HeaderTensor acts as one.
    return _parsed(header, cast(Tensors, tensors), as_trained=False)


def _parsed(header: FileHeader, tensors: Tensors, as_trained: bool) -> LoraFile:
    file = parse_tensors(header.path, tensors, settings_of(header.path, header.metadata), as_trained)
    return replace(file, metadata=header.metadata)


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
    path: Path, tensors: Tensors, settings: FileSettings | None = None, as_trained: bool = False
) -> LoraFile:
    """Makes the adapters of one file.

    Args:
        path: only its name is used, in messages.
        tensors: all of the file, by name.
        settings: the PEFT configurations that belong to it.
        as_trained: DoRA in the meaning of its trainer where the host's differs.

    Raises:
        LoraFileError: the file contradicts itself, or holds no LoRA.
    """
    settings = settings or FileSettings({})
    name = shown(path.name)
    groups, unknown = _group(name, tensors)
    adapters: dict[tuple[str, str], Adapter] = {}

    def put(module: str, parameter: str, adapter: Adapter) -> None:
        if (module, parameter) in adapters:
            raise _refusal(name, Message("lora.two_changes", {"module": shown(module), "parameter": parameter}))
        adapters[module, parameter] = adapter

    for module, by_kind in groups.items():
        shared = by_kind.pop(None, {})
        if not by_kind:
            unknown += [f"{module}.{key}" for key in shared]
            continue
        kinds = [kind for kind in by_kind if kind is not None]
        weights = [kind for kind in kinds if kind.parameter == "weight"]
        if len(weights) > 1:
            spelled = Joined(sorted(kind.name for kind in weights), "list.and")
            raise _refusal(name, Message("lora.two_kinds", {"module": shown(module), "kinds": spelled}))
        numbers, weight = _shared_fields(shared), None
        for kind in [*weights, *(kind for kind in kinds if kind not in weights)]:
            found = Found(module, by_kind[kind], numbers, settings.of(module), weight)
            adapter = _make(name, kind, found)
            if as_trained:
                adapter = adapter.with_dora_as_trained()
            put(module, kind.parameter, adapter)
            if kind in weights:
                weight = adapter
        if weight is not None and weight.covers_bias:
            put(module, "bias", weight)
    if not adapters:
        raise _refusal(name, Message("lora.none", {"count": len(tensors)}))
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return LoraFile(path, adapters, tuple(unknown), shapes)


def _group(name: str, tensors: Tensors) -> tuple[Groups, list[str]]:
    """Sorts the tensors; returns the groups and the names that no kind knows."""
    groups: Groups = {}
    written: dict[KeyMeaning, str] = {}
    unknown = []
    for key, tensor in tensors.items():
        meaning = meaning_of(key, tensors)
        if meaning is None:
            unknown.append(key)
            continue
        if meaning in written:
            first = written[meaning]
            raise _refusal(name, Message("lora.said_twice", {"first": shown(first), "second": shown(key)}))
        written[meaning] = key
        is_number = meaning.field in ({"alpha"} if meaning.kind is None else meaning.kind.numbers)
        try:
            check_values(tensor, whole_numbers=is_number)
        except LoraMismatchError as error:
            raise _refusal(name, about(shown(key), reason(error))) from None
        if is_number and tensor.numel() != 1:
            raise _refusal(name, Message("lora.several_values", {"key": shown(key), "count": tensor.numel()}))
        groups.setdefault(meaning.module, {}).setdefault(meaning.kind, {})[meaning.field] = tensor
    return groups, unknown


def _shared_fields(shared: Fields) -> Fields:
    """alpha as a number, which a LyCORIS `scalar` multiplies; PEFT's magnitude as one per row."""
    fields = dict(shared)
    scalar = fields.pop("scalar", None)
    if "alpha" in fields:
        fields["alpha"] = float(fields["alpha"])
        if scalar is not None and scalar.numel() == 1:
            fields["alpha"] *= float(scalar)
    rows = fields.pop("row_magnitude", None)
    if rows is not None:
        fields["magnitude"] = rows.flatten()
    return fields


def _make(name: str, kind: Kind, found: Found) -> Adapter:
    """The adapter of one module. Raises LoraFileError if a field is missing or has an impossible shape."""
    facts = {"module": shown(found.module), "kind": kind.name}
    try:
        adapter = kind.make(found)
        if not adapter.is_whole_tensor and any(tensor.dim() == 0 for tensor in adapter.tensors()):
            raise LoraMismatchError.of("lora.single_number")
    except (TypeError, KeyError) as error:
        raise _refusal(name, Message("lora.incomplete", {**facts, "missing": _missing(error)})) from None
    except (LoraMismatchError, IndexError, RuntimeError, ZeroDivisionError) as error:
        shapes = str([list(tensor.shape) for tensor in found.fields.values()])
        raise _refusal(name, Message("lora.not_factors", {**facts, "found": shapes, "why": _one_line(error)})) from None
    return adapter


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
