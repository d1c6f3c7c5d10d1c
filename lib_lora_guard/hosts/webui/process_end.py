"""Closes the journal at every end that the process makes itself, so that none of them looks like a death.

Sources: `modules/restart.py` and `modules/initialize_util.py` of the A1111 family.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable

from ...runtime.hooks import HookSet, P
from ...runtime.journal import Journal


def close_at_the_end(journal: Journal) -> HookSet:
    """Closes `journal` when the interpreter ends, and when the WebUI ends at once by `os._exit`.

    The WebUI does that at Ctrl+C, at its button "Restart", and when its API is told to end it. No exit handler runs then.
    """
    atexit.register(journal.close)

    def at_once(original: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            journal.close()
        finally:
            original(*args, **kwargs)

    exits = HookSet()
    exits.add(os, "_exit", at_once)
    return exits
