"""The log ring: bounded, in order, cleaned, folded, and never in the way of whoever logs."""

import gc
import logging
import sys
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machine_speed import CpuTime

from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.messages import Joined, Message, say
from lib_lora_guard.reporting import log as reporting_log
from lib_lora_guard.reporting.ring import ALIKE_LINES, LINE_CHARACTERS, LogRing


@pytest.fixture
def ring():
    return LogRing()


@pytest.fixture
def log(ring):
    logger = logging.Logger("lib_lora_guard.test", logging.DEBUG)
    logger.addHandler(ring)
    return logger


@pytest.fixture
def package_logger():
    """The package's logger without handlers, as in a new process."""
    logger = logging.getLogger("lib_lora_guard")
    logger.handlers.clear()
    return logger


def texts(ring, language="en"):
    return [line.text(language) for line in ring.since(0)]


def test_a_line_has_its_source_time_and_text_in_both_languages(log, ring):
    before = time.time()
    log.info("plain %d", 1)
    say(log, logging.WARNING, "host.updated", version="1.2.3")
    plain, update = ring.since(0)
    assert (plain.number, plain.row, plain.level, plain.message, plain.error) == (1, 1, "INFO", "plain 1", None)
    assert (update.number, update.level, update.message.key) == (2, "WARNING", "host.updated")
    assert before <= plain.time <= update.time <= time.time()
    assert update.text() == update.text("en") == str(update.message)
    assert "1.2.3 is still running" in update.text("en")
    assert update.text("zh") == "LoRA Guard 已更新；请重启 Forge 以使用新版本（当前运行的仍是 1.2.3）"
    assert update.text("fr") == update.text("en")
    with pytest.raises(AttributeError):
        update.number = 7


def test_lines_are_given_from_a_number_on_oldest_first(log, ring):
    for number in range(10):
        log.info("line %d", number)
    assert [line.number for line in ring.since(7)] == [8, 9, 10]
    assert [line.number for line in ring.since(0, limit=4)] == [1, 2, 3, 4]
    assert [line.number for line in ring.since(4, limit=4)] == [5, 6, 7, 8]
    assert ring.since(10) == ring.since(99) == ring.since(3, limit=0) == ring.since(3, limit=-1) == ()
    assert ring.last == 10


def test_a_reader_who_fell_behind_goes_on_with_what_is_left(ring, log):
    small = LogRing(capacity_lines=5)
    log.addHandler(small)
    for number in range(20):
        log.info("line %d", number)
    assert [line.number for line in small.since(3)] == [16, 17, 18, 19, 20]


def test_the_bytes_are_bounded_whatever_is_logged(log):
    small = LogRing(capacity_bytes=20_000)
    log.addHandler(small)
    for number in range(200):
        log.info("%d %s", number, "x" * 10_000)
        assert small.bytes <= 20_000
    lines = small.since(0)
    assert len(lines) > 2
    assert lines[-1].number == 200
    assert all(len(line.text()) <= LINE_CHARACTERS for line in lines)
    small.clear()
    assert (small.bytes, small.since(0), small.last) == (0, (), 200)
    log.info("on")
    assert [line.number for line in small.since(0)] == [201]


def test_a_repeated_line_is_one_with_a_count_and_readers_see_it_grow(log, ring):
    for _ in range(3):
        say(log, logging.WARNING, "host.still_without", loras="a")
    (line,) = ring.since(0)
    assert (line.number, line.row) == (3, 1)
    assert line.text() == "still without a (x3)"
    assert line.text("zh") == "仍未应用：a（×3）"
    say(log, logging.WARNING, "host.still_without", loras="a")
    (again,) = ring.since(3)
    assert (again.number, again.row, again.text()) == (4, 1, "still without a (x4)")
    assert ring.bytes < 1000, "what was replaced counts no more"
    say(log, logging.WARNING, "host.still_without", loras="b")
    assert texts(ring) == ["still without a (x4)", "still without b"]
    log.info("same")
    log.warning("same")
    assert texts(ring)[2:] == ["same", "same"], "another level is another line"


