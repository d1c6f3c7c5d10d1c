"""A running Forge under load: several clients at once, a process that is killed and started again, and its memory over many changes.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/clients.py [--only pictures,kills,memory] [--write-docs]

- pictures: each client makes images with changing stacks of LoRAs, and sets the LoRA mode for all of them while the others' images are
  made. Each picture has to be, bit for bit, the one that a single client got with one mode.
- kills: SIGKILL at random moments of two clients' images. Each next start has to name the phase that the process died in, make the
  right first picture, and find every LoRA file as it was.
- memory: the resident memory over many changes of LoRAs, the guard's and stock's, as MB for each change.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent.parent.parent), str(HERE.parent.parent)]
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7921")

from lib_lora_guard.memory.probe import default_spool_dir  # noqa: E402  # found by the lines above
from lib_lora_guard.settings import LoraMode  # noqa: E402
from real_forge.killed import DATA, open_phases, tells_of_death  # noqa: E402
from real_forge.run import link_extensions, markdown, measured_on, write_table  # noqa: E402
from real_forge.server import FORGE, ApiError, Server  # noqa: E402

MODES = tuple(mode.value for mode in LoraMode)
STACKS = {
    "without": "",
    "a": "<lora:lg_{0}_a:1>",
    "a, weak": "<lora:lg_{0}_a:0.4>",
    "b": "<lora:lg_{0}_b:1>",
    "a and b": "<lora:lg_{0}_a:0.7> <lora:lg_{0}_b:-0.6>",
    "text encoder": "<lora:lg_{0}_text:1>",
    "norms and b": "<lora:lg_{0}_norm:1> <lora:lg_{0}_b:0.5>",
}
SHAPES = {
    "one pass": {},
    "hires": {
        "enable_hr": True,
        "hr_scale": 2,
        "hr_second_pass_steps": 2,
        "denoising_strength": 0.6,
        "hr_additional_modules": ["Use same choices"],
    },
    "two batches": {"n_iter": 2},
}
STEPS = 2
SETTLED = 60
"""Changes until what is kept on purpose is kept: files, prompts, the allocator's own."""
ALLOWED_MB = 0.02
"""A change, above stock's."""


class OneModel(Server):
    """A host with one checkpoint, and settings of its own, so that the user's file stays as it is."""

    families: ClassVar = {}
    """Checkpoints with the family that their LoRAs are named after, and the CFG scale. The first is the fastest."""
    settings: ClassVar = {}
    """What the host's config needs to start."""
    upscaler = "Latent"

    def __init__(self, folder, name, model, flags=()):
        config = Path(folder) / f"{name}.json"
        config.write_text(json.dumps({**self.settings, "lora_guard_mode": MODES[0]}), encoding="utf-8")
        super().__init__(Path(folder) / f"{name}.log", ["--ui-settings-file", str(config), *flags])
        self.model, (self.family, self.cfg_scale) = model, self.families[model]

    @staticmethod
    def link():
        """Links the extension into the host."""
        link_extensions()

    @staticmethod
    def write_docs(text):
        """Writes the table into the host's page."""
        write_table("clients", f"{measured_on()} {text}")

    def set_mode(self, mode):
        """As another client does that is no client of the queue: it waits for no image."""
        self.call("/sdapi/v1/options", {"lora_guard_mode": mode})

    def load(self):
        self.image(self.model, steps=1, cfg_scale=self.cfg_scale)

    def picture(self, stack, shape="one pass", **settings):
        prompt = f"a cat {STACKS[stack]}".format(self.family)
        settings |= {"steps": STEPS, "cfg_scale": self.cfg_scale, "hr_upscaler": self.upscaler, **SHAPES[shape]}
        return self.image(prompt=prompt, **settings)


class Forge(OneModel):
    families: ClassVar = {"tiny_flux_bf16": ("flux", 1), "rand_sd15_tiny": ("sd15", 7)}


# Pictures.


def references(forge):
    """`{(stack, shape): {mode: picture}}`, made by one client."""
    found = {}
    for mode in MODES:
        forge.set_mode(mode)
        for stack in STACKS:
            for shape in SHAPES:
                found.setdefault((stack, shape), {})[mode] = forge.picture(stack, shape)
    return found


