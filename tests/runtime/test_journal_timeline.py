"""The journal's looks at the memory are the samples of the panel's curve: no look is taken for the curve alone in a step."""

import pytest

from lib_lora_guard.memory.readings import MemorySnapshot, Reading
from lib_lora_guard.messages import Message
from lib_lora_guard.recorder.flight_recorder import KEPT_FREE, Phase
from lib_lora_guard.runtime import journal as journals
from lib_lora_guard.runtime.journal import Journal
from lib_lora_guard.units import MB

NAMES = [name for name in MemorySnapshot.__dataclass_fields__ if name != "system"]
CARD = {"vram_total": 12000, "vram_free": 5000, "vram_reserved": 6000, "vram_active": 5500}


@pytest.fixture
def looks():
    return []


@pytest.fixture
def journal(looks):
    def look():
        looks.append(len(looks))
        known = {**CARD, "ram_total": 32000, "ram_available": 20000 - len(looks)}
        missing = Message("readings.cuda_not_started")
        readings = {
            name: Reading(known[name] * MB, "x") if name in known else Reading(None, "x", missing) for name in NAMES
        }
        return MemorySnapshot("Linux", **readings)

    return Journal(look)


def rows(journal):
    return [
        (one.phase, one.levels.vram_bytes // MB, one.levels.ram_bytes // MB, (one.promised_bytes or 0) // MB)
        for one in journal.timeline.since(0)
    ]


def test_phases_begin_and_end_with_a_sample_and_a_load_promises(journal, looks):
    with journal.image():
        with journal.phase(Phase.ENCODE_PROMPT), journal.phase(Phase.MOVE_TO_GPU, plan={KEPT_FREE: 2000 * MB}):
            pass
        with pytest.raises(ZeroDivisionError), journal.phase(Phase.VAE_DECODE):
            raise ZeroDivisionError
    # In use without what torch only keeps, and what the plan leaves free.
    promised = 12000 - 5000 - (6000 - 5500) + 2000
    assert rows(journal) == [
        ("encode_prompt", 7000, 12001, 0),
        ("move_to_gpu", 7000, 12002, 0),
        ("encode_prompt", 7000, 12003, promised),
        ("", 7000, 12004, promised),
        ("vae_decode", 7000, 12005, promised),
        ("", 7000, 12006, promised),
        ("", 7000, 12007, promised),
    ]
    (image,) = journal.timeline.images()
    assert (image.peak_bytes, image.promised_bytes) == (7000 * MB, promised * MB)
    assert image.ended is not None


def test_steps_are_looked_at_once_in_a_while(journal, looks, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journals.time, "monotonic", lambda: now[0])
    for _ in range(30):
        with journal.phase(Phase.SAMPLING_STEP):
            now[0] += 0.1
    assert len(looks) == 3
    assert (journal.timeline.now().phase, journal.timeline.now().calls) == ("sampling_step", 30)


def test_the_steps_begin_on_the_curve_even_where_the_memory_was_looked_at_a_moment_ago(journal, looks, monkeypatch):
    monkeypatch.setattr(journals.time, "monotonic", lambda: 100.0)
    with journal.phase(Phase.MOVE_TO_GPU):
        pass
    for _ in range(3):
        with journal.phase(Phase.SAMPLING_STEP):
            pass
    assert len(looks) == 2
    assert [row[0] for row in rows(journal)] == ["move_to_gpu", "", "sampling_step"]
    assert rows(journal)[2][1:] == rows(journal)[1][1:]


def test_a_promise_is_no_more_than_the_card(journal):
    with journal.phase(Phase.MOVE_TO_GPU, plan={KEPT_FREE: 99000 * MB}):
        pass
    assert journal.timeline.since(0)[-1].promised_bytes == 12000 * MB


@pytest.mark.parametrize("look", [lambda: None, lambda: 1 / 0])
def test_without_numbers_there_are_no_samples_and_no_error(look):
    journal = Journal(look)
    with journal.image(), journal.phase(Phase.MERGE):
        pass
    assert [sample.levels.vram_bytes for sample in journal.timeline.since(0)] == [None]
    assert len(journal.timeline.images()) == 1
