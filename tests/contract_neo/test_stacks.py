"""Stacks of LoRAs on every storage that Neo loads, on models that are placed whole."""

import gc
import weakref

import pytest
import torch
from contract.stacks import CASES, dora, faults, lora_on_everything, other_kinds, reference, run, shapes, tokens
from support.make import host_value, rand
from support.measure import assert_same, contribution_error, fp32_limit, same_bits

from contract_neo.host import KITCHEN, LOW_BIT, REAL, STORAGES, WIDE
from lib_lora_guard.patching.marked_class import class_of

FILE = "C:\\loras\\style.safetensors"
SOME = list(CASES) if REAL else ["lora", "other kinds"]


def stored(parameter):
    """The bits of a parameter: of a quantised one what it holds."""
    return (getattr(parameter, "_qdata", None) if hasattr(parameter, "_qdata") else parameter.data).clone()


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_stack_equals_the_fp32_reference_and_goes_without_a_trace(guarded, storage, case):
    patcher, dense = guarded.build(storage)
    base, before = run(patcher), {k: stored(p) for k, p in patcher.model.named_parameters()}
    loras = [(FILE, CASES[case](dense, 1), 0.8), ("b.safetensors", lora_on_everything(dense, 30), -0.4)]
    wanted = reference(patcher, dense, loras)
    if storage.startswith("int8"):
        # Its own product differs from one of decoded weights; beside it the LoRA's own share is what is compared.
        wanted = wanted - reference(patcher, dense, []) + base
    limit = 0.015 if storage.startswith("int8") else fp32_limit(wanted, base)
    assert_same(run(guarded.load(guarded.with_loras(patcher, *loras))), wanted, base, limit)
    for name, wrong in faults(loras):
        error = contribution_error(run(guarded.load(guarded.with_loras(patcher, *wrong))), wanted, base)
        assert error > 2 * limit, f"fault '{name}' would not be seen ({error:.1e}, limit {limit:.1e})"
    assert same_bits(run(guarded.load(patcher)), base)
    after = dict(patcher.model.named_parameters())
    assert list(after) == list(before)
    assert all(same_bits(stored(after[k]), before[k]) for k in before)


@pytest.mark.parametrize("storage", KITCHEN)
def test_low_rank_loras_leave_the_product_of_quantised_weights_in_use(guarded, storage, monkeypatch):
    patcher, dense = guarded.build(storage)
    layer = patcher.model.blocks[0].proj
    patches = {"blocks.0.proj.weight": host_value("lora", shapes(dense)["blocks.0.proj.weight"], 3)}
    changed = guarded.load(guarded.with_loras(patcher, (FILE, patches, 1.0)))
    assert guarded.report(changed).loras[0].modes == {"bypass": 1}
    assert not layer.weight_function
    if not REAL:
        before = type(layer).products
        run(changed)
        assert type(layer).products > before
    others = {"blocks.0.proj.weight": host_value("glora", shapes(dense)["blocks.0.proj.weight"], 3)}
    changed = guarded.load(guarded.with_loras(patcher, (FILE, others, 1.0)))
    assert guarded.report(changed).loras[0].modes == {"on_the_fly": 1}
    assert len(layer.weight_function) == 1


def test_what_loses_the_product_of_its_format_is_said(guarded, lines):
    patcher, dense = guarded.build("kitchen fp8")
    layer = patcher.model.blocks[0].proj
    layer._full_precision_mm = False
    patches = {"blocks.0.proj.weight": host_value("glora", shapes(dense)["blocks.0.proj.weight"], 3)}
    patches |= {"blocks.0.qkv.weight": host_value("lora", shapes(dense)["blocks.0.qkv.weight"], 4)}
    guarded.load(guarded.with_loras(patcher, (FILE, patches, 1.0)))
    assert "1 of 1 patched fp8 weights run without the fast product" in lines.text
    lines.clear()
    guarded.load(guarded.with_loras(patcher, (FILE, {k: v for k, v in patches.items() if "qkv" in k}, 1.0)))
    assert "fast product" not in lines.text


