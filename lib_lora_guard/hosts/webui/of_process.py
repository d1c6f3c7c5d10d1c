"""The settings and the journal of the process. They do not belong to one takeover: switching the guard off and on is no clean
end, and changes no setting."""

from __future__ import annotations

import logging
from pathlib import Path

from ...messages import say
from ...recorder.crash_report import crash_report
from ...runtime.journal import Journal
from ...runtime.live_settings import LiveSettings
from .process_end import close_at_the_end

log = logging.getLogger(__name__)

settings = LiveSettings()
journal: Journal | None = None
"""None until the first takeover is made."""


def keep_journal(journal: Journal, folder: Path) -> None:
    """Begins to write down what happens, in a file below `folder`; says how the last process died, if it did."""
    if journal.is_open:
        return
    crash = journal.open(folder)
    close_at_the_end(journal)
    if crash is not None:
        for line in crash_report(crash):
            say(log, logging.WARNING, "flight.line", line=line)