def test_three_hundred_layers_share_a_line_after_the_first_ones(log, ring):
    for number in range(300):
        say(log, logging.ERROR, "memory.key_not_restored", key=f"blocks.{number}.weight")
    lines = ring.since(0)
    assert len(lines) == ALIKE_LINES + 1
    assert lines[0].text() == "blocks.0.weight could not be restored"
    left = 300 - ALIKE_LINES - 1
    assert lines[-1].text() == f"blocks.299.weight could not be restored (and {left} more of this kind)"
    assert lines[-1].text("zh") == f"blocks.299.weight 无法恢复（另有 {left} 条同类消息）"
    assert (lines[-1].number, lines[-1].row) == (300, ALIKE_LINES + 1)
    log.info("something else")
    say(log, logging.ERROR, "memory.key_not_restored", key="last")
    assert texts(ring)[-2:] == ["something else", "last could not be restored"]


def test_different_plain_lines_are_never_folded(log, ring):
    for number in range(100):
        log.info("line %d", number)
    assert len(ring.since(0)) == 100


def test_the_error_is_named_and_translated_where_it_is_ours(log, ring):
    for error in (LoraFileError.of("file.missing"), KeyError("lora_up")):
        try:
            raise error
        except Exception:
            say(log, logging.ERROR, "host.apply_failed", exc_info=True, model="Flux")
    ours, other = ring.since(0)
    assert ours.error.key == "file.missing"
    assert ours.text() == "Flux: applying LoRAs failed (no such file; check its name and folder, or refresh the list)"
    assert ours.text("zh") == "Flux：应用 LoRA 失败（文件不存在；请检查文件名与所在文件夹，或刷新列表）"
    assert other.error == "KeyError: 'lora_up'"
    assert other.text("zh") == "Flux：应用 LoRA 失败（KeyError: 'lora_up'）"


def test_text_from_files_is_made_harmless(log, ring):
    bad = "a\x1b[31m\n\u202eb" + "c" * 5000
    log.info("%s", bad)
    say(log, logging.INFO, "host.still_without", loras=Joined([bad, Message("lora.none", {"count": bad})]))
    for line in ring.since(0):
        for language in ("en", "zh"):
            assert line.text(language).isprintable()
            assert len(line.text(language)) < 3 * LINE_CHARACTERS


def test_nothing_that_was_logged_is_kept_alive(log, ring):
    class Model:
        def __str__(self):
            return "model"

    model = Model()
    gone = weakref.ref(model)
    try:
        raise ValueError(model)
    except ValueError:
        say(log, logging.ERROR, "host.still_without", exc_info=True, loras=Joined([model]))
    del model
    gc.collect()
    assert gone() is None
    assert texts(ring) == ["still without model (ValueError: model)"]


class Broken:
    def __str__(self):
        raise RuntimeError("planted")


def test_a_message_that_cannot_be_formatted_raises_nothing(log, ring):
    log.info("%s", Broken())
    log.info("%d", "not a number")
    log.info("too few %s %s", 1)
    say(log, logging.INFO, "report.lora", name="a", strength="not a number", used=1, skipped=0)
    say(log, logging.INFO, "host.still_without")
    lines = texts(ring)
    assert lines[:3] == [
        "a log line could not be kept (RuntimeError)",
        "a log line could not be kept (TypeError) (x2)",
        lines[2],
    ]
    assert "not a number" in lines[2]
    assert lines[3].startswith("still without {loras}")


