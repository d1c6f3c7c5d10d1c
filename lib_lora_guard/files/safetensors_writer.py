"""Writes safetensors files one tensor at a time, so that a file may be far larger than the memory.

Source: the format's own description (github.com/huggingface/safetensors, README "Format"). As its library does, the
header ends on a multiple of 8 bytes and the tensors with the widest values come first: then every tensor begins where
its dtype may begin.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from .header import MAX_HEADER_BYTES, shown
from .safetensors_file import FORMATS

SLICE_BYTES = 64 << 20
"""Written in one go; also what is copied of a tensor that does not lie in RAM in one piece."""
_ALIGNMENT = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A tensor to be: `load` is called once, when its turn to be written has come, and must keep what `dtype` and `shape`
    promise."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None, progress: Progress | None = None
) -> None:
    """Writes a new file beside `path`, which takes its place when it is complete; until then `path` stays as it was.

    `progress` is told the bytes of tensors that are written and all of them. Tensors with the widest values come first,
    otherwise the order is that of `entries`. What `load` gives is let go of before the next one is called.
    Raises OSError where there is no folder, no room on the disk, or no right to write; ValueError for entries that
    cannot be written or that load as something else. No partial file is left, not even by KeyboardInterrupt.
    """
    header = _header(entries, metadata or {})
    total = sum(entry.bytes for entry in entries)
    _check_place(path, len(header) + total)
    partial = path.with_name(f"{path.name[:40]}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb", buffering=0) as file:
            _write(file, memoryview(header))
            done = 0
            for entry in _ordered(entries):
                for size in _write_entry(file, entry):
                    done += size
                    if progress is not None:
                        progress(done, total)
            os.fsync(file.fileno())
        _replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def format_of(dtype: torch.dtype) -> str | None:
    """What the format calls a dtype of torch's ("BF16"), or None where it has no name for it."""
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
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        raise OSError(
            f"{shown(path.name)}: needs {_gb(needed_bytes)} on the disk, {_gb(free)} are free; make room, or choose "
            "another disk"
        )


def _gb(count: int) -> str:
    return f"{count / (1 << 30):.2f} GB"


def _replace(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        # Windows does not let go of a file that a program has open.
        raise OSError(
            f"{shown(path.name)}: cannot be replaced ({error.strerror or error}); close the program that uses it, or "
            "choose another name"
        ) from error


def _write_entry(file: FileIO, entry: Entry) -> Iterator[int]:
    """The bytes of each slice written."""
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
        # Torch's own memory: numpy has no bf16 and no fp8.
        view = memoryview((ctypes.c_ubyte * size).from_address(piece.data_ptr())).cast("B")
        for start in range(0, size, SLICE_BYTES):
            part = view[start : start + SLICE_BYTES]
            _write(file, part)
            yield len(part)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in contiguous pieces in RAM: itself where it is one, else small copies of its rows."""
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


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        # The system may take less than it is given.
        data = data[file.write(data) or 0 :]
