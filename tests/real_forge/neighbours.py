"""Other extensions on the same ground, re-created by small test extensions, in a running Forge: the guard against stock
with the same neighbour.

    FORGE_ROOT=... FORGE_PYTHON=... $FORGE_PYTHON tests/real_forge/neighbours.py [--only NAME] [--fresh] [--write-docs]

The neighbours are in neighbours/, written from what their sources do. Every path asks, besides its own pictures, for one
with the neighbour at rest, and ends with the picture without LoRA (sides.py).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("LORA_GUARD_TEST_PORT", "7916")
os.environ.setdefault("PYTHONUNBUFFERED", "1")
from real_forge.run import difference
from real_forge.sides import HERE, Comparison, into

WAYS = []
VARIABLE = "LORA_GUARD_NEIGHBOURS"


def there(*neighbours):
    return ((VARIABLE, ",".join(neighbours)),)


SWITCHED = there("block_weight", "strength_per_step", "frozen", "two_clones", "regional")
"""Neighbours that do nothing in an image that does not ask for them share a server."""
WRAPPED = there("wrap_refresh@before", "force_refresh@after", "module_to", "state_dict@after")
AT_REST = "a cat <lora:@a:0.6>"


way = into(WAYS, env=SWITCHED)


def asking(f, title, *arguments):
    """A maker of pictures that passes `arguments` to the always-on script `title`."""

    def image(prompt, **settings):
        return f.image(prompt, alwayson_scripts={title: {"args": list(arguments)}}, **settings)

    return image


def at_work(f, name, action):
    """Runs `action`; the neighbour must have done something in it."""
    before = f.forge.call("/lora-guard-test/neighbours").get(name, 0)
    action()
    f.check(f.forge.call("/lora-guard-test/neighbours").get(name, 0) > before, f"'{name}' was not at work", True)


BLOCKS = {
    "sd15": {"input_blocks": 0.3, "middle": 2.0, "layers.1.": 0.0},
    "flux": {"double": 0.3, "single": 1.5, "layers.0.": 0.0},
}


@way("lora-block-weight")
def block_weight(f):
    blocks = BLOCKS[f.model.family]

    def weigh(**setting):
        return asking(f, "lg block weight", json.dumps({"blocks": blocks, **setting}))

    f.shot("weights per block", "a cat <lora:@a:1>", make=weigh())
    f.shot("two LoRAs", "a cat <lora:@a:1> <lora:@b:0.6>", make=weigh())
    timed = [
        ("start", weigh(start=2)),
        ("stop", weigh(stop=2)),
        ("start and stop", weigh(start=1, stop=3)),
    ]
    for label, make in timed:
        at_work(
            f, "block weight in mid-sampling", lambda m=make, n=label: f.shot(n, "a cat <lora:@a:1>", make=m, steps=4)
        )
    f.shot("start, 2 pictures", "a cat <lora:@a:1> <lora:@b:0.6>", make=weigh(start=2), steps=4, n_iter=2)
    f.shot("at rest, same LoRA", "a cat <lora:@a:1>")
    f.shot("at rest", AT_REST)


@way("strength per step (loractl), under new keys")
def per_step(f):
    make = asking(f, "lg strength per step", json.dumps({"strengths": [0, 0.3, 1.5, 0.5], "way": "key"}))
    at_work(f, "strength per step", lambda: f.shot("one", "a cat <lora:@a:1>", make=make, steps=5))
    f.shot("two", "a cat <lora:@a:1> <lora:@b:0.5>", make=make, steps=5)
    f.shot("2 pictures", "a cat <lora:@a:1>", make=make, steps=5, n_iter=2)
    f.shot("at rest, same LoRA", "a cat <lora:@a:1>")
    f.shot("at rest", AT_REST)


@way("strength per step, in place and forced")
def per_step_forced(f):
    make = asking(f, "lg strength per step", json.dumps({"strengths": [0, 0.3, 1.5, 0.5], "way": "force"}))
    at_work(f, "strength per step", lambda: f.shot("one", "a cat <lora:@a:1>", make=make, steps=5))
    f.shot("2 pictures", "a cat <lora:@a:1>", make=make, steps=5, n_iter=2)
    f.shot("at rest, same LoRA", "a cat <lora:@a:1>")
    f.shot("at rest", AT_REST)


@way("frozen patcher (LayerDiffuse)")
def frozen(f):
    make = asking(f, "lg frozen patcher", json.dumps({"strength": 0.8}))
    changed = difference(f.image(), f.shot("alone", make=make, effect=False))
    f.check(changed is not None and changed[0] > 8, "the frozen patches are not seen", True)
    at_work(f, "frozen patcher", lambda: f.shot("with a LoRA", "a cat <lora:@a:1>", make=make))
    f.shot("with another LoRA", "a cat <lora:@b:1>", make=make)
    f.shot("at rest, same LoRA", "a cat <lora:@b:1>")
    f.shot("again", "a cat <lora:@b:1>", make=make)
    f.shot("at rest", AT_REST)


@way("two clones in turns (Fooocus inpaint)")
def two_clones(f):
    make = asking(f, "lg two clones", json.dumps({"turns": True}))
    at_work(f, "turn", lambda: f.shot("with a LoRA", "a cat <lora:@a:1>", make=make, steps=4))
    f.shot("without a LoRA", make=make, steps=4, effect=False)
    f.shot("at rest", AT_REST)


@way("a clone for every pass (ControlNet)")
def clones(f):
    make = asking(f, "lg two clones", json.dumps({"clones": 2}))
    at_work(f, "clone", lambda: f.shot("one", "a cat <lora:@a:1>", make=make, n_iter=2))
    f.shot("another", "a cat <lora:@b:1>", make=make)
    f.shot("at rest", AT_REST)


@way("FreeU and PAG (Forge's own)", "SD1.5 fp16")
def freeu(f):
    make = asking(f, "FreeU Integrated (SD 1.x, SD 2.x, SDXL)", True, 1.3, 1.4, 0.9, 0.2, 0.0, 1.0)
    f.shot("FreeU", "a cat <lora:@a:1>", make=make, n_iter=2)
    make = asking(f, "PerturbedAttentionGuidance Integrated", True, 3.0, 0.0, 0.0, 1.0)
    f.shot("PAG", "a cat <lora:@a:1>", make=make)
    f.shot("at rest", AT_REST)


@way("NeverOOM (Forge's own)")
def never_oom(f):
    make = asking(f, "Never OOM Integrated", True, False)
    f.shot("before", "a cat <lora:@a:1>")
    f.shot("on, same LoRA", "a cat <lora:@a:1>", make=make)
    f.shot("on, again", "a cat <lora:@a:1>", make=make)
    f.shot("on, another", "a cat <lora:@b:1>", make=make)
    f.shot("off, same LoRA", "a cat <lora:@b:1>")
    f.shot("at rest", AT_REST)


@way("regional-prompter: load_networks, online_lora")
def regional(f):
    make = asking(f, "lg regional", json.dumps({"on": True}))
    at_work(f, "regional load_networks", lambda: f.shot("active", "a cat <lora:@a:1>", make=make))
    f.shot("not active, same LoRA", "a cat <lora:@a:1>")
    f.shot("active, two", "a cat <lora:@a:1> <lora:@b:0.5>", make=make)
    f.shot("at rest", AT_REST)


@way("regional-prompter: its own refresh in the text encoder")
def regional_text(f):
    make = asking(f, "lg regional", json.dumps({"text": 0.4}))
    at_work(f, "regional refresh", lambda: f.shot("active", "a fox <lora:@a:1>", make=make))
    f.shot("active, text encoder only", "an owl <lora:@text:1>", make=make)
    f.shot("not active, another LoRA", "a toad <lora:@a:0.8>")
    f.shot("active, two", "a hare <lora:@a:1> <lora:@text:0.5>", make=make)
    f.shot("at rest", AT_REST)


@way("regional-prompter: the same with a prompt of before")
def regional_remembered(f):
    make = asking(f, "lg regional", json.dumps({"text": 0.4}))
    f.shot("not active", "a newt <lora:@a:1>")
    f.shot("another prompt", "a wasp <lora:@b:1>")
    at_work(f, "regional refresh", lambda: f.shot("active", "a newt <lora:@a:1>", make=make))
    f.shot("at rest", AT_REST)


@way("regional-prompter: strengths per region", "SD1.5 fp16")
def regional_strengths(f):
    make = asking(f, "lg regional", json.dumps({"regions": [1.0, 0.0]}))
    at_work(f, "regional strengths", lambda: f.shot("LoRA for the prompt only", "a cat <lora:@b:1>", make=make))
    f.shot("not active, same LoRA", "a cat <lora:@b:1>")
    f.shot("at rest", AT_REST)


def wrapped(f, *names):
    for name in names:
        at_work(f, name, lambda n=name: f.shot(n, f"a cat <lora:@a:{0.5 + len(n) / 100}>"))
    f.shot("two", "a cat <lora:@a:1> <lora:@b:0.5>")
    f.shot("without, in between", effect=False)
    f.shot("at rest", AT_REST)


@way("refresh wrapped before and after, and forced", env=WRAPPED)
def wrap_both(f):
    # Who wrapped Forge's function before the guard replaced it is asked only where the guard leaves a stack to Forge.
    wrapped(f, "force_refresh@after")


@way("Module.to replaced", env=WRAPPED)
def module_to(f):
    make = asking(f, "lg module to", "on")
    at_work(f, "Module.to", lambda: f.shot("a space moves its modules", "a cat <lora:@a:1>", make=make))


@way("load_lora_state_dict replaced after", env=WRAPPED)
def state_dict_after(f):
    wrapped(f, "state_dict@after")


@way("load_lora_state_dict replaced before", env=there("state_dict@before"))
def state_dict_before(f):
    wrapped(f, "state_dict@before")


def main():
    folder = HERE / "neighbours"
    links = {"aa_lora_guard_neighbours": folder / "before", "zz_lora_guard_neighbours": folder}
    return Comparison("neighbours", WAYS, links, {}).main(__doc__)


if __name__ == "__main__":
    sys.exit(main())
