"""Runs at start and at every 'Reload UI'. Thin on purpose: the takeover is installed by preload.py and stays."""

from pathlib import Path

from lib_lora_guard.hosts import forge_start

LoraGuardScript = forge_start.script_class()
forge_start.run_script(Path(__file__).resolve().parent.parent)
