"""Strengths that change between two steps of an image: the result of a whole change, without its work."""

import random

import pytest
import torch
from patching.any_stack import VARIANTS, build, patch_of
from patching.any_stack import X as ANY_X
from patching.planned_layers import DORA, FIRST, KEYS, SECOND, Counted, lora
from support.measure import same_bits

from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import SWITCH, Engine
from lib_lora_guard.patching.exchanges import Exchanges
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.strengths import set_strengths
from lib_lora_guard.planning.mode import Wish


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


def strengths_one_after_the_other(seed, switch, monkeypatch):
    """The picture and the report after each of some changes of strengths, and which attachments stayed."""
    rng = random.Random(seed)
    # Where every term has a cheap form: else one that has none puts most stacks on the fly.
    cheap = {"lora", "dora_rows", "dora_model", "loha", "lora_rows", "ia3_rows"}
    pool = [
        {
            key: patch_of(key, rng.choice(sorted(cheap & found.keys() if rng.random() < 0.8 else found) or ["diff"]), n)
            for key, found in VARIANTS.items()
            if rng.random() < 0.7
        }
        for n in range(3)
    ]
    model = build({"block.qkv": "fp8", "block.proj": rng.choice(["bf16", "fp32", "Q8_0"])})
    engine, access = Engine(), PlainAccess(model)
    wish = rng.choice([Wish.AUTO, Wish.AUTO, Wish.ON_THE_FLY, Wish.NEVER_MERGE])
    monkeypatch.setenv(SWITCH, switch)
    found = []
    for _ in range(4):
        chosen = [rng.choice([1.0, 0.7, 0.05, 0.0, -0.5, 0.7]) for _ in pool]
        stack = [
            LoraRequest(f"lora{n}", strength, {key: [patch.term(strength, n)] for key, patch in patches.items()})
            for n, (patches, strength) in enumerate(zip(pool, chosen, strict=True))
        ]
        before = dict(engine.attached)
        report = engine.change(access, stack, wish)
        report.milliseconds = 0.0
        stayed = {key for key, one in engine.attached.items() if before.get(key) is one}
        with torch.no_grad():
            found.append((model(ANY_X), str(report), report, engine.device_bytes(), stayed))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_other_strengths_for_attachments_that_stay_equal_new_attachments_bit_for_bit(seed, monkeypatch):
    exchanged = strengths_one_after_the_other(seed, "1", monkeypatch)
    anew = strengths_one_after_the_other(seed, "0", monkeypatch)
    for (picture, text, report, size, _), (other, its_text, its_report, its_size, _) in zip(
        exchanged, anew, strict=True
    ):
        assert same_bits(picture, other)
        assert (text, report, size) == (its_text, its_report, its_size)


def test_a_change_of_strengths_alone_keeps_the_attachments_unless_it_is_switched_off(counted, monkeypatch):
    counted.change((FIRST, 0.7), (DORA, 0.5))
    before = dict(counted.engine.attached)
    counted.change((FIRST, 0.7), (DORA, -0.5))
    assert counted.engine.attached == before, "the DoRA's norms are of the first LoRA, which is as it was"
    terms = counted.engine.attached[KEYS[0]].terms
    assert [term.strength for term in terms] == [0.7, -0.5]
    counted.change((FIRST, 0.2), (DORA, -0.5))
    assert not any(counted.engine.attached[key] is before[key] for key in KEYS), "other norms"
    monkeypatch.setenv(SWITCH, "0")
    before = dict(counted.engine.attached)
    counted.change((FIRST, 0.2), (DORA, 0.5))
    assert not any(counted.engine.attached[key] is before[key] for key in KEYS)


def test_a_stack_that_scales_the_input_is_made_anew_for_calls_of_other_threads(counted):
    """It has two hooks: a call that began with the old scale must not go on with the new strengths."""
    by_column = lora(90, dora="input")
    counted.change((by_column, 0.7))
    before = dict(counted.engine.attached)
    assert before[KEYS[0]].hook.scales_input
    counted.change((by_column, 0.2))
    assert not any(counted.engine.attached[key] is before[key] for key in KEYS)


@pytest.mark.parametrize("what", ["storage", "short way", "output"])
def test_a_weight_that_is_held_otherwise_by_now_gets_a_new_attachment(counted, monkeypatch, what):
    counted.change((FIRST, 0.7))
    before = dict(counted.engine.attached)
    if what == "storage":
        counted.model.half()
    elif what == "short way":
        monkeypatch.setattr(counted.access, "raw_weight", lambda site: object())
    else:
        monkeypatch.setattr(counted.access, "owns_output", lambda layer: None)
    counted.change((FIRST, 0.2))
    assert not any(counted.engine.attached[key] is before[key] for key in KEYS)


def test_hooks_that_another_extension_has_taken_off_come_back_with_another_strength(counted):
    counted.change((FIRST, 0.7))
    counted.model[3]._forward_hooks.clear()
    counted.change((FIRST, 0.2))
    patched = counted.picture()
    counted.change()
    counted.change((FIRST, 0.2))
    assert same_bits(counted.picture(), patched)


def test_a_failure_after_the_strengths_were_changed_brings_the_old_ones_back(counted, monkeypatch):
    counted.change((FIRST, 0.7), (SECOND, 0.5))
    patched, report, before = counted.picture(), counted.engine.report, dict(counted.engine.attached)
    make = Exchanges._make

    def fail(exchanges):
        make(exchanges)
        assert not same_bits(counted.picture(), patched)
        raise KeyboardInterrupt

    monkeypatch.setattr(Exchanges, "_make", fail)
    with pytest.raises(KeyboardInterrupt):
        counted.change((FIRST, 0.2), (SECOND, 0.0))
    assert same_bits(counted.picture(), patched)
    assert counted.engine.report is report
    assert counted.engine.attached == before
    assert [term.strength for term in before[KEYS[0]].terms] == [0.7, 0.5]
