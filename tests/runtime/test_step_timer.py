"""Steps are timed from start to start: what is slow is said, what was interrupted, first or another kind of step is not."""

import logging
import platform
import threading
from types import SimpleNamespace

import pytest
import torch
from support.fake_card import CARD, RAM, Weight

from lib_lora_guard.hosts.forge.lora_loader_state import STATE
from lib_lora_guard.hosts.forge.stacks import ForgeStacks
from lib_lora_guard.memory.step_times import MB, StepTimes
from lib_lora_guard.messages import message_of
from lib_lora_guard.recorder.flight_recorder import FlightRecorder, Phase
from lib_lora_guard.runtime import step_timer
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.image_words import ImageWords
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.runtime.step_timer import StepTimer
from lib_lora_guard.settings import LoraMode

GB = 1 << 30


class FakeMemory:
    """Forge's memory management as far as it is asked; counts how often."""

    def __init__(self):
        self.asked, self.on_device = 0, 6 * GB

    def module_size(self, model, include_device=None):
        assert include_device == CARD
        self.asked += 1
        return self.on_device


stack_of = ForgeStacks(None, None, None, None).names_on


def no_look():
    raise OSError("no numbers")


class Forge:
    """A clock, and a model that takes as long as it is told to."""

    def __init__(self, shared=None, spills=True, words=None):
        self.now, self.clock_reads = 100.0, 0
        self.shared_mb, self.shared_reads = shared, 0
        self.memory, self.journal = FakeMemory(), Journal(no_look)
        self.model, self.kinds = self.new_model(), {}
        self.times = StepTimes(spills)
        self.timer = StepTimer(
            self.memory,
            self.journal,
            stack_of,
            times=self.times,
            clock=self.clock,
            shared_usage=None if shared is None else self.counters,
            words=words,
        )
        self.moved()

    @staticmethod
    def new_model():
        return SimpleNamespaceModel(lora_loader=SimpleNamespace(loaded_hash="[]"))

    def clock(self):
        self.clock_reads += 1
        return self.now

    def counters(self):
        self.shared_reads += 1
        return None if self.shared_mb < 0 else self.shared_mb * MB

    def moved(self, seconds=3.0, phase=Phase.MOVE_TO_GPU):
        with self.journal.phase(phase):
            self.now += seconds

    def call(self, seconds, rows=2, size=64, device=CARD, model=None, **conditioning):
        """One call of the model; the sampler's own work is 10 ms."""

        def original(model, x, t, **conditioning):
            self.now += seconds
            return x

        key = rows, size, device
        x = self.kinds.setdefault(key, Weight(None, (rows, 4, size, size), torch.float16, device))
        assert self.timer.apply_model(original, model or self.model, x, 1.0, **conditioning) is x
        self.now += 0.01

    def image(self, seconds, **how):
        """Loads, samples and decodes one picture; a first call takes longer."""
        self.moved()
        self.call(5.0, **how)
        for one in seconds:
            self.call(one, **how)
        self.call(0.0, **how)
        self.moved(2.0, Phase.VAE_DECODE)


