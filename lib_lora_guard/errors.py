"""Everything LoRA Guard raises on purpose.

    LoraGuardError
    |-- FileFormatError    a file is not what its format says               (also a ValueError)
    |   `-- LoraFileError  the file is missing, broken, or not a LoRA
    |-- LoraMismatchError  the LoRA does not fit this model                  (also a ValueError)
    |-- ModeError          the wished mode cannot be had for a weight        (also a ValueError)
    |-- RestoreError       an original value could not be put back            (also a RuntimeError)
    |-- LayerError         a patched layer could not finish its forward pass (also a RuntimeError)
    |-- MemoryShortError   RAM would not survive what was to be done          (also a RuntimeError)
    `-- HostError          the host does not look as expected                (also a RuntimeError)

Messages name the object, what was wanted, what was found and what to do, in this order. What a user of the panel can
meet is a sentence of the catalogue (`LoraFileError.of("file.missing", name=...)`), so that it can be read in the user's
language; what only a programmer can meet is plain English.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .messages import Joined as Joined
from .messages import Message as Message
from .messages import about as about
from .messages import reason as reason

if TYPE_CHECKING:
    from typing_extensions import Self


class LoraGuardError(Exception):
    """Base of all errors raised on purpose by LoRA Guard. `message` is what it says, a Message where the catalogue has it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    @classmethod
    def of(cls, key: str, /, **facts: Any) -> Self:
        """The error that says a sentence of the catalogue."""
        return cls(Message(key, facts))


class FileFormatError(LoraGuardError, ValueError):
    """A file is missing, truncated, or breaks the rules of its own format."""


class LoraFileError(FileFormatError):
    """A LoRA file is missing, broken, or holds nothing that can be applied."""


class LoraMismatchError(LoraGuardError, ValueError):
    """A LoRA does not fit the model it was to be applied to."""


class ModeError(LoraGuardError, ValueError):
    """A mode was asked for that this weight cannot have without losing the LoRA."""


class RestoreError(LoraGuardError, RuntimeError):
    """A weight could not be given its original value back; until it is, the model must not be trusted."""


class LayerError(LoraGuardError, RuntimeError):
    """A patched layer could not finish its forward pass; the image must stop, not go on with part of a LoRA."""


class MemoryShortError(LoraGuardError, RuntimeError):
    """Something was refused before it was begun, because the system would have ended the process for it."""


class HostError(LoraGuardError, RuntimeError):
    """The host program lacks something that LoRA Guard needs."""


def named(error: BaseException) -> str:
    """Why, as a fact for a sentence, of an error that may be anybody's: one that is not ours says its type too."""
    why = reason(error)
    return why if isinstance(error, LoraGuardError) or isinstance(why, Message) else f"{type(error).__name__}: {why}"
