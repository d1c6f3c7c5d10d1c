"""Strengths that change between two steps of an image: the result of a whole change, without its work."""

import pytest
from patching.planned_layers import DORA, FIRST, KEYS, Counted, lora
from support.measure import same_bits

from lib_lora_guard.patching.strengths import set_strengths


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def test_a_change_between_two_steps_derives_no_forms_and_equals_a_whole_change(counted):
    counted.change((FIRST, 0.7), (DORA, 0.5))
    counted.forms = counted.forwards = 0
    set_strengths(counted.engine, {0: 0.2, 1: 0.9})
    assert (counted.forms, counted.forwards) == (0, 0)
    patched = counted.picture()
    assert counted.change((FIRST, 0.2), (DORA, 0.9)) == (0, 0)
    assert same_bits(counted.picture(), patched)


def test_a_strength_reaches_a_lora_whose_place_in_the_stack_has_changed(counted):
    """Its attachments stay when the LoRA before it, which is on other weights, is taken off."""
    first, second = lora(1, KEYS[:5]), lora(50, KEYS[5:])
    counted.change((first, 0.7), (second, 0.5))
    before = dict(counted.engine.attached)
    counted.change((second, 0.5))
    assert all(counted.engine.attached[key] is before[key] for key in KEYS[5:]), "they were made anew"
    set_strengths(counted.engine, {0: 0.9})
    patched = counted.picture()
    counted.change()
    counted.change((second, 0.9))
    assert same_bits(counted.picture(), patched)
