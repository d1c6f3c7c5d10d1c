"""LoRAs on models of which a part lies in RAM: loaded again, shrunk, moved out, and used in between."""

import pytest
import torch
from contract.stacks import dora, lora_on_everything, other_kinds, reference, run
from support.make import rand
from support.measure import assert_same, same_bits

from contract_neo.host import CPU, REAL

FILE = "style.safetensors"
STORAGES = ["fp32", "bf16", "fp8", "kitchen fp8", "Q8_0"] if REAL else ["bf16", "kitchen fp8"]


def rooms(patcher):
    """The whole, less each time, and more again; two of them come twice."""
    size = patcher.model_size()
    return [size * 2, size * 6 // 10, size * 6 // 10, size * 58 // 100, size * 3 // 10, size * 7 // 10, size * 2]


def kinds(dense):
    """Low-rank and of other kinds, with differences on norms and biases, which are merged."""
    return {**other_kinds(dense), **{k: v for k, v in lora_on_everything(dense).items() if "qkv" in k or "norm" in k}}


@pytest.mark.parametrize("mode", ["Automatic", "Merge"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_stack_is_whole_whatever_room_there_is(guarded, storage, mode):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    guarded.guard.settings.options = {"lora_guard_mode": mode}
    stacks = {"a": [(FILE, kinds(dense), 0.7)], "b": [("b", dora(dense), 1.0), (FILE, lora_on_everything(dense), 0.4)]}
    limit = 0.02 if mode == "Merge" or storage in ("kitchen fp8", "bf16") else None
    for name, loras in stacks.items():
        changed = guarded.with_loras(patcher, *loras)
        wanted = reference(patcher, dense, loras)
        for room in rooms(patcher):
            assert_same(run(guarded.place(changed, room)), wanted, base, limit)
        assert name in stacks
    small = patcher.model_size() * 4 // 10
    assert same_bits(run(guarded.place(patcher, small)), base), "the LoRA is still on"
    assert same_bits(run(guarded.place(patcher, patcher.model_size() * 2)), base)


@pytest.mark.parametrize("storage", STORAGES[-2:])
def test_a_partial_unload_in_the_middle_of_an_image_keeps_the_stack(guarded, storage):
    patcher, dense = guarded.build(storage)
    base, loras = run(patcher), [(FILE, kinds(dense), 0.7)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    wanted = reference(patcher, dense, loras)
    for part in (5, 3, 2):
        changed.partially_unload(CPU, patcher.model_size() // part)
        assert_same(run(changed), wanted, base, 0.02)
    # Neo lets the parent stand for a clone that is gone.
    patcher.partially_unload(CPU, patcher.model_size() // 3)
    assert_same(run(changed), wanted, base, 0.02)
    assert_same(run(guarded.load(changed)), wanted, base, 0.02)


def test_for_another_model_the_factors_leave_first_and_less_of_the_model(guarded, monkeypatch):
    """A decode, for which Neo asks for room. For the model's own next steps the factors come back, and do not count."""
    patcher, dense = guarded.build("bf16")
    changed = guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense), 0.7)))
    engine, size, on_card = guarded.stack(changed).engine, patcher.model_size(), {"factors": 0}
    monkeypatch.setattr(engine, "resident_bytes", lambda: on_card["factors"])
    monkeypatch.setattr(engine, "drop_device_copies", lambda: on_card.update(factors=0))
    monkeypatch.setattr(guarded.memory, "get_free_memory", lambda dev=None: size * 2 - on_card["factors"])

    def left_by(shrink, factors=size // 4):
        guarded.place(changed, size * 2)
        on_card["factors"], before = factors, patcher.model.model_loaded_weight_memory
        shrink()
        assert on_card["factors"] == 0
        return before - patcher.model.model_loaded_weight_memory

    freed = []
    without = left_by(lambda: changed.partially_unload(CPU, size // 2 - size // 4), factors=0)
    assert left_by(lambda: freed.append(changed.partially_unload(CPU, size // 2))) == without > 0
    assert freed == [without + size // 4]
    assert left_by(lambda: freed.append(changed.partially_unload(CPU, size // 5))) == 0
    assert freed[1] == size // 4
    assert left_by(lambda: changed.partially_load(CPU, -(size // 2))) >= size // 2


def test_an_original_goes_back_to_the_device_that_its_layer_has_stayed_on(guarded):
    from lib_lora_guard.hosts.neo.access import NeoAccess, back_home

    patcher, dense = guarded.build("bf16")
    guarded.guard.settings.options = {"lora_guard_mode": "Merge"}
    guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense), 0.7)))
    homes = guarded.guard.stacks.before_move(patcher.model)
    access, meta = NeoAccess(guarded.guard.api, patcher.model), torch.device("meta")
    assert {site.key for site, _ in homes} == set(dense)
    stays, leaves = patcher.model.blocks[0].proj, patcher.model.blocks[0].qkv
    leaves.forge_patched_weights = False
    before = leaves.weight.data
    # No second device here: the one that holds no values stands for it.
    back_home(access, [(site, meta) for site, _ in homes if site.layer in (stays, leaves)])
    assert stays.weight.is_meta
    assert same_bits(leaves.weight.data, before)
    back_home(access, [(site, device) for site, device in homes if site.layer is leaves])
    assert same_bits(leaves.weight.data, before)


def test_merges_that_are_lifted_for_a_load_and_put_back_are_not_told_of_again(guarded, lines):
    patcher, dense = guarded.build("bf16")
    changed = guarded.with_loras(patcher, (FILE, kinds(dense), 0.7))
    room = patcher.model_size() // 2
    guarded.place(changed, room)
    assert lines.text.count("strength 0.7") == 1
    first = run(changed)
    guarded.place(changed, room)
    assert lines.text.count("strength 0.7") == 1
    assert same_bits(run(changed), first)
    assert guarded.guard.reports()[0].loras[0].strength == 0.7


def test_what_lies_merged_is_moved_out_as_it_was(guarded):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    before = {k: p.data.clone() for k, p in patcher.model.named_parameters()}
    guarded.guard.settings.options = {"lora_guard_mode": "Merge"}
    changed = guarded.load(guarded.with_loras(patcher, (FILE, kinds(dense), 1.0)))
    assert any(not same_bits(p.data, before[k]) for k, p in patcher.model.named_parameters()), "nothing is merged"
    changed.detach()
    assert all(same_bits(p.data, before[k]) for k, p in patcher.model.named_parameters())
    assert not guarded.guard.stacks.is_current(changed)
    assert_same(run(guarded.load(changed)), reference(patcher, dense, [(FILE, kinds(dense), 1.0)]), base, 0.02)
    assert same_bits(run(guarded.load(patcher)), base)


def test_a_load_that_ends_in_an_error_is_healed_by_the_next(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base, loras = run(patcher), [(FILE, kinds(dense), 0.7)]
    changed = guarded.place(guarded.with_loras(patcher, *loras), patcher.model_size() // 2)
    sync = guarded.base.ModelPatcher._layers if not REAL else guarded.base.ModelPatcher._load_list
    name = sync.__name__

    def fails(self):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(guarded.base.ModelPatcher, name, fails)
    with pytest.raises(RuntimeError, match="the device is gone"):
        guarded.place(changed, patcher.model_size() // 3)
    monkeypatch.setattr(guarded.base.ModelPatcher, name, sync)
    assert_same(run(guarded.load(changed)), reference(patcher, dense, loras), base, 0.02)
    assert same_bits(run(guarded.load(patcher)), base)


def test_other_weights_in_the_same_module_make_norms_anew(guarded):
    patcher, dense = guarded.build("fp32")
    loras = [(FILE, dora(dense), 1.0), ("n", {"blocks.0.norm.weight": (rand(32, seed=4, scale=0.3),)}, 1.0)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    run(changed)
    # The fast way of the refiner: out of memory, other values, in again with the same LoRAs.
    changed.detach()
    other = {k: v + 0.3 * rand(*v.shape, seed=n) for n, (k, v) in enumerate(dense.items())}
    with torch.no_grad():
        guarded.state_dict.load_state_dict(patcher.model, dict(other))
    guarded.guard.install_loaded({"backend.state_dict": guarded.state_dict})
    with torch.no_grad():
        guarded.state_dict.load_state_dict(patcher.model, dict(other))
    again = guarded.load(guarded.with_loras(patcher, *loras))
    assert_same(run(again), reference(patcher, other, loras), reference(patcher, other, []))
