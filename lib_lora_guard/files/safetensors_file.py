"""safetensors: 8 bytes of header length, a JSON object, then the tensors' bytes without a gap.

Source: the format's own description (github.com/huggingface/safetensors, README "Format") and, where it is silent, what
version 0.8 of the library does: holes and bytes past the last tensor are refused, blanks around the object are not.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from functools import partial
from io import FileIO
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, Message
from ..lazy_torch import torch
from .header import (
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_VALUES,
    FileHeader,
    FileState,
    TableLimits,
    TensorEntry,
    check_size,
    count_values,
    damaged,
    find_overlap,
    opened,
    refusal,
    shown,
)
from .reading import Check, ComingInOnePiece, Typed, prepare_entries, read_bytes, read_entries
from .safetensors_json import Scanner

FORMATS: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"), "I8": (8, "int8"), "U16": (16, "uint16"), "I16": (16, "int16"),
    "U32": (32, "uint32"), "I32": (32, "int32"), "U64": (64, "uint64"), "I64": (64, "int64"),
    "F16": (16, "float16"), "BF16": (16, "bfloat16"), "F32": (32, "float32"), "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"), "F8_E5M2": (8, "float8_e5m2"), "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F4": (4, "float4_e2m1fn_x2"), "F6_E2M3": (6, None), "F6_E3M2": (6, None),
}  # fmt: skip
"""Name in the file -> (bits of a value, torch's name or None). An older torch may lack some of them."""


MOST_METADATA = 10_000
"""Entries of the metadata. Trainers write some hundred."""


def read_header(path: str | Path, limits: TableLimits | None = None) -> FileHeader:
    """Reads the header of a safetensors file.

    Args:
        path: The file.
        limits: The largest table that is read; None for any that the format allows.

    Raises:
        FileFormatError: The file cannot be read, breaks the format's rules or the limits.
    """
    path = Path(path)
    with opened(path) as (file, facts):
        size = facts.st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or size - 8 < length <= MAX_HEADER_BYTES:
            wanted = length if len(head) == 8 else Message("file.header_at_least", {"count": 8})
            raise refusal(path, Message("file.header_incomplete", {"wanted": wanted, "found": max(size - 8, 0)}))
        if length > MAX_HEADER_BYTES:
            raise refusal(path, Message("file.header_too_long", {"most": MAX_HEADER_BYTES, "found": length}))
        raw = _read_fully(file, length)
    if len(raw) < length:
        raise refusal(path, Message("file.header_cut", {"wanted": length, "found": len(raw)}))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"expected a header in UTF-8, found another byte at {8 + error.start}") from None
    del raw  # up to 100 MB
    tensors, metadata = _parse(path, text, 8 + length, limits)
    check_size(path, tensors, size)
    _check_covered(path, tensors, 8 + length, size)
    return FileHeader(path, "safetensors", tensors, metadata, size, FileState.of(facts))


