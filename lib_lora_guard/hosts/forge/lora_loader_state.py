"""The state that the guard keeps on each `LoraLoader` of Forge, and the record of the applied stack that Forge keeps there.

Source: Forge's `backend/patcher/lora.py` (`LoraLoader`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...planning.mode import Mode
from ...runtime.model_stack import ModelStack
from .identifiers import stack_name
from .types import Identifier, LoraLoader

STATE = "lora_guard_state"
"""The attribute of a LoraLoader that holds its LoaderState."""

RETRY = "lora guard: apply again"
"""A `loaded_hash` that no stack has, so that the next refresh really works."""


class AppliedStack:
    """`LoraLoader.loaded_hash`: the stack that is applied to a model, as Forge and other extensions compare it.

    It is a stack, or unknown: while a change is under way, after one that failed, and as long as merges are suspended.
    """

    def __init__(self, loader: LoraLoader) -> None:
        self._loader = loader

    @property
    def name(self) -> str:
        """Forge's name for the stack; a name that no stack has if it is unknown."""
        return self._loader.loaded_hash

    def is_current(self, stack: Iterable[Identifier]) -> bool:
        """True if exactly this stack is applied."""
        return self.name == stack_name(stack)

    @property
    def is_unknown(self) -> bool:
        """True if the next refresh will apply its stack whatever it is."""
        return self.name == RETRY

    def record(self, stack: Iterable[Identifier]) -> None:
        """Notes that this stack is applied."""
        self._loader.loaded_hash = stack_name(stack)

    def invalidate(self) -> None:
        """Makes the next refresh apply its stack."""
        self._loader.loaded_hash = RETRY


@dataclass(eq=False)
class LoaderState(ModelStack):
    """The stack of one of Forge's models. It lives on the loader and dies with it."""

    reported: str = ""
    """Forge's name for the stack that `report` describes."""
    published: tuple[Mapping[str, torch.Tensor], Sequence[torch.nn.Module]] | None = None
    """The `backup` and `online_backup` objects that the guard has left on the loader."""

    def publish(self, loader: LoraLoader, stack: Iterable[Identifier]) -> None:
        """Gives the loader's attributes the values that they have in Forge: other extensions read them."""
        attached = self.engine.attached.values()
        loader.backup = self.engine.originals()
        loader.online_backup = [a.site.layer for a in attached if a.mode is Mode.ON_THE_FLY]
        self.published = (loader.backup, loader.online_backup)
        self.reported = stack_name(stack)
        AppliedStack(loader).record(stack)

    def unpublish(self, loader: LoraLoader) -> None:
        """Gives the attributes the values of a model without LoRAs."""
        loader.backup, loader.online_backup = {}, []
        self.published, self.report = None, None

    def is_patched_by_other(self, loader: LoraLoader) -> bool:
        """True if `backup` or `online_backup` are not the objects that the guard has left there.

        Then Forge's own refresh ran before the guard was installed, or another extension brought a copy of it.
        """
        if self.published is None:
            return bool(loader.backup or loader.online_backup)
        return loader.backup is not self.published[0] or loader.online_backup is not self.published[1]


def state_of(loader: LoraLoader | None) -> LoaderState | None:
    """Returns the state on a loader; None if the guard has not worked on its model."""
    state: LoaderState | None = getattr(loader, STATE, None)
    return state
