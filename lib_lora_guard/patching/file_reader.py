"""Reads parts of one large file to a device, as fast as the link: several threads fill pinned buffers, the card reads them.

One thread copies 5 to 8 GB/s out of the system's page cache, and the card takes several times as much. So a few threads
read pieces of 4 MB into a ring of buffers, in the order in which they will be asked for, also while the card works on
what it has. There are more buffers than threads: a thread need not wait for the card, which reads some of them. The file is read, never mapped: a mapped file that is truncated kills the process.

The file stays open from `open` to `close`. Windows refuses to delete, rename or write it meanwhile, and lets others read
it. Elsewhere a deleted file lives on with the handle; one that is written in place has other bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..errors import Message
from ..files import FileState
from ..inference_mode import outside_inference
from ..units import MB
from .reading_threads import ReadingThreads, Task
from .spool import memory_of

T = TypeVar("T")

PIECE_BYTES = 4 * MB
BUFFERS = 12
"""Of PIECE_BYTES each: 48 MB of RAM are all that it takes."""
THREADS = 8

if sys.platform == "win32":
    import ctypes
    import msvcrt

    _GENERIC_READ, _SHARE_READ, _OPEN_EXISTING, _INVALID = 0x80000000, 1, 3, ctypes.c_void_p(-1).value

    def open_shared(path: str, flags: int) -> int:
        """Opens a file for reading; others may read it, and cannot write, rename or delete it."""
        create = ctypes.WinDLL("kernel32", use_last_error=True).CreateFileW
        create.restype = ctypes.c_void_p
        create.argtypes = (
            ctypes.c_wchar_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_uint32,
            ctypes.c_void_p,
        )
        handle = create(path, _GENERIC_READ, _SHARE_READ, None, _OPEN_EXISTING, 0, None)
        if handle == _INVALID:
            raise ctypes.WinError(ctypes.get_last_error())
        return msvcrt.open_osfhandle(handle, flags)

else:

    def open_shared(path: str, flags: int) -> int:
        """Opens a file for reading."""
        return os.open(path, flags)


class Piece(NamedTuple):
    """A part of the file."""

    start: int
    bytes: int


@dataclass
class Buffer:
    """One buffer of the ring."""

    memory: torch.Tensor
    is_pinned: bool
    bytes: memoryview
    """The same memory, for threads that fill it: they are to hold the interpreter for as short as can be."""
    read: torch.cuda.Event | None = None
    """Recorded after the device's copy out of it."""

    @property
    def is_free(self) -> bool:
        """True when the device has read it."""
        return self.read is None or bool(self.read.query())  # type: ignore[no-untyped-call]  # torch's own


