"""The guard comes and goes inside Forge, beside other extensions, and keeps no model alive."""

import gc
import weakref

import torch
from support.make import host_value, rand
from support.measure import assert_same, contribution_error, same_bits
from support.page_locks import pinned_by

from contract.stacks import (
    FILE,
    lora_on_everything,
    other_kinds,
    reference,
    run,
    with_loras,
)
from lib_lora_guard.adapters import DiffAdapter
from lib_lora_guard.hosts.forge import takeover as forge


def test_a_model_without_the_usual_attributes_can_be_unloaded(guarded):
    class TheirPatcher:
        load_device = offload_device = torch.device("cpu")

        def forge_unpatch_model(self, device=None):
            self.unpatched = True

        def model_patches_to(self, device):
            pass

    patcher = TheirPatcher()
    loaded = guarded.memory.LoadedModel(patcher)
    loaded.model_unload()
    assert patcher.unpatched


def test_models_may_be_given_as_any_iterable(guarded):
    patcher, dense = guarded.build("bf16")
    clone = patcher.clone()
    clone.add_patches(filename=FILE, patches=lora_on_everything(dense), strength_patch=1.0)
    guarded.memory.load_models_gpu(p for p in [clone])
    assert clone.lora_loader.loaded_hash == str(list(clone.lora_patches))


def test_uninstalling_hands_nothing_refused_to_forge_and_leaves_no_model_behind(guarded):
    first, dense = guarded.build("bf16")
    second, _ = guarded.build("bf16", seed=1)
    bad = ("bad.safetensors", {"blocks.0.proj.weight": host_value("lora", (32, 48), 5)}, 1.0)
    good = (FILE, {k: v for k, v in lora_on_everything(dense).items() if "proj.weight" in k}, 0.5)
    changed = [with_loras(guarded, patcher, bad, good) for patcher in (first, second)]
    forge.uninstall()
    for patcher in changed:
        assert set(patcher.lora_loader.backup) == set(good[1])
        assert not any(layer._forward_hooks for layer in patcher.model.modules())


def test_uninstalling_gives_forge_its_functions_and_applies_the_lora_again(guarded):
    names = [
        (guarded.lora.LoraLoader, "refresh"),
        (guarded.operations, "merge_lora_to_weight"),
        (guarded.memory, "load_models_gpu"),
    ]
    names += [
        (guarded.base.ModelPatcher, "has_online_lora"),
        (guarded.memory.LoadedModel, "model_unload"),
        (guarded.lora, "model_lora_keys_unet"),
    ]
    assert all(hasattr(getattr(owner, name), "lora_guard_hook") for owner, name in names)
    originals = [getattr(owner, name).lora_guard_hook.original for owner, name in names]
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    patches = {k: v for k, v in lora_on_everything(dense).items() if k.endswith("weight")}
    changed = with_loras(guarded, patcher, (FILE, patches, 0.8))
    with_guard = run(changed)
    forge.uninstall()
    assert [getattr(owner, name) for owner, name in names] == originals
    assert set(patcher.lora_loader.backup) == set(patches), "Forge's own merge"
    # bf16 rounds the merged weight: stock is near, not equal.
    assert contribution_error(run(changed), with_guard, base) < 0.2
    assert same_bits(run(guarded.load(patcher)), base)


def test_uninstalling_gives_pinned_ram_back(guarded):
    patcher, _ = guarded.build("bf16")
    driver = pinned_by(guarded.guard.copies, patcher.model)
    forge.uninstall()
    assert driver.locked == {}


def test_installing_over_a_merge_of_forges_undoes_it_at_the_next_change(host):
    patcher, dense = host.build("bf16")
    run(patcher)
    before = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    patches = {k: v for k, v in lora_on_everything(dense).items() if "proj" in k}
    changed = with_loras(host, patcher, (FILE, patches, 1.0))
    assert changed.lora_loader.backup
    try:
        forge.install()
        assert forge.install() is forge.installed(), "a second call changes nothing"
        again = with_loras(host, patcher, (FILE, patches, 0.5))
        assert_same(run(again), reference(patcher, dense, [(FILE, patches, 0.5)]), reference(patcher, dense, []))
        host.load(patcher)
        assert all(same_bits(p.data, before[k]) for k, p in patcher.model.named_parameters())
    finally:
        host.memory.current_loaded_models.clear()
        forge.uninstall()


def test_a_function_that_someone_wrapped_after_us_passes_through(guarded):
    loader_class = guarded.lora.LoraLoader
    ours = loader_class.refresh
    loader_class.refresh = lambda self, *a, **k: ours(self, *a, **k)
    theirs = loader_class.refresh
    try:
        forge.uninstall()
        assert loader_class.refresh is theirs
        patcher, _dense = guarded.build("fp32")
        changed = with_loras(guarded, patcher, (FILE, {"blocks.0.proj.weight": host_value("lora", (32, 32), 1)}, 1.0))
        assert set(changed.lora_loader.backup) == {"blocks.0.proj.weight"}, "Forge's own merge behind two wrappers"
        guarded.load(patcher)
    finally:
        loader_class.refresh = ours.lora_guard_hook.original


def test_the_guard_keeps_no_model_alive(guarded):
    alive = []
    for seed in range(5):
        patcher, dense = guarded.build("bf16", seed)
        changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 1.0), ("k", other_kinds(dense), 1.0))
        run(changed)
        alive.append(weakref.ref(changed.model))
        guarded.memory.current_loaded_models.clear()
        del patcher, changed, dense
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_a_diff_on_a_bias_is_merged_and_one_on_an_fp8_bias_keeps_its_effect(guarded):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    patches = {
        "blocks.0.proj.bias": (rand(32, seed=3, scale=0.001),),
        "blocks.0.norm.weight": (rand(32, seed=4, scale=0.001),),
    }
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0))
    assert_same(run(changed), reference(patcher, dense, [(FILE, patches, 1.0)]), base)
    assert changed.model.blocks[0].proj.bias.dtype == torch.float32, "fp8 would round the difference away"
    assert isinstance(
        next(iter(guarded.guard.stacks.state(patcher.lora_loader).engine.attached.values())).terms[0].adapter,
        DiffAdapter,
    )
