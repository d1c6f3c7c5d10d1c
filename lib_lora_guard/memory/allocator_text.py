"""Parses, checks and composes the string that configures torch's CUDA allocator. Pure text.

Facts: `c10/core/AllocatorConfig.h`, `c10/cuda/CUDAAllocatorConfig.{h,cpp}` of torch, and experiments with torch
2.12.1+cu130. Blanks are ignored, the last of two equal keys counts, a trailing comma is allowed, an unknown key is an
error. A string without `max_split_size_mb` or `garbage_collection_threshold` resets them. A string without
`expandable_segments` leaves it unchanged, so "off" has to be written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import LoraGuardError
from ..messages import Message

EXPANDABLE = "expandable_segments"
SPLIT = "max_split_size_mb"
COLLECT = "garbage_collection_threshold"
BACKEND = "backend"
OPTIONS = (EXPANDABLE, SPLIT, COLLECT)

CUDA_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
HIP_VARIABLE = "PYTORCH_HIP_ALLOC_CONF"
COMMON_VARIABLE = "PYTORCH_ALLOC_CONF"
COMMON_VARIABLE_SINCE = (2, 10)
"""2.9.1 knows the name but ignores it for CUDA (pytorch issue 183387); 2.11 and 2.12 read it."""

LEAST_SPLIT_MB = 21
"""Newer torch accepts 20 (its large buffer) too; older torch requires more than 20."""


class AllocatorTextError(LoraGuardError, ValueError):
    """An allocator string that torch would refuse too. `message` names the place."""

    def __init__(self, message: Message) -> None:
        super().__init__(str(message))
        self.message = message


@dataclass(frozen=True)
class AllocatorWish:
    """The options that the user set. False and 0 leave an option to the environment and to torch."""

    expandable_segments: bool = False
    max_split_size_mb: int = 0
    garbage_collection_threshold: float = 0.0

    def entries(self) -> dict[str, str]:
        """Returns the options that are set, spelled as torch spells them."""
        wished = {EXPANDABLE: "True"} if self.expandable_segments else {}
        if self.max_split_size_mb:
            wished[SPLIT] = str(self.max_split_size_mb)
        if self.garbage_collection_threshold:
            wished[COLLECT] = repr(float(self.garbage_collection_threshold))
        return wished


def variable_in_force(environment: Mapping[str, str], torch_version: tuple[int, int], rocm: bool) -> str | None:
    """Returns the name of the environment variable that torch reads; None if none is set. An empty variable counts: it
    hides the later ones.
    """
    common = torch_version >= COMMON_VARIABLE_SINCE
    names = [CUDA_VARIABLE]
    if rocm or common:
        names.append(HIP_VARIABLE)
    if common:
        names.append(COMMON_VARIABLE)
    return next((name for name in names if name in environment), None)


_TOKEN = re.compile(r"[\w.>+-]+", re.ASCII)
"""The characters of torch's keys and values. None of them has a meaning in a shell or a batch file."""


def parse(text: str) -> dict[str, str]:
    """Parses an allocator string into `{key: value}`, in the written order.

    A list such as `[256:1,>:4]` is one value. Unknown keys are kept.

    Raises:
        AllocatorTextError: `text` is no list of `key:value`, or torch would refuse the value of one of our three
            options.
    """
    tokens = _tokens(text)
    entries: dict[str, str] = {}
    at = 0
    while at < len(tokens):
        key, colon = tokens[at], tokens[at + 1 : at + 2]
        if not _TOKEN.fullmatch(key) or colon != [":"]:
            raise AllocatorTextError(Message("allocator.text_no_pair", {"text": text, "part": key}))
        value, at = _value(text, tokens, at + 2)
        if at < len(tokens) and tokens[at] != ",":
            raise AllocatorTextError(Message("allocator.text_no_comma", {"text": text, "part": tokens[at]}))
        _check(text, key, value)
        entries[key] = value
        at += 1
    return entries


def _tokens(text: str) -> list[str]:
    packed = re.sub(r"\s+", "", text)
    found = re.findall(r"[,:\[\]]|[^,:\[\]]+", packed)
    for token in found:
        if token not in ",:[]" and not _TOKEN.fullmatch(token):
            raise AllocatorTextError(Message("allocator.text_no_word", {"text": text, "part": token}))
    return found


def _value(text: str, tokens: list[str], at: int) -> tuple[str, int]:
    """Returns the value that starts at index `at`, and the index of the token after it."""
    if at < len(tokens) and tokens[at] == "[":
        end = next((i for i in range(at + 1, len(tokens)) if tokens[i] in "[]"), None)
        if end is None or tokens[end] == "[":
            raise AllocatorTextError(Message("allocator.text_open_list", {"text": text}))
        return "".join(tokens[at : end + 1]), end + 1
    if at >= len(tokens) or tokens[at] in ",:]":
        raise AllocatorTextError(Message("allocator.text_no_value", {"text": text, "part": tokens[at - 2]}))
    return tokens[at], at + 1


def _check(text: str, key: str, value: str) -> None:
    right = {
        EXPANDABLE: lambda: value in ("True", "False"),
        SPLIT: lambda: value.isdecimal(),
        COLLECT: lambda: 0 < float(value) < 1,
    }
    try:
        valid = right[key]() if key in right else True
    except ValueError:
        valid = False
    if not valid:
        raise AllocatorTextError(Message("allocator.text_bad_value", {"text": text, "part": key, "value": value}))


def compose(entries: Mapping[str, str]) -> str:
    """Joins `entries` into one string; `parse` is the inverse."""
    return ",".join(f"{key}:{value}" for key, value in entries.items())


def for_now(entries: Mapping[str, str]) -> str:
    """Returns the string for a running torch. It writes "off" explicitly and omits the backend, which cannot change any
    more: torch raises if the string names another one.
    """
    running = {key: value for key, value in entries.items() if key != BACKEND}
    return compose({**running, EXPANDABLE: running.get(EXPANDABLE, "False")})


def same_effect(left: str, right: str) -> bool:
    """True if two strings have the same effect on a running torch. A string that cannot be parsed equals no other."""
    try:
        return dict(parse(for_now(parse(left)))) == dict(parse(for_now(parse(right))))
    except AllocatorTextError:
        return False


def start_line(text: str, windows: bool) -> Message:
    """Returns the line that sets the options in Forge's start script. The value is quoted: a shell takes the `>` in a
    value such as `[256:1,>:4]` for a redirection."""
    if windows:
        return Message("allocator.line", {"file": "webui-user.bat", "line": f'set "{CUDA_VARIABLE}={text}"'})
    return Message("allocator.line", {"file": "webui-user.sh", "line": f'export {CUDA_VARIABLE}="{text}"'})
