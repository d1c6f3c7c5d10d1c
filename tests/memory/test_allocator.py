"""The allocator options: what is written is one whole string, and nothing is claimed that torch did not report."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.memory import allocator_torch
from lib_lora_guard.memory.allocator import Standing, apply
from lib_lora_guard.memory.allocator_machine import Machine, availability, look
from lib_lora_guard.memory.allocator_text import (
    BACKEND,
    COLLECT,
    EXPANDABLE,
    OPTIONS,
    SPLIT,
    AllocatorTextError,
    AllocatorWish,
    compose,
    for_now,
    parse,
    same_effect,
    start_line,
    variable_in_force,
)
from lib_lora_guard.messages import Message

CUDA = torch.device("cuda", 0)
LINUX = Machine("cuda", (2, 12))
WINDOWS = Machine("cuda", (2, 3), system="Windows")
ON = AllocatorWish(expandable_segments=True)


class FakeTorch:
    """An allocator with the rules that torch 2.12.1 showed: numbers are reset by a string without them, expandable
    segments stay as they were, the string is recorded even where it is refused."""

    def __init__(self, start="", has_expandable=True, probe=True, tells=True, refuses=(), splits_mb=None):
        self.settings = {"PYTORCH_CUDA_ALLOC_CONF": "", EXPANDABLE: False, "max_split_size": -1, COLLECT: 0.0}
        self.wants_expandable = False
        self.has_expandable, self.probe, self.tells = has_expandable, probe, tells
        self.refuses, self.splits_mb = refuses, splits_mb
        self.writes, self.probes, self.caps, self.share = [], 0, [], 1.0
        self._take(start)

    def write(self, text):
        self.writes.append(text)
        self._take(text)

    def _take(self, text):
        self.settings |= {"PYTORCH_CUDA_ALLOC_CONF": text, "max_split_size": -1, COLLECT: 0.0}
        for key, value in parse(text).items():
            if key in self.refuses:
                raise ValueError(f"Unrecognized key '{key}' in CUDA allocator config.\nC++ CapturedTraceback: ...")
            if key == EXPANDABLE:
                self.wants_expandable = value == "True"
            elif key == SPLIT:
                self.settings["max_split_size"] = (self.splits_mb or int(value)) << 20
            elif key == COLLECT:
                self.settings[COLLECT] = float(value)
        self.settings[EXPANDABLE] = self.wants_expandable and self.has_expandable

    def read(self):
        return dict(self.settings) if self.tells else {}

    def takes_expandable(self, device):
        self.probes += 1
        if isinstance(self.probe, Exception):
            raise self.probe
        return self.probe

    def cap_near_whole_card(self, device):
        self.caps.append(device)
        before, self.share = self.share, 0.99
        return before if before > 0.99 else None

    def lift_cap(self, fraction, device):
        self.share = fraction


def tell(fake, wish, environment=None, before=None, machine=LINUX):
    return apply(wish, environment or {}, CUDA, before, machine=machine, allocator=fake)


def standings(state):
    return [state.options()[name].standing for name in OPTIONS]


OFF, ACTIVE, MISSING, LATER = Standing.OFF, Standing.ACTIVE, Standing.NOT_AVAILABLE, Standing.NEXT_START


# The text.

words = st.from_regex(re.compile(r"[A-Za-z0-9_.>]{1,8}", re.ASCII), fullmatch=True)
lists = st.lists(st.tuples(words, words).map(":".join), min_size=1, max_size=3).map(
    lambda pairs: f"[{','.join(pairs)}]"
)
entries = st.dictionaries(words.filter(lambda word: word not in OPTIONS), words | lists, max_size=4)
ours = st.fixed_dictionaries(
    {},
    optional={
        EXPANDABLE: st.sampled_from(["True", "False"]),
        SPLIT: st.integers(21, 1 << 20).map(str),
        COLLECT: st.floats(0, 1, exclude_min=True, exclude_max=True).map(repr),
    },
)


@settings(deadline=None, max_examples=60)
@given(entries, ours, st.sampled_from(["", " ", "\t", " \n"]))
def test_what_is_composed_reads_back_with_any_blanks(others, own, blanks):
    given_entries = {**others, **own}
    text = compose(given_entries)
    assert parse(text) == given_entries
    assert parse(blanks + blanks.join(text)) == given_entries
    assert same_effect(text, text)


@settings(deadline=None, max_examples=60)
@given(entries, ours)
def test_a_running_torch_gets_everything_but_the_backend_and_off_is_said(others, own):
    told = parse(for_now({**others, **own, BACKEND: "native"}))
    assert told == {EXPANDABLE: "False", **others, **own}
    assert BACKEND not in told


def test_a_list_is_one_value_and_of_a_key_given_twice_the_last_counts():
    text = "roundup_power2_divisions:[256:1,512:2,>:4], max_split_size_mb:64,max_split_size_mb:128,"
    assert parse(text) == {"roundup_power2_divisions": "[256:1,512:2,>:4]", SPLIT: "128"}
    assert parse("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_split_size_mb", 'expected key:value, found "max_split_size_mb"'),
        (",max_split_size_mb:64", 'expected key:value, found ","'),
        ("expandable_segments:True,,backend:native", 'expected key:value, found ","'),
        ("max_split_size_mb:64:65", 'expected a comma before ":"'),
        ("max_split_size_mb:", '"max_split_size_mb" has no value'),
        ("a:[1:2", "a list is opened with [ and not closed"),
        ("a:[1:[2]]", "a list is opened with [ and not closed"),
        ("a:b&c", '"b&c" contains signs that belong to no setting'),
        ('a:"%PATH%"', "contains signs that belong to no setting"),
        ("expandable_segments:true", 'expandable_segments cannot be "true"'),
        ("max_split_size_mb:abc", 'max_split_size_mb cannot be "abc"'),
        ("garbage_collection_threshold:1.0", 'garbage_collection_threshold cannot be "1.0"'),
        ("garbage_collection_threshold:x", 'garbage_collection_threshold cannot be "x"'),
    ],
)
def test_garbage_is_refused_with_a_sentence(text, says):
    with pytest.raises(AllocatorTextError, match=re.escape(says)) as error:
        parse(text)
    assert f"“{text}”" in error.value.message.text("zh")
    assert not same_effect(text, text)


CUDA_NAME, HIP_NAME, COMMON_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.mark.parametrize(
    ("names", "torch_version", "rocm", "read"),
    [
        ((CUDA_NAME, HIP_NAME, COMMON_NAME), (2, 12), False, CUDA_NAME),
        ((HIP_NAME, COMMON_NAME), (2, 12), False, HIP_NAME),
        ((COMMON_NAME,), (2, 12), False, COMMON_NAME),
        ((COMMON_NAME,), (2, 9), False, None),
        ((HIP_NAME,), (2, 3), False, None),
        ((HIP_NAME,), (2, 3), True, HIP_NAME),
        ((HIP_NAME, CUDA_NAME), (2, 3), True, CUDA_NAME),
        ((), (2, 12), True, None),
    ],
)
def test_which_variable_torch_reads(names, torch_version, rocm, read):
    assert variable_in_force(dict.fromkeys(names, ""), torch_version, rocm) == read


def test_the_line_for_the_start_file_is_quoted():
    text = "roundup_power2_divisions:[256:1,>:4],expandable_segments:True"
    assert str(start_line(text, windows=True)) == f'Put this line into webui-user.bat: set "{CUDA_NAME}={text}"'
    assert start_line(text, windows=False).facts["line"] == f'export {CUDA_NAME}="{text}"'


# What the machine can have.


@pytest.mark.parametrize("device", ["CPU", "MPS", "DirectML", "XPU"])
def test_without_cuda_there_is_nothing(device):
    state = tell(None, AllocatorWish(True, 64, 0.8), machine=Machine(device, (2, 12), backend="", can_set=False))
    assert standings(state) == [MISSING] * 3
    assert str(state.expandable_segments.reason).startswith(f"not available here: images are made on {device}")
    assert state.text == ""


@pytest.mark.parametrize(
    ("machine", "key"),
    [
        (Machine("cuda", (2, 12), backend="cudaMallocAsync"), "allocator.backend"),
        (WINDOWS, "allocator.windows"),
        (Machine("cuda", (2, 13), system="Windows"), "allocator.windows"),
        (Machine("cuda", (2, 12), wsl=True), "allocator.wsl"),
        (Machine("cuda", (2, 12), tegra=True), "allocator.tegra"),
        (Machine("cuda", (2, 12), rocm=True), "allocator.rocm"),
        (Machine("cuda", (2, 12), rocm=True, system="Windows"), "allocator.rocm"),
    ],
)
def test_why_there_are_no_expandable_segments(machine, key):
    found = availability(machine)
    assert found[EXPANDABLE].key == key
    assert (found[SPLIT] is None and found[COLLECT] is None) == (machine.backend == "native")
    fake = FakeTorch()
    state = tell(fake, AllocatorWish(True, 64, 0.8), machine=machine)
    assert state.expandable_segments.reason.key == key
    if machine.backend == "native":
        assert standings(state) == [MISSING, ACTIVE, ACTIVE]
        assert fake.writes == ["max_split_size_mb:64,garbage_collection_threshold:0.8,expandable_segments:False"]
    else:
        assert standings(state) == [MISSING] * 3
        assert fake.writes == []
    assert fake.probes == 0


def test_linux_and_new_windows_may_try():
    assert availability(LINUX) == availability(Machine("cuda", (2, 14), system="Windows")) == dict.fromkeys(OPTIONS)


def test_this_machine_says_what_it_is():
    machine = look(torch.device("cpu"))
    assert (machine.device, machine.backend) == ("CPU", "")
    assert machine.torch_version == tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert look(torch.device("mps")).device == "MPS"
    assert look(torch.device("privateuseone")).device == "DirectML"
    if not torch.cuda.is_available():
        assert look(CUDA).device == "CPU"
        state = apply(ON, {}, CUDA)
        assert standings(state) == [MISSING] * 3
        assert "made on CPU" in str(state.expandable_segments.reason)


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


# Into force.


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


def test_what_the_environment_wants_in_vain_is_told_and_not_written_again():
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


def test_what_somebody_else_wrote_since_is_written_over():
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
def test_what_could_not_be_proven_says_so(probe, key):
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
@given(ours, st.lists(wishes, min_size=1, max_size=4), st.booleans(), st.sampled_from([True, False, None]))
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


# Torch's own functions.


@pytest.fixture
def memory(monkeypatch):
    """A card whose allocator serves probes from the segments given, one per stream."""
    served, known = [], []

    class Probe:
        def __init__(self, address):
            self.data_ptr = lambda: address

    def empty(*_, **__):
        segment = served.pop(0)
        known.append(segment)
        return Probe(segment["address"] + 512)

    class Nothing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Stream", Nothing)
    monkeypatch.setattr(torch.cuda, "stream", Nothing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": list(known)})
    return served, known


def segment(address, expandable):
    return {"address": address, "total_size": 2 << 20, "is_expandable": expandable}


def test_only_fresh_memory_proves_anything(memory):
    served, known = memory
    probe = allocator_torch.TorchAllocator().takes_expandable
    served[:] = [segment(0, True)]
    assert probe(CUDA) is True
    served[:] = [segment(4 << 20, False)]
    assert probe(CUDA) is False
    old = segment(8 << 20, False)
    known.append(old)
    served[:] = [old, segment(12 << 20, True)]
    assert probe(CUDA) is True
    served[:] = [old] * 4
    assert probe(CUDA) is None


def test_cudas_own_setter_goes_first(monkeypatch):
    told = []
    for name in allocator_torch._SETTERS:
        monkeypatch.delattr(torch._C, name, raising=False)
    for name in reversed(allocator_torch._SETTERS):
        monkeypatch.setattr(torch._C, name, lambda text, name=name: told.append((name, text)), raising=False)
        allocator_torch.TorchAllocator().write("a:1")
    assert told[-1] == ("_cuda_cudaCachingAllocator_set_allocator_settings", "a:1")
    for name in allocator_torch._SETTERS:
        monkeypatch.delattr(torch._C, name)
    assert look(torch.device("cpu")).can_set is False
    with pytest.raises(RuntimeError, match="no function for allocator settings"):
        allocator_torch.TorchAllocator().write("a:1")


@pytest.mark.parametrize(("fraction", "set_to"), [(1.0, [0.99]), (0.99, []), (0.5, []), (None, [0.99])])
def test_a_lower_cap_stays(monkeypatch, fraction, set_to):
    caps = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: caps.append(part))
    if fraction is None:
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction, raising=False)
    allocator_torch.TorchAllocator().cap_near_whole_card(CUDA)
    assert caps == set_to


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
