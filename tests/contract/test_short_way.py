"""Layers of Forge's with low-rank LoRAs on storage of low bits, once the kernels are there."""

import pytest
import torch
from support.measure import assert_same, contribution_error, fp32_limit, same_bits
from support.short_way import take_short_way

from contract.host import LOW_BIT
from contract.stacks import (
    FILE,
    dora,
    faults,
    lokr_on_everything,
    lora_on_everything,
    other_kinds,
    reference,
    run,
    with_loras,
)
from lib_lora_guard.hosts.forge.access import ForgeAccess
from lib_lora_guard.kernels.factors import Sides
from lib_lora_guard.patching import fused_measured
from lib_lora_guard.patching.bypass import CAST
from lib_lora_guard.patching.fused_choice import CHOICE
from lib_lora_guard.patching.marked_class import class_of
from lib_lora_guard.patching.operators import WEIGHT_PATCH

WITH_KERNELS = [
    storage for storage in LOW_BIT if storage in ("fp8", "scaled_fp8", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K")
]


@pytest.fixture
def passes(monkeypatch):
    return take_short_way(monkeypatch)


def linears(patcher):
    return [layer for layer in patcher.model.modules() if type(layer).__name__ == "Linear"]


@pytest.mark.parametrize("storage", WITH_KERNELS)
def test_loras_give_what_the_fp32_reference_gives(guarded, storage, passes):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    loras = [(FILE, lora_on_everything(dense, 1), 0.8)]
    wanted = reference(patcher, dense, loras)
    limit = fp32_limit(wanted, base)
    changed = with_loras(guarded, patcher, *loras)
    found = run(changed)
    assert len(passes) == len(linears(patcher)) > 0
    assert_same(found, wanted, base, limit)
    for name, wrong in list(faults([*loras, ("b", {}, 0.0)]))[:3]:
        error = contribution_error(run(with_loras(guarded, patcher, *wrong[:1])), wanted, base)
        assert error > 2 * limit, f"fault '{name}' would not be seen ({error:.1e}, limit {limit:.1e})"
    before = len(passes)
    assert same_bits(run(guarded.load(patcher)), base)
    assert len(passes) == before
    assert all(type(layer) is class_of(layer) and "__call__" not in type(layer).__dict__ for layer in linears(patcher))


def hook_of_others(layer):
    handle = layer.register_forward_hook(lambda module, args, output: output)
    return handle.remove


def input_hook_of_others(layer):
    handle = layer.register_forward_pre_hook(lambda module, args: None)
    return handle.remove


def forward_of_others(layer):
    layer.forward = lambda x, original=layer.forward: original(x)
    return lambda: layer.__dict__.pop("forward")


def loras_of_forge(layer):
    layer.forge_online_loras = {}
    return lambda: layer.__dict__.pop("forge_online_loras")


UNUSUAL = [hook_of_others, input_hook_of_others, forward_of_others, loras_of_forge]


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_others_put_on_a_layer_sends_it_the_long_way(guarded, passes, unusual):
    patcher, dense = guarded.build("fp8")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8))
    wanted, all_layers = run(changed), linears(patcher)
    take_back = unusual(all_layers[0])
    passes.clear()
    found = run(changed)
    assert len(passes) == len(all_layers) - 1
    assert_same(found, wanted, run(guarded.load(patcher)), 1e-4)
    take_back()
    passes.clear()
    run(with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8)))
    assert len(passes) == len(all_layers)


def test_an_image_ends_as_it_began(guarded, passes, monkeypatch):
    patcher, dense = guarded.build("fp8")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8))
    there = []
    monkeypatch.setattr(CHOICE.compiler, "ready", lambda *key: bool(there), raising=False)
    run(changed)
    with CHOICE.image():
        first = run(changed)
        there.append(True)
        with CHOICE.image():
            # A detailer's image.
            assert same_bits(run(changed), first)
        assert not passes
    with CHOICE.image():
        # The same again, and then with another strength: no other picture than the kernels' coming would make.
        assert same_bits(run(changed), first)
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.5))
    with CHOICE.image():
        run(changed)
        assert not passes
    changed = with_loras(guarded, patcher, ("another", lora_on_everything(dense, 2), 0.8))
    with CHOICE.image():
        run(changed)
        assert passes
        there.clear()
        count = len(passes)
        run(changed)
        assert len(passes) == 2 * count
    passes.clear()
    with CHOICE.image():
        run(changed)
    there.append(True)
    # Without images a kernel is taken as soon as it is there.
    with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8))
    changed = with_loras(guarded, patcher, ("another", lora_on_everything(dense, 2), 0.8))
    there.clear()
    run(changed)
    assert not passes
    there.append(True)
    run(changed)
    assert passes


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), ValueError("a wrong kernel")])
def test_a_kernel_that_fails_sends_the_layer_the_long_way(guarded, passes, error, monkeypatch, caplog):
    patcher, dense = guarded.build("fp8")
    loras = [(FILE, lora_on_everything(dense, 1), 0.8)]
    wanted = run(with_loras(guarded, patcher, *loras))
    calls = []

    def fail(*args):
        calls.append(args)
        raise error

    from lib_lora_guard.patching import fused

    monkeypatch.setattr(fused, "fused_weight", fail)
    monkeypatch.setattr(CHOICE, "_failed", set())
    base = run(guarded.load(patcher))
    found = run(with_loras(guarded, patcher, *loras))
    assert_same(found, wanted, base, 1e-4)
    is_lasting = isinstance(error, ValueError)
    assert len(calls) == (1 if is_lasting else len(linears(patcher)))


