"""The guard's promises inside Forge. Runs unchanged against the double and against the real Forge."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same, contribution_error, fp32_limit, live_tensors, same_bits

from contract.host import LOW_BIT, REAL, STORAGES
from contract.stacks import (
    CASES,
    FILE,
    dora,
    faults,
    lora_on_everything,
    other_kinds,
    reference,
    run,
    shapes,
    slices_of_qkv,
    with_loras,
)
from lib_lora_guard.patching.engine import Engine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_stack_equals_the_fp32_reference_on_every_storage(guarded, storage, case):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    loras = [(FILE, CASES[case](dense, 1), 0.8), ("b.safetensors", lora_on_everything(dense, 30), -0.4)]
    wanted = reference(patcher, dense, loras)
    limit = fp32_limit(wanted, base)
    assert_same(run(with_loras(guarded, patcher, *loras)), wanted, base, limit)
    for name, wrong in faults(loras):
        error = contribution_error(run(with_loras(guarded, patcher, *wrong)), wanted, base)
        assert error > 2 * limit, f"fault '{name}' would not be seen ({error:.1e}, limit {limit:.1e})"
    host_free = run(guarded.load(patcher))
    assert same_bits(host_free, base)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_weight_comes_back_bit_for_bit(guarded, storage):
    patcher, dense = guarded.build(storage)
    run(patcher)
    before = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    # Forge itself copies GGUF blocks at every .to(), so only the others can show who else did.
    places = {
        k: p.data.data_ptr()
        for k, p in patcher.model.named_parameters()
        if p.data.dim() > 1 and not hasattr(p, "gguf_cls")
    }
    # On wide storage patches as large as the weight are merged, so DoRA stands in for the other kinds there.
    others = other_kinds(dense) if storage in LOW_BIT else dora(dense)
    for strength in (1.0, 0.3, 1.0):
        changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), strength), ("k", others, 0.5))
        now = {k: p.data.data_ptr() for k, p in changed.model.named_parameters() if k in places}
        assert now == places, "a weight was replaced"
        run(changed)
    guarded.load(patcher)
    run(patcher)
    after = dict(patcher.model.named_parameters())
    assert list(after) == list(before)
    assert all(same_bits(after[k].data, before[k]) for k in before)


@pytest.mark.parametrize("storage", ["fp32", *LOW_BIT[:1]])
def test_strength_is_a_scalar_and_removal_of_one_leaves_the_other(guarded, storage):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    a, b = lora_on_everything(dense, 1), lora_on_everything(dense, 60)
    for loras in ([(FILE, a, 1.0)], [(FILE, a, 0.25)], [(FILE, a, 0.25), ("b", b, 0.5)], [("b", b, 0.5)]):
        assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)


def test_a_weight_patched_on_the_fly_is_never_written_to(guarded):
    # fp32 without a cast: the temporary weight of the forward pass is the parameter itself.
    patcher, dense = guarded.build("fp32")
    before = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    changed = with_loras(guarded, patcher, (FILE, dora(dense), 1.0))
    outputs = [run(changed) for _ in range(3)]
    assert same_bits(outputs[0], outputs[2]), "the delta piles up"
    assert all(same_bits(p.data, before[k]) for k, p in changed.model.named_parameters())


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_patches_as_large_as_the_weight_are_merged_where_that_loses_nothing(guarded, storage):
    patcher, dense = guarded.build(storage)
    base, before = run(patcher), {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    calls = []

    def theirs(weight, strength, value):
        calls.append(1)
        return weight + strength * value[0].to(weight)

    guarded.lora.extra_weight_calculators["theirs"] = theirs
    patches = {
        "blocks.0.proj.weight": ("theirs", (rand(32, 32, seed=1),)),
        "blocks.1.proj.weight": (rand(32, 32, seed=2),),
    }
    changed = with_loras(guarded, patcher, (FILE, patches, 0.5))
    modes = guarded.guard.stacks.report(patcher.lora_loader).loras[0].modes
    assert modes == ({"merge": 2} if storage == "bf16" else {"on_the_fly": 2})
    calls.clear()
    result = run(changed)
    assert len(calls) == (0 if storage == "bf16" else 1)
    state = {k: (v[1] if v[0] == "theirs" else v) for k, v in patches.items()}
    assert_same(result, reference(patcher, dense, [(FILE, state, 0.5)]), base)
    del guarded.lora.extra_weight_calculators["theirs"]
    assert same_bits(run(guarded.load(patcher)), base)
    assert all(same_bits(p.data, before[k]) for k, p in patcher.model.named_parameters())


def test_loader_attributes_keep_their_meaning(guarded):
    patcher, dense = guarded.build("bf16")
    loader = patcher.lora_loader
    assert (loader.backup, loader.online_backup, loader.loaded_hash) == ({}, [], str([]))
    changed = with_loras(
        guarded,
        patcher,
        (FILE, lora_on_everything(dense), 1.0),
        ("k", {"blocks.0.proj.weight": host_value("glora", (32, 32), 3)}, 1.0),
    )
    assert loader.loaded_hash == str(list(changed.lora_patches))
    assert set(loader.backup) == {k for k, s in shapes(dense).items() if len(s) == 1}
    assert loader.online_backup == [patcher.model.blocks[0].proj]
    guarded.load(patcher)
    assert (loader.backup, loader.online_backup, loader.loaded_hash) == ({}, [], str([]))


def test_refresh_does_nothing_for_the_same_stack_unless_forced(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 1.0))
    calls = []
    change = Engine.change
    monkeypatch.setattr(Engine, "change", lambda *a, **k: calls.append(1) or change(*a, **k))
    changed.refresh_loras()
    assert calls == []
    identifier = next(iter(changed.lora_patches))
    changed.lora_patches[identifier] = {k: v for k, v in changed.lora_patches[identifier].items() if "qkv" in k}
    changed.lora_loader.refresh(
        lora_patches=changed.lora_patches, offload_device=torch.device("cpu"), force_refresh=True
    )
    assert calls == [1]
    wanted = reference(
        patcher, dense, [(FILE, {k: v for k, v in lora_on_everything(dense).items() if "qkv" in k}, 1.0)]
    )
    assert_same(run(changed), wanted, base)


def test_a_lora_of_the_wrong_shape_between_two_good_ones_is_left_out_by_name(guarded, caplog):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    bad = {
        "blocks.1.proj.weight": host_value("lora", (32, 48), 5),
        "blocks.0.proj.weight": host_value("lora", (32, 32), 5),
    }
    good = [("a.safetensors", lora_on_everything(dense, 1), 0.5), ("c.safetensors", lora_on_everything(dense, 40), 0.5)]
    with caplog.at_level(logging.WARNING, "lib_lora_guard"):
        changed = with_loras(guarded, patcher, good[0], ("C:/x/bad.safetensors", bad, 1.0), good[1])
    assert_same(run(changed), reference(patcher, dense, good), base)
    report = guarded.guard.stacks.report(patcher.lora_loader)
    assert [lora.label for lora in report.refused] == ["bad.safetensors"]
    assert "blocks.1.proj.weight: up @ down gives [32, 48], the weight is [32, 32]" in report.refused[0].refused
    assert "bad.safetensors NOT applied (made for another model" in caplog.text
    assert same_bits(run(guarded.load(patcher)), base)


def test_values_that_are_not_numbers_are_refused_by_name(guarded):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    broken = lora_on_everything(dense)
    broken["blocks.0.qkv.weight"][1][0][3, 1] = float("nan")
    changed = with_loras(guarded, patcher, ("nan.safetensors", broken, 1.0))
    assert same_bits(run(changed), base)
    assert "NaN or Inf" in guarded.guard.stacks.report(patcher.lora_loader).refused[0].refused


def test_the_report_counts_keys_modes_and_bytes(guarded):
    patcher, dense = guarded.build("fp8")
    patches = lora_on_everything(dense)
    with_loras(guarded, patcher, ("x/y/style.safetensors", patches, 0.75))
    report = guarded.guard.stacks.report(patcher.lora_loader)
    (lora,) = report.loras
    tensors = [t for v in patches.values() for t in (v[1] if v[0] == "lora" else v) if isinstance(t, torch.Tensor)]
    assert (lora.label, lora.strength, lora.used, lora.skipped) == ("style.safetensors", 0.75, len(patches), [])
    assert lora.modes == {
        "bypass": sum(len(s) > 1 for s in shapes(dense).values()),
        "merge": sum(len(s) == 1 for s in shapes(dense).values()),
    }
    assert report.ram_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert report.device_bytes == 0, "on the CPU there are no device copies"
    line = report.line()
    assert all(
        part in line
        for part in (
            "style.safetensors strength 0.75",
            f"{len(patches)} keys used, 0 skipped",
            "bypass",
            "MB RAM",
            " ms",
        )
    )


def test_factors_are_our_own_copies(guarded):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    patches = lora_on_everything(dense)
    wanted = reference(patcher, dense, [(FILE, copy.deepcopy(patches), 1.0)])
    changed = with_loras(guarded, patcher, (FILE, patches, 1.0))
    for value in patches.values():
        for tensor in value[1] if value[0] == "lora" else value:
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()  # a trainer overwrites the mapped file
    assert_same(run(changed), wanted, base)


def test_factors_are_copied_once_per_stack_and_go_when_no_stack_uses_them(guarded):
    patcher, dense = guarded.build("fp8")
    patches = lora_on_everything(dense)
    source = patches["blocks.0.proj.weight"][1][0]
    with_loras(guarded, patcher, (FILE, patches, 1.0))
    copies = guarded.guard.stacks.reader.adapters.copies
    first = weakref.ref(copies(source))
    with_loras(guarded, patcher, (FILE, patches, 0.5))
    assert copies(source) is first(), "a change of strength copies nothing"
    guarded.load(patcher)
    gc.collect()
    assert first() is None, "the host keeps the file mapped, we do not keep its factors"


def test_three_hundred_random_changes_leave_values_tensors_and_models_as_they_were(guarded, nothing_of_others):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    bits = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    pool = [lora_on_everything(dense, 1), other_kinds(dense, 20), slices_of_qkv(dense, 40), dora(dense, 60)]
    generator = torch.Generator().manual_seed(3)
    tensors, alive = set(), []
    for n in range(300):
        count = int(torch.randint(0, 4, (1,), generator=generator))
        picks = torch.randperm(4, generator=generator)[:count].tolist()
        strengths = (torch.randint(1, 11, (count,), generator=generator) / 10).tolist()
        loras = [(f"lora{i}", pool[i], s) for i, s in zip(picks, strengths, strict=True)]
        changed = with_loras(guarded, patcher, *loras)
        if n % 50 == 7:
            wanted = reference(patcher, dense, loras)
            assert_same(run(changed), wanted, base) if loras else same_bits(run(changed), base)
        del changed
        if not loras and n >= 50 and n % 4 == 0:
            tensors.add(live_tensors())
        if n % 20 == 0:
            gc.collect()
            kinds = (torch.nn.Module, guarded.base.ModelPatcher)
            alive.append(sum(issubclass(type(o), kinds) for o in gc.get_objects()))
    guarded.load(patcher)
    assert same_bits(run(patcher), base)
    assert all(same_bits(p.data, bits[k]) for k, p in patcher.model.named_parameters())
    # One patcher more or less is the current stack's. Held without a LoRA: the same tensors and bytes each time. (What
    # stays resident is measured in a process of its own: tests/patching/test_engine.py.)
    assert max(alive[2:]) - min(alive[2:]) <= 1
    assert len(tensors) == 1, f"tensors (count, bytes) without a LoRA: {sorted(tensors)}"


def test_key_maps_do_not_remember_earlier_models(guarded):
    first, _ = guarded.build("bf16")
    unet = guarded.lora.model_lora_keys_unet
    if not REAL:
        before = dict(unet(first.model))
        other = torch.nn.Sequential(torch.nn.Linear(2, 2))
        assert set(unet(other)) == {"lora_unet_0"}
        assert unet(first.model) == before
    given = {"kept": "by.caller"}
    guarded.lora.model_lora_keys_clip(first.model, given)
    assert given["kept"] == "by.caller"
    assert "kept" not in guarded.lora.model_lora_keys_clip(first.model)


def test_forge_is_told_that_there_is_no_online_lora_to_move(guarded):
    patcher, dense = guarded.build("fp8")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 1.0), online=True)
    assert not changed.has_online_lora()
    assert_same(
        run(changed), reference(patcher, dense, [(FILE, lora_on_everything(dense), 1.0)]), reference(patcher, dense, [])
    )
