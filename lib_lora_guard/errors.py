"""All errors that LoRA Guard raises on purpose.

    LoraGuardError
    |-- FileFormatError    a file breaks the rules of its format           (also a ValueError)
    |   `-- LoraFileError  the file is missing, broken, or no LoRA
    |-- LoraMismatchError  the LoRA does not fit this model                (also a ValueError)
    |-- ModeError          a weight does not support the requested mode    (also a ValueError)
    |-- BusyError          LoRAs of this model are being changed, or another guard's are on it (also a RuntimeError)
    |-- RestoreError       an original value could not be restored         (also a RuntimeError)
    |-- LayerError         a patched layer could not finish its forward    (also a RuntimeError)
    |-- MemoryShortError   the operation would need more RAM than there is (also a RuntimeError)
    `-- HostError          the host lacks something that is expected       (also a RuntimeError)

A message names the object, what was expected, what was found and what to do, in this order. Errors that users of the
panel can see are sentences of the catalogue (`LoraFileError.of("file.missing", name=...)`), so that they are
translated. Errors for programmers are plain English.
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
    """Base of all errors raised on purpose by LoRA Guard. `message` is a Message if the catalogue has the sentence."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    @classmethod
    def of(cls, key: str, /, **facts: Any) -> Self:
        """Makes an error with a sentence of the catalogue."""
        return cls(Message(key, facts))


class FileFormatError(LoraGuardError, ValueError):
    """A file is missing, truncated, not of the expected kind, or breaks the rules of its own format."""


class LoraFileError(FileFormatError):
    """A LoRA file is missing, broken, or contains nothing that can be applied."""


class LoraMismatchError(LoraGuardError, ValueError):
    """A LoRA does not fit the model."""


class ModeError(LoraGuardError, ValueError):
    """A weight cannot use the requested mode without losing the LoRA."""


class BusyError(LoraGuardError, RuntimeError):
    """The model cannot be changed now: a change is under way in this very thread, or another guard's LoRAs are on it."""


class RestoreError(LoraGuardError, RuntimeError):
    """A weight's original value could not be restored. Until it is, the model's results are wrong."""


class LayerError(LoraGuardError, RuntimeError):
    """A patched layer could not finish its forward pass. The image must stop: it would have a part of a LoRA."""


class MemoryShortError(LoraGuardError, RuntimeError):
    """An operation was refused before it began: the system would have ended the process for lack of memory."""


class HostError(LoraGuardError, RuntimeError):
    """The host program lacks something that LoRA Guard needs."""


def named(error: BaseException) -> str:
    """Returns the cause of any error as a fact for a sentence; adds the type of errors that are not ours."""
    why = reason(error)
    return why if isinstance(error, LoraGuardError) or isinstance(why, Message) else f"{type(error).__name__}: {why}"
