"""Makes lines of a pasted log: any encoding, colours, progress bars, line ends of any system. Bounded."""

from __future__ import annotations

import re

HEAD_BYTES = 1 << 20
"""Kept of the beginning of a long log: it names the machine."""
TAIL_BYTES = 8 << 20
"""Kept of its end, where what went wrong stands."""
LINE_CHARACTERS = 20_000
"""A longer line is cut: the longest that hosts print lists the keys of a LoRA."""

# Escape sequences of terminals: colours, titles, single letters. Old consoles show their first character as an arrow,
# and pasting may drop it.
_ESCAPES = re.compile(
    r"(?:\x1b|\u2190)\[[0-?]*[ -/]*[@-~]|\x1b(?:\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])|\[\d{1,3}(?:;\d{1,3}){0,4}m"
)
# A progress bar writes its states over each other.
_LINE_ENDS = re.compile(r"\r\n|\n|\r|\x0b|\x0c|\x85|\u2028|\u2029")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
# The two-byte letters of GB 2312, in which a Chinese Windows writes what a console's `>` puts into a file.
_GB_2312 = re.compile(rb"(?:[\x00-\x7f]|[\xa1-\xf7][\xa1-\xfe])*")
_NARROWEST, _WIDEST = 79, 300
"""Characters of the consoles whose wrapped lines are put together."""
_ALIKE = 6
"""Lines of one kind have so many first characters in common: none of them goes on in the next."""
_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8"))


def lines_of(raw: bytes) -> list[str]:
    """Returns the lines of a log without colours and control characters, also of UTF-16, as PowerShell's `>` writes it.

    Of a log beyond HEAD_BYTES and TAIL_BYTES the middle is left out.
    """
    encoding = "utf-8"
    for mark, name in _BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            raw, encoding = raw[len(mark) :], name
            break
    if len(raw) > HEAD_BYTES + TAIL_BYTES:
        # Both numbers are even, so that no character of UTF-16 is cut.
        start = len(raw) - TAIL_BYTES
        parts = [raw[:HEAD_BYTES], raw[start + start % 2 :]]
    else:
        parts = [raw]
    text = "\n".join(_decoded(part, encoding) for part in parts)
    text = _ESCAPES.sub("", text)
    lines = [_CONTROL.sub("", line[:LINE_CHARACTERS]) for line in _LINE_ENDS.split(text)]
    return [line for line in _unwrapped(lines) if line and not line.isspace()]


def _decoded(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return raw.decode("gb2312" if encoding == "utf-8" and _GB_2312.fullmatch(raw) else encoding, "replace")


def _unwrapped(lines: list[str]) -> list[str]:
    """Puts lines together that a narrow console has cut: they fill its width, and no line is longer."""
    width = max(map(len, lines), default=0)
    if not _NARROWEST <= width <= _WIDEST or len({line for line in lines if len(line) == width}) < 2:
        return lines
    whole: list[str] = []
    goes_on = False
    for line in lines:
        if goes_on and line[:_ALIKE] != whole[-1][:_ALIKE] and len(whole[-1]) < LINE_CHARACTERS:
            whole[-1] += line
        else:
            whole.append(line)
        # A progress bar fills the width without going on.
        goes_on = len(line) == width and not line.endswith("]")
    return whole
