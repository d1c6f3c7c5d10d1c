"""Replacing functions of the host so that they can be put back: installed once, undone in reverse, never by force."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

Function = Callable[..., Any]
"""A function of the host, or a body that stands in for one: its parameters are the host's business."""

P = ParamSpec("P")
R = TypeVar("R")
"""For bodies that pass the host's own parameters on: `def body(original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R`."""


def signature_of(function: Function, usual: Function) -> inspect.Signature:
    """Of a function of the host; that of `usual` where another extension has wrapped it as (*args, **kwargs)."""
    found, wanted = inspect.signature(function), inspect.signature(usual)
    return found if next(iter(wanted.parameters)) in found.parameters else wanted


class Hook:
    """One replaced attribute of a module or class.

    `body(original, *args, **kwargs)` runs in place of the original. Where another extension has wrapped ours in the
    meantime, restoring would throw theirs away: then ours stays in the chain and passes every call through.
    """

    def __init__(self, owner: Any, name: str, body: Function) -> None:
        self.owner, self.name = owner, name
        self.active = True
        original = getattr(owner, name)
        self.original = original

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return original(*args, **kwargs)
            return body(original, *args, **kwargs)

        for extra in ("cache_clear", "cache_info"):
            # functools.wraps does not carry what lru_cache puts beside a function.
            if hasattr(original, extra):
                setattr(replacement, extra, getattr(original, extra))
        replacement.lora_guard_hook = self  # type: ignore[attr-defined]  # how a second copy of the extension sees the first
        self.replacement = replacement
        setattr(owner, name, replacement)

    @property
    def is_outermost(self) -> bool:
        """True while nobody has replaced or wrapped the attribute after us."""
        return getattr(self.owner, self.name, None) is self.replacement

    def restore(self) -> None:
        self.active = False
        if self.is_outermost:
            setattr(self.owner, self.name, self.original)


class HookSet:
    """Hooks that belong together: all are installed or none, and they are undone in reverse."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []

    def add(self, owner: Any, name: str, body: Function) -> None:
        self.hooks.append(Hook(owner, name, body))

    def restore(self) -> None:
        while self.hooks:
            self.hooks.pop().restore()

    def __enter__(self) -> HookSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.restore()
