"""A Forge process that is killed in the middle of an image: the next start names the phase it died in.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/real_forge/killed.py

`--model` should be of full size (forge-host's gen_sd15.py makes one of random numbers), so that each phase lasts a while. The
phases are watched from outside, in the flight recorder's file.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent.parent.parent), str(HERE.parent.parent)]
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7918")

from lib_lora_guard.reporting.flight_ring import bodies  # noqa: E402  # found by the lines above
from real_forge.run import link_extensions  # noqa: E402
from real_forge.server import FORGE, Server  # noqa: E402

PHASES = {
    "load_checkpoint": "a checkpoint was being loaded",
    "encode_prompt": "the prompt was being encoded",
    "apply_lora": "LoRAs were being applied",
    "sampling_step": "the image was being sampled",
    "vae_decode": "the VAE was decoding the image",
}
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


def killed_in(phase, options, log):
    """Makes an image and kills Forge when it is in `phase`; False where the image was ready first."""
    with Server(log) as forge:

        def image():
            try:
                prompt = f"a cat <lora:{options.lora}:0.8>"
                forge.image(options.model, prompt=prompt, steps=4, width=512, height=512)
            except OSError:
                pass  # it was killed

        worker = threading.Thread(target=image)
        worker.start()
        while worker.is_alive():
            if phase in open_phases(forge.process.pid)[-1:]:
                forge.process.kill()
                worker.join()
                return True
            time.sleep(0.002)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rand_sd15_full")
    parser.add_argument("--lora", default="rand_lora_full")
    parser.add_argument("--phases", default=",".join(PHASES))
    options = parser.parse_args()
    link_extensions()
    folder, failed = Path(tempfile.mkdtemp(prefix="lora_guard_killed_")), []
    for phase in options.phases.split(","):
        shutil.rmtree(DATA, ignore_errors=True)
        if not killed_in(phase, options, folder / f"{phase}.log"):
            failed.append(f"{phase}: the image was ready before it was seen")
            continue
        with Server(folder / f"{phase}_next.log") as forge:
            said = [
                line for line in forge.console().splitlines() if "lora_guard" in line.lower() or "LoRA Guard" in line
            ]
        print(f"--- {phase}")
        print("\n".join(said))
        if not any(PHASES[phase] in line for line in said):
            failed.append(f"{phase}: the next start says something else")
        with Server(folder / f"{phase}_clean.log") as forge:
            again = forge.console()
        if any(text in again for text in PHASES.values()):
            failed.append(f"{phase}: said a second time")
    print("\n".join(failed) or "all as it should be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
