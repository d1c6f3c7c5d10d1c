"""Reads parts of one large file to a device, as fast as the link: several threads fill pinned memory, the card reads it.

One thread copies 5 to 8 GB/s out of the system's page cache, and the card takes several times as much. So a few threads
read ahead into a ring (`ring_memory.py`), in the order in which the parts will be asked for, also while the card works on
what it has. Each fills a piece of 4 MB: larger ones cost the thread that asks for them less time, and leave the threads fewer to
fill (docs/gpu.md). The card gets in one copy what is there and lies together. The ring holds more than the threads write: they
need not wait for the card, which reads some of it. The file is read, never mapped: a mapped file that is truncated kills the
process.

The file stays open from `open` to `close`. Windows refuses to delete, rename or write it meanwhile, and lets others read
it. Elsewhere a deleted file lives on with the handle; one that is written in place has other bytes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import torch

from ..errors import Message
from ..files import FileState
from ..inference_mode import outside_inference
from ..locks import while_locked
from ..units import MB
from .reading_threads import ReadingThreads, Task
from .ring_memory import RingMemory, Span
from .spool import memory_of

T = TypeVar("T")

PIECE_BYTES = 4 * MB
"""Of what one thread reads at once."""
COPY_BYTES = 16 * MB
"""Of what the card gets in one copy at most: the ring's other parts are filled meanwhile."""
RING_BYTES = 64 * MB
"""Of RAM: all that it takes. torch rounds pinned memory up to a power of two."""
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


Load: TypeAlias = tuple[Piece, ...]
"""What one thread fills at once: pieces that lie one behind the other on the card, wherever they are in the file."""


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
        self._ring: RingMemory | None = None
        self._planned: deque[Load] = deque()
        self._under_way: deque[tuple[Load, Span, Task[None]]] = deque()
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
            RuntimeError: There is no room even for ordinary memory.
        """
        if self._ring is None:
            self._ring = RingMemory(RING_BYTES, device)

    def expect(self, groups: Iterable[Sequence[Piece]]) -> None:
        """Begins to read ahead: these parts will be asked for next, each group at once, in this order, to a device."""

        def begin() -> None:
            if self._ring is not None:
                self._begin()
                self._plan(self._ring, (load for group in groups for load in loads(group)))
                self._is_reading = False

        while_locked(self._lock, begin)

    def read(self, parts: Sequence[Piece], into: torch.Tensor) -> None:
        """Reads parts through the ring. Many small ones take little more work of the processor than one.

        Args:
            parts: One of several parts of the same region begins a whole number of PIECE_BYTES after its start.
            into: A flat byte tensor that holds them one behind the other, on the device that `reserve` was called for.

        Raises:
            OSError: They cannot be read.
        """

        def work() -> None:
            self._begin()
            self._read_to_device(parts, into)
            self._is_reading = False

        while_locked(self._lock, work)

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

        def work() -> list[T]:
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

        return while_locked(self._lock, work)

    def _begin(self) -> None:
        """Makes sure that no thread reads what an earlier read has left behind."""
        if self._is_reading:
            # The last one was interrupted, or this one comes from a signal handler in the middle of it.
            self._stop()
            self._planned, self._under_way = deque(), deque()
            if self._ring is not None:
                if self._ring.is_pinned:
                    # The interrupt may have come before a copy was noted.
                    torch.cuda.synchronize()
                self._ring.forget()
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
        self._ring, self._planned, self._under_way = None, deque(), deque()
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def _read_to_device(self, parts: Sequence[Piece], into: torch.Tensor) -> None:
        self.reserve(into.device)
        ring = self._ring
        assert ring is not None
        wanted = loads(parts)
        ahead = [load for load, _, _ in self._under_way]
        ahead += [load for load, _ in zip(self._planned, wanted[len(ahead) :], strict=False)]
        if ahead[: len(wanted)] != wanted:
            self._plan(ring, wanted)
        done, left = 0, len(wanted)
        stream = torch.cuda.current_stream(into.device) if ring.is_pinned else None
        while left:
            self._read_ahead(ring)
            spans = self._filled(left)
            left -= len(spans)
            span = ring.joined(spans)
            size = span.memory.numel()
            into.narrow(0, done, size).copy_(span.memory, non_blocking=ring.is_pinned)
            ring.give(span, stream)
            done += size
        self._read_ahead(ring)

    def _filled(self, most: int) -> list[Span]:
        """Waits for the next load, and returns its span with those of the next ones that are there already and lie behind it.

        So the card gets more at once where this thread is what it waits for. At most `most` of them, and COPY_BYTES.
        """
        _, span, task = self._under_way.popleft()
        task.result()
        spans = [span]
        while len(spans) < most and self._under_way:
            _, following, task = self._under_way[0]
            if following.start != span.end or following.end - spans[0].start > COPY_BYTES or not task.is_done:
                break
            self._under_way.popleft()
            task.result()
            span = following
            spans.append(span)
        return spans

    def _read_ahead(self, ring: RingMemory) -> None:
        """Hands what is free of the ring to the threads."""
        while self._planned:
            load = self._planned[0]
            span = ring.take(load[0].bytes if len(load) == 1 else sum(piece.bytes for piece in load))
            if span is None:
                if self._under_way:
                    return
                ring.wait()
                continue
            # The task holds the memory, whatever happens to the ring.
            self._under_way.append((load, span, self._running().submit(partial(_fill, load=load, span=span))))
            self._planned.popleft()

    def _plan(self, ring: RingMemory, planned: Iterable[Load]) -> None:
        """Forgets what was planned, and begins with something else."""
        while self._under_way:
            _, span, task = self._under_way.popleft()
            # Its memory is free when it has ended, however it ends.
            with contextlib.suppress(OSError, ValueError):
                task.result()
            ring.give(span)
        self._planned = deque(planned)
        self._read_ahead(ring)


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


def _fill(file: FileIO, load: Load, span: Span) -> None:
    place = 0
    for piece in load:
        read_piece(file, piece, span.bytes[place : place + piece.bytes])
        place += piece.bytes


def loads(parts: Sequence[Piece]) -> list[Load]:
    """Puts parts together, and cuts them, into what one thread fills at once."""
    found: list[Load] = []
    load: list[Piece] = []
    size = 0
    for part in parts:
        for piece in pieces(part):
            if load and size + piece.bytes > PIECE_BYTES:
                found.append(tuple(load))
                load, size = [], 0
            load.append(piece)
            size += piece.bytes
    if load:
        found.append(tuple(load))
    return found


def pieces(part: Piece) -> list[Piece]:
    """Cuts a part into pieces of PIECE_BYTES."""
    size, end = PIECE_BYTES, part.start + part.bytes
    if 0 < part.bytes <= size:
        return [part]
    return [Piece(start, min(size, end - start)) for start in range(part.start, end, size)]
