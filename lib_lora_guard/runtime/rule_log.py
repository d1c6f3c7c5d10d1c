"""The log of what the memory rules have changed. The same settings break the same rule with every image, so each finding is
logged once while it stays the same.
"""

from __future__ import annotations

import logging

from ..memory.rules import Finding
from ..messages import Message
from .image_words import ImageWords

log = logging.getLogger(__name__)

EXPECTED_RULES = frozenset({"LG-R01", "LG-R05", "LG-R06"})
"""Logged as information: what they change comes from a usual setting or request."""
QUIET_RULES = frozenset({"LG-R10"})
"""Logged for who looks for the last detail: all that happens is that nothing has to be done."""
SLOW = frozenset({"rule.ram_slow", "rule.slider_below"})
"""Findings that make an image slow: they stand under each."""


class RuleLog:
    """Shared by all that apply rules; remembers the last finding of each rule."""

    def __init__(self, words: ImageWords | None = None) -> None:
        """
        Args:
            words: says under the image what makes it slow.
        """
        self._words = words or ImageWords()
        self._said: dict[str, str] = {}

    def tell(self, finding: Finding | None) -> None:
        """Logs `finding`, unless the last one of its rule said the same. None is ignored: the rule changed nothing."""
        if finding is None:
            return
        line = Message("rule.line", {"rule": finding.rule, "says": finding.says})
        if self._said.get(finding.rule) != finding.says:
            self._said[finding.rule] = finding.says
            log.log(_level_of(finding.rule), "%s", line)
        if finding.says.key in SLOW:
            self._words.tell(line, is_logged=True, once=finding.says.key)


def _level_of(rule: str) -> int:
    if rule in QUIET_RULES:
        return logging.DEBUG
    return logging.INFO if rule in EXPECTED_RULES else logging.WARNING
