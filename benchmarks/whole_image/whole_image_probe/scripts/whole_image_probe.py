"""Extension for the whole-image benchmark: notes when each step begins and ends, and slows copies down if asked to.

WHOLE_IMAGE_STEPS names the file for the notes, a JSON line each. WHOLE_IMAGE_LINK_GB_S is the rate that copies between RAM
and the card shall have at most.
"""

import importlib.util
import json
import os
import time
from pathlib import Path

import torch
from modules import script_callbacks

NOTES = os.environ.get("WHOLE_IMAGE_STEPS")
RATE = os.environ.get("WHOLE_IMAGE_LINK_GB_S")


def note(event):
    # The steps of one image are calculated one after the other: what is still running belongs to the one before.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with open(NOTES, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "at": time.time()}) + "\n")


if NOTES:
    script_callbacks.on_cfg_denoiser(lambda _: note("step begins"))
    script_callbacks.on_cfg_after_cfg(lambda _: note("step ended"))

if RATE:
    path = Path(__file__).resolve().parent.parent / "slow_link.py"
    spec = importlib.util.spec_from_file_location("whole_image_slow_link", path)
    slow_link = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slow_link)
    slow_link.install(torch, float(RATE) * 1e9)
