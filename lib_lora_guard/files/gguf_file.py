"""GGUF: fixed numbers, key-value metadata, tensor infos, then the aligned data.

Source: the format's description (github.com/ggml-org/ggml, docs/gguf.md). Version 2 and 3 are laid out alike; version 1
counted in 32 bits. Big-endian files have the same magic and a version whose bytes are swapped. The sizes of a tensor are
written innermost first; torch wants them outermost first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from ..lazy_torch import torch
from .gguf_cursor import Cursor, ValueType
from .gguf_types import GGUF_TYPES, PLAIN
from .header import (
    MAX_DIMS,
    MAX_ENTRIES,
    FileHeader,
    FileState,
    TensorEntry,
    check_size,
    count_values,
    damaged,
    find_overlap,
    opened,
    refusal,
    shown,
)
from .reading import read_entries

MAGIC = b"GGUF"
"""The first bytes of the file."""
MAX_NAME_BYTES = 1 << 16
MAX_TEXT_BYTES = 64_000_000
"""Bytes of one text in the metadata."""
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
"""In bytes, where the metadata states none."""
SHORT_ARRAY = 16
"""Arrays of up to 16 values become text in the metadata; of longer arrays the length is kept."""
MAX_NESTING = 4
"""How deep arrays may lie in arrays."""

_LEAST_PAIR_BYTES = 8 + 4 + 1
"""An empty key, a type, a value of one byte."""
_LEAST_INFO_BYTES = 8 + 4 + 8 + 4 + 8
"""An empty name, the count of sizes, one size, a type, an offset."""


def read_header(path: str | Path) -> FileHeader:
    """Reads the header of a GGUF file.

    Raises:
        FileFormatError: The file cannot be read or breaks the format's rules.
    """
    path = Path(path)
    with opened(path) as (file, facts):
        cursor = Cursor(path, file, facts.st_size)
        _check_version(path, cursor)
        tensor_count = _count(cursor, "tensors", _LEAST_INFO_BYTES)
        pair_count = _count(cursor, "metadata values", _LEAST_PAIR_BYTES)
        metadata: dict[str, str] = {}
        alignment = DEFAULT_ALIGNMENT
        for _ in range(pair_count):
            key = _name(cursor, metadata)
            kind = cursor.value_type(key)
            metadata[key] = _value(cursor, kind, key)
            if key == "general.alignment":
                alignment = _alignment(path, kind, metadata[key])
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = _name(cursor, infos)
            infos[name] = _info(cursor, name)
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {name: _entry(path, name, info, data_start, alignment) for name, info in infos.items()}
    check_size(path, tensors, facts.st_size)
    if pair := find_overlap(tensors.values()):
        raise damaged(path, f"expected its own bytes, found it to overlap with {shown(pair[0].name)}", pair[1].name)
    return FileHeader(path, "gguf", tensors, metadata, facts.st_size, FileState.of(facts))


def read_tensors(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads tensors into memory of their own.

    Tensors of block types become uint8 of (rows, bytes of a row), where rows are all sizes but the last. The others have
    their dtype and shape.

    Args:
        header: The file's header.
        names: The tensors in the order asked for; None for all.

    Raises:
        FileFormatError: A name is not in the header, or the file was changed since the header was read.
    """
    return read_entries(header, names, _typed)


_DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


def _typed(entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
    if entry.format in PLAIN:
        return buffer.view(getattr(torch, _DTYPES[entry.format])).reshape(entry.shape)
    return buffer.reshape(count_values(entry.shape[:-1]) or 1, -1)


def _check_version(path: Path, cursor: Cursor) -> None:
    magic = cursor.take(4, "the magic")
    if magic != MAGIC:
        raise refusal(path, f"expected a GGUF file, found one that starts with {shown(repr(magic))}; download it again")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise refusal(path, "expected a little-endian GGUF file, found a big-endian one; get the file for PCs")
    if version == 1:
        raise refusal(path, "expected GGUF version 2 or 3, found 1; get a newer file, or convert it with llama.cpp")
    if version not in (2, 3):
        raise refusal(path, f"expected GGUF version 2 or 3, found {version}; update LoRA Guard or download it again")


def _count(cursor: Cursor, what: str, least_bytes: int) -> int:
    count = cursor.u64(f"the number of {what}")
    most = min(MAX_ENTRIES, cursor.left // least_bytes)
    if count > most:
        raise damaged(cursor.path, f"expected at most {most} {what} in a file of this size, found {count}")
    return count


def _name(cursor: Cursor, seen: Iterable[str]) -> str:
    raw = cursor.sized_bytes(MAX_NAME_BYTES, "a name")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        found = shown(raw[:40].decode("utf-8", "replace"))
        raise damaged(cursor.path, f"expected a name in UTF-8, found {found}") from None
    if name in seen:
        raise damaged(cursor.path, "expected each name once, found it twice", name)
    return name


def _value(cursor: Cursor, kind: ValueType, key: str) -> str:
    """Reads one metadata value as text."""
    if kind is ValueType.STRING:
        # Real descriptions are not always UTF-8. They are only shown, so the file is not refused for it.
        return cursor.sized_bytes(MAX_TEXT_BYTES, key).decode("utf-8", "replace")
    if kind is not ValueType.ARRAY:
        return cursor.scalar(kind, key)
    item, count = cursor.value_type(key), cursor.u64(key)
    if count > SHORT_ARRAY or item is ValueType.ARRAY:
        cursor.skip_items(item, count, key, MAX_NESTING)
        return f"[{count} values]"
    return f"[{', '.join(_value(cursor, item, key) for _ in range(count))}]"


def _alignment(path: Path, kind: ValueType, text: str) -> int:
    value = int(text) if kind is ValueType.UINT32 else 0
    if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        found = f"{shown(text)} as {kind.name}"
        raise damaged(
            path,
            f"expected a power of two from 1 to {MAX_ALIGNMENT} as UINT32, found {found}",
            "general.alignment",
        )
    return value


def _info(cursor: Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Reads the shape in torch's order, the type number and the offset in the data."""
    count = cursor.u32(name)
    if not 1 <= count <= MAX_DIMS:
        raise damaged(cursor.path, f"expected 1 to {MAX_DIMS} sizes, found {count}", name)
    form = struct.Struct(f"<{count}QIQ")
    *sizes, number, offset = form.unpack(cursor.take(form.size, name))
    return tuple(reversed(sizes)), number, offset


def _entry(
    path: Path, name: str, info: tuple[tuple[int, ...], int, int], data_start: int, alignment: int
) -> TensorEntry:
    shape, number, offset = info
    form = GGUF_TYPES.get(number)
    if form is None:
        raise refusal(
            path,
            f"expected a tensor type of GGUF, found number {number}, unknown or taken back; "
            "get the file in another quantisation, or update LoRA Guard",
            name,
        )
    count = count_values(shape)
    if not count:
        raise damaged(path, f"expected sizes from 1 and less than 2^63 values, found {list(shape)}", name)
    if shape[-1] % form.block:
        raise damaged(path, f"expected rows of {form.name} in blocks of {form.block}, found {shape[-1]} values", name)
    if offset % alignment:
        raise damaged(path, f"expected an offset that is a multiple of {alignment}, found {offset}", name)
    return TensorEntry(name, form.name, shape, data_start + offset, count // form.block * form.block_bytes)
