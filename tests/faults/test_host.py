"""An allocation that fails at the k-th operation of everything that a host does with LoRAs, for every k.

After each failure: the picture is that of the new stack, of the old one, or of the model without LoRAs, and never of a part of
one; what is recorded says which; the next refresh gives exactly what it should; and after removal every bit is as it was.
"""

import re

import pytest
from support.measure import contribution_error, fp32_limit, same_bits

from faults.models import DEVICE, STORAGES
from faults.planting import Faults, every, is_planted, is_the_hosts_move
from faults.scene import Scene, listening
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.hosts.forge.access import ForgeAccess
from lib_lora_guard.hosts.forge.fallback import HostRefresh
from lib_lora_guard.hosts.forge.lora_loader_state import RETRY
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup, merge_attachment
from lib_lora_guard.settings import LoraMode


def load_stack(name):
    return lambda scene: scene.load(name)


def unload_and_load(scene):
    scene.host.memory.unload_all_models()
    scene.host.load(scene.clone)


def give_up_and_load(scene):
    """Nobody holds the patcher any more, and the host lets it go without moving the model; then a new one comes."""
    scene.clone = None
    scene.host.memory.free_memory(0, DEVICE)
    scene.load("weaker")


def move_some(scene):
    """The host places the model anew, and half of its layers elsewhere."""
    scene.host.memory.unload_all_models()
    place = moving(scene.clone, scene.patcher.model.entry, scene.patcher.model.norm, scene.patcher.model.proj)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene.clone, "forge_patch_model", place)
        scene.host.load(scene.clone)


def moving(patcher, *layers):
    """`forge_patch_model` of a host that leaves `layers` in RAM (on a GPU) or copies them (without one)."""
    original = patcher.forge_patch_model

    def place_in_part(target_device=None):
        if target_device is None:
            return original(None)
        for layer in patcher.model.modules():
            for parameter in layer.parameters(recurse=False):
                if target_device.type == "cpu":
                    parameter.data = parameter.data.clone() if layer in layers else parameter.data
                elif layer not in layers:
                    layer._apply(lambda value: value.to(target_device), recurse=False)
        return patcher.model

    return place_in_part


OPERATIONS = {
    "apply": ("none", load_stack("two"), "two"),
    "strength": ("two", load_stack("weaker"), "weaker"),
    "other stack": ("two", load_stack("other"), "other"),
    "remove": ("two", load_stack("none"), "none"),
    "unload and load": ("two", unload_and_load, "two"),
    "give up and load": ("two", give_up_and_load, "weaker"),
    "move a part": ("two", move_some, "two"),
}


MERGING = {
    "to merging": ("two", load_stack("merged"), "merged"),
    "from merging": ("merged", load_stack("two"), "two"),
    "strength of what is merged": ("merged", load_stack("merged weaker"), "merged weaker"),
    "remove what is merged": ("merged", load_stack("none"), "none"),
    "unload and load what is merged": ("merged", unload_and_load, "merged"),
}


MERGE_ENDED = "memory ended while LoRAs were merged"
NO_MEMORY = re.compile("no memory left|no room|OutOfMemory|MemoryError")


def after_failure(scene, old, new, faults, lines, raised):
    """What is wrong after an operation in which `faults` were planted; nothing if all is as it should be."""
    recorded = scene.loader.loaded_hash
    in_the_hosts_move = raised is not None and recorded == RETRY and is_the_hosts_move(raised)
    close = False
    # Where the host's own moving failed half way, before it has asked for LoRAs again, no picture can be made.
    if not (in_the_hosts_move and scene.lies_elsewhere()):
        picture, wanted = scene.picture(), scene.pictures[new]
        close = same_bits(picture, wanted)
        if not close and new != "none":
            close = contribution_error(picture, wanted, scene.base) <= fp32_limit(wanted, scene.base)
        if close:
            if raised is None and recorded not in (scene.hashes[new], RETRY):
                yield f"new stack, recorded {recorded}"
        elif not in_the_hosts_move:
            yield from what_another_picture_is(scene, old, new, picture, lines, raised)
    text = "\n".join([*lines, repr(raised)])
    if faults.error == "other":
        if "not out of memory" not in text and not close:
            yield "the error that was planted is not named"
        if NO_MEMORY.search(text):
            yield "an error of another kind was taken for want of memory"
    if raised is not None and not is_planted(raised):
        yield f"another error: {raised!r}"


def what_another_picture_is(scene, old, new, picture, lines, raised):
    """What is wrong where the picture is not that of the new stack."""
    recorded, fell_back = scene.loader.loaded_hash, any(" instead: " in line for line in lines)
    if fell_back and same_bits(picture, scene.hosts_pictures[new]):
        if raised is not None:
            yield "the whole stack the host's way, and an error"
    elif any(MERGE_ENDED in line for line in lines) and same_bits(picture, scene.unmerged_pictures[new]):
        if raised is not None or recorded != RETRY:
            yield f"the whole stack without merging, recorded {recorded}, raised {raised!r}"
    elif same_bits(picture, scene.pictures[old]) or same_bits(picture, scene.base):
        if recorded == scene.hashes[new]:
            yield "old stack or none, recorded as the new one"
        if raised is None and not any(line.startswith(("ERROR", "WARNING")) for line in lines):
            yield "the new stack is missing, and nobody was told"
    elif not (isinstance(raised, RestoreError) and recorded == RETRY):
        # A RestoreError: an undo has failed too, so that the image stops, and the next change has it done first.
        yield f"a part of a stack lies on the model, recorded {recorded}, raised {raised!r}"


