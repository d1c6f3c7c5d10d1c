"""Failures, refusals and interrupts inside Forge: the image has a whole stack or none, and it is said."""

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same, same_bits

from contract.stacks import FILE, lora_on_everything, reference, run, with_loras
from lib_lora_guard.hosts.forge.fallback import HostRefresh
from lib_lora_guard.hosts.forge.lora_loader_state import LoaderState
from lib_lora_guard.patching.engine import Engine


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
    changed = with_loras(guarded, patcher, *loras)
    assert same_bits(run(changed), base)
    assert "WITHOUT the LoRAs style.safetensors" in caplog.text
    monkeypatch.setattr(Engine, "commit", commit)
    layer.__class__ = type(layer).__mro__[1]
    changed.refresh_loras()
    assert_same(run(changed), reference(patcher, dense, loras), base)


def test_a_failed_removal_ends_without_loras_and_misses_none(guarded, monkeypatch, caplog):
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
