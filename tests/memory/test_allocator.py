"""Allocator options brought into force: nothing is claimed that torch did not report."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory.allocator_double import (
    ACTIVE,
    CUDA,
    CUDA_NAME,
    LATER,
    LINUX,
    MISSING,
    OFF,
    ON,
    OWN_ENTRIES,
    WINDOWS,
    FakeTorch,
    standings,
    tell,
)

from lib_lora_guard.memory.allocator_machine import Machine
from lib_lora_guard.memory.allocator_text import COLLECT, EXPANDABLE, OPTIONS, SPLIT, AllocatorWish, compose, parse
from lib_lora_guard.messages import Message

# Into force.


@pytest.mark.parametrize(
    ("machine", "wish", "line"),
    [
        (WINDOWS, AllocatorWish(False, 64, 0.8), 'set "PYTORCH_CUDA_ALLOC_CONF=a:[1:2],max_split_size_mb:64,garbage_collection_threshold:0.8"'),
        (LINUX, ON, 'export PYTORCH_CUDA_ALLOC_CONF="a:[1:2],expandable_segments:True"'),
    ],
)  # fmt: skip
def test_a_torch_that_cannot_be_told_is_told_at_the_next_start(machine, wish, line):
    state = tell(None, wish, {CUDA_NAME: "a:[1:2]"}, machine=dataclasses.replace(machine, can_set=False))
    later = [option for option in state.options().values() if option.standing is LATER]
    assert len(later) == len(wish.entries())
    assert all(line in str(option.reason) for option in later)
    then = tell(None, wish, {CUDA_NAME: compose({"a": "[1:2]", **wish.entries()})}, machine=dataclasses.replace(machine, can_set=False))  # fmt: skip
    assert [state.options()[name].standing is LATER for name in OPTIONS] == [s is ACTIVE for s in standings(then)]


def test_a_user_who_wants_nothing_gets_nothing_written():
    for environment in ({}, {CUDA_NAME: "backend:native,max_split_size_mb:128"}):
        fake = FakeTorch(environment.get(CUDA_NAME, ""))
        state = tell(fake, AllocatorWish(), environment)
        assert fake.writes == []
        assert fake.probes == 0
        assert fake.caps == []
        assert state.notes == ()
        assert standings(state) == [OFF, ACTIVE if environment else OFF, OFF]
    assert str(state.max_split_size_mb.reason) == "128, set by PYTORCH_CUDA_ALLOC_CONF"


def test_a_refused_option_of_the_environment_is_reported_and_not_written_again():
    fake = FakeTorch("expandable_segments:True", has_expandable=False)
    state = tell(fake, AllocatorWish(), {CUDA_NAME: "expandable_segments:True"}, machine=WINDOWS)
    assert standings(state) == [MISSING, OFF, OFF]
    assert "torch reports False" in str(state.expandable_segments.reason)
    assert fake.writes == []


def test_on_is_proven_and_off_is_off_again_and_the_environment_stays():
    environment = {CUDA_NAME: "roundup_power2_divisions:[256:1,>:4]"}
    fake = FakeTorch(environment[CUDA_NAME])
    on = tell(fake, ON, environment)
    assert standings(on) == [ACTIVE, OFF, OFF]
    assert on.expandable_segments.reason.key == "allocator.proven"
    assert on.notes == (Message("allocator.new_memory"),)
    assert on.text == "roundup_power2_divisions:[256:1,>:4],expandable_segments:True"
    off = tell(fake, AllocatorWish(), environment, on)
    assert standings(off) == [OFF] * 3
    assert fake.settings[EXPANDABLE] is False
    assert fake.writes == [on.text, "roundup_power2_divisions:[256:1,>:4],expandable_segments:False"]


def test_the_same_wish_again_does_nothing():
    fake = FakeTorch()
    on = tell(fake, ON)
    assert tell(fake, ON, before=on) is on
    assert (len(fake.writes), fake.probes) == (1, 1)
    again = tell(fake, ON)
    assert (len(fake.writes), again.expandable_segments) == (1, on.expandable_segments)


def test_allocator_settings_that_another_program_wrote_are_written_over():
    fake = FakeTorch()
    on = tell(fake, ON)
    fake._take("expandable_segments:False")
    assert standings(tell(fake, ON, before=on)) == [ACTIVE, OFF, OFF]
    assert len(fake.writes) == 2


def test_numbers_go_over_the_environment_and_zero_leaves_it():
    environment = {CUDA_NAME: "max_split_size_mb:128"}
    fake = FakeTorch("max_split_size_mb:128")
    state = tell(fake, AllocatorWish(False, 64, 0.8), environment)
    assert standings(state) == [OFF, ACTIVE, ACTIVE]
    assert fake.settings["max_split_size"] == 64 << 20
    assert fake.settings[COLLECT] == 0.8
    assert fake.caps == [CUDA]
    state = tell(fake, AllocatorWish(), environment, state)
    assert standings(state) == [OFF, ACTIVE, OFF]
    assert fake.settings["max_split_size"] == 128 << 20
    assert fake.settings[COLLECT] == 0.0


def test_the_environments_own_threshold_caps_nothing():
    fake = FakeTorch("garbage_collection_threshold:0.7")
    state = tell(fake, AllocatorWish(), {CUDA_NAME: "garbage_collection_threshold:0.7"})
    assert standings(state) == [OFF, OFF, ACTIVE]
    assert fake.caps == []


def test_numbers_are_set_aside_beside_expandable_segments():
    fake = FakeTorch("max_split_size_mb:128")
    state = tell(fake, AllocatorWish(True, 0, 0.8), {CUDA_NAME: "max_split_size_mb:128"})
    assert standings(state) == [ACTIVE, MISSING, MISSING]
    assert state.max_split_size_mb.reason.key == state.garbage_collection_threshold.reason.key == "allocator.beside_expandable"  # fmt: skip
    assert fake.writes == ["expandable_segments:True"]
    assert fake.caps == []


@pytest.mark.parametrize("number", [1, 20])
def test_a_size_that_torch_refuses_is_not_written(number):
    fake = FakeTorch()
    state = tell(fake, AllocatorWish(False, number))
    assert standings(state) == [OFF, MISSING, OFF]
    assert fake.writes == []
    assert "torch takes 21 MB or more" in str(state.max_split_size_mb.reason)


@pytest.mark.parametrize("number", [1.0, -0.5, float("nan")])
def test_a_threshold_that_torch_refuses_is_not_written(number):
    fake = FakeTorch()
    state = tell(fake, AllocatorWish(False, 0, number))
    assert standings(state) == [OFF, OFF, MISSING]
    assert fake.writes == []


def test_garbage_in_the_environment_is_told_and_nothing_is_written():
    fake = FakeTorch()
    state = tell(fake, ON, {CUDA_NAME: "expandable_segments=True"})
    assert standings(state) == [MISSING] * 3
    assert fake.writes == []
    assert "PYTORCH_CUDA_ALLOC_CONF cannot be read" in str(state.expandable_segments.reason)
    assert "“expandable_segments=True”" in state.expandable_segments.reason.text("zh")


# What goes wrong.


def test_a_refused_string_leaves_the_previous_one_in_force():
    fake = FakeTorch()
    tell(fake, AllocatorWish(False, 64), {CUDA_NAME: "new_key:1"})
    fake.refuses = ("new_key",)
    fake._take("max_split_size_mb:64")
    state = tell(fake, AllocatorWish(False, 128), {CUDA_NAME: "new_key:1"})
    assert standings(state) == [OFF, MISSING, OFF]
    says = str(state.max_split_size_mb.reason)
    assert "Unrecognized key 'new_key'" in says
    assert "the settings from before hold" in says
    assert "Traceback" not in says
    assert fake.settings["max_split_size"] == 64 << 20
    assert fake.writes[-1] == state.text == "max_split_size_mb:64,expandable_segments:False"


def test_a_torch_that_refuses_everything_is_told_in_words():
    fake = FakeTorch(refuses=(EXPANDABLE,))
    state = tell(fake, ON)
    assert state.expandable_segments.standing is MISSING
    assert state.notes[0].key == "allocator.refused"


@pytest.mark.parametrize(
    ("probe", "key"),
    [
        (False, "allocator.not_expandable"),
        (RuntimeError("CUDA driver error: unknown error\nmore"), "allocator.driver"),
    ],
)
def test_a_failed_proof_switches_off_again_and_lets_the_numbers_in(probe, key):
    fake = FakeTorch("expandable_segments:True", probe=probe)
    state = tell(fake, AllocatorWish(True, 64), {CUDA_NAME: "expandable_segments:True"})
    assert standings(state) == [MISSING, ACTIVE, OFF]
    assert state.expandable_segments.reason.key == key
    assert fake.settings[EXPANDABLE] is False
    assert fake.writes == ["max_split_size_mb:64,expandable_segments:False"]
    assert "more" not in str(state.expandable_segments.reason)
    assert tell(fake, state.wish, {CUDA_NAME: "expandable_segments:True"}, state) is state


@pytest.mark.parametrize(
    ("probe", "key"), [(torch.cuda.OutOfMemoryError("full"), "allocator.no_room"), (None, "allocator.unproven")]
)
def test_an_unproven_option_says_that_it_is_unproven(probe, key):
    state = tell(FakeTorch(probe=probe), ON)
    assert state.expandable_segments.standing is ACTIVE
    assert state.expandable_segments.reason.key == key
    assert "could not be proven" in str(state.expandable_segments.reason)


def test_a_read_back_that_differs_is_not_claimed():
    fake = FakeTorch(has_expandable=False)
    state = tell(fake, ON, machine=Machine("cuda", (2, 14), system="Windows"))
    assert standings(state) == [MISSING, OFF, OFF]
    assert fake.probes == 0
    assert "torch reports False" in str(state.expandable_segments.reason)
    assert fake.writes == ["expandable_segments:True", "expandable_segments:False"]
    state = tell(FakeTorch(splits_mb=512), AllocatorWish(False, 64))
    assert standings(state) == [OFF, MISSING, OFF]
    assert str(512 << 20) in str(state.max_split_size_mb.reason)


def test_an_option_that_torch_keeps_on_is_not_called_off():
    fake = FakeTorch("expandable_segments:True")
    fake.write = lambda text: fake.settings.update(PYTORCH_CUDA_ALLOC_CONF=text)
    state = tell(fake, AllocatorWish())
    assert state.expandable_segments.standing is ACTIVE
    assert state.expandable_segments.reason.key == "allocator.still_on"


def test_a_torch_that_reports_nothing_is_believed_only_by_the_proof():
    fake = FakeTorch(tells=False)
    state = tell(fake, ON)
    assert state.expandable_segments.reason.key == "allocator.proven"
    state = tell(fake, AllocatorWish(False, 64), before=state)
    assert standings(state) == [OFF, LATER, OFF]
    assert "max_split_size_mb:64" in str(state.max_split_size_mb.reason)
    tell(fake, AllocatorWish(), before=state)
    assert fake.writes[-1] == "expandable_segments:False"
    assert len(fake.writes) == 3
    untold = FakeTorch(tells=False)
    tell(untold, AllocatorWish())
    assert untold.writes == []


wishes = st.builds(
    AllocatorWish, st.booleans(), st.sampled_from([0, 10, 21, 64]), st.sampled_from([0.0, 0.5, 0.8, 1.0])
)


@settings(deadline=None, max_examples=100)
@given(OWN_ENTRIES, st.lists(wishes, min_size=1, max_size=4), st.booleans(), st.sampled_from([True, False, None]))
def test_after_any_wishes_the_last_holds_and_every_claim_is_true(own, sequence, has_expandable, probe):
    environment = {CUDA_NAME: compose({"pinned_num_register_threads": "4", **own})}
    fake = FakeTorch(environment[CUDA_NAME], has_expandable=has_expandable, probe=probe)
    state = None
    for wish in sequence:
        state = tell(fake, wish, environment, state)
    alone = FakeTorch(environment[CUDA_NAME], has_expandable=has_expandable, probe=probe)
    assert tell(alone, sequence[-1], environment).options() == state.options()
    assert fake.settings[EXPANDABLE] == alone.settings[EXPANDABLE]
    assert fake.settings["max_split_size"] == alone.settings["max_split_size"]
    assert parse(state.text)["pinned_num_register_threads"] == "4"
    holds = {
        EXPANDABLE: fake.settings[EXPANDABLE],
        SPLIT: fake.settings["max_split_size"] > 0,
        COLLECT: fake.settings[COLLECT] > 0,
    }
    for name, option in state.options().items():
        if option.standing in (ACTIVE, OFF):
            assert holds[name] == (option.standing is ACTIVE)
        elif name not in own:
            # Not available is said of the wish; only the environment's own value may hold beside it.
            assert not holds[name]


def test_every_reason_reads_in_both_languages():
    states = [tell(FakeTorch(probe=probe), AllocatorWish(True, 10, 0.8)) for probe in (True, False, None)]
    states += [tell(FakeTorch(), AllocatorWish(False, 64, 0.8), machine=machine) for machine in (LINUX, WINDOWS)]
    for state in states:
        for said in (*(option.reason for option in state.options().values()), *state.notes):
            assert "{" not in str(said)
            assert re.search("[\u4e00-\u9fff]", said.text("zh"))


def test_the_cap_that_collecting_needs_goes_with_it():
    fake = FakeTorch()
    state = tell(fake, AllocatorWish(garbage_collection_threshold=0.8))
    assert fake.share == 0.99
    state = tell(fake, AllocatorWish(garbage_collection_threshold=0.7), before=state)
    assert (fake.share, len(fake.caps)) == (0.99, 1)
    state = tell(fake, AllocatorWish(), before=state)
    assert fake.share == 1.0
    assert state.uncapped is None


def test_a_lower_cap_of_the_users_own_stays():
    fake = FakeTorch()
    fake.share = 0.5
    fake.cap_near_whole_card = lambda device: None
    state = tell(fake, AllocatorWish(garbage_collection_threshold=0.8))
    tell(fake, AllocatorWish(), before=state)
    assert fake.share == 0.5


@pytest.mark.parametrize("environment", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"}])
def test_who_wishes_nothing_gets_nothing_written(environment):
    fake = FakeTorch("max_split_size_mb:64,expandable_segments:True")
    state = tell(fake, AllocatorWish(), environment)
    assert fake.writes == []
    assert state.text == "max_split_size_mb:64,expandable_segments:True"
