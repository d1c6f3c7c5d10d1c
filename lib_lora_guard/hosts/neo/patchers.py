"""The LoRAs of a prompt on Neo's patchers.

They lie in an attribute of the patcher, not in its `patches`: what is there is Neo's to merge, and a new id of the patches makes
Neo move the whole model out and in again. `ModelPatcher.clone` carries them to the clone.

Source: Neo's `backend/patcher/base.py`, `backend/patcher/clip.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PureWindowsPath
from types import FunctionType, ModuleType
from typing import Concatenate, TypeVar

from ...adapters import Term
from ...adapters.base import Slice
from ...errors import named
from ...messages import Message, say, without
from ...patching.lora_request import LoraRequest
from ...runtime.hooks import P
from ...runtime.host import Entries, FittedLora, PatcherObject
from .types import HostPatch, Loras, Patcher, PatchFunction, WeightChange

log = logging.getLogger(__name__)

LORAS = "lora_guard_loras"
"""The attribute of a patcher that holds its LoRAs."""

PatcherT = TypeVar("PatcherT", bound=Patcher)
EntryT = TypeVar("EntryT")


def loras_of(patcher: Patcher) -> Loras:
    """Returns the LoRAs that the guard is to apply to a patcher's model."""
    found: Loras = getattr(patcher, LORAS, ())
    return found


def label_of(lora: FittedLora) -> str:
    """Returns the name that users know a LoRA by: its file without the folder."""
    # PureWindowsPath splits at both kinds of slashes.
    return PureWindowsPath(lora.filename).name or lora.filename


def requests_of(loras: Loras, as_trained: bool = False) -> list[LoraRequest]:
    """Makes one request for each LoRA, in order.

    Args:
        loras: the stack.
        as_trained: DoRA in the meaning of its trainer.
    """
    return [_request(lora, place, as_trained) for place, lora in enumerate(loras)]


def _request(lora: FittedLora, place: int, as_trained: bool) -> LoraRequest:
    strength = lora.asked_strength()
    try:
        # Threads may have read the file while Neo has placed the model.
        lora.wait()
    except Exception as error:
        # Of the file, or of a thread that read it: the other LoRAs are of use all the same.
        log.debug("%s never comes", lora.filename, exc_info=True)
        return LoraRequest(label_of(lora), strength, refused=without(label_of(lora), named(error)))
    terms = {
        key: [_term(term, strength, place, as_trained) for term in on_key] for key, on_key in lora.asked_terms().items()
    }
    return LoraRequest(label_of(lora), strength, terms)


def _term(term: Term, strength: float, place: int, as_trained: bool) -> Term:
    adapter = term.adapter.with_dora_as_trained() if as_trained else term.adapter
    return Term(adapter, strength, term.strength_model, term.part, term.function, place)


