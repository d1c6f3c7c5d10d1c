"""Runs at start and at every 'Reload UI'. Thin on purpose: the takeover is installed by preload.py and stays."""

import sys
from pathlib import Path

# An update without a restart runs this file over modules of the version before, which had its entry elsewhere (0.1).
start = sys.modules.get("lib_lora_guard.hosts.forge_start")
if start is None:
    from lib_lora_guard.hosts import start

LoraGuardScript = start.script_class()
start.run_script(Path(__file__).resolve().parent.parent)
