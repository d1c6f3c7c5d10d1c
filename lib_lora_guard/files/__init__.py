"""What lies in a model or LoRA file, read from its header alone, and its tensors in our own memory.

Knows the two formats that carry data and nothing else. Pickles (.pt, .ckpt, .bin, .pth) are refused: they can carry code
that runs on loading.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import FileFormatError
from . import gguf_file, safetensors_file
from .header import MAX_HEADER_BYTES, FileHeader, TensorEntry, opened, refusal, shown

__all__ = ["FileHeader", "TensorEntry", "open_header", "read_tensors", "shown"]


def open_header(path: str | Path) -> FileHeader:
    """What the file holds; its format is told by its first bytes, never by its name. Raises FileFormatError."""
    path = Path(path)
    with opened(path) as (file, _):
        head = file.read(16)
    if head.startswith(gguf_file.MAGIC):
        return gguf_file.read_header(path)
    if _looks_like_safetensors(head):
        return safetensors_file.read_header(path)
    raise _foreign(path, head)


def read_tensors(header: FileHeader, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The named tensors (None: all) of either format, in our own memory; see the two modules. Raises FileFormatError."""
    if header.container == "gguf":
        return gguf_file.read_tensors(header, names)
    return safetensors_file.read_tensors(header, names)


def _looks_like_safetensors(head: bytes) -> bool:
    # A pickle's first bytes could be a length, but then no JSON object follows.
    return int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:].lstrip(b" \t\n\r")[:1] == b"{"


_CONVERT = "convert it to safetensors (for example with the Checkpoint Merger tab, or safetensors.torch.save_file)"
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"PK",
        f"found a zip archive, as .pt, .ckpt and .bin files are; {_CONVERT}, it can carry code that runs on loading",
    ),
    (b"\x80", f"found a pickle, as .pt, .ckpt and .pth files are; {_CONVERT}, it can carry code that runs on loading"),
    (
        b"version https:",
        "found the short text that Git LFS keeps in place of a file; run 'git lfs pull' or download it",
    ),
    (b"<", "found a web page, saved in place of the file; download it again, logged in where the site asks for it"),
)


def _foreign(path: Path, head: bytes) -> FileFormatError:
    if not head:
        return refusal(path, "expected a safetensors or GGUF file, found an empty one; download it again")
    for start, text in _FOREIGN:
        if head.startswith(start):
            return refusal(path, f"expected a safetensors or GGUF file, {text}")
    return refusal(
        path,
        f"expected a safetensors or GGUF file, found one that starts with {shown(repr(head[:8]))}; "
        "check that it is a model, or download it again",
    )
