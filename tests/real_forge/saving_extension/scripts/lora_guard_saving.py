"""Test-only extension: with LORA_GUARD_SAVING=1, `POST /lora-guard-test/save` does what the buttons Save UNet and Save
Checkpoint do, and answers with the memory that it took. Linked into extensions/ by tests/real_forge/saving.py.
"""

import os
import sys
import threading
import time
from pathlib import Path

if os.environ.get("LORA_GUARD_SAVING"):
    from fastapi import Body
    from modules import script_callbacks, sd_models, shared
    from modules.paths import models_path

    forge = sys.modules.get("lib_lora_guard.hosts.forge.takeover")
    if forge is not None and forge.installed() is not None:
        from lib_lora_guard.hosts.webui import saving as forge_saving

        forge_saving.install(forge.installed().hooks, forge.installed().stacks.engines)

    # The button's own function is inside a function that builds the page; this one has its module's name.
    names = {"__name__": "modules.ui_checkpoint_merger", "sd_models": sd_models, "shared": shared}
    exec(
        "def press(what, path):\n"
        "    sd_models.forge_model_reload()\n"
        "    return getattr(shared.sd_model, 'save_' + what)(path)\n",
        names,
    )

    def own_bytes():
        """Memory that is this process's alone; the pages of mapped model files are not."""
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

    def save(what: str = Body(), name: str = Body()):
        before = peak = own_bytes()
        done = threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, own_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        try:
            error = ""
            names["press"](what, os.path.join(models_path, "Stable-diffusion", name))
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        finally:
            done.set()
            watcher.join()
        seconds = time.perf_counter() - started
        return {"grown_bytes": peak - before, "left_bytes": own_bytes() - before, "seconds": seconds, "error": error}

    script_callbacks.on_app_started(
        lambda demo, app: app.add_api_route("/lora-guard-test/save", save, methods=["POST"])
    )
