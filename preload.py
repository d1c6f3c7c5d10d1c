"""Runs while Forge builds its command line: adds two flags and installs the takeover. Thin on purpose."""

import argparse
import sys
from pathlib import Path

# Forge does not put an extension on sys.path before its scripts run, and the folder may have any name.
_root = str(Path(__file__).resolve().parent)
if _root not in sys.path:
    sys.path.append(_root)


def preload(parser):
    from lib_lora_guard.hosts import start

    try:
        start.add_flags(parser)
    except argparse.ArgumentError:
        # Another copy of the extension has brought them.
        start.say_installed_twice(Path(_root))
        return
    start.start(sys.argv[1:])
