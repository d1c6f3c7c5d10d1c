"""Looks over the folder of the guard's own files when a host starts: what lies in it under their names and is none of them.

Each reader passes such a thing by; said here, all of it in one line.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ..memory.calibration import FILE_NAME
from ..memory.links_file import FILE_NAME as LINKS_NAME
from ..messages import Message, say
from ..private_files import other_than_file
from ..reporting.report import clean_text

log = logging.getLogger(__name__)

CARDS_NAME = "lora-cards.json"
"""What `hosts.webui` has read of LoRA files for their cards."""
_NAME = re.compile(
    rf"({re.escape(FILE_NAME)}|{re.escape(LINKS_NAME)}|{re.escape(CARDS_NAME)})(\.\w+)?|flight-.*\.(ring|told)",
    re.DOTALL,
)


def look_over(folder: Path) -> None:
    """Says what is in the way of the guard's own files; changes nothing. Never raises.

    Args:
        folder: The folder. Where there is none, or something else has its name, the writers of the files say so.
    """
    try:
        found = {path.name: what for path in sorted(folder.iterdir()) if (what := in_the_way(path)) is not None}
    except OSError:
        return
    if found:
        name, what = next(iter(found.items()))
        where, name = clean_text(str(folder)), clean_text(name)
        say(log, logging.WARNING, "private.in_the_way", folder=where, count=len(found), name=name, found=what)


def in_the_way(path: Path) -> Message | None:
    """Returns what has the name of one of the guard's files and is none that can be read; None for everything else."""
    if _NAME.fullmatch(path.name) is None:
        return None
    what = other_than_file(path)
    return what if what is not None or os.access(path, os.R_OK) else Message("private.unreadable")