def verdict(image, wanted):
    """`(as it should be, the modes whose picture it is)`; without any of these how far the nearest is, in grey levels."""
    modes = [mode for mode, truth in wanted.items() if np.array_equal(truth, image)]
    if modes:
        return True, modes
    gap = min(int(np.abs(image.astype(int) - truth.astype(int)).max()) for truth in wanted.values())
    return False, gap


class Client(threading.Thread):
    """Makes images one after the other; a fault ends nothing."""

    def __init__(self, forge, seed, count, wanted):
        super().__init__()
        self.forge, self.random, self.count, self.wanted = forge, random.Random(seed), count, wanted
        self.made, self.set, self.wrong = Counter(), 0, []

    def run(self):
        for n in range(self.count):
            try:
                self.one()
            except Exception as error:
                self.wrong.append(f"image {n}: {type(error).__name__}: {error}")

    def one(self):
        stack, shape = self.random.choice([*STACKS]), self.random.choice([*SHAPES])
        own, settings = None, {}
        chance = self.random.random()
        if chance < 0.2:
            own = self.random.choice(MODES)
            settings = {"override_settings": {"lora_guard_mode": own}}
        elif chance < 0.8:
            self.forge.set_mode(self.random.choice(MODES))
            self.set += 1
        image = self.forge.picture(stack, shape, **settings)
        wanted = self.wanted[stack, shape]
        if own is not None:
            wanted = {own: wanted[own]}
        right, found = verdict(image, wanted)
        self.made[shape] += 1
        if not right:
            self.wrong.append(
                f"{stack}, {shape}, own mode {own}: of no single mode, {found} grey levels from the nearest"
            )


