"""The takeover of Neo: what it needs, what it replaces, and that all of it is given back."""

import pytest
from contract.stacks import lora_on_everything, other_kinds, reference, run
from support.measure import assert_same, same_bits
from support.page_locks import pinned_by

from lib_lora_guard.errors import HostError
from lib_lora_guard.hosts.neo import api
from lib_lora_guard.hosts.neo import takeover as neo
from lib_lora_guard.hosts.neo.hook_table import LATER, START
from lib_lora_guard.runtime import installed

FILE = "style.safetensors"


def functions(host):
    modules = {one.__name__: one for one in (host.base, host.memory, host.state_dict)}
    found = {}
    for row in (row for row in (*START, *LATER) if row.module in modules):
        owner, *path = modules[row.module], *row.path.split(".")
        for name in path[:-1]:
            owner = getattr(owner, name)
        found[row.path] = vars(owner)[path[-1]]
    return found


def test_every_function_is_neos_own_object_again(host):
    before = functions(host)
    takeover = neo.install()
    takeover.install_loaded({"backend.state_dict": host.state_dict})
    assert neo.install() is takeover, "a second call changes nothing"
    assert all(before[path] is not function for path, function in functions(host).items())
    with pytest.raises(HostError, match="another copy"):
        api.probe()
    installed.uninstall()
    assert functions(host) == before


def test_switched_off_neo_has_its_loras_and_switched_on_again_the_guard_has_them(guarded):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    loras = [(FILE, other_kinds(dense), 0.5), ("b", lora_on_everything(dense), 0.25)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    wanted = reference(patcher, dense, loras)
    before = {k: p.data for k, p in patcher.model.named_parameters()}
    installed.uninstall()
    layers = list(patcher.model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    assert not any(getattr(layer, "weight_function", None) for layer in layers)
    assert same_bits(run(patcher), base), "something of the guard is left"
    assert_same(run(guarded.load(changed)), wanted, base, 0.05)
    assert same_bits(run(guarded.load(patcher)), base)
    guarded.guard = neo.install()
    again = guarded.load(guarded.with_loras(patcher, *loras))
    assert guarded.report(again) is not None
    assert_same(run(again), wanted, base, 0.02)
    assert same_bits(run(guarded.load(patcher)), base)
    assert all(same_bits(p.data, before[k]) for k, p in patcher.model.named_parameters() if k.endswith("qkv.weight"))


def test_switched_off_no_ram_stays_pinned(guarded):
    patcher, _ = guarded.build("bf16")
    driver = pinned_by(guarded.guard.copies, patcher.model)
    installed.uninstall()
    assert driver.locked == {}


def test_neo_is_told_from_forge_by_what_it_has(host, monkeypatch):
    assert api.is_neo_like()
    monkeypatch.setattr(host.lora, "LoraLoader", object, raising=False)
    assert not api.is_neo_like()
    monkeypatch.undo()
    monkeypatch.delattr(host.base.ModelPatcher, "partially_load")
    assert not api.is_neo_like()