class SimpleNamespaceModel(SimpleNamespace):
    """Can be weakly referred to, and is itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")

    def lines():
        found = [(record.levelname, message_of(record).key) for record in caplog.records]
        caplog.clear()
        return found

    return lines


SPILL = [("WARNING", "spill.slow"), ("WARNING", "spill.likely"), ("WARNING", "spill.setting")]


def test_steps_that_became_slow_are_said_with_what_they_usually_take(said, caplog):
    forge = Forge()
    forge.image([1.0] * 10)
    assert said() == []
    forge.image([1.0] * 4 + [8.0] * 6)
    slow, _, setting = (message_of(record) for record in caplog.records)
    assert str(slow) == "a step took 8.0 s, 7.9 times the usual 1.01 s (median of 14 steps of the same kind)"
    assert "Prefer No Sysmem Fallback" in setting
    assert said() == SPILL
    forge.image([8.0] * 10)
    assert said() == [], "once"


def test_each_slow_image_has_one_line_and_the_log_the_first_of_them(said):
    words = ImageWords()
    forge = Forge(words=words)
    for seconds, found in (([1.0] * 10, 0), ([8.0, 8.0, 1.0, 9.0, 9.0], 1), ([1.0] * 5, 0), ([7.0] * 4, 1)):
        shown = []
        with words.image(id(shown), shown.append):
            forge.image(seconds)
        assert len(shown) == found
        assert all(line.startswith("LoRA Guard: slower than usual: a step took ") for line in shown)
    assert said() == SPILL


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([{"rows": 2}], id="one call for prompt and negative prompt"),
        pytest.param([{"rows": 1}, {"rows": 1}], id="two calls, as also in samplers of second order"),
        pytest.param([{"rows": 1}, {"rows": 3}], id="two calls of different sizes"),
        pytest.param([{"size": 64}, {"size": 32}, {"size": 16}], id="regions of a picture"),
    ],
)
def test_however_many_calls_a_step_has(said, calls):
    forge = Forge()

    def steps(count, seconds):
        for _ in range(count):
            for place, kind in enumerate(calls):
                forge.call(seconds * (1 + 4 * place), **kind)

    if calls[-1] == calls[0]:

        def steps(count, seconds):
            for kind in calls * count:
                forge.call(seconds, **kind)

    steps(8, 0.5)
    forge.moved()
    steps(8, 0.5)
    assert said() == []
    steps(2, 4.0)
    forge.call(0.1, **calls[0])
    assert set(said()) == set(SPILL)


def test_what_is_no_step_counts_for_nothing(said):
    """The last call before a pause, and the first one after it."""
    forge = Forge()
    for _ in range(3):
        forge.image([1.0] * 6)
        forge.now += 3600
    for phase in Phase:
        if phase is not Phase.SAMPLING_STEP:
            forge.call(1.0)
            forge.moved(600.0, phase)
            forge.call(60.0)
            forge.call(1.0)
    assert said() == []
    known = next(iter(forge.times._histories.values()))
    assert max(known.seconds) == pytest.approx(1.01)


def test_an_interrupted_image(said):
    forge = Forge()
    forge.image([1.0] * 8)

    class InterruptedException(BaseException):
        pass

    def interrupted(model, x, t):
        raise InterruptedException

    forge.moved()
    forge.call(1.0)
    forge.call(1.0)
    with pytest.raises(InterruptedException):
        forge.timer.apply_model(interrupted, forge.model, forge.kinds[2, 64, CARD], 1.0)
    forge.now += 900
    forge.call(1.0)
    forge.call(1.0)
    assert said() == []


def test_a_preview_that_another_thread_decodes(said):
    forge = Forge()
    forge.image([1.0] * 8)
    forge.moved()
    begun, end = threading.Event(), threading.Event()

    def preview():
        with forge.journal.phase(Phase.VAE_DECODE):
            begun.set()
            end.wait(10)

    thread = threading.Thread(target=preview)
    forge.call(1.0)
    forge.call(1.0)
    thread.start()
    assert begun.wait(10)
    forge.call(9.0)
    end.set()
    thread.join()
    forge.call(9.0)
    forge.call(1.0)
    forge.call(1.0)
    assert said() == []


CHANGES = {
    "rows": lambda forge, how: how | {"rows": 4},
    "size": lambda forge, how: how | {"size": 128},
    "a ControlNet": lambda forge, how: how | {"control": {"output": []}},
    "another model": lambda forge, how: how | {"model": forge.new_model()},
    "less of it on the card": lambda forge, how: setattr(forge.memory, "on_device", 2 * GB) or how,
    "a LoRA": lambda forge, how: setattr(forge.model.lora_loader, "loaded_hash", "[('a',)]") or how,
    "nothing": lambda forge, how: how,
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_has_another_usual_time(said, change):
    forge = Forge()
    how = {"rows": 2, "size": 64}
    forge.image([1.0] * 10, **how)
    how = CHANGES[change](forge, how)
    forge.image([30.0] * 10, **how)
    assert bool(said()) is (change == "nothing")
    forge.image([300.0] * 3, **how)
    assert bool(said()) is (change != "nothing"), "it has a time of its own, and that is known by now"


def with_report(forge, strength, mode=LoraMode.AUTOMATIC, label="style"):
    report = SimpleNamespace(loras=[SimpleNamespace(label=label, strength=strength)])
    setattr(forge.model.lora_loader, STATE, SimpleNamespace(mode=mode, report=report))
    forge.model.lora_loader.loaded_hash = str(strength)


def test_another_strength_is_no_other_configuration_and_another_mode_is(said):
    forge = Forge()
    for strength in (0.1, 0.5, 0.9):
        with_report(forge, strength)
        forge.image([1.0] * 3)
    (known,) = forge.times._histories.values()
    assert len(known.seconds) == 9
    with_report(forge, 0.9, LoraMode.MERGE)
    forge.image([1.0] * 3)
    with_report(forge, 0.9, label="other")
    forge.image([1.0] * 3)
    assert len(forge.times._histories) == 3


@pytest.mark.parametrize(
    ("grown_mb", "level", "keys"),
    [
        (1200, "WARNING", ["spill.slow", "spill.spilled", "spill.setting", "spill.lower"]),
        (100, "INFO", ["spill.slow", "spill.not_grown"]),
    ],
)
def test_windows_counters_decide(said, caplog, grown_mb, level, keys):
    forge = Forge(shared=300)
    forge.image([1.0] * 10)
    forge.moved()
    forge.shared_mb += grown_mb
    forge.image([10.0] * 3)
    if grown_mb == 1200:
        assert str(message_of(caplog.records[-1])) == "or lower 'GPU Weights' by 1280 MB", "whole steps of the slider"
        assert "from 300 to 1500 MB" in message_of(caplog.records[1])
    assert said() == [(level, key) for key in keys]


def spilling(forge, seconds, grown_mb, **how):
    """An image whose first step does not fit: what the driver moves stays moved until its end."""
    forge.moved()
    forge.call(8.0, **how)
    forge.shared_mb += grown_mb
    for one in seconds:
        forge.call(one, **how)
    forge.shared_mb -= grown_mb


def test_what_spills_from_the_first_step_on_is_said_without_a_usual_time(said, caplog):
    forge = Forge(shared=300)
    spilling(forge, [6.0] * 5, 900)
    assert [str(message_of(record)) for record in caplog.records][:2] == [
        "VRAM did not last for this picture from its first steps on: a step takes 6.0 s",
        "VRAM is too full: the graphics driver moved a part of it into system memory (shared GPU memory went from 300 to 1200 MB)",
    ]
    at_once = [("WARNING", f"spill.{key}") for key in ("at_once", "spilled", "setting", "lower")]
    assert said() == at_once
    # Once for a configuration; another picture size is another one.
    spilling(forge, [6.0] * 5, 900)
    assert said() == []
    spilling(forge, [6.0] * 5, 900, size=128)
    assert said() == at_once
    # What was slow did not become the usual: with room again, and then without, it is slow.
    forge.image([1.0] * 6, size=96)
    spilling(forge, [6.0] * 3, 900, size=96)
    assert said() == [("WARNING", f"spill.{key}") for key in ("slow", "spilled", "setting", "lower")]


@pytest.mark.parametrize(("shared", "grown_mb", "seconds"), [(300, 200, 6.0), (300, 900, 0.3), (-2000, 900, 6.0)])
def test_without_evidence_first_steps_are_only_what_they_take(said, shared, grown_mb, seconds):
    """Pinned memory comes and goes in small parts; quick steps are nobody's trouble; counters may not answer."""
    spilling(Forge(shared=shared), [seconds] * 5, grown_mb)
    assert said() == []


