"""The result of applying a stack of LoRAs, as data, and its text: one line for the log or several printed ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..adapters.left_out import LeftOut
from ..files import shown
from ..messages import Joined, Message
from ..planning.mode import Mode
from ..units import MB


@dataclass
class LoraReport:
    """One LoRA of the stack. `refused`, `reasons` and `lost` may hold Messages."""

    label: str
    strength: float
    bytes: int = 0
    used: int = 0
    """Number of weights that the LoRA changes."""
    skipped: list[str] = field(default_factory=list)
    """Keys that were not applied, or sentences about them."""
    lost: list[str] = field(default_factory=list)
    """The part of `skipped` that the model has but that could not be patched."""
    refused: str | None = None
    """The reason if the whole file was refused."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """The part of the file that is not applied."""
    modes: Counter[str] = field(default_factory=Counter)
    """Number of weights by mode."""
    reasons: dict[str, set[str]] = field(default_factory=dict)
    """The reasons for each mode."""
    fused: Counter[str] = field(default_factory=Counter)
    """Number of weights by mode that fast kernels are there for, or are being compiled for."""

    def count(self, mode: Mode, reason: Message, weights: int = 1, is_fused: bool = False) -> None:
        """Counts weights that are in the same mode for the same reason."""
        self.used += weights
        self.modes[mode.value] += weights
        if is_fused:
            self.fused[mode.value] += weights
        self.reasons.setdefault(mode.value, set()).add(reason)

    def forget_counts(self) -> None:
        """Forgets the weights that were counted: the change was planned anew."""
        self.used = 0
        self.modes.clear()
        self.fused.clear()
        self.reasons.clear()

    @property
    def is_worrying(self) -> bool:
        """True if the image will lack a part of this LoRA."""
        return self.refused is not None or bool(self.lost) or self.used == 0 or self.left_out.is_much

    def message(self) -> Message | Joined:
        """Returns the report as a sentence."""
        name = clean_text(self.label)
        if self.refused is not None:
            return Message("report.refused", {"name": name, "why": clean_text(self.refused)})
        numbers = {"name": name, "strength": self.strength, "used": self.used, "skipped": len(self.skipped)}
        parts = [Message("report.lora", numbers)]
        for mode, count in sorted(self.modes.items()):
            reasons = Joined(sorted(self.reasons[mode]), "list.names")
            word = mode_word(mode, count, self.fused[mode])
            parts.append(Message("report.mode", {"count": count, "mode": word, "reasons": reasons}))
        if self.lost:
            parts.append(Message("report.lost", {"count": len(self.lost), "first": clean_text(self.lost[0])}))
        if self.left_out.is_much:
            parts.append(Message("report.left_out", self.left_out.facts()))
        return Joined(parts)

    def __str__(self) -> str:
        return str(self.message())


def mode_word(mode: str, count: int, fused: int) -> Message:
    """Returns a mode in words.

    Args:
        mode: The mode.
        count: The weights that have it.
        fused: Those of them that fast kernels are for.
    """
    word = Message(f"mode.{mode}")
    if not fused:
        return word
    all_of_them = fused == count
    return (
        Message("mode.fused", {"mode": word})
        if all_of_them
        else Message("mode.partly_fused", {"mode": word, "fused": fused})
    )


@dataclass
class ApplyReport:
    """The whole stack on one model."""

    model: str
    loras: list[LoraReport]
    device_bytes: int
    """Needed on the device while the model runs."""
    ram_bytes: int
    """The guard's own copies in RAM."""
    milliseconds: float
    device: str = "device"
    otherwise: list[Message] = field(default_factory=list)
    """Sentences on what is applied otherwise than asked, or slower. The log has each already."""

    @property
    def refused(self) -> list[LoraReport]:
        """The LoRAs that were refused."""
        return [lora for lora in self.loras if lora.refused is not None]

    @property
    def is_worrying(self) -> bool:
        """True if the image will lack a part of any LoRA."""
        return any(lora.is_worrying for lora in self.loras)

    def line(self) -> Message:
        """Returns one line for the log."""
        if not self.loras and not self.device_bytes and not self.ram_bytes:
            return Message("report.empty", {"model": self.model, "loras": Message("report.nothing")})
        loras = Joined([lora.message() for lora in self.loras], "list.bar") if self.loras else Message("report.nothing")
        return Message("report.line", {**self._facts(), "loras": loras})

    def __str__(self) -> str:
        head = Message("report.head", self._facts())
        return "\n".join([head, *(f"  {lora}" for lora in self.loras)])

    def _facts(self) -> dict[str, object]:
        return {
            "model": self.model,
            "device_mb": self.device_bytes / MB,
            "device": self.device,
            "ram_mb": self.ram_bytes / MB,
            "milliseconds": self.milliseconds,
        }


def clean_text(text: str) -> str:
    """Makes text from files safe for a console: replaces control characters by '?' and shortens long text. Cleans the
    facts of a Message.
    """
    return text.map(_clean) if isinstance(text, (Message, Joined)) else shown(text, 400)


def _clean(fact: object) -> object:
    return shown(fact, 400) if isinstance(fact, str) else fact
