"""Linked under a name before lora-guard's: its preload.py runs first."""

import sys
from pathlib import Path

_shared = str(Path(__file__).resolve().parent.parent)
if _shared not in sys.path:
    sys.path.append(_shared)


def preload(parser):
    import lg_neighbours

    if lg_neighbours.wanted("wrap_refresh@before"):
        lg_neighbours.wrap_refresh("wrap_refresh@before", force=False)
