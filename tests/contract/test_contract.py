"""The guard's promises inside Forge. Runs unchanged against the double and against the real Forge."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from support.make import Net, host_value, rand
from support.measure import assert_same, contribution_error, fp32_limit, live_tensors, same_bits
from support.reference import merge_reference

from contract.host import LOW_BIT, REAL, STORAGES
from lib_lora_guard.adapters import DiffAdapter
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.forge.fallback import HostRefresh
from lib_lora_guard.hosts.forge.lora_loader_state import LoaderState
from lib_lora_guard.patching.engine import Engine

FILE = "C:\\loras\\style.safetensors"


def tokens(patcher):
    width = patcher.model.blocks[0].norm.normalized_shape[0]
    return torch.randn(2, 16, width, generator=torch.Generator().manual_seed(5))


def with_loras(host, patcher, *loras, online=False):
    """A clone of `patcher` with `loras`, `(filename, patches, strength)`, loaded the way Forge loads it."""
    clone = patcher.clone()
    for filename, patches, strength in loras:
        clone.add_patches(filename=filename, patches=patches, strength_patch=strength, online_mode=online)
    return host.load(clone)


def run(patcher):
    with torch.inference_mode():
        return patcher.model(tokens(patcher)).clone()


def reference(patcher, dense, loras):
    """The fp32 model with the merge written out in float64; what is merged is rounded once to its storage: small
    parameters, and on wide storage the weights with patches as large as themselves."""
    model = Net(patcher.model.blocks[0].norm.normalized_shape[0], depth=len(patcher.model.blocks))
    state, merged = dict(dense), {key for key, value in dense.items() if value.dim() == 1}
    for _, patches, strength in loras:
        for address, value in patches.items():
            key, offset, function = (address, None, None) if isinstance(address, str) else (*address, None)[:3]
            if isinstance(value, list) or len(value) == 1:
                merged.add(key)
            state[key] = merge_reference([[strength, value, 1.0, offset, function]], state[key].double())
    for key, dtype in patcher.model.rounded_to.items():
        if key in state and state[key].dtype == torch.float64:
            state[key] = state[key].to(dtype).float() if key in merged else state[key].float()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(tokens(patcher)).clone()


def shapes(dense):
    return {name: tuple(value.shape) for name, value in dense.items()}


def lora_on_everything(dense, seed=1):
    patches = {k: host_value("lora", s, seed + n) for n, (k, s) in enumerate(shapes(dense).items()) if len(s) > 1}
    patches |= {k: (rand(*s, seed=seed + 50, scale=0.05),) for k, s in shapes(dense).items() if len(s) == 1}
    return patches


def slices_of_qkv(dense, seed=1):
    patches = {}
    for key, shape in shapes(dense).items():
        if key.endswith("qkv.weight"):
            third = shape[0] // 3
            for n in range(3):
                patches[key, (0, n * third, third)] = host_value("lora", (third, shape[1]), seed + n)
            patches[key, (1, 8, 16)] = host_value("lora", (shape[0], 16), seed + 9)
    return patches


def other_kinds(dense, seed=1):
    kinds = ["loha", "lokr", "glora", "diff", "nested"]
    linear = [k for k, s in shapes(dense).items() if len(s) == 2]
    patches = {key: host_value(kinds[n % len(kinds)], shapes(dense)[key], seed + n) for n, key in enumerate(linear)}
    conv = [k for k, s in shapes(dense).items() if len(s) == 4]
    return patches | {key: host_value("loha_mid", shapes(dense)[key], seed + n) for n, key in enumerate(conv)}


def dora(dense, seed=1):
    return {
        k: host_value("lora", s, seed + n, dora=("output", "input")[n % 2])
        for n, (k, s) in enumerate(shapes(dense).items())
        if len(s) == 2
    }


CASES = {"lora": lora_on_everything, "slices": slices_of_qkv, "other kinds": other_kinds, "dora": dora}


def faults(loras):
    (name, patches, strength), *rest = loras
    # Forge knows a LoRA by file name and strength, so a changed content needs another name.
    yield "layer skipped", [("skipped", dict(list(patches.items())[1:]), strength), *rest]
    yield "strength 5 % off", [(name, patches, strength * 1.05), *rest]
    ignored = {
        k: (v[0], (*v[1][:2], None, *v[1][3:])) if v[0] in ("lora", "loha") and not isinstance(v, list) else v
        for k, v in patches.items()
    }
    if any(ignored[k] is not v for k, v in patches.items()):
        yield "alpha ignored", [("ignored", ignored, strength), *rest]
    yield "one of two LoRAs dropped", rest


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
        logging.getLogger("lib_lora_guard").propagate = True
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


@pytest.mark.parametrize("storage", ["fp32", "fp8", "Q8_0"])
def test_a_failure_inside_the_guard_falls_back_to_forges_online_path(guarded, monkeypatch, storage):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    loras = [
        (FILE, {k: v for k, v in lora_on_everything(dense).items() if k.endswith("weight") and "norm" not in k}, 0.8)
    ]
    bad = ("bad.safetensors", {"blocks.0.proj.weight": host_value("lora", (32, 48), 5)}, 1.0)
    commit = Engine.commit
    monkeypatch.setattr(Engine, "commit", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    changed = with_loras(guarded, patcher, *loras, bad)
    assert changed.has_online_lora(), "now Forge has to reserve and move the factors"
    assert_same(run(changed), reference(patcher, dense, loras), base)
    assert not any("bad" in str(k) for k in [getattr(m, "forge_online_loras", {}) for m in changed.model.modules()])
    monkeypatch.setattr(Engine, "commit", commit)
    again = with_loras(guarded, patcher, (FILE, loras[0][1], 0.3))
    assert not again.has_online_lora()
    assert_same(run(again), reference(patcher, dense, [(FILE, loras[0][1], 0.3)]), base)
    assert same_bits(run(guarded.load(patcher)), base)


def test_when_everything_fails_the_image_has_no_lora_and_the_next_refresh_tries_again(guarded, monkeypatch, caplog):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    loras = [(FILE, {k: v for k, v in lora_on_everything(dense).items() if "proj.weight" in k}, 0.8)]
    commit = Engine.commit

    def planted(*args, **kwargs):
        raise RuntimeError("planted")

    def stubborn(self, name, value):
        if name == "forge_online_loras":
            raise MemoryError("planted")
        torch.nn.Module.__setattr__(self, name, value)

    layer = patcher.model.blocks[0].proj
    layer.__class__ = type("Stubborn", (type(layer),), {"__setattr__": stubborn})
    monkeypatch.setattr(Engine, "commit", planted)
    logging.getLogger("lib_lora_guard").propagate = True
    changed = with_loras(guarded, patcher, *loras)
    assert same_bits(run(changed), base)
    assert "WITHOUT the LoRAs style.safetensors" in caplog.text
    monkeypatch.setattr(Engine, "commit", commit)
    layer.__class__ = type(layer).__mro__[1]
    changed.refresh_loras()
    assert_same(run(changed), reference(patcher, dense, loras), base)


def test_a_failed_removal_ends_without_loras_and_misses_none(guarded, monkeypatch, caplog):
    logging.getLogger("lib_lora_guard").propagate = True
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    with_loras(guarded, patcher, (FILE, lora_on_everything(dense), 0.8))
    monkeypatch.setattr(Engine, "commit", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    guarded.load(patcher)
    assert same_bits(run(patcher), base)
    assert "planted" in caplog.text
    assert "WITHOUT" not in caplog.text


def test_a_failed_change_is_tried_again_for_a_patcher_that_stays_loaded(guarded, monkeypatch, caplog):
    # Forge calls refresh only when a patcher is loaded: without this the LoRA would be missing from every later image.
    patcher, dense = guarded.build("fp8")
    base, loras = run(patcher), [(FILE, {"blocks.0.norm.weight": (rand(32, seed=3),)}, 0.8)]
    monkeypatch.setattr(Engine, "commit", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    monkeypatch.setattr(HostRefresh, "attempt", lambda *a: False)
    changed = with_loras(guarded, patcher, *loras)
    assert same_bits(run(changed), base)
    monkeypatch.undo()
    guarded.load(changed)
    assert_same(run(changed), reference(patcher, dense, loras), base)


def test_a_refused_lora_is_named_again_for_every_image(guarded, caplog):
    patcher, _ = guarded.build("fp8")
    logging.getLogger("lib_lora_guard").propagate = True
    changed = with_loras(
        guarded, patcher, ("bad.safetensors", {"blocks.0.proj.weight": host_value("lora", (32, 48), 5)}, 1.0)
    )
    caplog.clear()
    guarded.load(changed)
    assert "still without bad.safetensors NOT applied (made for another model" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_between_change_and_record_is_healed_by_the_next_load(guarded, monkeypatch, error):
    patcher, dense = guarded.build("fp8")
    base, patches = run(patcher), lora_on_everything(dense)
    first = with_loras(guarded, patcher, (FILE, patches, 0.3))
    publish = LoaderState.publish

    def stop(*args):
        raise error

    monkeypatch.setattr(LoaderState, "publish", stop)
    with pytest.raises(error):
        with_loras(guarded, patcher, (FILE, patches, 0.8))
    monkeypatch.setattr(LoaderState, "publish", publish)
    guarded.memory.current_loaded_models.clear()
    guarded.load(first)
    assert_same(run(first), reference(patcher, dense, [(FILE, patches, 0.3)]), base)


def test_a_copy_of_forges_refresh_run_by_another_extension_is_undone(guarded):
    patcher, dense = guarded.build("bf16")
    base, bits = run(patcher), {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    patches = lora_on_everything(dense)
    changed = with_loras(guarded, patcher, (FILE, patches, 0.5))
    copied = guarded.lora.LoraLoader.refresh.lora_guard_hook.original
    copied(changed.lora_loader, changed.lora_patches, torch.device("cpu"), True)
    again = with_loras(guarded, patcher, (FILE, patches, 0.25))
    assert_same(run(again), reference(patcher, dense, [(FILE, patches, 0.25)]), base)
    guarded.load(patcher)
    assert same_bits(run(patcher), base)
    assert all(same_bits(p.data, bits[k]) for k, p in patcher.model.named_parameters())


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (("lora", (rand(32, 4, seed=1), rand(4, 32, seed=2), 2.0, None, torch.tensor(1.0))), "blocks.0.proj.weight"),
        (("lora", (rand(32, 4, seed=1), rand(4, 32, seed=2), "two", None, None)), "cannot be read (ValueError"),
        (
            ("lora", (rand(32, 4, seed=1), rand(4, 32, seed=2), float("nan"), None, None)),
            "its alpha is nan, not a usable number",
        ),
        (("lora", ("up", rand(4, 32, seed=2), 2.0, None, None)), "blocks.0.proj.weight"),
        ("nonsense", "a patch value of type str is not known"),
    ],
    ids=["0-d dora_scale", "alpha is text", "alpha is NaN", "a factor is text", "no patch at all"],
)
def test_a_lora_that_cannot_be_read_is_left_out_and_the_good_one_is_applied(guarded, value, why):
    patcher, dense = guarded.build("fp8")
    base, good = run(patcher), (FILE, lora_on_everything(dense), 0.5)
    changed = with_loras(guarded, patcher, ("bad.safetensors", {"blocks.0.proj.weight": value}, 1.0), good)
    assert_same(run(changed), reference(patcher, dense, [good]), base)
    (refused,) = guarded.guard.stacks.report(patcher.lora_loader).refused
    assert refused.label == "bad.safetensors"
    assert why in refused.refused


def test_a_merge_that_overflows_leaves_its_lora_out_and_keeps_the_others(guarded):
    patcher, dense = guarded.build("fp16")
    base, good = run(patcher), (FILE, {k: v for k, v in lora_on_everything(dense).items() if "conv" in k}, 0.5)
    bad = (
        "bad.safetensors",
        {"blocks.0.norm.weight": (torch.full((32,), 7e4),), "blocks.0.proj.weight": host_value("lora", (32, 32), 5)},
        1.0,
    )
    changed = with_loras(guarded, patcher, bad, good)
    assert_same(run(changed), reference(patcher, dense, [good]), base)
    assert (
        "blocks.0.norm.weight: the patched values do not fit into fp16"
        in guarded.guard.stacks.report(patcher.lora_loader).refused[0].refused
    )


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