class NeoPatchers:
    """Adds LoRAs to Neo's patchers, and to what holds one (`CLIP`)."""

    counts_once = False

    def __init__(self, base: ModuleType | None = None) -> None:
        """
        Args:
            base: Neo's module of patchers. None: what others put in place of its `add_patches` is not asked.
        """
        self._base = base

    def clone(
        self,
        original: Callable[Concatenate[PatcherT, P], PatcherT],
        patcher: PatcherT,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> PatcherT:
        """Stands in place of `ModelPatcher.clone`."""
        made = original(patcher, *args, **kwargs)
        loras = loras_of(patcher)
        if loras:
            setattr(made, LORAS, loras)
        return made

    def has_loras(self, patcher: PatcherObject) -> bool:
        """Returns True if a patcher has LoRAs already."""
        return bool(loras_of(_inner(patcher)))

    def with_lora(self, patcher: PatcherObject, lora: FittedLora) -> PatcherObject:
        """Returns a clone of a patcher that has one LoRA more."""
        clone = patcher.clone()
        inner = _inner(clone)
        added = (lora,) if self._adds_as_neo(inner) else _through(clone, inner, lora)
        setattr(inner, LORAS, (*loras_of(inner), *added))
        return clone

    def _adds_as_neo(self, inner: Patcher) -> bool:
        """Returns True if `add_patches` of a patcher is Neo's own, whenever another extension may have replaced it."""
        if self._base is None:
            return True
        add_patches = type(inner).add_patches
        return isinstance(add_patches, FunctionType) and add_patches.__globals__ is vars(self._base)

    def entries(self, patcher: Patcher) -> Iterable[tuple[str, Entries]]:
        """Returns the patches that a patcher asks for, by the name of each LoRA, and an id of what others have added."""
        for lora in loras_of(patcher):
            yield (
                lora.filename,
                {
                    key: [(lora.asked_strength(), one.adapter, one.strength_model, _part(one.part)) for one in terms]
                    for key, terms in lora.asked_terms().items()
                },
            )
        if patcher.patches or patcher.weight_wrapper_patches:
            yield str(patcher.patches_uuid), {}

    def not_patchable(self, patcher: PatcherObject) -> Message | None:
        """Returns why only Neo can apply LoRAs to a model: nunchaku's layers are fused kernels that no hook sees."""
        if any(kind.__name__ == "NunchakuPatcher" for kind in type(patcher).__mro__):
            return Message("neo.nunchaku")
        return None


def _through(clone: PatcherObject, inner: Patcher, lora: FittedLora) -> Loras:
    """Hands a LoRA to an `add_patches` that another extension has put in place of Neo's, and returns what it makes of it.

    Extensions that weigh the blocks of a LoRA do it there: they pass the keys on in groups, each with a strength of its own.
    """
    of_others, identifier = (inner.patches, inner.weight_wrapper_patches), inner.patches_uuid
    inner.patches, inner.weight_wrapper_patches = {}, {}
    try:
        values = dict.fromkeys(lora.terms, lora)
        clone.add_patches(
            filename=lora.filename, patches=values, strength_patch=lora.strength, online_mode=lora.is_online
        )
        added, functions = inner.patches, inner.weight_wrapper_patches
    except Exception:
        facts = {"name": label_of(lora), "strength": lora.strength}
        say(log, logging.WARNING, "neo.add_patches_failed", exc_info=True, **facts)
        inner.patches_uuid = identifier
        return (lora,)
    finally:
        inner.patches, inner.weight_wrapper_patches = of_others
    groups: dict[float, list[str]] = {}
    is_ours_alone = _sorted_out(added, lambda one: one, inner.patches, lora, groups)
    # A later Neo keeps patches on the fly as functions.
    is_ours_alone &= _sorted_out(functions, _patch_of, inner.weight_wrapper_patches, lora, groups)
    if is_ours_alone:
        inner.patches_uuid = identifier
    return tuple(_weighed(lora, strength, tuple(keys)) for strength, keys in groups.items())


def _sorted_out(
    added: Mapping[str, list[EntryT]],
    patch_of: Callable[[EntryT], HostPatch | None],
    of_others: dict[str, list[EntryT]],
    lora: FittedLora,
    groups: dict[float, list[str]],
) -> bool:
    """Puts the keys of a LoRA into groups by strength, and what others have added beside it to theirs. False if there is any."""
    is_ours_alone = True
    for key, on_key in added.items():
        for entry in on_key:
            patch = patch_of(entry)
            if patch is not None and patch[1] is lora:
                groups.setdefault(patch[0], []).append(key)
            else:
                of_others[key] = [*of_others.get(key, []), entry]
                is_ours_alone = False
    return is_ours_alone


def _patch_of(function: WeightChange | PatchFunction) -> HostPatch | None:
    """Returns the patch that Neo has made a function of; None for a function of another program."""
    if not isinstance(function, PatchFunction) or len(function.patch) != 1:
        return None
    return function.patch[0]


def _weighed(lora: FittedLora, strength: float, keys: tuple[str, ...]) -> FittedLora:
    """Returns the part of a LoRA that has another strength, or other parameters, than all of it."""
    named = None if len(keys) == len(lora.terms) else keys
    if lora.strength == 0:
        return replace(lora, strength=strength, keys=named)
    return replace(lora, weight=strength / lora.strength, keys=named)


def _inner(patcher: PatcherObject) -> Patcher:
    """Returns the patcher itself; a `CLIP` holds one."""
    inner: Patcher | None = getattr(patcher, "patcher", None)
    return patcher if inner is None else inner


def _part(part: Slice | None) -> tuple[int, int, int] | None:
    return None if part is None else (part.dim, part.start, part.length)