def test_counters_that_do_not_answer_leave_it_at_likely(said):
    forge = Forge(shared=-1)
    forge.image([1.0] * 10)
    forge.image([10.0] * 3)
    assert said() == SPILL


def test_where_no_driver_spills_a_slow_step_is_not_alarming(said):
    forge = Forge(spills=False)
    forge.image([1.0] * 10)
    forge.image([10.0] * 3)
    assert said() == [("INFO", "spill.slow"), ("INFO", "spill.other")]


def test_a_card_of_another_maker_has_no_such_setting(said, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.1")
    forge = Forge()
    forge.image([1.0] * 10)
    forge.image([10.0] * 3)
    assert said() == SPILL[:2]


def test_it_is_said_once_of_a_configuration_though_steps_recover(said):
    forge = Forge()
    forge.image([1.0] * 10)
    forge.image([8.0, 8.0, 1.0, 8.0, 8.0, 1.0] * 5)
    assert said() == SPILL
    forge.image([1.0] * 10, size=128)
    forge.image([8.0] * 3, size=128)
    assert said() == SPILL, "of this one it was not said"


def test_what_a_step_costs():
    """One look at the clock a call, one at the model a run, one at the counters a run and a second."""
    forge = Forge(shared=300)
    for _ in range(5):
        forge.moved()
        for _ in range(200):
            forge.call(0.04)
    assert (forge.clock_reads, forge.memory.asked) == (1000, 5)
    assert 5 * 8 <= forge.shared_reads <= 5 * 200 * 0.05 + 10
    forge.shared_reads = 0
    forge.image([0.6] * 10)
    assert forge.shared_reads == 1 + 11, "a step that may be a slow one is looked at"


def test_on_a_cpu_nothing_is_looked_at(said):
    forge = Forge(shared=300)
    forge.image([1.0] * 10, device=RAM)
    forge.image([100.0] * 10, device=RAM)
    assert (forge.clock_reads, forge.memory.asked, forge.shared_reads) == (0, 0, 0)
    assert said() == []


@pytest.mark.parametrize("broken", ["module_size", "counters"])
def test_an_alarm_that_is_broken_stops_no_image(said, broken):
    forge = Forge(shared=300)
    if broken == "module_size":
        forge.memory.module_size = lambda *_, **__: 1 / 0
    else:
        forge.timer._shared_usage = no_look
    forge.image([1.0] * 10)
    forge.image([30.0] * 10)
    assert said() == []


def test_two_that_sample_at_the_same_time_are_not_timed(said):
    forge = Forge()
    forge.image([1.0] * 10)
    forge.moved()
    forge.call(1.0)
    with forge.timer._lock:
        forge.call(50.0)
    forge.call(1.0)
    forge.call(1.0)
    assert said() == []


def test_the_step_is_written_in_the_journal_and_passes_everything_on(tmp_path, monkeypatch):
    class KModel:
        def apply_model(self, x, t, c_concat=None, control=None, **kwargs):
            assert begun == [self]
            phases.append([one.phase for one in journal.recorder._open])
            return self, x, t, c_concat, kwargs

    phases, hooks, model, begun = [], HookSet(), KModel(), []
    monkeypatch.setattr(step_timer, "AHEAD", SimpleNamespace(step_begins=begun.append, step_ends=begun.clear))
    journal = Journal(no_look, FlightRecorder.open(tmp_path))
    timer = StepTimer(FakeMemory(), journal, stack_of)
    hooks.add(KModel, "apply_model", timer.apply_model)
    x = torch.zeros(1)
    assert model.apply_model(x, 2, c_concat=3, guidance=4) == (model, x, 2, 3, {"guidance": 4})
    assert model.apply_model(x=x, t=2) == (model, x, 2, None, {})
    assert phases == [[Phase.SAMPLING_STEP]] * 2
    assert begun == []
    assert journal.others == 0
    hooks.restore()
    journal.recorder.close()


def test_by_itself_it_asks_the_system_what_its_driver_does(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert StepTimer(FakeMemory(), None, stack_of)._times._driver_spills
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.1")
    assert not StepTimer(FakeMemory(), None, stack_of)._times._driver_spills
