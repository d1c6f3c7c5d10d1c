"""The log of what the memory rules have changed. The same settings break the same rule with every image, so each finding is
logged once while it stays the same.
"""

from __future__ import annotations

import logging

from ..memory.rules import Finding
from ..messages import say

log = logging.getLogger(__name__)

EXPECTED_RULES = frozenset({"LG-R01", "LG-R05", "LG-R06"})
"""Logged as information: what they change comes from a usual setting or request."""
QUIET_RULES = frozenset({"LG-R10"})
"""Logged for who looks for the last detail: all that happens is that nothing has to be done."""


class RuleLog:
    """Shared by all that apply rules; remembers the last finding of each rule."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def tell(self, finding: Finding | None) -> None:
        """Logs `finding`, unless the last one of its rule said the same. None is ignored: the rule changed nothing."""
        if finding is None or self._said.get(finding.rule) == finding.says:
            return
        self._said[finding.rule] = finding.says
        level = logging.INFO if finding.rule in EXPECTED_RULES else logging.WARNING
        if finding.rule in QUIET_RULES:
            level = logging.DEBUG
        say(log, level, "rule.line", rule=finding.rule, says=finding.says)
