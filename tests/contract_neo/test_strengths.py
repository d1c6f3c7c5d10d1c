"""Strengths that change between the steps of an image, in Neo."""

from contract.stacks import dora, lora_on_everything, other_kinds, reference, run
from support.measure import assert_same, same_bits

from lib_lora_guard.hosts.neo.patchers import LORAS, loras_of
from lib_lora_guard.hosts.neo.step_strengths import NeoStepStrengths


def test_strengths_of_a_step_count_and_go_with_it(guarded):
    patcher, dense = guarded.build("bf16")
    base, strengths = run(patcher), NeoStepStrengths(guarded.guard.stacks)
    patches = {
        **other_kinds(dense),
        **{k: v for k, v in lora_on_everything(dense).items() if "qkv" in k or "norm" in k},
    }
    stack = [("a", patches, 0.5), ("b", dora(dense), 0.8)]
    changed = guarded.load(guarded.with_loras(patcher, *stack))
    first = run(changed)
    assert strengths.loras(changed) == [("a", 0.5), ("b", 0.8)]
    strengths.set(changed, {})
    assert not strengths.are_changed
    for step in ({0: 0.9}, {0: 0.2, 1: -0.4}, {1: 0.0}):
        strengths.set(changed, step)
        then = [(name, loras, step.get(place, strength)) for place, (name, loras, strength) in enumerate(stack)]
        assert_same(run(changed), reference(patcher, dense, then), base, 0.02)
        assert strengths.are_changed
    strengths.restore()
    assert not strengths.are_changed
    assert same_bits(run(changed), first)
    guarded.load(changed)
    assert same_bits(run(changed), first)
    assert same_bits(run(guarded.load(patcher)), base)


def test_strengths_of_a_patcher_whose_stack_is_not_on_the_model_change_nothing(guarded):
    patcher, dense = guarded.build("bf16")
    strengths = NeoStepStrengths(guarded.guard.stacks)
    one = guarded.load(guarded.with_loras(patcher, ("a", lora_on_everything(dense), 0.5)))
    first = run(one)
    strengths.set(guarded.with_loras(patcher, ("b", lora_on_everything(dense), 0.5)), {0: 2.0})
    strengths.set(patcher, {0: 2.0})
    assert same_bits(run(one), first)
    assert not strengths.are_changed


def test_strengths_left_behind_by_a_patcher_that_is_gone_do_not_reach_the_next_image(guarded):
    patcher, dense = guarded.build("bf16")
    strengths, loras = NeoStepStrengths(guarded.guard.stacks), ("a", lora_on_everything(dense), 0.5)
    one = guarded.load(guarded.with_loras(patcher, loras))
    first = run(one)
    strengths.set(one, {0: 2.0})
    guarded.memory.current_loaded_models.clear()
    again = patcher.clone()
    setattr(again, LORAS, loras_of(one))
    del one
    strengths.restore()
    assert same_bits(run(guarded.load(again)), first)
