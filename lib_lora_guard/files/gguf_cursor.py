"""Walks the header of a GGUF file with a small buffer, and never past a limit.

Each length is compared with the bytes left before anything is read or allocated, so that a length of 2^63 in a file of
100 bytes takes no memory.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from io import BufferedReader, FileIO
from pathlib import Path

from ..errors import FileFormatError, Message
from .header import MAX_HEADER_BYTES, damaged, refusal

_BUFFER_BYTES = 1 << 18
_MAX_SKIPPED_ITEMS = 4_000_000
"""Strings and arrays skipped one by one in one file. The largest tokenizers have a tenth of it."""

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class ValueType(IntEnum):
    """Types of metadata values, numbered as in the format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS: dict[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: _U32,
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: _U64,
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}


class Cursor:
    """Reads a file from its beginning. `at` is the next byte.

    The argument `what` of its methods names in errors what is read. All methods raise FileFormatError for a header that is
    too short, too long or broken.
    """

    def __init__(self, path: Path, file: FileIO, size: int) -> None:
        """Starts at the first byte.

        Args:
            path: The file, for errors.
            file: The open file.
            size: Its size, in bytes.
        """
        self.path, self.at = path, 0
        self._size = size
        self._limit = min(size, MAX_HEADER_BYTES)
        self._file = BufferedReader(file, _BUFFER_BYTES)
        self._skipped_items = 0

    @property
    def left(self) -> int:
        """The bytes that may still be read."""
        return self._limit - self.at

    def take(self, count: int, what: str) -> bytes:
        """Reads `count` bytes."""
        self._check(count, what)
        data = self._file.read(count)
        if len(data) < count:
            raise refusal(self.path, Message("file.cut_in_header"), what)
        self.at += count
        return data

    def skip(self, count: int, what: str) -> None:
        """Skips `count` bytes."""
        self._check(count, what)
        self._file.seek(count, 1)
        self.at += count

    def u32(self, what: str) -> int:
        """Reads a number of 32 bits."""
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """Reads a number of 64 bits."""
        return int(_U64.unpack(self.take(8, what))[0])

    def sized_bytes(self, limit: int, what: str) -> bytes:
        """Reads a string of at most `limit` bytes: its length in 8 bytes, then its bytes."""
        count = self.u64(what)
        if count > limit:
            raise damaged(self.path, f"expected text of at most {limit} bytes, found {count}", what)
        return self.take(count, what)

    def value_type(self, what: str) -> ValueType:
        """Reads the type of a metadata value."""
        number = self.u32(what)
        try:
            return ValueType(number)
        except ValueError:
            raise damaged(self.path, f"expected a value type from 0 to 12, found {number}", what) from None

    def scalar(self, kind: ValueType, what: str) -> str:
        """Reads a number or truth value as text. FLOAT32 gets 9 digits, which distinguish any two values."""
        form = _SCALARS[kind]
        value = form.unpack(self.take(form.size, what))[0]
        if kind is ValueType.BOOL:
            return "true" if value else "false"
        return f"{value:.9g}" if kind is ValueType.FLOAT32 else str(value)

    def skip_items(self, item: ValueType, count: int, what: str, nesting: int) -> None:
        """Skips the values of an array.

        Args:
            item: Their type.
            count: Their number.
            what: Its name in errors.
            nesting: How deep arrays may still lie in arrays.
        """
        if item in _SCALARS:
            self.skip(count * _SCALARS[item].size, what)
            return
        self._skipped_items += count
        if self._skipped_items > _MAX_SKIPPED_ITEMS:
            raise damaged(
                self.path,
                f"expected at most {_MAX_SKIPPED_ITEMS} texts in arrays, found {self._skipped_items}",
                what,
            )
        if item is ValueType.STRING:
            self._check(8 * count, what)
            for _ in range(count):
                self.skip(self.u64(what), what)
            return
        if nesting <= 1:
            raise damaged(self.path, "expected arrays in arrays a few deep, found them deeper", what)
        self._check(12 * count, what)
        for _ in range(count):
            self.skip_items(self.value_type(what), self.u64(what), what, nesting - 1)

    def _check(self, count: int, what: str) -> None:
        if count <= self._limit - self.at:
            return
        if self.at + count <= self._size:
            raise damaged(
                self.path,
                f"expected a header of at most {MAX_HEADER_BYTES} bytes, found a longer one",
                what,
            )
        raise self._truncated(count, what)

    def _truncated(self, count: int, what: str) -> FileFormatError:
        why = Message("file.at_least_too_short", {"wanted": self.at + count, "found": self._size})
        return refusal(self.path, why, what)
