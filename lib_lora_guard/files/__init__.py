"""Reads headers and tensors of model and LoRA files, and writes new files.

Knows the two formats that hold data alone. Pickles (.pt, .ckpt, .bin, .pth) are refused: they can hold code that runs on
loading. Headers are read without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import FileFormatError, Message
from ..lazy_torch import torch
from . import gguf_file, safetensors_file
from .header import (
    MAX_HEADER_BYTES,
    FileHeader,
    FileState,
    TableLimits,
    TensorEntry,
    is_file,
    opened,
    read_unchanged,
    refusal,
    shown,
    state_of,
)
from .reading import LARGE_FILE_BYTES, ComingInOnePiece, memory_of, read_bytes, unread_bytes
from .safetensors_file import prepare_tensors
from .safetensors_writer import Entry, write_safetensors

__all__ = [
    "LARGE_FILE_BYTES",
    "ComingInOnePiece",
    "Entry",
    "FileHeader",
    "FileState",
    "TableLimits",
    "TensorEntry",
    "container_of",
    "is_file",
    "memory_of",
    "open_header",
    "prepare_tensors",
    "read_bytes",
    "read_tensors",
    "read_unchanged",
    "shown",
    "state_of",
    "unread_bytes",
    "write_safetensors",
]


def container_of(path: str | Path) -> str:
    """Returns the format of a file, "safetensors" or "gguf": the first bytes tell it, never the name.

    Raises:
        FileFormatError: The file cannot be read, or is in no known format.
    """
    path = Path(path)
    with opened(path) as (file, _):
        head = file.read(16)
    if head.startswith(gguf_file.MAGIC):
        return "gguf"
    if _looks_like_safetensors(head):
        return "safetensors"
    raise _foreign(path, head)


def open_header(path: str | Path, limits: TableLimits | None = None) -> FileHeader:
    """Reads a header.

    Args:
        path: The file.
        limits: The largest table of a safetensors file that is read; None for any that the format allows.

    Raises:
        FileFormatError: The file cannot be read, is in no known format or damaged, or breaks the limits.
    """
    if container_of(path) == "gguf":
        return gguf_file.read_header(path)
    return safetensors_file.read_header(path, limits)


def read_tensors(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Reads tensors of either format into memory of their own, as `safetensors_file` and `gguf_file` say.

    Args:
        header: The file's header.
        names: The tensors in the order asked for; None for all.

    Raises:
        FileFormatError: A tensor cannot be read, or the file was changed since the header was read.
    """
    if header.container == "gguf":
        return gguf_file.read_tensors(header, names)
    return safetensors_file.read_tensors(header, names)


def _looks_like_safetensors(head: bytes) -> bool:
    # A pickle's first bytes may look like a length, but no JSON object follows them.
    return int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:].lstrip(b" \t\n\r")[:1] == b"{"


_FOREIGN = (
    (b"PK", Message("file.zip")),
    (b"\x80", Message("file.pickle")),
    (b"version https:", Message("file.lfs")),
    (b"<", Message("file.web_page")),
)


def _foreign(path: Path, head: bytes) -> FileFormatError:
    found = next((what for start, what in _FOREIGN if head.startswith(start)), None)
    if found is None:
        found = Message("file.unknown", {"start": shown(repr(head[:8]))}) if head else Message("file.empty")
    return refusal(path, Message("file.not_a_model", {"found": found}))
