"""The part of a LoRA file that is not applied, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Message
from ..files import shown

MUCH, MOST = 0.1, 0.5
"""Shares of a file: above the first the picture will lack it, above the second the file counts as not applied."""


@dataclass(frozen=True)
class LeftOut:
    """The part of a file that a model has no place for, or that cannot be applied.

    Attributes:
        keys: names of its tensors, as the file spells them.
        modules: the number of modules that they belong to.
        of: the number of modules of the file, without those of components that the model does not have.
    """

    keys: tuple[str, ...] = ()
    modules: int = 0
    of: int = 0

    @property
    def share(self) -> float:
        """The part of the file's modules, 0 to 1."""
        return self.modules / self.of if self.of else 0.0

    @property
    def is_much(self) -> bool:
        """True if the picture will lack it."""
        return self.share > MUCH

    @property
    def refusal(self) -> Message | None:
        """Why the file counts as not applied; None if it does not."""
        if self.share <= MOST or self.modules >= self.of:
            return None
        return Message("lora.mostly_left_out", self.facts())

    def facts(self) -> dict[str, object]:
        """The numbers for a sentence."""
        return {"left": self.modules, "of": self.of, "first": shown(self.keys[0]) if self.keys else ""}
