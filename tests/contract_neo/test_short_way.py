"""Layers of Neo's with low-rank LoRAs on storage of low bits, once the kernels are there."""

import pytest
import torch
from contract.stacks import FILE, lokr_on_everything, lora_on_everything, reference, run
from support.measure import assert_same, fp32_limit, same_bits
from support.short_way import take_short_way

from contract_neo.host import STORAGES
from lib_lora_guard.kernels.factors import Sides
from lib_lora_guard.patching import fused_measured
from lib_lora_guard.patching.fused_choice import CHOICE
from lib_lora_guard.patching.marked_class import class_of
from lib_lora_guard.patching.operators import WEIGHT_PATCH, is_compilable

WITH_KERNELS = [
    storage for storage in STORAGES if storage in ("fp8", "kitchen fp8", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K")
]
LORAS = [(FILE, lora_on_everything, 0.8)]


@pytest.fixture
def passes(monkeypatch):
    return take_short_way(monkeypatch)


def quantised(patcher):
    """The layers whose weights have few bits."""
    found = [m for m in patcher.model.modules() if any(kind.__name__ == "Linear" for kind in type(m).__mro__)]
    for layer in found:
        # A card without fp8 products.
        layer.__dict__["_full_precision_mm"] = True
    return found


@pytest.mark.parametrize("storage", WITH_KERNELS)
def test_loras_give_what_the_fp32_reference_gives(guarded, storage, passes):
    patcher, dense = guarded.build(storage)
    layers = quantised(patcher)
    base = run(patcher)
    loras = [(FILE, lora_on_everything(dense, 1), 0.8)]
    wanted = reference(patcher, dense, loras)
    limit = fp32_limit(wanted, base)
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    assert_same(run(changed), wanted, base, limit)
    assert len(passes) == len(layers) > 0
    assert f"bypass, {len(layers)} of them fused (low rank)" in str(guarded.report(changed).loras[0])
    stronger = [(FILE, loras[0][1], 0.84)]
    assert_same(
        run(guarded.load(guarded.with_loras(patcher, *stronger))), reference(patcher, dense, stronger), base, limit
    )
    count = len(passes)
    assert same_bits(run(guarded.load(patcher)), base)
    assert len(passes) == count
    assert all("__call__" not in type(layer).__dict__ and type(layer) is class_of(layer) for layer in layers)


@pytest.mark.parametrize("switch", ["", "0"])
def test_the_product_of_a_quantised_format_stays_unless_it_is_switched_off(guarded, passes, monkeypatch, switch):
    monkeypatch.setenv("LORA_GUARD_QUANTIZED_PRODUCT", switch)
    patcher, dense = guarded.build("kitchen fp8")
    layers = quantised(patcher)
    for layer in layers:
        layer.__dict__["_full_precision_mm"] = False
    run(guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense, 1), 0.8))))
    assert len(passes) == (len(layers) if switch == "0" else 0)
    # Kernels for layers without LoRAs too: those layers keep their product.
    monkeypatch.setattr(CHOICE, "casts_too", lambda: True)
    monkeypatch.setattr(fused_measured, "FEWEST_VALUES", 0)
    passes.clear()
    key = "blocks.0.qkv.weight"
    one = {key: lora_on_everything(dense, 1)[key]}
    run(guarded.load(guarded.with_loras(patcher, ("one", one, 0.8))))
    assert [factors is None for _, factors in passes] == [False] * (switch == "0")


def test_a_function_of_others_on_the_weight_sends_the_layer_the_long_way(guarded, passes):
    patcher, dense = guarded.build("fp8")
    changed = guarded.load(guarded.with_loras(patcher, (FILE, lora_on_everything(dense, 1), 0.8)))
    layers = quantised(changed)
    run(changed)
    assert len(passes) == len(layers)
    layers[0].weight_function = [lambda weight: weight * 1.0]
    passes.clear()
    run(changed)
    assert len(passes) == len(layers) - 1
    layers[0].weight_function = []


@pytest.mark.skipif(not is_compilable(), reason="Neo's torch is newer: this one fails on layers with LoRAs")
def test_compiled_code_goes_the_long_way(guarded, passes):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    loras = [(FILE, lora_on_everything(dense, 1), 0.8)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    layer = quantised(changed)[0]
    x = torch.randn(1, 4, layer.in_features)
    with torch.inference_mode():
        wanted = layer(x)
        passes.clear()
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        found = compiled(x)
    assert not passes
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert base.shape


@pytest.mark.parametrize("storage", WITH_KERNELS)
def test_a_lokr_goes_the_short_way_on_every_layer(guarded, storage, passes):
    patcher, dense = guarded.build(storage)
    layers = quantised(patcher)
    base = run(patcher)
    for strength in (0.8, -0.3):
        loras = [("lokr", lokr_on_everything(dense), strength)]
        wanted = reference(patcher, dense, loras)
        passes.clear()
        changed = guarded.load(guarded.with_loras(patcher, *loras))
        assert_same(run(changed), wanted, base, fp32_limit(wanted, base))
        assert len(passes) == len(layers) > 0
        assert {type(sides) for _, sides in passes} == {Sides}
        assert f"{len(layers)} on_the_fly, fused (cheaper on the weight)" in str(guarded.report(changed).loras[0])
    # Functions of others beside the terms, and in their place.
    layer = next(layer for layer in layers if WEIGHT_PATCH in layer.__dict__)
    ours = layer.weight_function
    for functions in ([*ours, lambda weight: weight * 1.0], [lambda weight: weight * 1.0]):
        layer.weight_function = functions
        passes.clear()
        run(changed)
        assert len(passes) == len(layers) - 1
    layer.weight_function = ours
    passes.clear()
    assert same_bits(run(guarded.load(patcher)), base)
    assert not passes
    for layer in layers:
        assert type(layer) is class_of(layer)
        assert not layer.weight_function
        assert WEIGHT_PATCH not in layer.__dict__


@pytest.mark.skipif(not is_compilable(), reason="Neo's torch is newer: this one fails on layers with LoRAs")
def test_compiled_code_of_a_lokr_goes_the_long_way(guarded, passes):
    patcher, dense = guarded.build("fp8")
    changed = guarded.load(guarded.with_loras(patcher, ("lokr", lokr_on_everything(dense), 0.8)))
    layer = next(layer for layer in quantised(changed) if WEIGHT_PATCH in layer.__dict__)
    x = torch.randn(1, 4, layer.in_features)
    with torch.inference_mode():
        wanted = layer(x)
        passes.clear()
        found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert not passes
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
