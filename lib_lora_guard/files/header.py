"""Parts shared by both file formats: the header as data, one-line errors, and reading bytes into memory of our own.

Why files are read here instead of through safetensors' `safe_open`:
- A mapped file that a trainer rewrites or truncates kills the process (SIGBUS, or an access violation on Windows) when
  the next byte is touched. A plain read returns fewer bytes instead, which is an error with a name.
- A JSON object may hold a key twice, and most readers silently keep one of the two. Here both are seen.
- The header lies in front and describes the whole file, so a file of 24 GB is described in milliseconds.
- One header type serves safetensors and GGUF, and limits keep hostile files from taking memory.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

from ..errors import FileFormatError, Message, about

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library; GGUF files, tokenizers included, stay far below it."""
MAX_ENTRIES = 1_000_000
"""Tensors in one file."""
MAX_DIMS = 8
"""Sizes of one tensor."""
MAX_VALUES = 2**63 - 1
"""torch counts values, and the system counts bytes of a file, in signed 64 bit."""
SHOWN_CHARACTERS = 120
"""Characters shown of a name from a file."""
CLOCK_STEP_NS = 16_000_000
"""File times move in steps: 1 to 10 ms on Linux, 15.6 ms on Windows. Two writes within a step leave the same time."""
MOST_READS = 4
"""How often a file that changes meanwhile is read, before it is refused."""

_MODEL_ENDS = (".safetensors", ".gguf")
_NEAR_NAME = 0.88
"""Likeness from which a name may be a misspelling of another."""
_MOST_NAMES = 2000
"""Names of a folder that are compared."""

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Its name in the file.
        format: The container's name for its type: "BF16", "F8_E4M3", "Q4_K".
        shape: Sizes in torch's order, (out, in).
        start: Its first byte, counted from the beginning of the file.
        bytes: Its bytes in the file.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class TableLimits:
    """The largest table of tensors that is read.

    Attributes:
        tensors: How many it may have.
        characters: How long the names, dtypes, shapes and offsets may be together; metadata does not count.
    """

    tensors: int
    characters: int


@dataclass(frozen=True, slots=True)
class FileState:
    """The facts by which a file is known to be the same as before.

    On Windows `changed_ns` is the time the file was made, and `inode` is 0 on file systems without one: equal states still mean
    what they say, with fewer facts. Two states are compared only if both are of an open file, or both of a path: Windows
    answers the two questions differently.

    Attributes:
        device: The file system.
        inode: The number of the file in it: another file under the old name has another one.
        bytes: The size.
        modified_ns: The time of the last write, which a program may set back.
        changed_ns: The time of the last change of the file or its facts, which no program can set.
    """

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, facts: os.stat_result) -> FileState:
        """Takes the state from the system's answer."""
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@dataclass(frozen=True)
class FileHeader:
    """The header of a file, compared with the file's size.

    Attributes:
        path: The file.
        container: "safetensors" or "gguf".
        tensors: The tensors by name, in the header's own order.
        metadata: Text as written; it must be cleaned before it is shown.
        bytes: The file's size.
        state: The open file's state, which shows whether the file was written since; None if not compared.
    """

    path: Path
    container: str
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    bytes: int
    state: FileState | None = None


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Makes text from a file fit for a message: control characters become '?', the middle of long text is left out.

    Args:
        text: The text.
        limit: Characters to keep.
    """
    if len(text) > limit:
        head = (limit - 3) // 2
        text = f"{text[:head]}...{text[-(limit - 3 - head) :]}"
    return "".join(c if c.isprintable() else "?" for c in text)


def refusal(path: Path, text: str, key: str | None = None) -> FileFormatError:
    """Returns the error for a file, in one line.

    Args:
        path: The file.
        text: The reason, which may be a Message.
        key: The name in the file that it is about.
    """
    what = text if key is None else about(shown(key) or "(empty name)", text)
    return FileFormatError(about(shown(path.name), what))


def damaged(path: Path, detail: str, key: str | None = None) -> FileFormatError:
    """Returns the error for a file that breaks the rules of its format.

    Args:
        path: The file.
        detail: The rule, in English: it is for authors of programs that write such files.
        key: The name in the file that it is about.
    """
    return refusal(path, Message("file.damaged", {"detail": detail}), key)


@contextmanager
def opened(path: Path, is_listed: bool = True) -> Iterator[tuple[FileIO, os.stat_result]]:
    """Opens a file and reads its facts.

    Args:
        path: The file.
        is_listed: True if the WebUI's lists name such files, and may be out of date where it is missing.

    Raises:
        FileFormatError: The system cannot open or read it.
    """
    if not is_file(path):
        raise FileFormatError(about(shown(str(path)), _why_no_file(path, is_listed)))
    try:
        with path.open("rb", buffering=0) as file:
            yield file, os.fstat(file.fileno())
    except OSError as error:
        raise refusal(path, Message("file.unreadable", {"error": error.strerror or str(error)})) from error


def _why_no_file(path: Path, is_listed: bool) -> Message:
    """Returns the reason why there is no file at `path`, with the file that may be meant."""
    missing = Message("file.missing" if is_listed else "file.missing_unlisted")
    try:
        if path.is_dir():
            first = min((name for name in _names_in(path) if name.lower().endswith(_MODEL_ENDS)), default="")
            example = Message("file.folder_example", {"name": shown(first)}) if first else ""
            return Message("file.folder", {"example": example})
        # A pipe or a device has the name itself.
        names = [name for name in _names_in(path.parent) if name != path.name]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=_NEAR_NAME)
    except (OSError, ValueError):
        return missing
    return Message("file.missing_near", {"near": shown(near[0])}) if near else missing


def _names_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]


def is_file(path: Path) -> bool:
    """Returns True for a regular file; False too for a name that the system cannot have, such as one of 300 letters."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def state_of(path: Path) -> FileState | None:
    """Returns the state of the file at `path`; None if there is none."""
    try:
        return FileState.of(path.stat())
    except (OSError, ValueError):
        return None


