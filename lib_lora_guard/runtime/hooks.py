"""Replaces functions of the host so that they can be put back: installed once, undone in reverse, never by force.

A host states what it replaces as a table of rows: the owner, the name, and the layers that stand around the original, the
outermost first. There is one hook a function, however many layers it has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from ..errors import HostError

Function: TypeAlias = Callable[..., Any]
"""A function of the host. Its parameters are the host's business."""

Layer: TypeAlias = Callable[..., Any]
"""Stands around a function of the host: `layer(original, *args, **kwargs)` runs in its place.

A layer passes parameters on that it does not know: a newer host may have more of them.
"""

P = ParamSpec("P")
R = TypeVar("R")
"""For layers that pass everything on: `def layer(original: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R`."""

T = TypeVar("T")


def signature_of(function: Function, usual: Function) -> inspect.Signature:
    """Returns the signature of a function of the host; that of `usual` if another extension wrapped it as (*args, **kwargs)."""
    found, wanted = inspect.signature(function), inspect.signature(usual)
    return found if next(iter(wanted.parameters)) in found.parameters else wanted


def stacked(layers: Sequence[Layer]) -> Layer:
    """Makes one layer of several, the outermost first."""

    def all_layers(original: Function, *args: Any, **kwargs: Any) -> Any:
        call = original
        for layer in reversed(layers):
            call = functools.partial(layer, call)
        return call(*args, **kwargs)

    return layers[0] if len(layers) == 1 else all_layers


class Hook:
    """One replaced attribute of a module or class.

    If another extension has wrapped the hook in the meantime, restoring would throw that wrapper away. Then the hook stays
    in the chain and passes every call through.
    """

    def __init__(self, owner: Any, name: str, body: Layer) -> None:
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
        """True until something replaces or wraps the attribute after the hook."""
        return getattr(self.owner, self.name, None) is self.replacement

    def restore(self) -> None:
        """Puts the original back, or lets every call through if something wraps the hook."""
        self.active = False
        if self.is_outermost:
            setattr(self.owner, self.name, self.original)


def is_hooked(function: Function | None) -> bool:
    """True if an active hook is anywhere in the chain of wrappers.

    The one rule for "already there": a module that was loaded again has no hook; one that another extension has wrapped
    may keep a hook that only passes on.
    """
    while function is not None:
        if getattr(getattr(function, "lora_guard_hook", None), "active", False):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class HookSet:
    """Hooks that belong together: all are installed or none, and they are undone in reverse."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []

    def add(self, owner: Any, name: str, body: Layer) -> None:
        """Replaces `owner.name` by `body`."""
        self.hooks.append(Hook(owner, name, body))

    def restore(self) -> None:
        """Gives every function back, the last one first."""
        while self.hooks:
            self.hooks.pop().restore()

    def __enter__(self) -> HookSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.restore()


@dataclass(frozen=True)
class Row(Generic[T]):
    """One function of the host that is replaced.

    Attributes:
        module: the host's module, by its name in `sys.modules`.
        path: the function in it, such as `LoadedModel.model_load`.
        layers: makes the layers from the takeover, the outermost first; none of them leaves the function alone.
        is_needed: False for a function that some versions of the host lack.
    """

    module: str
    path: str
    layers: Callable[[T], Sequence[Layer]]
    is_needed: bool = True


def lay(
    rows: Iterable[Row[T]],
    takeover: T,
    modules: Mapping[str, ModuleType],
    hooks: HookSet,
    others: Iterable[tuple[type, str, Layer]] = (),
) -> None:
    """Replaces the functions of all `rows`, or none of them. A function that is hooked already is left as it is.

    Args:
        rows: belong together.
        takeover: what the rows' layers are made from.
        modules: the host's, by name.
        hooks: gets the hooks that were laid.
        others: methods that belong to the rows and have no fixed place: class, name, layer.

    Raises:
        HostError: a needed function is missing.
    """
    with HookSet() as laid:
        for row in rows:
            *path, name = row.path.split(".")
            owner: Any = modules.get(row.module)
            for part in path:
                owner = getattr(owner, part, None)
            function = getattr(owner, name, None)
            if function is None:
                if row.is_needed:
                    raise HostError(f"{row.module}.{row.path} is missing")
                continue
            layers = [] if is_hooked(function) else row.layers(takeover)
            if layers:
                laid.add(owner, name, stacked(layers))
        for cls, name, layer in others:
            if not is_hooked(vars(cls)[name]):
                laid.add(cls, name, layer)
    hooks.hooks += laid.hooks
