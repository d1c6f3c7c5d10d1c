"""The panel's buttons: nothing while an image is made, each says what came of it, and a bug report has no names."""

import logging
import threading
from types import SimpleNamespace

import pytest

from lib_lora_guard.messages import Message
from lib_lora_guard.reporting.bug_report import HIDDEN, bug_report, without_names
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.reporting.ring import Line
from lib_lora_guard.runtime import doings
from lib_lora_guard.runtime.corrections import Corrections
from lib_lora_guard.runtime.doings import Action, act
from lib_lora_guard.settings import Settings
from lib_lora_guard.units import GB, MB


class Guard:
    def __init__(self, free=(GB, 3 * GB)):
        self.free, self.done = list(free), []

    def snapshot(self):
        return SimpleNamespace(vram_free=SimpleNamespace(bytes=self.free.pop(0)), readings=list)

    def free_vram(self):
        self.done.append("vram")

    def drop_caches(self):
        self.done.append("ram")
        return 5 * MB

    def reports(self):
        return (ApplyReport("KModel", [LoraReport("secret.safetensors", 1.0)], 0, 0, 12.3),)


@pytest.mark.parametrize(
    ("action", "free", "said"),
    [
        (Action.FREE_VRAM, (GB, 3 * GB), "2048 MB of VRAM freed, 3.0 GB are free now"),
        (Action.FREE_VRAM, (3 * GB, GB), "0 MB of VRAM freed, 1.0 GB are free now"),
        (Action.FREE_VRAM, (None, None), "models were moved away; there is no card whose VRAM could be read"),
        (Action.FREE_RAM, (), "5 MB of kept files and copies given back"),
        (Action.FORGET, (), "corrections forgotten: 0"),
    ],
)
def test_a_button_says_what_came_of_it(action, free, said):
    lock = threading.Lock()
    assert act(action, Guard(free), lock, Corrections()) == said
    assert lock.acquire(blocking=False), "the host can go on"


def test_nothing_is_done_while_an_image_is_made():
    guard, lock = Guard(), threading.Lock()
    with lock:
        assert act(Action.FREE_VRAM, guard, lock) == "an image is being made; try again when it is done"
    assert guard.done == []
    assert act(Action.FREE_VRAM, None, lock) == "LoRA Guard is not at work"


def test_a_failure_is_said_and_the_host_goes_on(monkeypatch):
    guard, lock = Guard(), threading.Lock()
    monkeypatch.setattr(guard, "free_vram", lambda: 1 / 0)
    assert act(Action.FREE_VRAM, guard, lock).startswith("it failed (ZeroDivisionError: ")
    assert lock.acquire(blocking=False)


def test_corrections_are_forgotten_with_and_without_a_card_in_use(tmp_path):
    from lib_lora_guard.memory.calibration import FILE_NAME, Calibration, Key, Kind

    def measured():
        kept = Calibration(tmp_path / FILE_NAME, "card", "2.3")
        for _ in range(3):
            kept.record(Key(Kind.LOAD, "SDXL", "bf16"), 1000, 1100)
        return kept

    measured()
    corrections = Corrections(tmp_path)
    assert corrections.forget() == 1
    assert not (tmp_path / FILE_NAME).exists()
    corrections._kept = measured()
    assert corrections.bytes(Key(Kind.LOAD, "SDXL", "bf16"), 1000) > 0
    assert corrections.forget() == 1
    assert corrections.bytes(Key(Kind.LOAD, "SDXL", "bf16"), 1000) == 0


NAME = "/home/me/my face.safetensors"


def test_a_bug_report_has_the_numbers_and_no_names():
    inner = Message("lora.made_for", {"lora": "SDXL", "model": NAME})
    said = Message("host.left_out", {"name": NAME, "why": inner})
    lines = [
        Line(1, 0.0, "INFO", f"plain text about {NAME}"),
        Line(2, 0.0, "WARNING", said, f"FileNotFoundError: {NAME}"),
        Line(3, 0.0, "INFO", Message("memory.shrunk", {"size_mb": 730.0, "model": "KModel"})),
    ]
    text = bug_report([("LoRA Guard", "1")], lines)
    assert "face" not in text
    assert "home" not in text
    head, blank, warning, info, end = text.split("\n")
    assert (head, blank, end) == ("LoRA Guard: 1", "", "")
    assert warning.startswith(f"warning: {HIDDEN}")
    assert warning.endswith("(FileNotFoundError)")
    assert info == "info: 730 MB of KModel leave the card for what comes; the rest of it stays"
    assert without_names("text") == HIDDEN


def test_the_report_has_versions_settings_and_flags(monkeypatch):
    ring = doings.current_ring()
    logging.getLogger("lib_lora_guard").warning("about %s", NAME)
    assert ring.since(0)
    text = doings.report_text(Guard([1]), Settings(), "Forge f2", ["--listen"])
    facts = dict(line.partition(": ")[::2] for line in text.split("\n\n")[0].split("\n"))
    assert (facts["host"], facts["flags"], facts["at work"]) == ("Forge f2", "--listen", "Guard")
    assert "mode=Automatic" in facts["settings"]
    assert facts["LoRAs"] == "KModel: 1 LoRAs, 0 refused, 12 ms"
    assert "secret" not in text
    assert "my face" not in text
