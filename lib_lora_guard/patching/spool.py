"""Tensors kept in a file, bit for bit. Each spool has one file, which is deleted with its last tensor.

The file is open for as long as it exists, so that no other program can remove its contents: Windows refuses, elsewhere
they stay with the handle. The file of a killed process is deleted by the next one; its name tells whose it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import psutil
import torch

from ..errors import Message, ModeError, RestoreError, about, reason
from ..memory.probe import default_spool_dir, disk_spare_bytes
from ..private_files import make_private_folder, private_opener
from ..recorder.processes import is_running
from ..units import MB

CHUNK_BYTES = 16 * MB
"""Bytes in RAM at a time on the way between a GPU and the disk."""

_NAME = re.compile(r"lora-guard-(\d{1,9})-(\d{1,15})-[0-9a-f]+\.spool")


@dataclass(frozen=True, eq=False)
class Region:
    """One tensor in the file: `bytes` from `start` on.

    `checksum` is CRC-32. It detects torn and foreign writes, not an attack, and is three times as fast as BLAKE2.
    """

    start: int
    bytes: int
    checksum: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Spool:
    """Tensors in one file in `folder`. Not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._file: FileIO | None = None
        self._close: weakref.finalize[[FileIO, Path], Spool] | None = None
        self._live: set[Region] = set()
        self._writes = 0
        """Under way: the file stays open for them."""
        remove_stale_files(folder)

    def write(self, key: str, tensor: torch.Tensor) -> Region:
        """Writes a tensor. `key` names it in errors.

        Raises:
            ModeError: The disk does not take it; the file is as before.
        """
        stride = torch.empty_like(tensor, device="meta").stride()
        # The order of the dimensions is kept; gaps and overlaps between rows are not.
        dense = tensor.detach() if tensor.stride() == stride else tensor.detach().clone()
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        spare = disk_spare_bytes(self.folder)
        self._writes += 1
        try:
            if flat.numel() > spare:
                raise OSError(Message("memory.spool_limit", {"spare_mb": spare / MB}))
            file = self._open()
            start = self._free_start(flat.numel())
            file.seek(start)
            checksum = 0
            for chunk in _chunks(flat):
                checksum = _write(file, chunk.cpu(), checksum)
            region = Region(start, flat.numel(), checksum, tuple(tensor.shape), tuple(stride), tensor.dtype)
            self._live.add(region)
        except OSError as error:
            facts = {"size_mb": flat.numel() / MB, "folder": str(self.folder), "error": reason(error)}
            raise ModeError(about(key, Message("memory.spool", facts))) from error
        finally:
            self._writes -= 1
            self._delete_if_empty()
        return region

    def read(self, key: str, region: Region, device: torch.device) -> torch.Tensor:
        """Reads a tensor back into a new one on `device`.

        Raises:
            RestoreError: The file no longer has its bits.
        """
        flat = torch.empty(region.bytes, dtype=torch.uint8, device=device)
        if self._file is None or region not in self._live:
            raise self._lost(key, "it was released")
        start, checksum = region.start, 0
        for chunk in _chunks(flat):
            # Outside the try: an error of the device is no loss, the file still has the bits.
            staged = chunk if device.type == "cpu" else torch.empty_like(chunk, device="cpu")
            try:
                self._file.seek(start)
                checksum = _read(self._file, staged, checksum)
            except (OSError, ValueError) as error:
                raise self._lost(key, str(error)) from error
            start += staged.numel()
            if staged is not chunk:
                chunk.copy_(staged)
        if checksum != region.checksum:
            raise self._lost(key, f"checksum {checksum:08x}, expected {region.checksum:08x}")
        return flat.view(region.dtype).as_strided(region.shape, region.stride)

    def _lost(self, key: str, problem: str) -> RestoreError:
        return RestoreError(about(key, Message("memory.spool_lost", {"path": str(self.path), "error": problem})))

    def free(self, region: Region) -> None:
        """Gives the region's room back. Idempotent."""
        self._live.discard(region)
        self._delete_if_empty()

    @property
    def bytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum([region.bytes for region in self._live.copy()])

    def _open(self) -> FileIO:
        if self._file is None:
            make_private_folder(self.folder, is_own=self.folder == default_spool_dir())
            started_ms = round(psutil.Process().create_time() * 1000)
            path = self.folder / f"lora-guard-{os.getpid()}-{started_ms}-{secrets.token_hex(4)}.spool"
            self._file, self.path = FileIO(path, "x+", opener=private_opener), path
            # Runs once: when this object is freed, or when the interpreter ends.
            self._close = weakref.finalize(self, _close_and_delete, self._file, path)
        return self._file

    def _delete_if_empty(self) -> None:
        # The collector may free the last region in the middle of a write, whose own is not there yet.
        if not self._live and not self._writes and self._close is not None:
            self._close()
            self._file = self._close = None

    def _free_start(self, size: int) -> int:
        """Returns the offset of `size` free bytes: the first gap that is large enough, or the end."""
        # The collector may free a region whenever an object is made; a copy of the set makes none in the middle.
        start, live = 0, self._live.copy()
        for region in sorted(live, key=lambda r: r.start):
            if region.start - start >= size:
                return start
            start = region.start + region.bytes
        return start


def remove_stale_files(folder: Path) -> None:
    """Deletes spool files whose process is gone. A file that cannot be deleted is in use, or belongs to another user."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return
    for path in found:
        name = _NAME.fullmatch(path.name)
        if name is not None and not is_running(int(name[1]), int(name[2])):
            with contextlib.suppress(OSError):
                path.unlink()


def _close_and_delete(file: FileIO, path: Path) -> None:
    with contextlib.suppress(OSError):
        file.close()
    with contextlib.suppress(OSError):
        path.unlink()


def _chunks(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, flat.numel(), CHUNK_BYTES):
        yield flat.narrow(0, start, min(CHUNK_BYTES, flat.numel() - start))


def _write(file: FileIO, chunk: torch.Tensor, checksum: int) -> int:
    """Writes a byte tensor in RAM and returns the checksum with it. An unbuffered write may take only a part."""
    view = memory_of(chunk)
    checksum = zlib.crc32(view, checksum)
    while len(view):
        view = view[file.write(view) :]
    return checksum


def _read(file: FileIO, chunk: torch.Tensor, checksum: int) -> int:
    view = memory_of(chunk)
    missing = view
    while len(missing):
        count = file.readinto(missing)
        if not count:
            raise OSError(f"it ends {len(missing)} bytes early")
        missing = missing[count:]
    return zlib.crc32(view, checksum)


def memory_of(chunk: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous byte tensor in RAM. The tensor has to outlive it."""
    if chunk.numel() == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * chunk.numel()).from_address(chunk.data_ptr())).cast("B")
