"""Free VRAM as Forge asks for it, where torch may call free what other programs hold."""

import types

import pytest
import torch

from lib_lora_guard.hosts.webui import free_memory as forge_free
from lib_lora_guard.hosts.webui.free_memory import FreeMemory

CARD, MB = torch.device("cuda", 0), 1 << 20


class Driver:
    """NVML's number, and how often it was asked."""

    def __init__(self, free_mb):
        self.free_mb, self.asked = free_mb, 0

    def memory(self, device):
        self.asked += 1
        return types.SimpleNamespace(
            free=types.SimpleNamespace(bytes=None if self.free_mb is None else self.free_mb * MB)
        )


@pytest.fixture
def asked(monkeypatch):
    """Asks for free memory where torch says 10,000 MB, 500 of them its own; `told`: the rules that were said."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2_500 * MB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2_000 * MB)
    told = []

    def ask(free, device=CARD, pair=False):
        found = (10_000 * MB, 500 * MB) if pair else 10_000 * MB
        return free.get_free_memory(lambda *a, **k: found, device)

    def made(driver):
        memory = types.SimpleNamespace(get_torch_device=lambda: CARD)
        rule_log = types.SimpleNamespace(tell=lambda finding: finding and told.append(finding.rule))
        free = FreeMemory(memory, rule_log)
        free.nvml = driver
        return free

    return types.SimpleNamespace(ask=ask, made=made, told=told)


def test_what_the_driver_says_counts_with_what_torch_holds(asked):
    free = asked.made(Driver(4_000))
    assert not free.is_believed, "nobody has asked yet"
    assert asked.ask(free) == (4_000 + 500) * MB
    assert free.is_believed
    assert asked.ask(free, pair=True) == ((4_000 + 500) * MB, 500 * MB)
    assert asked.told == ["LG-R07"]


def test_a_mute_driver_leaves_torchs_number_which_is_not_believed(asked):
    free = asked.made(Driver(None))
    assert asked.ask(free) == 10_000 * MB
    assert not free.is_believed


def test_where_drivers_do_not_spill_nobody_is_asked(asked):
    free = asked.made(None)
    assert asked.ask(free) == 10_000 * MB
    assert free.is_believed


def test_the_driver_is_asked_once_in_a_while_and_for_cards_alone(asked, monkeypatch):
    driver = Driver(4_000)
    free, now = asked.made(driver), [100.0]
    monkeypatch.setattr(forge_free.time, "monotonic", lambda: now[0])
    assert asked.ask(free, torch.device("cpu")) == 10_000 * MB
    assert driver.asked == 0
    for _ in range(50):
        assert asked.ask(free, None) == 4_500 * MB
    assert driver.asked == 1
    now[0] += 1.1
    driver.free_mb = 6_000
    assert asked.ask(free) == 6_500 * MB
    assert driver.asked == 2
