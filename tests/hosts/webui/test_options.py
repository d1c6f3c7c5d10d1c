"""The settings in Forge's options: what they ask for, and that they are carried out while no image is made."""

import logging
import threading

import pytest
import torch
from support.page_locks import pinned_by

from lib_lora_guard import settings
from lib_lora_guard.errors import HostError, Message
from lib_lora_guard.hosts.webui.options import GuardOptions
from lib_lora_guard.memory import Reading, shares
from lib_lora_guard.reporting import log as reporting_log
from lib_lora_guard.runtime import installed
from lib_lora_guard.runtime.live_settings import LiveSettings, mode_of
from lib_lora_guard.runtime.ram_copies import RamCopies
from lib_lora_guard.settings import Language, LoraMode, Settings


class Takeover:
    """What the options reach for, and nothing else."""

    def __init__(self):
        self.settings, self.misfits = LiveSettings(), []
        self.copies = RamCopies(self.settings.pins_swapped)

    def settings_changed(self):
        pass

    def install_in_webui(self):
        return self.misfits


class Guard:
    """In the place of `runtime.installed`."""

    def __init__(self):
        self.takeover, self.calls, self.misfits = Takeover(), [], []

    def installed(self):
        return self.takeover

    def install(self):
        self.calls.append("install")
        self.takeover = Takeover()
        self.takeover.misfits = self.misfits
        return self.takeover

    def uninstall(self):
        self.calls.append("uninstall")
        self.takeover = None


@pytest.fixture
def guard(monkeypatch):
    guard = Guard()
    for name in ("installed", "install", "uninstall"):
        monkeypatch.setattr(installed, name, getattr(guard, name))
    reporting_log.set_up("info")  # as at the start of a host
    return guard


def test_without_options_a_new_user_gets_the_defaults():
    assert settings.read({}) == (Settings(), [])
    assert settings.read({"lora_guard_mode": None, "sd_lora": "None"}) == (Settings(), [])


def test_every_option_is_read_in_its_type():
    options = {
        "lora_guard_enable": False,
        "lora_guard_mode": "fp16 LoRA",
        "lora_guard_kept_files_mb": 512.0,
        "lora_guard_log_level": "debug",
        "lora_guard_language": "zh",
        "lora_guard_expandable_segments": True,
        "lora_guard_max_split_size_mb": 128,
        "lora_guard_garbage_collection_threshold": 0.8,
        "lora_guard_plan_residency": False,
    }
    wanted = Settings(False, LoraMode.FP16, 512, "debug", Language.CHINESE, True, 128, 0.8, False)
    read, wrong = settings.read(options)
    assert (read, wrong) == (wanted, [])
    assert isinstance(read.kept_files_mb, int)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable", "yes"),
        ("mode", "merge"),
        ("mode", 3),
        ("kept_files_mb", -1),
        ("kept_files_mb", 1.5),
        ("kept_files_mb", float("nan")),
        ("kept_files_mb", "many"),
        ("log_level", "loud"),
        ("language", "fr"),
        ("max_split_size_mb", float("inf")),
        ("garbage_collection_threshold", 1.0),
        ("garbage_collection_threshold", [0.5]),
    ],
)
def test_a_value_that_makes_no_sense_is_named_and_the_default_holds(name, value):
    assert settings.read({f"lora_guard_{name}": value}) == (Settings(), [f"lora_guard_{name}"])


@pytest.mark.parametrize(
    ("own", "low_bits", "mode"),
    [
        (None, None, "Automatic"),
        (None, "Automatic", "Automatic"),
        (None, "Automatic (fp16 LoRA)", "fp16 LoRA"),
        ("Automatic", "bnb-nf4 (fp16 LoRA)", "fp16 LoRA"),
        ("Merge", "float8-e4m3fn (fp16 LoRA)", "Merge"),
        ("Forge's own", "Automatic (fp16 LoRA)", "Forge's own"),
        ("nonsense", "Automatic (fp16 LoRA)", "fp16 LoRA"),
    ],
)
def test_the_wish_of_forges_dropdown_counts_where_our_setting_leaves_it_open(own, low_bits, mode):
    assert mode_of({"lora_guard_mode": own, "forge_unet_storage_dtype": low_bits}).value == mode