def test_a_dora_by_row_goes_the_short_way_and_another_strength_too(guarded, passes):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    for strength in (0.8, 0.3):
        loras = [("dora", dora(dense), strength)]
        assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
    by_row = [key for key, (_, factors) in dora(dense).items() if factors[4].shape[1] == 1]
    assert [factors.row_scale is None for _, factors in passes] == [False] * 2 * len(by_row)
    passes.clear()
    for strength in (0.8, 0.3, -0.5):
        loras = [(FILE, lora_on_everything(dense, 1), strength)]
        assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
    assert len(passes) == 3 * len(linears(patcher))


def test_with_gradients_the_long_way_goes(guarded, passes):
    patcher, dense = guarded.build("fp8")
    changed = with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8))
    with torch.enable_grad(), torch.inference_mode(False):
        linears(changed)[0](torch.zeros(1, 4, linears(changed)[0].in_features))
    assert not passes


def test_layers_without_a_lora_get_the_hosts_own_numbers_if_that_is_wished(guarded, passes, monkeypatch):
    patcher, dense = guarded.build("fp8")
    key = "blocks.0.qkv.weight"
    one = {key: lora_on_everything(dense, 1)[key]}
    wanted = run(with_loras(guarded, patcher, (FILE, one, 0.8)))
    passes.clear()
    monkeypatch.setattr(CHOICE, "casts_too", lambda: True)
    again = with_loras(guarded, patcher, ("again", one, 0.8))
    assert same_bits(run(again), wanted)
    assert [factors is None for _, factors in passes] == [False], "these weights are so small that the host is faster"
    passes.clear()
    monkeypatch.setattr(fused_measured, "FEWEST_VALUES", 0)
    run(guarded.load(patcher))
    changed = with_loras(guarded, patcher, ("again", one, 0.8))
    assert same_bits(run(changed), wanted)
    count = len(linears(patcher))
    assert sorted(factors is None for _, factors in passes) == [False, *[True] * (count - 1)]
    # With a LoRA on all of them, and with none.
    passes.clear()
    run(with_loras(guarded, patcher, (FILE, lora_on_everything(dense, 1), 0.8)))
    assert [factors is None for _, factors in passes] == [False] * count
    run(with_loras(guarded, patcher, (FILE, one, 0.8)))
    passes.clear()
    run(guarded.load(patcher))
    assert not passes
    assert all(type(layer) is class_of(layer) for layer in linears(patcher))


def test_a_layer_whose_short_way_ends_has_its_own_class_again(guarded, passes, monkeypatch):
    monkeypatch.setattr(CHOICE, "casts_too", lambda: True)
    monkeypatch.setattr(fused_measured, "FEWEST_VALUES", 0)
    patcher, dense = guarded.build("fp8")
    key = "blocks.0.qkv.weight"
    one = {key: lora_on_everything(dense, 1)[key]}
    for ends in ("a LoRA on the weight itself", "no kernel any more"):
        run(with_loras(guarded, patcher, (ends, one, 0.8)))
        assert None in [factors for _, factors in passes]
        with monkeypatch.context() as change:
            if ends == "no kernel any more":
                change.setattr(CHOICE, "may_take", lambda key: key.rank > 0)
                with_loras(guarded, patcher, (FILE, one, 0.9))
            else:
                with_loras(guarded, patcher, (FILE, other_kinds(dense), 0.8))
        run(guarded.load(patcher))
        for layer in linears(patcher):
            assert type(layer) is class_of(layer), ends
            assert CAST not in layer.__dict__, ends
        passes.clear()


@pytest.mark.parametrize("storage", WITH_KERNELS)
def test_a_lokr_goes_the_short_way_on_every_layer_and_with_other_strengths(guarded, storage, passes):
    patcher, dense = guarded.build(storage)
    base = run(patcher)
    for strength in (0.8, -0.3, 0.0):
        loras = [("lokr", lokr_on_everything(dense), strength)]
        wanted = reference(patcher, dense, loras)
        passes.clear()
        changed = with_loras(guarded, patcher, *loras)
        found = run(changed)
        assert len(passes) == len(linears(patcher)) > 0
        assert {type(sides) for _, sides in passes} == {Sides}
        if strength:
            limit = fp32_limit(wanted, base)
            assert_same(found, wanted, base, limit)
            for name, wrong in list(faults([*loras, ("b", {}, 0.0)]))[:2]:
                error = contribution_error(run(with_loras(guarded, patcher, *wrong[:1])), wanted, base)
                assert error > 2 * limit, f"fault '{name}' would not be seen ({error:.1e}, limit {limit:.1e})"
        else:
            assert same_bits(found, base)
    passes.clear()
    assert same_bits(run(guarded.load(patcher)), base)
    assert not passes
    for layer in linears(patcher):
        assert type(layer) is class_of(layer)
        assert not {WEIGHT_PATCH, "forge_online_loras"} & set(layer.__dict__)


