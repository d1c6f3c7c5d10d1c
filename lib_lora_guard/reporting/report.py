"""What applying a stack did, as data; rendered as one log line or as a few printed ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..files import shown
from ..planning.mode import Choice
from ..weights.storage import MB


@dataclass
class LoraReport:
    """One LoRA of the stack. `skipped` holds keys (or sentences on keys) that were not applied; `lost` those of them that
    the model has and that could not be patched."""

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

    def __str__(self) -> str:
        name = clean_text(self.label)
        if self.refused is not None:
            return f"{name} NOT applied ({clean_text(self.refused)})"
        modes = [f"{n} {mode} ({', '.join(sorted(self.reasons[mode]))})" for mode, n in sorted(self.modes.items())]
        text = ", ".join(
            [f"{name} strength {self.strength:g}: {self.used} keys used, {len(self.skipped)} skipped", *modes]
        )
        return text if not self.lost else f"{text}, {len(self.lost)} LOST ({clean_text(self.lost[0])})"


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

    def line(self) -> str:
        """One line for the log."""
        loras = " | ".join(str(lora) for lora in self.loras) if self.loras else "no LoRA"
        return f"{self.model}: {loras} | {self.device_bytes / MB:.1f} MB on {self.device}, {self.ram_bytes / MB:.1f} MB RAM, {self.milliseconds:.1f} ms"

    def __str__(self) -> str:
        head = f"{self.model}: {self.device_bytes / MB:.1f} MB on {self.device} while running, {self.ram_bytes / MB:.1f} MB in RAM, {self.milliseconds:.1f} ms"
        return "\n".join([head, *(f"  {lora}" for lora in self.loras)])


def clean_text(text: str) -> str:
    """Text from files made harmless for a console: control characters become '?', the middle of long text is left out."""
    return shown(text, 400)
