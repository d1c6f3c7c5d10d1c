"""A Forge process that is killed in the middle of an image: the next start names the phase it died in. One that ends by
Ctrl+C or because its API is told to end it ends in order, in whatever it was: the next start says nothing.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/real_forge/killed.py

`--model` should be of full size (forge-host's gen_sd15.py makes one of random numbers), so that each phase lasts a while. The
phases are watched from outside, in the flight recorder's file.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent.parent.parent), str(HERE.parent.parent)]
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7918")

from lib_lora_guard.recorder.flight_ring import bodies  # noqa: E402  # found by the lines above
from real_forge.run import link_extensions  # noqa: E402
from real_forge.server import FORGE, Server  # noqa: E402

PHASES = {
    "load_checkpoint": "a checkpoint was being loaded",
    "encode_prompt": "the prompt was being encoded",
    "apply_lora": "LoRAs were being applied",
    "merge": "LoRAs were being merged into the model",
    "sampling_step": "the image was being sampled",
    "vae_decode": "the VAE was decoding the image",
}
SETTLES_SECONDS = {"vae_decode": 0.5}
"""A phase that begins with another one inside of it: the VAE is moved first."""
SETTINGS = {"merge": {"override_settings": {"lora_guard_mode": "Merge"}}}
ORDERLY = {
    "ctrl_c": lambda forge: forge.process.send_signal(signal.SIGINT),
    "server_kill": lambda forge: kill_over_api(forge),
}
"""Ends that are no death, each while the image is sampled."""
DATA = FORGE / "extensions" / "lora-guard" / "data"


def open_phases(pid):
    """Of the running process, outermost first."""
    newest = []
    for file in DATA.glob(f"flight-{pid}-*.ring"):
        for body in bodies(file.read_bytes()):
            record = json.loads(body)
            if not newest or record["time"] >= newest[0]:
                newest = [record["time"], [name for name, _ in record["open"]]]
    return newest[1] if newest else []


def kill_over_api(forge):
    """Does not answer any more, for it ends at once."""
    with contextlib.suppress(OSError):
        forge.call("/sdapi/v1/server-kill", {})


def ended_in(phase, options, log, end):
    """Makes an image and ends Forge when it is in `phase`; False where the image was ready first."""
    with Server(log, ["--api-server-stop"]) as forge:

        def image():
            with contextlib.suppress(OSError):  # it was ended
                prompt = f"a cat <lora:{options.lora}:0.8>"
                forge.image(options.model, prompt=prompt, steps=4, width=512, height=512, **SETTINGS.get(phase, {}))

        worker = threading.Thread(target=image)
        worker.start()
        while worker.is_alive():
            if phase in open_phases(forge.process.pid)[-1:]:
                time.sleep(SETTLES_SECONDS.get(phase, 0))
                if phase not in open_phases(forge.process.pid)[-1:]:
                    continue
                end(forge)
                worker.join()
                forge.process.wait(60)
                return True
            time.sleep(0.002)
    return False


def said_at_start(log):
    with Server(log) as forge:
        return [line for line in forge.console().splitlines() if "lora_guard" in line.lower() or "LoRA Guard" in line]


def checked_death(phase, options, folder):
    """What is wrong, in words."""
    if not ended_in(phase, options, folder / f"{phase}.log", lambda forge: forge.process.kill()):
        return ["the image was ready before it was seen"]
    said = said_at_start(folder / f"{phase}_next.log")
    print("\n".join(said))
    wrong = [] if any(PHASES[phase] in line for line in said) else ["the next start says something else"]
    again = said_at_start(folder / f"{phase}_clean.log")
    return [*wrong, "said a second time"] if tells_of_death(again) else wrong


def checked_end(way, options, folder):
    if not ended_in("sampling_step", options, folder / f"{way}.log", ORDERLY[way]):
        return ["the image was ready before it was seen"]
    said = said_at_start(folder / f"{way}_next.log")
    print("\n".join(said))
    return ["the next start tells of a death"] if tells_of_death(said) else []


def tells_of_death(lines):
    return any("was cut off" in line for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rand_sd15_full")
    parser.add_argument("--lora", default="rand_lora_full")
    parser.add_argument("--phases", default=",".join((*PHASES, *ORDERLY)))
    options = parser.parse_args()
    link_extensions()
    folder, failed = Path(tempfile.mkdtemp(prefix="lora_guard_killed_")), []
    for name in options.phases.split(","):
        shutil.rmtree(DATA, ignore_errors=True)
        print(f"--- {name}", flush=True)
        wrong = (checked_death if name in PHASES else checked_end)(name, options, folder)
        failed += [f"{name}: {what}" for what in wrong]
    print("\n".join(failed) or "all as it should be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