def test_a_lokr_on_the_fly_goes_the_long_way_without_a_kernel(guarded, passes, monkeypatch):
    """The layer's own call has the terms all the time, so that it goes wherever the pass does not."""
    patcher, dense = guarded.build("fp8")
    loras = [("lokr", lokr_on_everything(dense), 0.8)]
    base, wanted = run(patcher), reference(patcher, dense, loras)
    changed = with_loras(guarded, patcher, *loras)
    on_the_fly = [layer for layer in linears(patcher) if WEIGHT_PATCH in layer.__dict__]
    assert on_the_fly
    short = run(changed)
    count = len(passes)
    with monkeypatch.context() as change:
        change.setattr(CHOICE.compiler, "ready", lambda *key: False, raising=False)
        change.setattr(CHOICE, "held", {})
        assert_same(run(changed), wanted, base)
    assert len(passes) == count
    for error in (torch.cuda.OutOfMemoryError("CUDA out of memory"), ValueError("a wrong kernel")):
        monkeypatch.setattr(CHOICE, "_failed", set())
        monkeypatch.setattr(CHOICE, "held", {})
        with monkeypatch.context() as change:
            change.setattr("lib_lora_guard.patching.fused.fused_weight", _raise(error))
            assert_same(run(changed), wanted, base)
    monkeypatch.setattr(CHOICE, "_failed", set())
    monkeypatch.setattr(CHOICE, "held", {})
    assert same_bits(run(changed), short)
    # A patch of Forge's own in the place of the terms.
    layer = on_the_fly[0]
    ours = layer.__dict__["forge_online_loras"]
    layer.forge_online_loras = {"weight": []}
    passes.clear()
    run(changed)
    assert len(passes) == len(linears(patcher)) - 1
    layer.__dict__["forge_online_loras"] = ours


def _raise(error):
    def raised(*args):
        raise error

    return raised


def test_a_lokr_with_others_on_its_weight_goes_the_long_way(guarded, passes):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    loras = [("lokr", lokr_on_everything(dense), 0.8), (FILE, lora_on_everything(dense, 1), 0.5)]
    assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
    assert not passes
    # In the place of these, on the same layers.
    loras = loras[:1]
    assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
    assert len(passes) == len(linears(patcher))
    passes.clear()
    loras = [("others", other_kinds(dense), 0.8)]
    assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
    run(guarded.load(patcher))
    assert all(type(layer) is class_of(layer) for layer in linears(patcher))


def test_layers_beside_a_lokr_get_their_own_short_way_and_keep_it_from_the_others(guarded, passes, monkeypatch):
    monkeypatch.setattr(CHOICE, "casts_too", lambda: True)
    monkeypatch.setattr(fused_measured, "FEWEST_VALUES", 0)
    patcher, dense = guarded.build("fp8")
    base, key = run(patcher), "blocks.0.qkv.weight"
    lokr = lokr_on_everything(dense)
    for patches in ({key: lokr[key]}, lokr, {key: lokr[key]}):
        loras = [("lokr", patches, 0.7 + 0.1 * len(patches))]
        passes.clear()
        assert_same(run(with_loras(guarded, patcher, *loras)), reference(patcher, dense, loras), base)
        assert sorted(sides is None for _, sides in passes) == sorted(
            n >= len(patches) for n in range(len(linears(patcher)))
        )


@pytest.mark.parametrize("place", ["show_bypass", "hide_bypass"])
def test_an_interrupt_in_the_middle_of_a_layers_change_leaves_nothing_on_it(guarded, passes, monkeypatch, place):
    patcher, dense = guarded.build("fp8")
    base, loras = run(patcher), [("lokr", lokr_on_everything(dense), 0.8)]
    if place == "hide_bypass":
        with_loras(guarded, patcher, *loras)
    wanted, calls = reference(patcher, dense, loras), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    original = getattr(ForgeAccess, place)
    with monkeypatch.context() as change:
        change.setattr(ForgeAccess, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            guarded.load(patcher) if place == "hide_bypass" else with_loras(guarded, patcher, *loras)
    assert len(calls) >= 2
    assert same_bits(run(guarded.load(patcher)), base)
    for layer in linears(patcher):
        assert type(layer) is class_of(layer)
        assert not {WEIGHT_PATCH, "forge_online_loras"} & set(layer.__dict__)
    passes.clear()
    assert_same(run(with_loras(guarded, patcher, *loras)), wanted, base)
    assert len(passes) == len(linears(patcher))
