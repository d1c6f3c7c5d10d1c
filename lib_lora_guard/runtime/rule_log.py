"""The log of what the memory rules have changed. The same settings break the same rule with every image, so each finding is
logged once while it stays the same, of each model and each work by itself: an image has a denoiser and a VAE.
"""

from __future__ import annotations

import logging
import weakref

import torch

from ..memory.rules import Finding
from ..messages import Message
from .image_words import ImageWords

log = logging.getLogger(__name__)

EXPECTED_RULES = frozenset({"LG-R01", "LG-R05", "LG-R06"})
"""Logged as information: what they change comes from a usual setting or request."""
GOOD_NEWS = frozenset({"LG-R05", "LG-R06"})
"""Room that is kept as it should be: told once of each model. Its number changes with the size of the picture, twice in an
image of two passes; from then on that is for who looks for detail.
"""
QUIET_RULES = frozenset({"LG-R10"})
"""Logged for who looks for the last detail: all that happens is that nothing has to be done."""
SLOW = frozenset({"rule.ram_slow", "rule.slider_below"})
"""Findings that make an image slow: they stand under each."""


class RuleLog:
    """Shared by all that apply rules; remembers the last finding of each rule, of each model that it was about."""

    def __init__(self, words: ImageWords | None = None) -> None:
        """
        Args:
            words: says under the image what makes it slow.
        """
        self._words = words or ImageWords()
        self._said: dict[tuple[str, str], str] = {}
        self._said_of: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, str], str]] = (
            weakref.WeakKeyDictionary()
        )

    def tell(self, finding: Finding | None, model: torch.nn.Module | None = None) -> None:
        """Logs `finding`, unless the last one of its rule said the same of the same.

        Args:
            finding: None is ignored: the rule changed nothing.
            model: the finding is about it; None for one about the card, or about a work that it names.
        """
        if finding is None:
            return
        said = self._said if model is None else self._said_of.setdefault(model, {})
        what = finding.rule, str(finding.says.facts.get("what", ""))
        line = Message("rule.line", {"rule": finding.rule, "says": finding.says})
        if said.get(what) != finding.says:
            log.log(_level_of(finding.rule, is_first=what not in said), "%s", line)
            said[what] = finding.says
        if finding.says.key in SLOW:
            self._words.tell(line, is_logged=True, once=finding.says.key)


def _level_of(rule: str, is_first: bool) -> int:
    if rule in QUIET_RULES or (rule in GOOD_NEWS and not is_first):
        return logging.DEBUG
    return logging.INFO if rule in EXPECTED_RULES else logging.WARNING
