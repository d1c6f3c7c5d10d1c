"""Sentences for users: a key of the catalogue and the facts that go into it, so that each reader gets their own language."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .catalogue import ENGLISH, TEXTS


@dataclass(frozen=True)
class Message:
    """`str()` is the English sentence. A fact may itself be a Message."""

    key: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def text(self, language: str = ENGLISH) -> str:
        """The sentence in `language`; in English where the catalogue has no other."""
        texts = TEXTS[self.key]
        facts = {name: fact.text(language) if isinstance(fact, Message) else fact for name, fact in self.facts.items()}
        return texts.get(language, texts[ENGLISH]).format(**facts)

    def __str__(self) -> str:
        return self.text()


def say(log: logging.Logger, level: int, key: str, /, **facts: Any) -> None:
    """Logs a sentence of the catalogue. Handlers find the Message itself in `record.args`."""
    if log.isEnabledFor(level):
        log.log(level, "%s", Message(key, facts), stacklevel=2)
