"""Reads tensors of a file into memory of our own: large files by several threads, for which the caller waits at once or later."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import FileIO
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import TypeAlias

from .. import large_pages
from ..errors import Message
from ..inference_mode import outside_inference
from ..lazy_torch import torch
from ..units import MB
from .header import FileHeader, TensorEntry, check_unchanged, opened, refusal

READERS = min(8, max(2, (os.cpu_count() or 2) // 2))
"""Threads that read a large file. A file that the system has in RAM comes as fast as a core can fill memory that did not exist
before, page by page: 2 GB/s a core."""
READ_AT_ONCE_BYTES = 8 * MB
"""What a thread reads before it takes the next piece: the threads stay close together, so that a disk that turns need not seek."""
READ_AT_ONCE_MEANWHILE_BYTES = 32 * MB
"""The same while the caller goes on: after each piece a thread waits up to 5 ms for the interpreter, three times."""
LARGE_FILE_BYTES = 64 * MB
"""From here on threads are worth what they cost."""
POLL_SECONDS = 0.05

Typed: TypeAlias = "Callable[[TensorEntry, torch.Tensor], torch.Tensor]"
"""Gives a flat uint8 tensor the type and shape of an entry."""
Check: TypeAlias = "Callable[[Sequence[TensorEntry], torch.Tensor], None]"
"""Looks at the bytes of neighbouring entries, from the first one's start to the last one's end; raises if they are of no use."""


class Coming:
    """The values of tensors that exist already, for threads to read from the file. Those of a small file are read at once."""

    def __init__(self, header: FileHeader, entries: Iterable[TensorEntry], memory: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            header: The file's header.
            entries: The tensors.
            memory: A flat uint8 tensor for each, by name.
        """
        self._header, self._memory = header, memory
        # Of two that begin at the same place, the first has no values: the last one of some ends behind all of them.
        self._entries = sorted(entries, key=attrgetter("start", "bytes"))
        self._bytes = sum(entry.bytes for entry in self._entries)
        self._pieces = _Pieces(self._entries, self._at_once_bytes)
        self._error: BaseException | None = None
        self._started = 0
        self._ended: list[None] = []
        self._read_bytes: list[int] = []
        self._wake: SimpleQueue[None] = SimpleQueue()

    @property
    def _at_once_bytes(self) -> int:
        return READ_AT_ONCE_BYTES

    def start(self) -> None:
        """Begins to read. To be called once."""
        _STARTED[id(self)] = self
        try:
            if len(self._entries) > 1 and self._bytes >= LARGE_FILE_BYTES:
                self._start_threads()
            if not self._started:
                self._started = 1
                self._run()
                self._raise_interrupt()
        except BaseException:
            self.stop()
            raise

    @property
    def is_done(self) -> bool:
        """True when no thread reads any more."""
        return len(self._ended) >= self._started > 0

    @property
    def has_failed(self) -> bool:
        """True if the values will never be there."""
        return self.is_done and self._error is not None

    @property
    def unread_bytes(self) -> int:
        """Bytes that threads are still to read."""
        return 0 if self.is_done else self._bytes - sum(self._read_bytes)

    def _place_of(self, entry: TensorEntry) -> torch.Tensor:
        """Returns the memory of a tensor."""
        return self._memory[entry.name]

    def wait(self) -> None:
        """Waits until all values are there. May be interrupted and called again.

        Raises:
            FileFormatError: The file cannot be read, or was changed since the header was read.
            Exception: What the check has raised.
        """
        while not self.is_done:
            # A call of C, which an interrupt cannot leave half done; it may take the token, so there is a limit.
            with contextlib.suppress(Empty):
                self._wake.get(timeout=POLL_SECONDS)
        if self._error is not None:
            raise self._error.with_traceback(None)

    def stop(self) -> None:
        """Leaves what is not read yet."""
        self._pieces.stop()
        self._error = self._error or InterruptedError("the read was stopped")

    def _start_threads(self) -> None:
        """Starts one thread, which starts the others: whoever starts one waits until it runs, and for the interpreter after that."""
        self._start_thread(self._run_and_start_others)

    def _run_and_start_others(self) -> None:
        for _ in range(READERS - 1):
            if not self._start_thread(self._run):
                break
        self._run()

    def _start_thread(self, run: Callable[[], None]) -> bool:
        """Starts a thread; returns False where the system has none left, or no memory for one."""
        # Counted before it may have ended.
        self._started += 1
        try:
            threading.Thread(target=run, name="lora-guard-reader").start()
        except Exception:
            self._started -= 1
            return False
        return True

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            # The other threads need not go on.
            self._pieces.stop()
            self._error = self._error or error
        finally:
            self._ended.append(None)
            self._wake.put(None)

    def _raise_interrupt(self) -> None:
        """Raises what is meant for the caller's own thread."""
        if self._error is not None and not isinstance(self._error, Exception):
            raise self._error

    def _read(self) -> None:
        with opened(self._header.path) as (file, facts):
            check_unchanged(self._header, facts)
            while piece := self._pieces.take():
                self._read_piece(piece, file)
                self._read_bytes.append(sum(entry.bytes for entry in piece))
            check_unchanged(self._header, os.fstat(file.fileno()))

    def _read_piece(self, piece: Sequence[TensorEntry], file: FileIO) -> None:
        for entry in piece:
            if entry.bytes:
                _fill(memory_of(self._place_of(entry)), self._header, entry, file)


