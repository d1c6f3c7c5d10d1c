"""Makes lines of a pasted log: any encoding, colours, progress bars, line ends of any system. Bounded."""

from __future__ import annotations

import re

HEAD_BYTES = 1 << 20
"""Kept of the beginning of a long log: it names the machine."""
TAIL_BYTES = 8 << 20
"""Kept of its end, where what went wrong stands."""
LINE_CHARACTERS = 20_000
"""A longer line is cut: the longest that hosts print lists the keys of a LoRA."""

# Escape sequences of terminals: colours, titles, single letters.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
# A progress bar writes its states over each other.
_LINE_ENDS = re.compile(r"\r\n|\n|\r|\x0b|\x0c|\x85|\u2028|\u2029")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
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
    text = "\n".join(part.decode(encoding, "replace") for part in parts)
    text = _ESCAPES.sub("", text)
    return [_CONTROL.sub("", line[:LINE_CHARACTERS]) for line in _LINE_ENDS.split(text) if line and not line.isspace()]