def test_the_takeover_asks_the_options_each_time(guard, monkeypatch):
    options = {}
    GuardOptions(options, threading.Lock()).apply()
    live = guard.takeover.settings
    assert (live.mode(), live.is_host_reading(), live.kept_files()) == (LoraMode.AUTOMATIC, False, 0)
    options |= {"lora_guard_mode": "Forge's own", "lora_in_memory_limit": 3}
    assert (live.mode(), live.is_host_reading(), live.kept_files()) == (LoraMode.OWN, True, 3)
    monkeypatch.setattr(shares, "read_ram", lambda: (Reading(16 << 30, Message("memory.ram")), None))
    shares.usual_kept_files_mb.cache_clear()
    assert live.kept_files_bytes() == 2048 << 20, "an eighth of the RAM"
    monkeypatch.undo()
    shares.usual_kept_files_mb.cache_clear()
    options["lora_guard_kept_files_mb"] = 512
    assert live.kept_files_bytes() == 512 << 20


def test_the_level_on_the_command_line_wins(guard):
    GuardOptions({"lora_guard_log_level": "debug"}, threading.Lock(), log_level_flag="error").apply()
    assert logging.getLogger("lib_lora_guard").level == logging.ERROR
    GuardOptions({"lora_guard_log_level": "debug"}, threading.Lock()).apply()
    assert logging.getLogger("lib_lora_guard").level == logging.DEBUG


def test_switched_off_and_on_while_nothing_runs(guard):
    options, lock = {"lora_guard_enable": False}, threading.Lock()
    guard_options = GuardOptions(options, lock)
    guard_options.apply()
    assert guard.calls == ["uninstall"]
    guard_options.apply()
    assert guard.calls == ["uninstall"]
    options["lora_guard_enable"] = True
    guard_options.apply()
    assert guard.calls == ["uninstall", "install"]
    assert guard.takeover.settings.mode() is LoraMode.AUTOMATIC
    assert not lock.locked()


def test_what_does_not_fit_is_said_when_it_is_switched_on_late_too(guard, caplog):
    options = {"lora_guard_enable": False}
    guard_options = GuardOptions(options, threading.Lock())
    guard_options.apply()
    guard.misfits.append(HostError("networks.foo is missing"))
    options["lora_guard_enable"] = True
    guard_options.apply()
    assert any("networks.foo is missing" in r.getMessage() for r in caplog.records if r.levelname == "WARNING")


def test_while_an_image_is_made_it_waits_and_switching_back_meanwhile_changes_nothing(guard):
    options, lock = {"lora_guard_enable": False}, threading.Lock()
    guard_options = GuardOptions(options, lock)
    with lock:
        guard_options.apply()
        assert guard.calls == []
        options["lora_guard_enable"] = True
        guard_options.apply()
        waiting = [t for t in threading.enumerate() if t.name == "lora-guard-switch"]
        assert len(waiting) == 1
    waiting[0].join(10)
    assert guard.calls == []
    with lock:
        options["lora_guard_enable"] = False
        guard_options.apply()
        waiting = [t for t in threading.enumerate() if t.name == "lora-guard-switch"]
    waiting[0].join(10)
    assert guard.calls == ["uninstall"]
    assert not lock.locked()


def test_pinned_ram_that_was_switched_off_is_given_back_when_no_image_reads_it(guard):
    options, lock, layer = {}, threading.Lock(), torch.nn.Linear(1, 1)
    guard_options = GuardOptions(options, lock)
    guard_options.apply()
    driver = pinned_by(guard.takeover.copies, layer)
    guard_options.apply()
    assert driver.locked, "still wanted"
    options["lora_guard_pin_swapped"] = False
    with lock:
        guard_options.apply()
        assert driver.locked
        waiting = [t for t in threading.enumerate() if t.name == "lora-guard-switch"]
    waiting[0].join(10)
    assert driver.locked == {}
    assert not lock.locked()
    options["lora_guard_pin_swapped"] = True
    driver = pinned_by(guard.takeover.copies, layer)
    with lock:
        options["lora_guard_pin_swapped"] = False
        guard_options.apply()
        options["lora_guard_pin_swapped"] = True
        waiting = [t for t in threading.enumerate() if t.name == "lora-guard-switch"]
    waiting[0].join(10)
    assert driver.locked, "switched on again meanwhile"


def test_a_switch_that_fails_is_told_and_gives_the_lock_back(guard, monkeypatch, caplog):
    def broken():
        raise RuntimeError("planted")

    monkeypatch.setattr(installed, "uninstall", broken)
    lock = threading.Lock()
    GuardOptions({"lora_guard_enable": False}, lock).apply()
    assert not lock.locked()
    assert [r.getMessage() for r in caplog.records] == ["the setting could not be carried out"]