def pictures(options, folder):
    """Rows of the table, and what is wrong."""
    with options.host(folder, "pictures", options.model) as forge:
        forge.load()
        # A start may have some: of a host without a git remote, for one.
        at_start = forge.console().count("Traceback")
        started = time.perf_counter()
        wanted = references(forge)
        one_client = time.perf_counter() - started
        distinct = sum(len({image.tobytes() for image in images.values()}) > 1 for images in wanted.values())
        clients = [Client(forge, options.seed + n, options.images, wanted) for n in range(options.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - started - one_client
        again = references(forge)
        tracebacks = forge.console().count("Traceback") - at_start
    wrong = [line for client in clients for line in client.wrong]
    differs = [
        f"{key}, {mode}: another picture after all that"
        for key, images in wanted.items()
        for mode, image in images.items()
        if not np.array_equal(image, again[key][mode])
    ]
    made = sum((client.made for client in clients), Counter())
    rows = [
        ["clients, images", f"{options.clients} x {options.images}: {', '.join(f'{n} {s}' for s, n in made.items())}"],
        ["changes of the mode by a client, while others wait", sum(client.set for client in clients)],
        ["kinds of picture in which two modes can be told apart", f"{distinct} of {len(wanted)}"],
        ["pictures that are not of one mode, bit for bit", len(wrong)],
        ["reference pictures that differ afterwards", len(differs)],
        ["tracebacks in the console", tracebacks],
    ]
    print(f"references {one_client:.0f} s, clients {seconds:.0f} s", flush=True)
    if not distinct:
        wrong.append("no two modes make another picture, so nothing is tested")
    if tracebacks:
        wrong.append("the console has tracebacks")
    return rows, wrong + differs


# Kills.


def digests():
    files = sorted((FORGE / "models" / "Lora").glob("lg_*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def left_behind(pid):
    """What the killed processes have left, beside the records that are kept, once the last one has started."""
    left = [file.name for file in default_spool_dir().glob("*")]
    left += [file.name for file in DATA.glob("*.ring") if not file.name.startswith(f"flight-{pid}-")]
    return [f"left behind: {left}"] if left else []


def busy(forge, seed, until):
    """Makes images until Forge is gone."""
    chance = random.Random(seed)
    while not until.is_set():
        stack, shape, mode = chance.choice([*STACKS]), chance.choice([*SHAPES]), chance.choice(MODES)
        with contextlib.suppress(OSError, ApiError, ValueError):
            forge.picture(stack, shape, override_settings={"lora_guard_mode": mode})


def kills(options, folder):
    """Rows of the table, and what is wrong."""
    chance, wrong, phases = random.Random(options.seed), [], Counter()
    before, died_in, first, told = digests(), None, None, 0
    for n in range(options.kills + 1):
        with options.host(folder, f"kill_{n}", options.model) as forge:
            said = [line for line in forge.console().splitlines() if "LoRA Guard" in line]
            if died_in is not None:
                tells = tells_of_death(said)
                told += tells
                if tells is not bool(died_in):
                    wrong.append(f"start {n}: died in {died_in or 'nothing'}, and the next start says {said}")
            forge.load()
            image = forge.picture("a and b")
            first = image if first is None else first
            if not np.array_equal(image, first):
                wrong.append(f"start {n}: another first picture")
            if n == options.kills:
                wrong += left_behind(forge.process.pid)
                break
            over = threading.Event()
            clients = [threading.Thread(target=busy, args=(forge, 100 * n + k, over)) for k in range(2)]
            for client in clients:
                client.start()
            time.sleep(chance.uniform(0, options.longest))
            over.set()
            forge.process.kill()
            forge.process.wait()
            for client in clients:
                client.join()
            died_in = open_phases(forge.process.pid)
            phases[died_in[-1] if died_in else "none"] += 1
            print(f"kill {n}: {died_in}", flush=True)
    if digests() != before:
        wrong.append("a LoRA file is not what it was")
    rows = [
        ["SIGKILLs, each with a new start", options.kills],
        ["died in", ", ".join(f"{name} {count}" for name, count in phases.most_common())],
        ["deaths in a phase that the next start named", f"{told} of {options.kills - phases['none']}"],
        ["wrong: first picture, LoRA files, what was left behind, what was said", len(wrong)],
    ]
    return rows, wrong


# Memory.


def slope(values):
    """MB for each change, by least squares; the first changes are not counted."""
    counted = values[SETTLED:]
    return float(np.polyfit(np.arange(len(counted)), counted, 1)[0])


def resident(side, flags, options, folder):
    """The resident memory after each change of the LoRAs, in MB."""
    found, stacks = [], [*STACKS]
    with options.host(folder, f"memory_{side}", options.model, flags) as forge:
        forge.load()
        process = psutil.Process(forge.process.pid)
        for n in range(options.changes):
            forge.picture(stacks[n % len(stacks)])
            found.append(process.memory_info().rss / 2**20)
    return found


def memory(options, folder):
    """Rows of the table, and what is wrong."""
    found = {side: resident(side, flags, options, folder) for side, flags in SIDES.items()}
    slopes = {side: slope(values) for side, values in found.items()}
    rows = [
        [
            f"resident memory over {options.changes} changes, {side}",
            f"{slopes[side]:+.3f} MB a change from the {SETTLED}th on ({values[SETTLED]:.0f} to {values[-1]:.0f} MB)",
        ]
        for side, values in found.items()
    ]
    more = slopes["guard"] - slopes["stock"]
    return rows, [f"the guard grows by {more:.3f} MB a change more than stock"] if more > ALLOWED_MB else []


SIDES = {"stock": ["--lora-guard-off"], "guard": []}
PARTS = {"pictures": pictures, "kills": kills, "memory": memory}


def main(host=Forge):
    """`host`: the `OneModel` that is started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--model", choices=host.families, default=next(iter(host.families)))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--images", type=int, default=200, help="of each client")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--longest", type=float, default=6.0, help="seconds until a kill, at most")
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-docs", action="store_true")
    parser.set_defaults(host=host)
    options = parser.parse_args()
    host.link()
    folder, rows, wrong = tempfile.mkdtemp(prefix="lora_guard_clients_"), [], []
    for name in options.only.split(","):
        started = time.perf_counter()
        more, faults = PARTS[name](options, folder)
        rows, wrong = rows + more, wrong + [f"{name}: {fault}" for fault in faults]
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    table = markdown(["what", "found"], rows)
    print(table)
    print(f"logs in {folder}")
    print("\n".join(wrong) or "all as it should be")
    if options.write_docs and not wrong:
        host.write_docs(f"{options.model}, {STEPS} steps, 64x64.\n\n{table}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