PLANS = {
    # Both kinds of out-of-memory in turns: the k-th operation alone, and it and all that come after it.
    "once": (False, lambda k: ("gpu", "ram")[k % 2], 1),
    "for good": (True, lambda k: ("ram", "gpu")[k % 2], 1),
    "another error": (False, lambda k: "other", 4),
}
"""Whether it lasts, which error number k is, and the stride: the last kind goes the ways of the first two."""


def count(scene, operation):
    """Returns how often `operation` needs memory, undisturbed; every plan has the same count."""
    old, act, new = (OPERATIONS | MERGING)[operation]
    with Faults() as counted:
        prepare(scene, old, new)
        counted.count = 0
        act(scene)
    assert not scene.restored()
    return counted.count


def sweep(scene, operation, plan, times):
    """Runs `operation` once for every k up to `times`; returns `(number of runs, what was wrong)`."""
    (old, act, new), (for_good, error_of, step) = (OPERATIONS | MERGING)[operation], PLANS[plan]
    wrong, ks = [], every(times, step)
    for k in ks:
        scene.load(old)
        raised = None
        with listening() as lines, Faults(k, error_of(k), for_good) as faults:
            try:
                act(scene)
            except Exception as error:
                raised = error
        assert faults.planted, f"{operation} needed memory {times} times and then less than {k} times"
        found = list(after_failure(scene, old, new, faults, lines, raised))
        raised = None
        is_the_hosts = scene.guard.stacks.was_left_to_host(scene.loader)
        if not scene.settle(new) and not is_the_hosts:
            found.append("the next refresh gives another picture")
        found += [f"{key} did not come back" for key in scene.restored()]
        wrong += [f"{plan}, k={k} {faults.error}: {what}\n    " + "\n    ".join(lines) for what in found]
    return len(ks), wrong


def prepare(scene, old, new):
    for name in {old, new}:
        scene.settle(name)
        scene.hosts_picture(name)
        scene.unmerged_picture(name)
    scene.settle("none")
    scene.settle(old)


@pytest.mark.parametrize(
    ("storage", "operation"),
    # How a patcher is given up and taken up again has nothing to do with the storage.
    [(s, o) for s in STORAGES for o in OPERATIONS if o != "give up and load" or s in ("bf16", "nf4", "Q8_0")],
)
def test_memory_that_ends_at_any_operation(guarded, storage, operation, record_property):
    # What the guard does with an error does not depend on the storage; what it does with memory may.
    plans = PLANS if storage in ("bf16", "Q8_0") else ("once", "for good")
    sweep_all(Scene(guarded, storage), operation, record_property, plans)


@pytest.mark.parametrize("operation", ["apply", "strength"])
def test_where_the_hosts_way_fails_too_there_is_no_lora_and_that_is_recorded(
    guarded, operation, monkeypatch, record_property
):
    monkeypatch.setattr(HostRefresh, "attempt", lambda *args: False)
    sweep_all(Scene(guarded, "Q8_0"), operation, record_property, PLANS)


def cases(operations):
    for operation in operations:
        for plan in PLANS:
            yield pytest.param(operation, plan)


@pytest.mark.parametrize(("operation", "plan"), list(cases(MERGING)))
def test_memory_that_ends_where_16_bit_weights_are_merged(guarded, operation, plan, monkeypatch, record_property):
    sweep_all(merging_scene(guarded, monkeypatch), operation, record_property, [plan])


FROM_DISK = ("from merging", "remove what is merged", "unload and load what is merged")


@pytest.mark.parametrize(("operation", "plan"), list(cases(FROM_DISK)))
def test_memory_that_ends_where_originals_come_back_from_the_disk(
    guarded, operation, plan, monkeypatch, record_property
):
    # As on a GPU with neither spare VRAM nor spare RAM: taking a merge off takes memory too.
    monkeypatch.setattr(backup, "lies_in_ram", lambda parameter: False)
    monkeypatch.setattr("lib_lora_guard.patching.spool.disk_spare_bytes", lambda folder: 1 << 30)
    monkeypatch.setattr(ForgeAccess, "backup_budget", lambda self: BackupBudget(0, 0, 1 << 30))
    sweep_all(merging_scene(guarded, monkeypatch), operation, record_property, [plan])


def merging_scene(host, monkeypatch):
    # As weights above 1 MB are: merged when they are put in place, one after the other.
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 16)
    scene = Scene(host, "bf16")
    scene.modes = {"merged": LoraMode.MERGE, "merged weaker": LoraMode.MERGE}
    scene.stacks |= {"merged": scene.stacks["two"], "merged weaker": scene.stacks["weaker"]}
    return scene


def sweep_all(scene, operation, record_property, plans):
    runs, wrong, times = {}, [], count(scene, operation)
    for plan in plans:
        runs[plan], found = sweep(scene, operation, plan, times)
        wrong += found
    record_property("runs", runs)
    assert not wrong, "\n".join(wrong)
