"""The samples of the memory: bounded, each in its image, with what is being done now."""

import string
import threading

import pytest

from lib_lora_guard.messages import Message
from lib_lora_guard.messages.catalogue import TEXTS
from lib_lora_guard.reporting.curve import COLUMNS, curve_json
from lib_lora_guard.reporting.timeline import IMAGES, SAMPLES, STEP, Levels, Timeline, image_of
from lib_lora_guard.reporting.why import why
from lib_lora_guard.units import MB


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timeline(clock):
    return Timeline(clock)


def level(vram_mb, ram_mb=500):
    return Levels(vram_mb * MB, 12000 * MB, ram_mb * MB, 32000 * MB)


def an_image(timeline, clock, steps=3, step_seconds=2.0):
    """One second of each phase."""
    timeline.enter("load_checkpoint", level(100))
    clock.now += 1
    timeline.leave("load_checkpoint", level(100, 900))
    timeline.begin_image()
    timeline.enter("encode_prompt", level(200))
    timeline.enter("move_to_gpu", level(300))
    clock.now += 1
    timeline.leave("move_to_gpu", level(400), 700 * MB)
    timeline.leave("encode_prompt", level(400))
    for step in range(steps):
        timeline.enter(STEP, level(500) if step == 0 else None)
        clock.now += step_seconds
        timeline.leave(STEP)
    timeline.enter("vae_decode", level(500))
    clock.now += 1
    timeline.leave("vae_decode", level(650))
    timeline.end_image(level(550))


def test_a_sample_has_its_image_its_phase_and_what_was_promised(timeline, clock):
    an_image(timeline, clock)
    rows = [(row[2:4], row[4], row[6]) for row in curve_json(timeline, 0)["samples"]]
    assert rows == [
        ([1, "load"], 100.0, None),  # before the host says that an image begins
        ([1, ""], 100.0, None),
        ([1, "encode"], 200.0, None),
        ([1, "load"], 300.0, None),
        ([1, "encode"], 400.0, 700.0),  # what lay around it goes on
        ([1, ""], 400.0, 700.0),
        ([1, "steps"], 500.0, 700.0),
        ([1, "decode"], 500.0, 700.0),
        ([1, ""], 650.0, 700.0),
        ([1, ""], 550.0, 700.0),
    ]
    told = curve_json(timeline, 8)
    assert [row[0] for row in told["samples"]] == [9, 10]
    assert len(told["samples"][0]) == len(COLUMNS)
    assert (told["vram_total_mb"], told["ram_total_mb"]) == (12000.0, 32000.0)
    assert told["images"] == [{"number": 1, "begun": 1000.0, "ended": 1009.0, "peak_mb": 650.0, "promised_mb": 700.0}]
    assert curve_json(timeline, 99)["samples"] == []


def test_a_log_line_belongs_to_the_image_that_was_made_then(timeline, clock):
    an_image(timeline, clock)
    clock.now += 500
    an_image(timeline, clock)
    images = timeline.images()
    assert [image.begun for image in images] == [1000.0, 1509.0]
    assert [image_of(images, seconds) for seconds in (999.0, 1000.0, 1508.9, 1509.0, 9999.0)] == [0, 1, 1, 2, 2]
    assert image_of((), 1.0) == 0


def test_what_was_done_long_before_is_not_of_the_next_image(timeline, clock):
    timeline.enter("unload", level(1))
    timeline.leave("unload", level(1))
    clock.now += 3600
    timeline.begin_image()
    assert timeline.images()[0].begun == clock.now


def test_it_is_bounded(timeline, clock):
    for _ in range(SAMPLES // 8):
        an_image(timeline, clock)
    assert len(timeline.since(0, 1 << 30)) == SAMPLES
    assert len(timeline.images()) == IMAGES
    assert len(timeline.since(0, 3)) == 3


def test_now_is_the_innermost_phase_and_the_time_of_a_call(timeline, clock):
    assert timeline.now() is None
    timeline.begin_image()
    assert (timeline.now().phase, timeline.now().image) == ("", 1)
    timeline.enter("encode_prompt")
    timeline.enter("apply_lora")
    assert timeline.now().phase == "apply_lora"
    timeline.leave("apply_lora")
    assert timeline.now().phase == "encode_prompt"
    timeline.leave("encode_prompt")
    for seconds in (9.0, 2.0, 2.5):
        timeline.enter(STEP)
        clock.now += seconds
        timeline.leave(STEP)
    now = timeline.now()
    # The first call prepares what the others use.
    assert (now.phase, now.calls, now.call_seconds) == (STEP, 3, 2.0)
    timeline.enter("vae_decode")
    assert (timeline.now().phase, timeline.now().calls) == ("vae_decode", 0)
    timeline.leave("vae_decode")
    timeline.begin_image()  # a detailer's, inside
    timeline.end_image()
    assert timeline.images()[-1].ended is None
    timeline.end_image()
    assert (timeline.now(), len(timeline.images())) == (None, 1)
    timeline.end_image()
    assert timeline.now() is None


def test_a_phase_that_was_cut_off_ends_with_its_image(timeline):
    timeline.begin_image()
    timeline.enter("load_checkpoint", level(100))
    timeline.end_image()
    assert timeline.now() is None


def test_threads_may_read_and_write(timeline, clock):
    failed = []

    def work():
        try:
            for _ in range(50):
                an_image(timeline, clock)
                curve_json(timeline, 0)
                timeline.now()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    numbers = [sample.number for sample in timeline.since(0)]
    assert numbers == sorted(set(numbers))


def test_a_line_is_explained_with_its_own_numbers():
    line = Message("memory.shrunk", {"size_mb": 730.4, "model": "KModel"})
    said = "What comes next needs room, and moving 730 MB of KModel takes less time than moving all of it."
    assert why(line, "en") == said
    assert why(Message("log.repeated", {"message": line, "count": 2}), "en") == said
    assert "730 MB" in why(line, "zh")
    rule = Message("rule.line", {"rule": "LG-R06", "says": Message("rule.factors", {"size_mb": 146.0})})
    assert "146 MB here" in why(rule, "en")
    assert why("text", "en") is why(Message("panel.mode.off"), "en") is None
    assert why(Message("memory.shrunk", {"model": "KModel"}), "en") is None, "a line of another version"


def test_each_explanation_has_its_line_with_all_of_its_numbers():
    def names(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    explained = {key.removeprefix("why."): texts for key, texts in TEXTS.items() if key.startswith("why.")}
    assert len(explained) >= 9
    lacking = {key for key, texts in explained.items() if names(texts["en"]) - names(TEXTS[key]["en"])}
    assert lacking == set()