def read_unchanged(path: Path, read: Callable[[], Found]) -> Found:
    """Calls `read`, and calls it again if the file at `path` has changed meanwhile.

    A file that was written within the last step of the clock is read after that step: a later write shows in its time then.

    Args:
        path: The file.
        read: Reads it from its beginning.

    Raises:
        FileFormatError: `read` refused the file, which did not change; or the file changed each time.
    """
    for _ in range(MOST_READS):
        before = state_of(path)
        if before is not None:
            age_ns = time.time_ns() - max(before.modified_ns, before.changed_ns)
            if 0 <= age_ns < CLOCK_STEP_NS:
                time.sleep((CLOCK_STEP_NS - age_ns) / 1e9)
                before = state_of(path)
        try:
            result = read()
        except FileFormatError:
            if state_of(path) == before:
                raise
        else:
            if state_of(path) == before:
                return result
    raise refusal(path, Message("file.keeps_changing", {"count": MOST_READS}))


def count_values(shape: Sequence[int]) -> int | None:
    """Returns the product of `shape`; None if torch cannot count that far. Sizes beside a 0 are counted all the same."""
    count = math.prod(shape)
    others = count or math.prod(size for size in shape if size)
    return count if others <= MAX_VALUES else None


def find_overlap(tensors: Iterable[TensorEntry]) -> tuple[TensorEntry, TensorEntry] | None:
    """Returns two tensors that share bytes of the file; None if there are none."""
    previous = None
    for entry in sorted((entry for entry in tensors if entry.bytes), key=lambda entry: entry.start):
        if previous is not None and entry.start < previous.start + previous.bytes:
            return previous, entry
        previous = entry
    return None


def check_size(path: Path, tensors: Mapping[str, TensorEntry], size: int) -> None:
    """Compares the end of the last tensor with the file's size.

    Raises:
        FileFormatError: The file is too short.
    """
    needed = max((entry.start + entry.bytes for entry in tensors.values()), default=0)
    if needed > size:
        raise refusal(path, Message("file.too_short", {"wanted": needed, "found": size}))


def check_unchanged(header: FileHeader, facts: os.stat_result) -> None:
    """Compares a file with its header.

    Raises:
        FileFormatError: It has another size or state than when the header was read.
    """
    if facts.st_size != header.bytes:
        raise refusal(header.path, Message("file.resized", {"wanted": header.bytes, "found": facts.st_size}))
    if header.state not in (None, FileState.of(facts)):
        raise refusal(header.path, Message("file.rewritten"))