def test_an_image_is_not_held_up(log, ring):
    """Measured 60 us a line on the development machine; forty times that is allowed."""
    with CpuTime(1000 * 2.4e-3):
        for number in range(1000):
            say(log, logging.INFO, "host.keys_for", name=f"{number}", count=number, side=Message("host.unet"))


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["plain", "say", "clear", "long"])), min_size=1, max_size=60
    ),
    capacity=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_a_reader_that_polls_ends_with_the_lines_of_the_ring(steps, capacity):
    """A reader that polls after every step, replacing rows, holds the ring's lines at the end."""
    ring = LogRing(capacity_lines=capacity, capacity_bytes=8000)
    log = logging.Logger("x", logging.DEBUG)
    log.addHandler(ring)
    rows, seen = {}, 0
    for value, kind in steps:
        if kind == "clear":
            ring.clear()
        elif kind == "say":
            say(log, logging.INFO, "host.still_without", loras=str(value))
        else:
            log.info("%s", str(value) * (3000 if kind == "long" else 1))
        new = ring.since(seen)
        assert all(line.number > seen for line in new)
        rows |= {line.row: line for line in new}
        seen = ring.last
        lines = ring.since(0)
        assert len(lines) <= capacity
        assert ring.bytes <= 8000 or len(lines) == 1
        assert [line.number for line in lines] == sorted({line.number for line in lines})
        assert all(rows[line.row] == line for line in lines)


def test_threads_lose_nothing_and_never_wait_for_readers_to_finish():
    ring = LogRing(capacity_lines=100_000, capacity_bytes=1 << 30)
    log = logging.Logger("x", logging.DEBUG)
    log.addHandler(ring)
    writers, count, problems, stop = 8, 250, [], threading.Event()

    def write(writer):
        for number in range(count):
            log.info("%d:%d", writer, number)

    def read():
        seen = []
        while True:
            ended = stop.is_set()
            new = ring.since(seen[-1].number if seen else 0, limit=37)
            seen += new
            if ended and not new:
                break
        if [line.number for line in seen] != list(range(1, writers * count + 1)):
            problems.append("numbers")
        for writer in range(writers):
            said = [line.message for line in seen if line.message.startswith(f"{writer}:")]
            if said != [f"{writer}:{number}" for number in range(count)]:
                problems.append(writer)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        readers = [threading.Thread(target=read) for _ in range(2)]
        threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
        for thread in readers + threads:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        for thread in readers:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []


def test_the_logger_has_one_ring_for_good(package_logger, capsys):
    ring = reporting_log.current_ring()
    assert reporting_log.current_ring() is ring
    reporting_log.set_up("info")
    say(logging.getLogger("lib_lora_guard.hosts.x"), logging.INFO, "host.in_place", version="1")
    boot = ring.boot
    reporting_log.set_up("warning", "zh")
    assert reporting_log.current_ring() is ring
    assert (ring.boot, texts(ring)) == (boot, ["1 in place of Forge's LoRA patcher"])
    assert len(boot) >= 16
    assert LogRing().boot != boot
    say(logging.getLogger("lib_lora_guard.hosts.x"), logging.INFO, "host.in_place", version="2")
    assert len(ring.since(0)) == 1, "what the level leaves out is not kept either"
    assert len([h for h in package_logger.handlers if getattr(h, "lora_guard", False)]) == 1
    assert len([h for h in package_logger.handlers if isinstance(h, LogRing)]) == 1
    capsys.readouterr()


def test_the_console_speaks_the_language_and_english_where_it_cannot_show_it(package_logger, monkeypatch):
    class Console:
        def __init__(self, encoding):
            self.encoding, self.text = encoding, ""

        def write(self, text):
            text.encode(self.encoding)
            self.text += text

        def flush(self):
            pass

    for encoding, expected in (
        ("utf-8", "[LoRA Guard] warning: LoRA Guard 已更新；"),
        ("gbk", "[LoRA Guard] warning: LoRA Guard 已更新；"),
        ("cp1252", "[LoRA Guard] warning: LoRA Guard was updated;"),
    ):
        console = Console(encoding)
        monkeypatch.setattr(sys, "stdout", console)
        package_logger.handlers.clear()
        logger = reporting_log.set_up("info", "zh")
        say(logger, logging.WARNING, "host.updated", version="1")
        assert console.text.startswith(expected)
        logger.warning("a name nobody can show: %s", "\U0001f9e8")
        assert "a name nobody can show" in console.text
    reporting_log.set_up("info", "en")
    say(logger, logging.WARNING, "host.updated", version="1")
    assert "was updated" in console.text
