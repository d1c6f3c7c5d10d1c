"""Explains a log: what happened, the worst first, each with what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..files import shown
from ..messages import Joined, Message
from .host_lines import Seen, look
from .reading import lines_of
from .rules import RULES

OURS_SHOWN = 8
"""Different warnings of the guard's own that are repeated."""
OURS_CHARACTERS = 400


@dataclass(frozen=True)
class Finding:
    """One thing that the log shows. `name` is the rule's, `do` the next step."""

    name: str
    said: Message
    do: Message
    is_harmless: bool = False


@dataclass(frozen=True)
class Explanation:
    """The explanation.

    Attributes:
        lines: Lines that were read.
        host: The host and the machine, as far as the log says.
        findings: The worst first, harmless ones last.
        ours: Warnings of the guard in the log, each once.
        has_guard: The guard was in place.
    """

    lines: int
    host: Message | None
    findings: Sequence[Finding]
    ours: Sequence[str]
    has_guard: bool

    def answer(self) -> Message:
        """Returns the answer in one sentence."""
        bad = [finding for finding in self.findings if not finding.is_harmless]
        if bad:
            return Message("explain.answer", {"said": bad[0].said})
        if self.ours:
            return Message("explain.ours_alone", {"count": len(self.ours)})
        if self.findings:
            return Message("explain.harmless", {"count": len(self.findings)})
        return Message("explain.nothing" if self.host is None else "explain.all_well", {"lines": self.lines})


def explain(raw: bytes) -> Explanation:
    """Explains a console log.

    Args:
        raw: The log as it lies in a file or comes from a pipe, whatever it is.
    """
    lines = lines_of(raw)
    seen = look(lines)
    findings = []
    for rule in RULES:
        facts = rule.facts(seen)
        if facts is not None:
            said = Message(f"explain.{rule.name}", facts)
            findings.append(Finding(rule.name, said, Message(f"explain.{rule.name}_do", facts), rule.is_harmless))
    ours = [shown(text.strip(), OURS_CHARACTERS) for text in seen.texts("ours", "text")]
    return Explanation(len(lines), _host(seen), findings, ours[:OURS_SHOWN], seen.has("guard"))


def _host(seen: Seen) -> Message | None:
    """Returns a sentence on the host and the machine; None if the log shows nothing of a host."""
    if not seen.found:
        return None
    facts: list[str] = []
    if seen.has("neo"):
        facts.append("Forge Neo")
    elif any(map(seen.has, ("patched", "patching", "loads_old", "placed_old", "not_loaded"))):
        facts.append(Message("explain.host_old"))
    elif any(map(seen.has, ("placed", "unloads", "online_wish"))):
        facts.append("Forge")
    if seen.has("guard"):
        facts.append(f"LoRA Guard {shown(seen.all('guard')[-1]['version'])}")
    if machine := seen.all("machine"):
        sizes = {name: float(machine[-1][name]) / 1024 for name in ("vram", "ram")}
        facts.append(Message("explain.host_memory", sizes))
    if device := seen.texts("device", "card"):
        facts.append(shown(device[-1]))
    if torch := seen.texts("torch", "version"):
        facts.append(f"torch {shown(torch[-1])}")
    return Message("explain.host", {"facts": Joined(facts)}) if facts else None
