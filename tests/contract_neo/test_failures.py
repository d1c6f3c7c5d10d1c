"""What happens in Neo when the guard's own way fails: Neo's ways, or no LoRA, and it is said."""

import pytest
import torch
from contract.stacks import lora_on_everything, other_kinds, reference, run
from support.make import rand
from support.measure import assert_same, same_bits

from contract_neo.host import CPU
from lib_lora_guard.errors import RestoreError
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.hook_attachments import BypassAttachment

FILE = "style.safetensors"


def linear_only(dense, make=lora_on_everything):
    return {k: v for k, v in make(dense).items() if k.endswith(("qkv.weight", "proj.weight"))}


def failing(monkeypatch, error, times=99):
    change, left = Engine.change, [times]

    def change_or_fail(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return change(*args, **kwargs)

    monkeypatch.setattr(Engine, "change", change_or_fail)


@pytest.mark.parametrize(
    ("storage", "way"),
    [("fp32", "Forge's merge"), ("kitchen fp8", "Forge's (fp16 LoRA) way"), ("fp8", "Forge's (fp16 LoRA) way")],
)
def test_an_unexpected_error_hands_the_stack_to_neo(guarded, storage, way, monkeypatch, lines):
    patcher, dense = guarded.build(storage)
    base, before = run(patcher), dict(patcher.model.named_parameters())
    # A kind that Neo has no name for is among them: the guard calculates it.
    loras = [(FILE, linear_only(dense, other_kinds), 0.7), ("b", linear_only(dense), 0.5)]
    failing(monkeypatch, ZeroDivisionError("planted"))
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    assert_same(run(changed), reference(patcher, dense, loras), base, 0.02)
    assert f"ZeroDivisionError: planted; applied by {way} instead: style.safetensors, b" in lines.text
    assert guarded.report(changed) is None
    # The same stack again is left as it is, another one is tried anew, none is none.
    ids = changed.patches_uuid
    guarded.load(changed)
    assert changed.patches_uuid == ids
    monkeypatch.undo()
    again = guarded.load(guarded.with_loras(patcher, loras[1]))
    assert guarded.report(again).loras[0].modes == {"bypass": len(loras[1][1])}
    assert_same(run(again), reference(patcher, dense, loras[1:]), base, 0.02)
    assert same_bits(run(guarded.load(patcher)), base)
    assert list(dict(patcher.model.named_parameters())) == list(before)


def test_a_neo_that_keeps_functions_on_the_patcher_gets_one_for_each_low_bit_weight(newer, guarded, monkeypatch):
    patcher, dense = guarded.build("fp8")
    base, patches = run(patcher), linear_only(dense, other_kinds)
    loras = [(FILE, patches, 0.7), ("b", linear_only(dense), 0.5)]
    failing(monkeypatch, ZeroDivisionError("planted"))
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    assert_same(run(changed), reference(patcher, dense, loras), base, 0.02)
    assert changed.patches == patcher.weight_wrapper_patches == {}
    assert {key: len(on_key) for key, on_key in changed.weight_wrapper_patches.items()} == dict.fromkeys(patches, 2)
    # Neo's own load puts them on again after it has wiped the layers; a clone has them too.
    guarded.place(changed, changed.model_size() // 2)
    assert_same(run(changed), reference(patcher, dense, loras), base, 0.02)
    monkeypatch.undo()
    again = guarded.load(guarded.with_loras(changed, ("c", linear_only(dense), 0.25)))
    assert again.weight_wrapper_patches == {}
    third = [*loras, ("c", linear_only(dense), 0.25)]
    assert_same(run(again), reference(patcher, dense, third), base, 0.02)
    assert same_bits(run(guarded.load(patcher)), base)


def test_a_parameter_that_neo_reaches_on_the_fly_nowhere_leaves_the_image_without(guarded, monkeypatch, lines):
    patcher, dense = guarded.build("fp8")
    base = run(patcher)
    patches = linear_only(dense) | {"blocks.0.norm.weight": (rand(32, seed=1, scale=0.1),)}
    failing(monkeypatch, ZeroDivisionError("planted"))
    changed = guarded.load(guarded.with_loras(patcher, (FILE, patches, 1.0)))
    assert same_bits(run(changed), base)
    assert "this image is made WITHOUT the LoRAs style.safetensors: ZeroDivisionError: planted" in lines.text
    assert not guarded.guard.stacks.is_current(changed)
    monkeypatch.undo()
    assert_same(run(guarded.load(changed)), reference(patcher, dense, [(FILE, patches, 1.0)]), base)


def test_after_memory_has_ended_the_next_load_tries_again(guarded, monkeypatch):
    patcher, dense = guarded.build("fp32")
    base, loras = run(patcher), [(FILE, linear_only(dense), 1.0)]
    failing(monkeypatch, torch.cuda.OutOfMemoryError("planted"))
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    assert_same(run(changed), reference(patcher, dense, loras), base)
    assert guarded.stack(changed).left_to_host
    monkeypatch.undo()
    guarded.load(changed)
    assert not guarded.stack(changed).left_to_host
    assert changed.patches == {}
    assert_same(run(changed), reference(patcher, dense, loras), base)
    assert same_bits(run(guarded.load(patcher)), base)


def test_a_lora_that_cannot_be_taken_off_stops_the_image_and_is_tried_again(guarded, monkeypatch):
    patcher, dense = guarded.build("bf16")
    base, loras = run(patcher), [(FILE, linear_only(dense), 1.0)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    failing(monkeypatch, ZeroDivisionError("planted"))
    monkeypatch.setattr(Engine, "detach_all", lambda self: False)
    with pytest.raises(RestoreError):
        guarded.load(guarded.with_loras(patcher, (FILE, linear_only(dense), 0.5)))
    monkeypatch.undo()
    assert same_bits(run(guarded.load(patcher)), base)
    assert_same(run(guarded.load(changed)), reference(patcher, dense, loras), base)


def test_a_lora_of_the_wrong_shape_between_two_good_ones_is_left_out_by_name(guarded, lines):
    patcher, dense = guarded.build("bf16")
    base = run(patcher)
    bad = {k: (*v[:1], (v[1][0], rand(4, 48, seed=3), *v[1][2:])) for k, v in linear_only(dense).items()}
    good = [("a.safetensors", linear_only(dense), 0.5), ("c.safetensors", linear_only(dense), 0.25)]
    changed = guarded.load(guarded.with_loras(patcher, good[0], ("C:/x/bad.safetensors", bad, 1.0), good[1]))
    assert_same(run(changed), reference(patcher, dense, good), base)
    assert [lora.label for lora in guarded.report(changed).refused] == ["bad.safetensors"]
    assert "bad.safetensors NOT applied" in lines.text


def test_an_error_while_merges_are_put_back_in_the_middle_of_an_image_is_said_and_healed(guarded, monkeypatch, lines):
    patcher, dense = guarded.build("bf16")
    base, loras = run(patcher), [(FILE, other_kinds(dense), 0.5)]
    changed = guarded.load(guarded.with_loras(patcher, *loras))
    assert any(not isinstance(one, BypassAttachment) for one in guarded.stack(changed).engine.attached.values())
    failing(monkeypatch, ZeroDivisionError("planted"))
    changed.partially_unload(CPU, patcher.model_size() // 3)
    assert "applying LoRAs failed" in lines.text
    monkeypatch.undo()
    assert_same(run(guarded.load(changed)), reference(patcher, dense, loras), base, 0.02)
