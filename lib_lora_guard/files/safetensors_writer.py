"""Writes safetensors files one tensor at a time, so that a file may be far larger than the memory.

Source: the format's own description (github.com/huggingface/safetensors, README "Format"). As its library does, the
header ends on a multiple of 8 bytes, and tensors with the widest values come first: so every tensor is aligned to its
dtype.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from ..lazy_torch import torch
from ..units import GB, MB
from .header import MAX_HEADER_BYTES, shown
from .safetensors_file import FORMATS

SLICE_BYTES = 64 << 20
"""Bytes written at once, and copied at once of a tensor that is not contiguous in RAM."""
_ALIGNMENT = 8
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A tensor to write. `load` is called once, when it is to be written, and returns a tensor of `dtype` and `shape`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """The bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    replaces: bool = True,
    partial: Path | None = None,
) -> None:
    """Writes a new file beside `path` and renames it to `path` when it is complete; until then `path` is unchanged.

    Tensors with the widest values come first, otherwise the order is that of `entries`. Each tensor is released before
    the next one is loaded. No partial file is left, not even by KeyboardInterrupt.

    Args:
        path: The file.
        entries: The tensors.
        metadata: The text entries of the header.
        progress: Called with the bytes of tensors written so far and in total.
        replaces: False keeps a file that is at `path` when the new one is complete.
        partial: The name of the file while it is written, in the same folder; None for one by chance.

    Raises:
        OSError: There is no folder, no room on the disk, or no right to write; or there is a file and `replaces` is False.
        ValueError: An entry cannot be written, or loads as another dtype or shape.
    """
    header = _header(entries, metadata or {})
    total = sum(entry.bytes for entry in entries)
    _check_place(path, len(header) + total)
    partial = partial or path.with_name(f"{path.name[:40]}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("xb", buffering=0) as file:
            _write(file, memoryview(header))
            done = 0
            for entry in _ordered(entries):
                for size in _write_entry(file, entry):
                    done += size
                    if progress is not None:
                        progress(done, total)
            _synced(file)
        if replaces:
            _replace(partial, path)
        else:
            _place(partial, path)
    except _WriteError as error:
        partial.unlink(missing_ok=True)
        raise _unwritten(path, len(header) + total, error.cause) from error.cause
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def format_of(dtype: torch.dtype) -> str | None:
    """Returns the format's name for a dtype ("BF16"); None if it has none."""
    return next((form for form, (_, name) in FORMATS.items() if str(dtype) == f"torch.{name}"), None)


def _ordered(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in _ordered(entries):
        form = format_of(entry.dtype)
        if form is None:
            raise ValueError(f"{shown(entry.name)}: safetensors has no name for {entry.dtype}")
        if entry.name in fields or entry.name == "__metadata__":
            raise ValueError(f"{shown(entry.name)}: expected each name once, and none called __metadata__")
        shape = list(entry.shape)
        if form == "F4":  # two values in a byte: torch counts the bytes
            shape[-1] *= 2
        fields[entry.name] = {"dtype": form, "shape": shape, "data_offsets": [at, at + entry.bytes]}
        at += entry.bytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is more than the {MAX_HEADER_BYTES} that readers take")
    return len(text).to_bytes(8, "little") + text


def _check_place(path: Path, needed_bytes: int) -> None:
    if not path.parent.is_dir():
        raise OSError(f"{shown(str(path.parent))}: no such folder; make it first, or choose another place")
    if path.is_dir():
        raise OSError(f"{shown(str(path))}: is a folder; give the name of a file in it")
    import shutil

    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        raise _no_room(path, needed_bytes, free)


def _no_room(path: Path, needed_bytes: int, free_bytes: int) -> OSError:
    return OSError(
        f"{shown(path.name)}: needs {_size(needed_bytes)} on the disk, {_size(free_bytes)} are free; make room, or choose "
        "another disk"
    )


def _unwritten(path: Path, needed_bytes: int, error: OSError) -> OSError:
    """Returns the error for a write that failed; the unfinished file is gone by now."""
    if error.errno in _FULL:
        import shutil

        return _no_room(path, needed_bytes, shutil.disk_usage(path.parent).free)
    if error.errno == errno.EFBIG:
        return OSError(
            f"{shown(path.name)}: needs {_size(needed_bytes)}, more than this disk takes in one file (FAT32: 4 GB); choose "
            "another disk"
        )
    return OSError(f"{shown(path.name)}: cannot be written ({error.strerror or error}); check the disk")


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / MB:.2f} MB"


def _replace(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        # Windows does not replace a file that a program has open.
        raise OSError(
            f"{shown(path.name)}: cannot be replaced ({error.strerror or error}); close the program that uses it, or "
            "choose another name"
        ) from error


def _place(partial: Path, path: Path) -> None:
    """Gives the complete file its name, unless something has that name by now."""
    try:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without second names: an empty file of ours keeps the name until it is replaced.
            path.touch(exist_ok=False)
            _replace(partial, path)
            return
    except FileExistsError as error:
        raise OSError(
            f"{shown(path.name)}: another program has made a file of this name meanwhile, and it stays; bake again with "
            "another name, or --force to replace it"
        ) from error
    # A second name that stays does no harm.
    with contextlib.suppress(OSError):
        partial.unlink()


def _write_entry(file: FileIO, entry: Entry) -> Iterator[int]:
    """Writes a tensor and yields the bytes of each slice written."""
    tensor = entry.load()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != tuple(entry.shape):
        raise ValueError(
            f"{shown(entry.name)}: expected {entry.dtype} {list(entry.shape)} as announced, found {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    for piece in _pieces(tensor.detach()):
        size = piece.numel() * piece.element_size()
        if not size:
            continue
        # The tensor's own memory: numpy has no bf16 and no fp8.
        view = memoryview((ctypes.c_ubyte * size).from_address(piece.data_ptr())).cast("B")
        for start in range(0, size, SLICE_BYTES):
            part = view[start : start + SLICE_BYTES]
            _write(file, part)
            yield len(part)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields contiguous pieces in RAM: the tensor itself if it is one, else small copies of its rows."""
    size = tensor.numel() * tensor.element_size()
    plain = not (tensor.is_conj() or tensor.is_neg())
    if tensor.is_cpu and tensor.is_contiguous() and plain:
        yield tensor
    elif size <= SLICE_BYTES or not tensor.dim():
        yield tensor.cpu().resolve_conj().resolve_neg().contiguous()
    else:
        rows = SLICE_BYTES * tensor.shape[0] // size
        for part in torch.split(tensor, max(1, rows)):
            yield from _pieces(part if rows else part[0])


class _WriteError(Exception):
    """The system has refused to write; an error of a tensor that is loaded meanwhile is none of these."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


def _write(file: FileIO, data: memoryview) -> None:
    try:
        while data:
            # The system may write less than it is given.
            data = data[file.write(data) or 0 :]
    except OSError as error:
        raise _WriteError(error) from error


def _synced(file: FileIO) -> None:
    """Waits until the file is on the disk: some file systems find no room only then."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise _WriteError(error) from error
