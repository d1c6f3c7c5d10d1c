"""The format of the flight recorder's file: slots of equal size, written in turn, each with a number and a checksum.

A slot, all little-endian: the magic, the record's number (8 bytes), the length of its body (2), CRC-32 (4), the body.
The CRC covers number, length and body. A killed process may leave the newest slot half written. Its checksum reveals
that, and the slot before it is complete, since every record has its own slot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SLOT_BYTES = 4096
_MAGIC = b"LGF1"
_FACTS = struct.Struct("<QH")
_CHECKSUM = struct.Struct("<I")
_HEAD_BYTES = len(_MAGIC) + _FACTS.size + _CHECKSUM.size

BODY_BYTES = SLOT_BYTES - _HEAD_BYTES
"""The largest size of a record."""


def packed(number: int, body: bytes) -> bytes:
    """Returns the bytes for the slot of record `number`; `body` has at most BODY_BYTES."""
    facts = _FACTS.pack(number, len(body))
    return b"".join((_MAGIC, facts, _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(facts))), body))


def start_of(number: int, ring_bytes: int) -> int:
    """Returns the offset of record `number` in a ring of `ring_bytes`."""
    return number % (ring_bytes // SLOT_BYTES) * SLOT_BYTES


def bodies(ring: bytes) -> list[bytes]:
    """Returns the bodies of all complete records, oldest first."""
    return [body for _, body in sorted(_whole(ring))]


def _whole(ring: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(ring) - SLOT_BYTES + 1, SLOT_BYTES):
        slot = ring[start : start + SLOT_BYTES]
        facts, rest = slot[len(_MAGIC) :][: _FACTS.size], slot[_HEAD_BYTES:]
        number, length = _FACTS.unpack(facts)
        (checksum,) = _CHECKSUM.unpack(slot[len(_MAGIC) + _FACTS.size : _HEAD_BYTES])
        body = rest[:length]
        if slot.startswith(_MAGIC) and length == len(body) and checksum == zlib.crc32(body, zlib.crc32(facts)):
            yield number, body
