"""What every container has in common: a header as data, the one line of a refusal, and reading bytes into our own memory.

Why files are read here instead of through safetensors' `safe_open`:
- A mapped file that a trainer rewrites or truncates kills the process (SIGBUS, or an access violation on Windows) when
  the next byte is touched. A plain read comes back short instead, and that is an error with a name.
- A JSON object may hold a key twice; most readers keep one of the two in silence. Here both are seen.
- The header alone says what is in a file. It lies in front, so a file of 24 GB answers in milliseconds.
- One header type serves safetensors and GGUF, and hostile files are met with limits instead of with memory.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from ..errors import FileFormatError, Message, about

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library; GGUF files, tokenizers included, stay far below it."""
MAX_ENTRIES = 1_000_000
MAX_DIMS = 8
MAX_VALUES = 2**63 - 1
"""Torch counts values, and the system counts bytes of a file, in signed 64 bit."""
SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `format` is the name its container uses ("BF16", "F8_E4M3", "Q4_K"); `shape` is in torch's
    order, (out, in); `start` counts bytes from the beginning of the file."""

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class FileHeader:
    """What a file says it holds, checked against its size. `container` is "safetensors" or "gguf"; `tensors` is in the
    header's own order; `metadata` is text as written, so clean it before showing it. `modified_ns` is the time of the
    last change, by which a file that was written since is noticed (None: not looked at)."""

    path: Path
    container: str
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    bytes: int
    modified_ns: int | None = None


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Text from a file made fit for a message: control characters become '?', the middle of long text is left out."""
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[-(limit - 3 - head) :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def refusal(path: Path, text: str, key: str | None = None) -> FileFormatError:
    """The error for `path`, in one line; `text` may be a Message, `key` is a name found in the file."""
    what = text if key is None else about(shown(key) or "(empty name)", text)
    return FileFormatError(about(shown(path.name), what))


def damaged(path: Path, detail: str, key: str | None = None) -> FileFormatError:
    """The error for a file that breaks the rules of its format. `detail`, for those who write such files, is English."""
    return refusal(path, Message("file.damaged", {"detail": detail}), key)


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, os.stat_result]]:
    """The open file and its facts. Raises FileFormatError where the system cannot open or read it."""
    if not path.is_file():
        raise FileFormatError(about(shown(str(path)), Message("file.missing")))
    try:
        with path.open("rb", buffering=0) as file:
            yield file, os.fstat(file.fileno())
    except OSError as error:
        raise refusal(path, Message("file.unreadable", {"error": error.strerror or str(error)})) from error


def count_values(shape: Sequence[int]) -> int | None:
    """The product of `shape`, or None where torch could not count that far. A 0 does not excuse the other sizes."""
    count = math.prod(shape)
    others = count or math.prod(size for size in shape if size)
    return count if others <= MAX_VALUES else None


def find_overlap(tensors: Iterable[TensorEntry]) -> tuple[TensorEntry, TensorEntry] | None:
    """Two tensors that claim the same bytes, or None."""
    previous = None
    for entry in sorted((entry for entry in tensors if entry.bytes), key=lambda entry: entry.start):
        if previous is not None and entry.start < previous.start + previous.bytes:
            return previous, entry
        previous = entry
    return None


def check_size(path: Path, tensors: Mapping[str, TensorEntry], size: int) -> None:
    """Raises FileFormatError where the tensors need more bytes than the file has."""
    needed = max((entry.start + entry.bytes for entry in tensors.values()), default=0)
    if needed > size:
        raise refusal(path, Message("file.too_short", {"wanted": needed, "found": size}))


def read_entries(
    header: FileHeader, names: Iterable[str] | None, typed: Callable[[TensorEntry, torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The named tensors (None: all), in the order asked for, each in memory of its own and outside inference mode.

    `typed` gives a flat uint8 tensor its type and shape. Raises FileFormatError for a name the header lacks and for a
    file that was changed since the header was read, or while this reads.
    """
    wanted = dict.fromkeys(header.tensors if names is None else names)
    for name in wanted:
        if name not in header.tensors:
            raise refusal(header.path, Message("file.no_tensor"), name)
    entries = sorted((header.tensors[name] for name in wanted), key=lambda entry: entry.start)
    tensors: dict[str, torch.Tensor] = {}
    with opened(header.path) as (file, facts), torch.inference_mode(False):
        _check_unchanged(header, facts)
        for entry in entries:
            tensors[entry.name] = typed(entry, _read_bytes(header, entry, file))
        _check_unchanged(header, os.fstat(file.fileno()))
    return {name: tensors[name] for name in wanted}


def _read_bytes(header: FileHeader, entry: TensorEntry, file: FileIO) -> torch.Tensor:
    # On the CPU whatever default device the host has set: the address below must be one that we may write to.
    buffer = torch.empty(entry.bytes, dtype=torch.uint8, device="cpu")
    if not entry.bytes:
        return buffer
    # Torch's own memory, written in place: a bytearray under the tensor would be filled with zeros first.
    view = memoryview((ctypes.c_ubyte * entry.bytes).from_address(buffer.data_ptr())).cast("B")
    file.seek(entry.start)
    done = 0
    while done < entry.bytes:
        # Systems return less than asked for above 2 GB; nothing at all means that the file ends here.
        got = file.readinto(view[done:])
        if not got:
            raise refusal(header.path, Message("file.cut_short", {"wanted": entry.bytes, "found": done}), entry.name)
        done += got
    return buffer


def _check_unchanged(header: FileHeader, facts: os.stat_result) -> None:
    if facts.st_size != header.bytes:
        raise refusal(header.path, Message("file.resized", {"wanted": header.bytes, "found": facts.st_size}))
    if header.modified_ns not in (None, facts.st_mtime_ns):
        raise refusal(header.path, Message("file.rewritten"))
