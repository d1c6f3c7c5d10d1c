"""What other extensions put on Neo's patchers and layers stays Neo's to apply, beside the guard's LoRAs."""

import pytest
import torch
from contract.stacks import dora, lora_on_everything, other_kinds, reference, run
from support.make import rand
from support.measure import assert_same, same_bits

from contract_neo.host import CPU
from lib_lora_guard.hosts.neo.patchers import loras_of
from lib_lora_guard.hosts.neo.step_strengths import NeoStepStrengths

FILE = "style.safetensors"


def theirs(dense, seed=70):
    """A difference on each linear layer, in Neo's own form."""
    linear = [k for k in dense if k.endswith(("qkv.weight", "proj.weight"))]
    return {key: (rand(*dense[key].shape, seed=seed + n, scale=0.05),) for n, key in enumerate(linear)}


@pytest.mark.parametrize(("storage", "online"), [("fp32", False), ("fp32", True), ("kitchen fp8", True)])
def test_patches_of_others_lie_beside_the_guards_loras(guarded, storage, online):
    patcher, dense = guarded.build(storage)
    base, mine = run(patcher), [(FILE, lora_on_everything(dense), 0.7)]
    limit = 0.02
    both = guarded.with_loras(patcher, *mine)
    both.add_patches(theirs(dense), 0.5, filename="theirs", online_mode=online)
    wanted = reference(patcher, dense, [("theirs", theirs(dense), 0.5), *mine])
    assert_same(run(guarded.load(both)), wanted, base, limit)
    # The guard's change while theirs stay, and the other way round; a part of the model in RAM too.
    other = guarded.load(guarded.with_loras(both, ("b", other_kinds(dense), 0.5)))
    wanted = reference(patcher, dense, [("theirs", theirs(dense), 0.5), *mine, ("b", other_kinds(dense), 0.5)])
    assert_same(run(other), wanted, base, limit)
    assert_same(run(guarded.load(guarded.with_loras(patcher, *mine))), reference(patcher, dense, mine), base)
    assert same_bits(run(guarded.load(patcher)), base)


def test_functions_that_others_keep_on_the_patcher_lie_beside_the_guards_loras(newer, guarded):
    test_patches_of_others_lie_beside_the_guards_loras(guarded, "fp32", True)


@pytest.mark.parametrize("is_merged_too", [False, True])
def test_a_dora_takes_the_norms_of_what_neo_has_merged(guarded, is_merged_too):
    patcher, dense = guarded.build("fp32")
    norms = {k: v for k, v in lora_on_everything(dense).items() if "norm" in k}
    mine = [(FILE, dora(dense) | (norms if is_merged_too else {}), 1.0)]
    alone = guarded.load(guarded.with_loras(patcher, *mine))
    run(alone)
    both = alone.clone()
    both.add_patches(theirs(dense), 1.0, filename="theirs")
    wanted = reference(patcher, dense, [("theirs", theirs(dense), 1.0), *mine])
    assert_same(run(guarded.load(both)), wanted, reference(patcher, dense, []))


def test_a_function_of_another_extension_stays_in_the_list(guarded):
    patcher, dense = guarded.build("bf16")
    base, layer = run(patcher), patcher.model.blocks[0].proj
    mine = [(FILE, {"blocks.0.proj.weight": other_kinds(dense)["blocks.0.proj.weight"]}, 0.5)]
    layer.weight_function = [lambda weight: weight * 1.5]
    with_theirs = run(patcher)
    changed = guarded.load(guarded.with_loras(patcher, *mine))
    assert not same_bits(run(changed), with_theirs)
    guarded.load(patcher)
    assert len(layer.weight_function) == 1
    assert same_bits(run(patcher), with_theirs)
    layer.weight_function = []
    assert same_bits(run(patcher), base)


