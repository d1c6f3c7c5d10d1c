"""What the guard knows of one `LoraLoader` of Forge, and how the host names stacks of LoRAs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...patching.engine import Engine
from ...planning.mode import Mode
from ...reporting.report import ApplyReport
from ...settings import LoraMode
from .access import STATE
from .patches import FactorCopies, Patches

RETRY = "lora guard: apply again"
"""A `loaded_hash` that no stack has, so that the next refresh really works."""

MERGE_ATTEMPTS = 2
"""How often one stack is merged in vain: copying the originals of a large model takes seconds each time."""


@dataclass(eq=False)
class LoaderState:
    """Lives on the loader and dies with it."""

    engine: Engine = field(default_factory=Engine)
    copies: FactorCopies = field(default_factory=FactorCopies)
    left_to_host: bool = False
    report: ApplyReport | None = None
    reported: str = ""
    """The stack that `report` is of, as the host names stacks."""
    mode: LoraMode | None = None
    """The mode of the last refresh."""
    told_merge_loss: bool = False
    """True once the user has been told why low-bit weights of this model are not merged."""
    merged_in_vain: tuple[str, int] = ("", 0)
    """The stack whose merge ended for lack of memory, and how often in a row."""
    published: tuple[object, object] | None = None
    """The `backup` and `online_backup` objects left on the loader: others there mean that someone else was at work."""

    def publish(self, loader: Any, stack_hash: str) -> None:
        """The attributes other extensions read mean what they mean in the host."""
        attached = self.engine.attached.values()
        loader.backup = self.engine.originals()
        loader.online_backup = [a.site.layer for a in attached if a.mode is Mode.ON_THE_FLY]
        loader.loaded_hash = self.reported = stack_hash
        self.published = (loader.backup, loader.online_backup)

    def merges_again(self, stack_hash: str, is_as_wished: bool) -> bool:
        """After a refresh: whether the next one is to try to merge the same stack again."""
        before, times = self.merged_in_vain
        self.merged_in_vain = ("", 0) if is_as_wished else (stack_hash, times + 1 if before == stack_hash else 1)
        return 0 < self.merged_in_vain[1] < MERGE_ATTEMPTS

    def someone_else_patched(self, loader: Any) -> bool:
        """True when `backup` or `online_backup` hold what the guard did not put there: Forge's own refresh ran before
        the guard came, or another extension brought a copy of it."""
        if self.published is None:
            return bool(loader.backup or loader.online_backup)
        return loader.backup is not self.published[0] or loader.online_backup is not self.published[1]


def state_of(loader: Any) -> LoaderState | None:
    """None where the guard has not worked on this loader's model."""
    state: LoaderState | None = getattr(loader, STATE, None)
    return state


def hash_of(lora_patches: Patches) -> str:
    """The host's name for a stack, which other extensions compare."""
    return str(list(lora_patches.keys()))
