"""Walks the JSON of a safetensors header one member at a time.

Such a header has exactly two levels, so nothing here recurses: a hostile header takes no more memory than its entries,
and never the stack. A name that occurs twice is an error at every level.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import FileFormatError
from .header import MAX_DIMS, MAX_ENTRIES, damaged, shown

_BLANKS = " \t\n\r"
_SPACE = re.compile(f"[{_BLANKS}]*")
_ENTRY = re.compile(r"\{[^{}]{0,1000}\}")
"""An entry holds no other object, and its longest possible numbers stay well below 1000 characters."""
_NUMBER = "(?:0|[1-9][0-9]{0,18})"
_USUAL_ENTRY = re.compile(
    rf' ?\{{"dtype": ?"([A-Z0-9_]+)", ?"shape": ?\[((?:{_NUMBER}(?:, ?{_NUMBER}){{0,{MAX_DIMS - 1}}})?)\], ?'
    rf'"data_offsets": ?\[({_NUMBER}), ?({_NUMBER})\]\}}'
)
"""An entry as the library writes it, or as Python's JSON does, for speed: any other valid spelling is read as JSON."""
_USUAL_STRING = re.compile(r'"([^"\\\x00-\x1f]*)"')
_USUAL_KEY = re.compile(r'"([^"\\\x00-\x1f]*)":')
_USUAL_NEXT = re.compile(r', ?"([^"\\\x00-\x1f]*)":')
_HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which could not be printed or saved."""


class Scanner:
    """Walks the JSON of one header. `at` is the next character.

    All methods raise FileFormatError for what is not expected there.
    """

    def __init__(self, path: Path, text: str) -> None:
        """Starts before the header's object.

        Args:
            path: The file, for errors.
            text: The header.
        """
        self.path, self.text, self.at = path, text, 0

    def members(self, most: int = MAX_ENTRIES) -> Iterator[str]:
        """Yields the keys of an object. The caller must read the value before it asks for the next key.

        Args:
            most: How many there may be.
        """
        seen: set[str] = set()
        self._expect("{")
        if self._next() == "}":
            self.at += 1
            return
        key = self._key()
        while True:
            if key in seen:
                raise damaged(self.path, "expected each name once, found it twice", key)
            seen.add(key)
            if len(seen) > most:
                raise damaged(self.path, f"expected at most {most} names, found more")
            yield key
            usual = _USUAL_NEXT.match(self.text, self.at)
            if usual is not None and (key := usual[1]).isascii():
                self.at = usual.end()
                continue
            if self._next() == "}":
                self.at += 1
                return
            self._expect(",")
            key = self._key()

    def _key(self) -> str:
        """Reads a name and the colon behind it."""
        usual = _USUAL_KEY.match(self.text, self.at)
        if usual is not None and (key := usual[1]).isascii():
            self.at = usual.end()
            return key
        key = self.string("a name")
        self._expect(":")
        return key

    def string(self, what: str, key: str | None = None) -> str:
        """Reads a string. `what` and `key` name it in errors."""
        if self._next() != '"':
            raise self._broken(f"{what} in quotes", key)
        usual = _USUAL_STRING.match(self.text, self.at)
        try:
            text, end = (usual[1], usual.end()) if usual else _PLAIN.raw_decode(self.text, self.at)
        except ValueError:
            raise self._broken(f"{what} in valid JSON", key) from None
        if not text.isascii() and _HALF_PAIR.search(text):
            raise self._broken(f"{what} in valid JSON", key)
        self.at = end
        return str(text)

    def usual_entry(self) -> tuple[str, tuple[int, ...], int, int] | None:
        """Reads the object that describes a tensor if it is written in a usual way.

        Returns:
            dtype, shape, and the two offsets; None for another spelling, of which nothing but blanks is read.
        """
        usual = _USUAL_ENTRY.match(self.text, self.at)
        if usual is None:
            self._next()
            return None
        self.at = usual.end()
        dtype, shape, start, end = usual.groups()
        return dtype, tuple(map(int, shape.split(","))) if shape else (), int(start), int(end)

    def entry(self, name: str) -> dict[str, Any]:
        """Reads the object that describes the tensor `name`."""
        self._next()
        found = _ENTRY.match(self.text, self.at)
        if found is None:
            raise damaged(
                self.path,
                "expected an object with dtype, shape and data_offsets, found something else",
                name,
            )
        self.at = found.end()
        try:
            entry: dict[str, Any] = _STRICT.decode(found.group())
        except FileFormatError as error:
            raise damaged(self.path, str(error), name) from None
        except (ValueError, RecursionError):
            raise damaged(self.path, "expected an entry in valid JSON, found a broken one", name) from None
        return entry

    def end(self) -> None:
        """Checks that nothing but blanks follows."""
        if self._next():
            raise self._broken("the end of the header")

    def _next(self) -> str:
        """Returns the next character that is no blank, or '' at the end, without reading it."""
        mark = self.text[self.at : self.at + 1]
        if mark in _BLANKS and (blanks := _SPACE.match(self.text, self.at)):
            self.at = blanks.end()
            mark = self.text[self.at : self.at + 1]
        return mark

    def _expect(self, mark: str) -> None:
        if self._next() != mark:
            raise self._broken(f"'{mark}'")
        self.at += 1

    def _broken(self, expected: str, key: str | None = None) -> FileFormatError:
        found = shown(self.text[self.at : self.at + 20]) or "its end"
        return damaged(self.path, f"expected {expected} at character {self.at} of the header, found {found}", key)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise FileFormatError("expected each field once, found one twice")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise FileFormatError(f"expected whole numbers, found {text}")


_PLAIN = json.JSONDecoder()
_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse_constant)