class ComingInOnePiece(Coming):
    """The same for tensors that lie in memory as they lie in the file: a thread reads megabytes in one call of the system.

    Each call of many that threads make waits for the interpreter, which is the caller's meanwhile.
    """

    @property
    def _at_once_bytes(self) -> int:
        return READ_AT_ONCE_MEANWHILE_BYTES

    def __init__(
        self, header: FileHeader, whole: torch.Tensor, start: int, entries: Iterable[TensorEntry], check: Check
    ) -> None:
        """
        Args:
            header: The file's header.
            whole: Flat, uint8; the bytes of the file from `start`, to the end of the last tensor.
            start: Where the first tensor begins.
            entries: The tensors.
            check: Called for what is there, in the thread that has read it.
        """
        super().__init__(header, entries, {})
        self._whole, self._start, self._check = whole, start, check

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Returns True if all of `tensors` lie in the memory that is read into. What was computed from it does not."""
        place = self._whole.untyped_storage().data_ptr()
        return all(tensor.untyped_storage().data_ptr() == place for tensor in tensors)

    def _place_of(self, entry: TensorEntry) -> torch.Tensor:
        return self._whole.narrow(0, entry.start - self._start, entry.bytes)

    def _read_piece(self, piece: Sequence[TensorEntry], file: FileIO) -> None:
        start, end = piece[0].start, piece[-1].start + piece[-1].bytes
        part = self._whole[start - self._start : end - self._start]
        file.seek(start)
        if part.numel() and file.readinto(memory_of(part)) < part.numel():
            # Again tensor by tensor, which says where the file ends.
            super()._read_piece(piece, file)
        self._check(piece, part)


_STARTED: weakref.WeakValueDictionary[int, Coming] = weakref.WeakValueDictionary()
"""By their ids, for as long as something has them."""


def unread_bytes() -> int:
    """Returns the bytes that are still to be read for all files: memory that is allocated, but not written to."""
    return sum(one.unread_bytes for get in _STARTED.valuerefs() if (one := get()) is not None)


@outside_inference
def prepare_entries(
    header: FileHeader, names: Sequence[str], dtype_of: Callable[[TensorEntry], torch.dtype], check: Check
) -> tuple[dict[str, torch.Tensor], ComingInOnePiece] | None:
    """Makes tensors for values that threads can read while the caller goes on, outside inference mode and in one piece of memory.

    Args:
        header: The file's header.
        names: The tensors, all of one format.
        dtype_of: Gives the type of a tensor's values, of which the file has what its shape says.
        check: Called for what is there, in the thread that has read it.

    Returns:
        The tensors, and what reads their values once it is started; None if they do not lie in the file as memory needs them.

    Raises:
        FileFormatError: A name is not in the header, or there is no memory.
    """
    entries = [_entry(header, name) for name in names]
    dtype, start = dtype_of(entries[0]), min(entry.start for entry in entries)
    if any((entry.start - start) % dtype.itemsize for entry in entries):
        # A tensor begins between two places for values of its type.
        return None
    whole = _memory(header, max(entry.start + entry.bytes for entry in entries) - start)
    values = whole.view(dtype)
    # In one call of torch for each: slices that get a type and a shape are three.
    tensors = {
        one.name: values.as_strided(one.shape, _strides(one.shape), (one.start - start) // dtype.itemsize)
        for one in entries
    }
    return tensors, ComingInOnePiece(header, whole, start, entries, check)


@outside_inference
def read_entries(header: FileHeader, names: Iterable[str] | None, typed: Typed) -> dict[str, torch.Tensor]:
    """Reads tensors, each into memory of its own and outside inference mode.

    Args:
        header: The file's header.
        names: Tensors in the order asked for; None for all.
        typed: Gives a tensor its type and shape.

    Raises:
        FileFormatError: A name is not in the header, there is no memory, or the file was changed since the header was read.
    """
    entries = [_entry(header, name) for name in dict.fromkeys(header.tensors if names is None else names)]
    memory = {entry.name: _memory(header, entry.bytes, entry.name) for entry in entries}
    tensors = {entry.name: typed(entry, memory[entry.name]) for entry in entries}
    coming = Coming(header, entries, memory)
    try:
        coming.start()
        coming.wait()
    except BaseException:
        coming.stop()
        raise
    return tensors


def read_bytes(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, bytes]:
    """Reads the bytes of small tensors as they lie in the file, without torch.

    Args:
        header: The file's header.
        names: The tensors in the order asked for; None for all.

    Raises:
        FileFormatError: A name is not in the header, or the file was changed since the header was read.
    """
    wanted = {name: _entry(header, name) for name in (header.tensors if names is None else names)}
    found = {}
    with opened(header.path) as (file, facts):
        check_unchanged(header, facts)
        for entry in sorted(wanted.values(), key=lambda entry: entry.start):
            buffer = bytearray(entry.bytes)
            _fill(memoryview(buffer), header, entry, file)
            found[entry.name] = bytes(buffer)
        check_unchanged(header, os.fstat(file.fileno()))
    return {name: found[name] for name in wanted}


class _Pieces:
    """The parts of a file that are still to be read, in the order of the file. For several threads."""

    def __init__(self, entries: Iterable[TensorEntry], at_once_bytes: int) -> None:
        self._left, self._lock, self._at_once_bytes = iter(entries), threading.Lock(), at_once_bytes

    def take(self) -> list[TensorEntry]:
        """Returns the next tensors; an empty list when there are no more."""
        piece: list[TensorEntry] = []
        size = 0
        with self._lock:
            for entry in self._left:
                piece.append(entry)
                size += entry.bytes
                if size >= self._at_once_bytes:
                    break
        return piece

    def stop(self) -> None:
        """Leaves nothing to be taken."""
        # Replaced without the lock, which an interrupt may have left locked.
        self._left = iter(())


def _entry(header: FileHeader, name: str) -> TensorEntry:
    if name not in header.tensors:
        raise refusal(header.path, Message("file.no_tensor"), name)
    return header.tensors[name]


def _memory(header: FileHeader, size: int, name: str | None = None) -> torch.Tensor:
    try:
        # On the CPU whatever the host's default device is: its address must be writable memory.
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError):
        # torch's own error says neither which file nor what to do.
        raise refusal(header.path, Message("file.no_memory", {"needed_mb": size / MB}), name) from None
    large_pages.ask(memory.data_ptr(), size)
    return memory


def _strides(shape: Sequence[int]) -> list[int]:
    """Returns the strides of a tensor without gaps."""
    strides, step = [1] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a flat uint8 tensor in RAM, to read into: a bytearray under the tensor would be filled with zeros
    first. The caller keeps the tensor meanwhile."""
    return memoryview((ctypes.c_ubyte * tensor.numel()).from_address(tensor.data_ptr())).cast("B")


def _fill(view: memoryview, header: FileHeader, entry: TensorEntry, file: FileIO) -> None:
    file.seek(entry.start)
    done = 0
    while done < entry.bytes:
        # Systems return less than asked for above 2 GB. No byte at all means that the file ends here.
        got = file.readinto(view[done:])
        if not got:
            raise refusal(header.path, Message("file.cut_short", {"wanted": entry.bytes, "found": done}), entry.name)
        done += got
