"""A LoRA in a process that may take little more RAM than it has: stock Forge's way ends, the guard's finishes with the picture
that is made where RAM is plenty.

    FORGE_ROOT=... FORGE_PYTHON=... python tests/real_forge/low_ram.py [--room 400]

Linux. The limit is RLIMIT_DATA, which counts what a process has writable and private, as Windows' commit limit does: an
allocation beyond it fails; glibc is told to give large tensors back when they are freed, as Windows does. It is set on the running Forge after a picture without LoRAs, `--room` MB above what it has then,
and lifted at the end. `--model` should be of full size (forge-host's gen_sd15.py makes one of random numbers).
"""

import argparse
import os
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7919")

from real_forge.run import LARGEST_GAP, difference, link_extensions, markdown, show
from real_forge.server import ApiError, Server

SIDES = {
    "stock": (["--lora-guard-off"], {}),
    "guard, Automatic": ([], {}),
    "guard, Merge": ([], {"override_settings": {"lora_guard_mode": "Merge"}}),
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
STRENGTHS = (0.8, 0.5)
"""Of the LoRA: first applied, then changed."""


class Limited:
    """What a running process has taken, and may take."""

    def __init__(self, pid):
        self.pid = pid

    def mb(self, name):
        """`VmData`: writable and private; `VmHWM`: the most that was resident."""
        lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) >> 10

    def forget_peak(self):
        Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="utf-8")

    def limit(self, mb):
        """None lifts it."""
        wanted = resource.RLIM_INFINITY if mb is None else mb << 20
        resource.prlimit(self.pid, resource.RLIMIT_DATA, (wanted, resource.RLIM_INFINITY))


def run(side, room_mb, options, folder):
    """Pictures by strength (None for one that was not made), what the process took, and the console."""
    flags, settings = SIDES[side]
    name = f"{side}_{room_mb}".replace(", ", "_")
    pictures, errors = {}, {}
    with Server(Path(folder) / f"{name}.log", flags, GIVES_BACK) as forge:
        forge.image(options.model, prompt="a cat", steps=2)
        process = Limited(forge.process.pid)
        before = {"VmData": process.mb("VmData"), "VmHWM": process.mb("VmRSS")}
        process.forget_peak()
        if room_mb is not None:
            process.limit(before["VmData"] + room_mb)
        for strength in STRENGTHS:
            try:
                pictures[strength] = forge.image(prompt=f"a cat <lora:{options.lora}:{strength}>", steps=2, **settings)
            except (ApiError, OSError) as error:
                pictures[strength], errors[strength] = None, str(error)
        took = {key: process.mb(key) - value for key, value in before.items()}
        alive = forge.process.poll() is None
        process.limit(None)
        after = forge.image(prompt="a cat", steps=2) if alive else None
        return {
            "pictures": pictures,
            "errors": errors,
            "took": took,
            "base": before,
            "after": after,
            "console": forge.console(),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rand_sd15_full")
    parser.add_argument("--lora", default="rand_lora_full")
    parser.add_argument("--room", type=int, default=400, help="MB of RAM beyond what Forge has with the model loaded")
    options = parser.parse_args()
    link_extensions()
    folder, wrong, rows = tempfile.mkdtemp(prefix="lora_guard_low_ram_"), [], []
    reference = run("stock", None, options, folder)
    plain = reference["after"]
    rows.append(row("stock", None, reference, reference))
    for strength in STRENGTHS:
        if difference(reference["pictures"][strength], plain)[0] < 4 * LARGEST_GAP:
            wrong.append("the LoRA changes nothing, so nothing is tested")
    for side in SIDES:
        found = run(side, options.room, options, folder)
        rows.append(row(side, options.room, found, reference))
        for strength, picture in found["pictures"].items():
            if side == "stock" and picture is not None:
                wrong.append(f"stock made the picture of strength {strength}: lower --room")
            elif side != "stock" and picture is None:
                wrong.append(f"{side}: no picture of strength {strength}: {found['errors'][strength]}")
            elif side != "stock" and difference(picture, reference["pictures"][strength])[0] > LARGEST_GAP:
                apart = show(difference(picture, reference["pictures"][strength]))
                wrong.append(f"{side}: {apart} from the picture of strength {strength} without a limit")
        if side != "stock" and (found["after"] is None or difference(found["after"], plain)[0] > LARGEST_GAP):
            wrong.append(f"{side}: without LoRAs the model is not what it was")
        print(f"--- {side}, {options.room} MB of room")
        print("\n".join(line for line in found["console"].splitlines() if says_why(line)))
        print("\n".join(f"{strength}: {error}" for strength, error in found["errors"].items()))
    print("limited by RLIMIT_DATA; MB, above what the process had with the model loaded")
    print(
        markdown(["side", "room", "private memory", "resident, peak", "pictures", "from stock without a limit"], rows)
    )
    print(f"logs in {folder}")
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


def row(side, room, found, reference):
    made = [strength for strength, picture in found["pictures"].items() if picture is not None]
    apart = [show(difference(found["pictures"][s], reference["pictures"][s])) for s in made]
    room = "no limit" if room is None else str(room)
    took = [f"+{found['took'][key]} (of {found['base'][key]})" for key in ("VmData", "VmHWM")]
    return [side, room, *took, f"{len(made)} of {len(found['pictures'])}", ", ".join(apart) or "-"]


def says_why(line):
    return "LoRA Guard" in line or "can't allocate" in line or "MemoryError" in line


if __name__ == "__main__":
    sys.exit(main())
