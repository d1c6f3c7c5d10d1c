"""Carries out what the panel and the API ask of the host."""

from __future__ import annotations

import logging
import sys

from ...runtime import doings, installed
from ...runtime.status import InForce
from ...settings import Settings
from ...ui.route import FitAnswer
from .will_it_fit import lists, will_it_fit

log = logging.getLogger(__name__)


class HostDoings:
    """The buttons of the tab. `options` is None where the guard is not at work here."""

    def __init__(self, options: InForce | None) -> None:
        self._options = options

    def do(self, name: str, language: str) -> str | None:
        """Carries out a button; returns what came of it, or None if there is no such button."""
        from modules import call_queue

        try:
            action = doings.Action(name)
        except ValueError:
            return None
        return doings.act(action, installed.installed(), call_queue.queue_lock).text(language)

    def report(self) -> str:
        """Returns the text for a bug report."""
        settings = Settings() if self._options is None else self._options.settings
        return doings.report_text(installed.installed(), settings, _host(), _flags())

    def files(self) -> dict[str, list[str]]:
        """Returns the names of checkpoints and LoRAs."""
        return lists()

    def will_it_fit(self, checkpoint: str, loras: list[str], language: str) -> FitAnswer:
        """Returns the answer of `plan` in words."""
        return will_it_fit(installed.installed(), checkpoint, loras, language)


def _host() -> str:
    try:
        from modules import launch_utils

        tag = str(launch_utils.git_tag())
    except Exception:
        log.debug("the host does not say its version", exc_info=True)
        return "not known"
    try:
        return f"{tag} {launch_utils.commit_hash()[:12]}"
    except Exception:
        # Forge Neo knows no commit.
        return tag


def _flags() -> list[str]:
    """Returns the names of the flags; their values may be paths or passwords."""
    return [argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("--")]