class FileReader:
    """One file, open. Threads take turns.

    Args:
        path: The file.
        expected: The state that it must have; the reader refuses another file under the name.

    Raises:
        OSError: The file cannot be opened, or is another one.
    """

    def __init__(self, path: Path, expected: FileState | None) -> None:
        self._files: list[FileIO] = []
        self._lock = threading.RLock()
        self._threads: ReadingThreads | None = None
        self._buffers: list[Buffer] = []
        self._free: deque[Buffer] = deque()
        self._planned: deque[Piece] = deque()
        self._under_way: deque[tuple[Piece, Buffer, Task[None]]] = deque()
        self._is_reading = False
        try:
            # A handle for each thread: reads through one wait for each other on Windows.
            for _ in range(min(THREADS, os.cpu_count() or 1)):
                self._files.append(FileIO(str(path), "rb", opener=open_shared))
            states = {FileState.of(os.fstat(file.fileno())) for file in self._files}
            if len(states) > 1 or expected not in (None, *states):
                raise OSError(Message("file.rewritten"))
        except BaseException:
            self.close()
            raise

    @outside_inference
    def reserve(self, device: torch.device) -> None:
        """Allocates the ring for a device, so that later reads need no memory. Pinned where the driver gives it.

        Raises:
            RuntimeError: There is no room even for ordinary buffers.
        """
        if self._buffers:
            return
        buffers = [_buffer(device) for _ in range(BUFFERS)]
        self._buffers, self._free = buffers, deque(buffers)

    def expect(self, parts: Iterable[Piece]) -> None:
        """Begins to read parts ahead: they will be asked for next, in this order, to a device."""
        with self._lock:
            if self._buffers:
                self._begin()
                self._plan(piece for part in parts for piece in pieces(part))
                self._is_reading = False

    def read(self, part: Piece, into: torch.Tensor) -> None:
        """Reads a part through the ring.

        Args:
            part: The part. One of several parts of the same region begins a whole number of PIECE_BYTES after its start.
            into: A flat byte tensor of its size, on the device that `reserve` was called for.

        Raises:
            OSError: It cannot be read.
        """
        with self._lock:
            self._begin()
            self._read_to_device(part, into)
            self._is_reading = False

    def read_to_ram(self, part: Piece, into: torch.Tensor, then: Callable[[torch.Tensor], T]) -> list[T]:
        """Reads a part into RAM, past the ring.

        Args:
            part: The part.
            into: A flat byte tensor of its size in RAM.
            then: Called with each piece that was read, in the thread that has read it.

        Returns:
            The answers of `then`, in the order of the pieces.

        Raises:
            OSError: It cannot be read.
        """

        def fill(piece: Piece, into: torch.Tensor, file: FileIO) -> T:
            read_piece(file, piece, memory_of(into))
            return then(into)

        with self._lock:
            self._begin()
            # Each task holds the memory that it writes to, whatever happens to the caller.
            threads = self._running()
            tasks = [
                threads.submit(partial(fill, piece, into.narrow(0, piece.start - part.start, piece.bytes)))
                for piece in pieces(part)
            ]
            found = [task.result() for task in tasks]
            self._is_reading = False
        return found

    def _begin(self) -> None:
        """Makes sure that no thread reads what an earlier read has left behind."""
        if self._is_reading:
            # The last one was interrupted, or this one comes from a signal handler in the middle of it.
            self._stop()
            if any(buffer.is_pinned for buffer in self._buffers):
                # The interrupt may have come before a copy was noted.
                torch.cuda.synchronize()
            self._planned, self._under_way, self._free = deque(), deque(), deque(self._buffers)
        self._is_reading = True

    def _stop(self) -> None:
        if self._threads is not None:
            self._threads.stop()
            self._threads = None

    def _running(self) -> ReadingThreads:
        if self._threads is None:
            self._threads = ReadingThreads(self._files)
        return self._threads

    def close(self) -> None:
        """Closes the file and frees the ring. Idempotent."""
        self._stop()
        self._buffers, self._free, self._planned, self._under_way = [], deque(), deque(), deque()
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def _read_to_device(self, part: Piece, into: torch.Tensor) -> None:
        self.reserve(into.device)
        wanted = pieces(part)
        ahead = [piece for piece, _, _ in self._under_way]
        ahead += [piece for piece, _ in zip(self._planned, wanted[len(ahead) :], strict=False)]
        if ahead[: len(wanted)] != wanted:
            self._plan(wanted)
        done = 0
        stream = torch.cuda.current_stream(into.device) if into.device.type == "cuda" else None
        for piece in wanted:
            self._read_ahead()
            _, buffer, task = self._under_way.popleft()
            memory = buffer.memory[: piece.bytes]
            task.result()
            into.narrow(0, done, piece.bytes).copy_(memory, non_blocking=buffer.is_pinned)
            if buffer.is_pinned:
                if buffer.read is None:
                    buffer.read = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
                buffer.read.record(stream)
            self._free.append(buffer)
            done += piece.bytes
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Hands the free buffers to the threads."""
        while self._planned and self._free:
            buffer = self._free[0]
            if not buffer.is_free:
                if self._under_way:
                    return
                assert buffer.read is not None
                buffer.read.synchronize()
            piece = self._planned[0]
            # The task holds the buffer, whatever happens to the ring.
            read = partial(_fill, piece=piece, buffer=buffer)
            self._under_way.append((piece, buffer, self._running().submit(read)))
            self._planned.popleft()
            self._free.popleft()

    def _plan(self, planned: Iterable[Piece]) -> None:
        """Forgets what was planned, and begins with something else."""
        while self._under_way:
            _, buffer, task = self._under_way.popleft()
            # Its buffer is free when it has ended, however it ends.
            with contextlib.suppress(OSError, ValueError):
                task.result()
            self._free.append(buffer)
        self._planned = deque(planned)
        self._read_ahead()


def read_piece(file: FileIO, piece: Piece, into: memoryview) -> None:
    """Reads a piece of an open file.

    Args:
        file: The file, which no other thread uses.
        piece: The piece.
        into: Memory of its size.

    Raises:
        OSError: It cannot be read, or the file ends before it.
    """
    done = 0
    while done < piece.bytes:
        count = _read_at(file, piece.start + done, into[done:] if done else into)
        if not count:
            raise OSError(f"it ends {piece.bytes - done} bytes early")
        done += count


if sys.platform == "win32" or not hasattr(os, "preadv"):

    def _read_at(file: FileIO, start: int, into: memoryview) -> int:
        """Reads what lies at a place of a file, and returns how many bytes that were."""
        file.seek(start)
        return file.readinto(into) or 0

else:

    def _read_at(file: FileIO, start: int, into: memoryview) -> int:
        """Reads what lies at a place of a file, and returns how many bytes that were. One call, which lets other threads run."""
        return os.preadv(file.fileno(), (into,), start)


def _fill(file: FileIO, piece: Piece, buffer: Buffer) -> None:
    read_piece(file, piece, buffer.bytes[: piece.bytes])


def pieces(part: Piece) -> list[Piece]:
    """Cuts a part into the pieces that are read at once."""
    end = part.start + part.bytes
    return [Piece(start, min(PIECE_BYTES, end - start)) for start in range(part.start, end, PIECE_BYTES)]


def _buffer(device: torch.device) -> Buffer:
    if device.type == "cuda":
        # Refused where the driver locks no more RAM; ordinary buffers are slower, and right.
        with contextlib.suppress(RuntimeError):
            return _buffer_of(torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True), True)
    return _buffer_of(torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu"), False)


def _buffer_of(memory: torch.Tensor, is_pinned: bool) -> Buffer:
    return Buffer(memory, is_pinned, memory_of(memory))