def read_tensors(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads tensors into memory of their own.

    Args:
        header: The file's header.
        names: The tensors in the order asked for; None for all.

    Raises:
        FileFormatError: A name is not in the header, torch lacks a dtype, or the file was changed since the header was
            read.
    """
    return read_entries(header, names, _typed(header))


def prepare_tensors(
    header: FileHeader, names: Sequence[str], check: Check
) -> tuple[dict[str, torch.Tensor], ComingInOnePiece] | None:
    """Makes tensors for values that threads can read while the caller goes on.

    Args:
        header: The file's header.
        names: The tensors, all of one format that fills whole bytes.
        check: Called for what is there, in the thread that has read it.

    Returns:
        The tensors, and what reads their values once it is started; None if they do not lie in the file as memory needs them.

    Raises:
        FileFormatError: A name is not in the header, torch lacks a dtype, or there is no memory.
    """
    return prepare_entries(header, names, partial(_dtype_of, header), check)


def _typed(header: FileHeader) -> Typed:
    def typed(entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
        shape = entry.shape
        if entry.format == "F4":  # two values in a byte: torch counts the bytes
            shape = (*shape[:-1], shape[-1] // 2)
        return buffer.view(_dtype_of(header, entry)).reshape(shape)

    return typed


def _dtype_of(header: FileHeader, entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, FORMATS[entry.format][1] or "", None)
    if not isinstance(dtype, torch.dtype):
        why = Message("file.dtype", {"format": entry.format, "torch": str(torch.__version__)})
        raise refusal(header.path, why, entry.name)
    return dtype


def read_numbers(header: FileHeader, names: Iterable[str]) -> dict[str, float | None]:
    """Reads tensors that hold one number each, without torch where Python knows the format.

    Returns:
        The numbers by name; None for one that is complex.

    Raises:
        FileFormatError: A number cannot be read, or the file was changed since the header was read.
    """
    names = list(names)
    known = [name for name in names if header.tensors[name].format in _NUMBERS]
    others = [name for name in names if header.tensors[name].format not in _NUMBERS]
    numbers: dict[str, float | None] = {}
    for name, raw in read_bytes(header, known).items():
        form = header.tensors[name].format
        # bf16 is the upper half of an fp32.
        numbers[name] = float(_NUMBERS[form].unpack(bytes(2) + raw if form == "BF16" else raw)[0])
    for name, tensor in read_tensors(header, others).items() if others else ():
        numbers[name] = None if tensor.is_complex() else float(tensor)
    return numbers


_NUMBERS = {
    form: struct.Struct(f"<{code}")
    for form, code in {
        "BOOL": "?", "U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i", "U64": "Q", "I64": "q",
        "F16": "e", "BF16": "f", "F32": "f", "F64": "d",
    }.items()
}  # fmt: skip


def _read_fully(file: FileIO, length: int) -> bytes:
    parts = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _parse(
    path: Path, text: str, data_start: int, limits: TableLimits | None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    scanner = Scanner(path, text)
    metadata: dict[str, str] = {}
    tensors: dict[str, TensorEntry] = {}
    beside = 0
    for name in scanner.members():
        if name == "__metadata__":
            start = scanner.at
            metadata = {key: scanner.string("text", key) for key in scanner.members(MOST_METADATA)}
            beside = scanner.at - start
        else:
            # Before the entry is made: what is over the limits takes no more memory than they allow.
            if limits is not None:
                _check_table(path, limits, len(tensors) + 1, scanner.at - beside)
            tensors[name] = _read_entry(scanner, name, data_start)
    scanner.end()
    return tensors, metadata


def _check_table(path: Path, limits: TableLimits, tensors: int, characters: int) -> None:
    if tensors > limits.tensors:
        raise refusal(path, Message("file.too_many_tensors", {"most": limits.tensors}))
    if characters > limits.characters:
        raise refusal(path, Message("file.table_too_long", {"most": limits.characters}))


def _read_entry(scanner: Scanner, name: str, data_start: int) -> TensorEntry:
    """Reads what a tensor is. One that is written as the library does and has values is told by a product; others are judged."""
    at = scanner.at
    usual = scanner.usual_entry()
    if usual is not None:
        form, shape, start, end = usual
        bits, count = FORMATS.get(form, (0, None))[0], math.prod(shape)
        if bits >= 8 and 0 < count <= MAX_VALUES and count * bits == 8 * (end - start) and end <= MAX_VALUES:
            return TensorEntry(name, form, shape, data_start + start, end - start)
    scanner.at = at
    return _entry(scanner.path, name, scanner.entry(name), data_start)


def _entry(path: Path, name: str, fields: dict[str, Any], data_start: int) -> TensorEntry:
    def wrong(what: str, expected: str, found: object) -> FileFormatError:
        return damaged(path, f"{what}: expected {expected}, found {shown(str(found))}", name)

    try:
        form, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    except KeyError as error:
        raise wrong(error.args[0], "it in the header", "nothing") from None
    if not isinstance(form, str) or form not in FORMATS:
        raise wrong("dtype", f"one of {', '.join(FORMATS)}", form)
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise wrong("shape", f"at most {MAX_DIMS} whole numbers from 0", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets", "two whole numbers from 0, the second not smaller", offsets)
    count = count_values(shape)
    if count is None:
        raise wrong("shape", "less than 2^63 values", shape)
    bits = count * FORMATS[form][0]
    found = offsets[1] - offsets[0]
    if bits % 8 or (form == "F4" and (not shape or shape[-1] % 2)):
        raise wrong("shape", f"values of {form} that fill whole bytes", shape)
    if bits // 8 != found:
        raise wrong("data_offsets", f"{bits // 8} bytes for {form} {list(shape)}", f"{found} bytes")
    return TensorEntry(name, form, tuple(shape), data_start + offsets[0], found)


def _is_sizes(value: object) -> bool:
    # A JSON truth value is no size, though Python's bool is an int.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_VALUES for item in value)


def _check_covered(path: Path, tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Checks as the library does that tensors fill the file: each starts where the one before ends, the last ends the file."""
    end = data_start
    for entry in sorted(tensors.values(), key=_place):
        if entry.start != end:
            if pair := find_overlap(tensors.values()):
                raise damaged(
                    path, f"expected its own bytes, found it to overlap with {shown(pair[0].name)}", pair[1].name
                )
            raise damaged(
                path,
                f"expected to start at byte {end} where the one before ends, found {entry.start}",
                entry.name,
            )
        end += entry.bytes
    if end != size:
        raise damaged(path, f"expected {end} bytes, found {size}, more than its tensors have")


_place = attrgetter("start", "bytes")
