"""What lies in a model or LoRA file, read from its header alone, its tensors in our own memory, and writing new files.

Knows the two formats that carry data and nothing else. Pickles (.pt, .ckpt, .bin, .pth) are refused: they can carry code
that runs on loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import FileFormatError, Message
from . import gguf_file, safetensors_file
from .header import MAX_HEADER_BYTES, FileHeader, TensorEntry, opened, refusal, shown
from .safetensors_writer import Entry, write_safetensors

__all__ = ["Entry", "FileHeader", "TensorEntry", "open_header", "read_tensors", "shown", "write_safetensors"]


def open_header(path: str | Path) -> FileHeader:
    """What the file holds; its format is told by its first bytes, never by its name. Raises FileFormatError."""
    path = Path(path)
    with opened(path) as (file, _):
        head = file.read(16)
    if head.startswith(gguf_file.MAGIC):
        return gguf_file.read_header(path)
    if _looks_like_safetensors(head):
        return safetensors_file.read_header(path)
    raise _foreign(path, head)


def read_tensors(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors (None: all) of either format, in our own memory; see the two modules. Raises FileFormatError."""
    if header.container == "gguf":
        return gguf_file.read_tensors(header, names)
    return safetensors_file.read_tensors(header, names)


def _looks_like_safetensors(head: bytes) -> bool:
    # A pickle's first bytes could be a length, but then no JSON object follows.
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
