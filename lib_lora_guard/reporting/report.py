"""What applying a stack did, as data; said in one log line or in a few printed ones, in every language."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..files import shown
from ..messages import Joined, Message
from ..planning.mode import Choice, Mode
from ..weights.storage import MB


@dataclass
class LoraReport:
    """One LoRA of the stack. `skipped` holds keys (or sentences on keys) that were not applied; `lost` those of them that
    the model has and that could not be patched. `refused`, `reasons` and what is lost may be Messages."""

    label: str
    strength: float
    bytes: int = 0
    used: int = 0
    skipped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: str | None = None
    modes: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, set[str]] = field(default_factory=dict)

    def count(self, choice: Choice) -> None:
        self.used += 1
        self.modes[choice.mode.value] += 1
        self.reasons.setdefault(choice.mode.value, set()).add(choice.reason)

    @property
    def is_worrying(self) -> bool:
        """True when the picture will not have all of this LoRA."""
        return self.refused is not None or bool(self.lost) or self.used == 0

    def message(self) -> Message | Joined:
        name = clean_text(self.label)
        if self.refused is not None:
            return Message("report.refused", {"name": name, "why": clean_text(self.refused)})
        numbers = {"name": name, "strength": self.strength, "used": self.used, "skipped": len(self.skipped)}
        parts = [Message("report.lora", numbers)]
        for mode, count in sorted(self.modes.items()):
            reasons = Joined(sorted(self.reasons[mode]))
            parts.append(Message("report.mode", {"count": count, "mode": _MODES[mode], "reasons": reasons}))
        if self.lost:
            parts.append(Message("report.lost", {"count": len(self.lost), "first": clean_text(self.lost[0])}))
        return Joined(parts)

    def __str__(self) -> str:
        return str(self.message())


_MODES = {
    Mode.BYPASS.value: Message("mode.bypass"),
    Mode.ON_THE_FLY.value: Message("mode.on_the_fly"),
    Mode.MERGE.value: Message("mode.merge"),
}


@dataclass
class ApplyReport:
    """The whole stack on one model. `device_bytes` are needed while the model runs, `ram_bytes` are our own copies."""

    model: str
    loras: list[LoraReport]
    device_bytes: int
    ram_bytes: int
    milliseconds: float
    device: str = "device"

    @property
    def refused(self) -> list[LoraReport]:
        return [lora for lora in self.loras if lora.refused is not None]

    @property
    def is_worrying(self) -> bool:
        return any(lora.is_worrying for lora in self.loras)

    def line(self) -> Message:
        """One line for the log."""
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
    """Text from files made harmless for a console: control characters become '?', the middle of long text is left out. Of
    a Message, its facts are."""
    return text.map(_clean) if isinstance(text, (Message, Joined)) else shown(text, 400)


def _clean(fact: object) -> object:
    return shown(fact, 400) if isinstance(fact, str) else fact