def test_the_lists_of_other_layers_are_not_touched(guarded):
    patcher, dense = guarded.build("bf16")
    mine = [(FILE, {"blocks.0.proj.weight": other_kinds(dense)["blocks.0.proj.weight"]}, 0.5)]
    changed = guarded.load(guarded.with_loras(patcher, *mine))
    guarded.place(changed, patcher.model_size() // 2)
    layers = [layer for layer in patcher.model.modules() if isinstance(layer, guarded.operations.ForgeWeights)]
    assert [layer for layer in layers if layer.weight_function] == [patcher.model.blocks[0].proj]
    assert guarded.operations.ForgeWeights.weight_function == []


def test_an_object_patch_that_replaces_a_layer_gets_the_lora(guarded):
    patcher, dense = guarded.build("fp32")
    mine = [(FILE, lora_on_everything(dense), 0.7)]
    changed = guarded.load(guarded.with_loras(patcher, *mine))
    run(changed)
    own, values = patcher.model.blocks[0].proj, rand(32, 32, seed=9)
    layer = torch.nn.Linear(32, 32)
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    layer.bias = torch.nn.Parameter(dense["blocks.0.proj.bias"].clone(), requires_grad=False)
    patched = changed.clone()
    patched.add_object_patch("blocks.0.proj", layer)
    dense_then = dense | {"blocks.0.proj.weight": values}
    guarded.load(patched)
    assert patcher.model.blocks[0].proj is layer
    assert_same(run(patched), reference(patcher, dense_then, mine), reference(patcher, dense_then, []))
    guarded.load(changed)
    assert patcher.model.blocks[0].proj is own
    assert_same(run(changed), reference(patcher, dense, mine), reference(patcher, dense, []))


def test_weights_of_blocks_that_another_extension_sets_in_add_patches_count(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base, lora = run(patcher), lora_on_everything(dense)
    monkeypatch.setattr(guarded.base.ModelPatcher, "add_patches", weighing(guarded.base.ModelPatcher.add_patches))
    [made] = loras_of(guarded.with_loras(patcher, (FILE, lora, 0.8), online=True))
    weighed = guarded.load(guarded.guard.patchers.with_lora(patcher, made))
    names = {
        "qkv": {k: v for k, v in lora.items() if "qkv" in k},
        "proj": {k: v for k, v in lora.items() if "proj" in k},
    }
    wanted = [("qkv", names["qkv"], 0.4), ("proj", names["proj"], -0.8)]
    assert_same(run(weighed), reference(patcher, dense, wanted), base, 0.02)
    # The same stack again is the same; a step's strength is weighed too.
    again = guarded.guard.patchers.with_lora(patcher, made)
    assert guarded.guard.stacks.is_current(again)
    strengths = NeoStepStrengths(guarded.guard.stacks)
    assert strengths.loras(weighed) == [(FILE, 0.8), (FILE, 0.8)]
    strengths.set(weighed, {0: 0.4, 1: 0.4})
    halved = [(name, patches, strength / 2) for name, patches, strength in wanted]
    assert_same(run(weighed), reference(patcher, dense, halved), base, 0.02)
    strengths.restore()
    # Nothing of it is Neo's to merge, and its own patches are as they were.
    assert weighed.patches == {}
    assert weighed.patches_uuid == patcher.patches_uuid
    assert same_bits(run(guarded.load(patcher)), base)


def test_weights_of_blocks_count_where_patches_on_the_fly_are_functions(newer, guarded, monkeypatch):
    test_weights_of_blocks_that_another_extension_sets_in_add_patches_count(guarded, monkeypatch)


def test_an_add_patches_of_another_extension_that_fails_costs_its_part_alone(guarded, lines, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base, lora = run(patcher), lora_on_everything(dense)

    def failing(self, patches, *args, **kwargs):
        self.patches["blocks.0.proj.weight"] = [next(iter(patches.values()))]
        raise KeyError("theirs")

    monkeypatch.setattr(guarded.base.ModelPatcher, "add_patches", failing)
    [made] = loras_of(guarded.with_loras(patcher, (FILE, lora, 0.8)))
    changed = guarded.load(guarded.guard.patchers.with_lora(patcher, made))
    assert_same(run(changed), reference(patcher, dense, [(FILE, lora, 0.8)]), base, 0.02)
    assert changed.patches == {}
    assert changed.patches_uuid == patcher.patches_uuid
    [said] = [line for line in lines.messages if "add_patches failed" in line]
    assert FILE in said
    assert "0.8" in said


def weighing(add_patches):
    """Another extension's: half of the strength on one kind of layers, the other sign on another, and nothing else."""

    def weighed(self, patches, strength_patch=1.0, *args, **kwargs):
        used = []
        for word, weight in {"qkv": 0.5, "proj": -1.0}.items():
            part = {key: value for key, value in patches.items() if word in key}
            used += add_patches(self, part, strength_patch * weight, *args, **kwargs)
        return used

    return weighed


def test_a_patcher_of_another_model_class_is_left_alone(guarded):
    class Foreign(guarded.base.ModelPatcher):
        def partially_load(self, device_to, *args, **kwargs):
            return 0

    model = torch.nn.Linear(2, 2)
    foreign = Foreign(model, load_device=CPU, offload_device=CPU, current_device=CPU)
    assert guarded.load(foreign.clone()).patches == {}
    assert guarded.guard.stacks.known(model) is None