def test_a_layer_of_neos_fast_fp8_is_a_plain_one_while_it_has_a_lora_on_the_fly(guarded):
    patcher, dense = guarded.build("fp8")
    base, fast = run(patcher), guarded.operations.ForgeOperationsFP8.Linear
    layer = patcher.model.blocks[0].proj
    layer.__class__ = fast
    patches = {"blocks.0.proj.weight": host_value("glora", shapes(dense)["blocks.0.proj.weight"], 3)}
    changed = guarded.load(guarded.with_loras(patcher, (FILE, patches, 1.0)))
    assert class_of(layer) is guarded.operations.ForgeOperations.Linear
    assert_same(run(changed), reference(patcher, dense, [(FILE, patches, 1.0)]), base)
    # Neo empties the list.
    guarded.place(changed, patcher.model_size() // 2)
    layer.weight_function = []
    guarded.load(patcher)
    assert type(layer) is fast
    assert "lora_guard_own_class" not in vars(layer)


@pytest.mark.parametrize("says_its_dtype", [True, False])
def test_biases_of_a_gguf_model_that_become_parameters_in_a_forward_pass(guarded, says_its_dtype, lines):
    patcher, dense = guarded.build("Q8_0")
    if says_its_dtype:
        patcher.model.computation_dtype = torch.bfloat16
    x, name = tokens(patcher).bfloat16(), "blocks.0.proj.bias"

    def outcome(strength):
        patches = {name: (rand(*shapes(dense)[name], seed=1),)}
        guarded.load(guarded.with_loras(patcher, ("a", patches, strength)) if strength else patcher)
        with torch.inference_mode():
            return patcher.model(x).float()

    first, half, one, none = outcome(0.5), outcome(0.25), outcome(0.5), outcome(0)
    # Neo rounds what it converts, the first time with the LoRA in it.
    assert same_bits(first, one) is says_its_dtype
    assert not same_bits(half, none)
    assert same_bits(outcome(0), none)
    assert dict(patcher.model.named_parameters())[name].dtype == torch.bfloat16
    assert ("were converted" in lines.text) is not says_its_dtype
    other, _ = guarded.build("Q8_0")
    with torch.inference_mode():
        assert same_bits(other.model(x).float(), none), "the values are not those of a model that never had a LoRA"


@pytest.mark.parametrize("storage", [*KITCHEN, "Q8_0"])
def test_rows_of_a_stored_weight_are_those_of_the_whole(guarded, storage):
    from lib_lora_guard.hosts.neo.access import NeoAccess

    patcher, dense = guarded.build(storage)
    access = NeoAccess(guarded.guard.api, patcher.model)
    site = access.site("blocks.0.qkv.weight")
    assert not site.storage.wide
    rows = site.shape[0]
    for start, length in ((0, rows), (0, 1), (1, 7), (rows - 3, 3), (rows // 2 - 1, 5)):
        piece = access.rows(site, start, length, torch.device("cpu"))
        assert torch.equal(piece, dense["blocks.0.qkv.weight"][start : start + length]), (start, length)


def test_a_new_stack_moves_nothing_and_keeps_the_id_of_neos_patches(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    loads = []
    load = guarded.base.ModelPatcher.load
    monkeypatch.setattr(guarded.base.ModelPatcher, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    for strength in (1.0, 0.5):
        changed = guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense), strength)))
        assert changed.patches_uuid == patcher.patches_uuid
        assert changed.patches == {}
    assert loads == []


def test_the_same_stack_is_not_worked_out_again(guarded, monkeypatch):
    from lib_lora_guard.patching.engine import Engine

    patcher, dense = guarded.build("bf16")
    changed = guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense), 1.0)))
    calls = []
    change = Engine.change
    monkeypatch.setattr(Engine, "change", lambda *a, **k: calls.append(1) or change(*a, **k))
    guarded.load(changed.clone())
    assert calls == []
    guarded.load(guarded.with_loras(changed, ("b", dora(dense), 0.5)))
    assert calls == [1]


def test_models_and_stacks_die_with_their_patchers(guarded):
    patcher, dense = guarded.build("bf16")
    changed = guarded.load(guarded.with_loras(patcher, (FILE, other_kinds(dense), 1.0)))
    model, stack = weakref.ref(patcher.model), weakref.ref(guarded.stack(patcher))
    guarded.memory.current_loaded_models.clear()
    del patcher, changed
    if not REAL:
        # By counting references alone, as Neo frees them.
        assert (model(), stack()) == (None, None)
    gc.collect()
    assert (model(), stack()) == (None, None)


@pytest.mark.parametrize("storage", [WIDE[1], LOW_BIT[0]])
def test_a_merge_is_asked_for_and_given_only_where_it_loses_nothing(guarded, storage):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    guarded.guard.settings.options = {"lora_guard_mode": "Merge"}
    patches = {k: v for k, v in lora_on_everything(dense).items() if k.endswith(("qkv.weight", "proj.weight"))}
    changed = guarded.load(guarded.with_loras(patcher, (FILE, patches, 1.0)))
    assert guarded.report(changed).loras[0].modes == {"merge" if storage in WIDE else "bypass": len(patches)}
    limit = 0.05 if storage in WIDE else None
    assert_same(run(changed), reference(patcher, dense, [(FILE, patches, 1.0)]), base, limit)
    assert same_bits(run(guarded.load(patcher)), base)
