"""Budgets follow from the numbers that are there, are never negative, never above the total, and None where they must be."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.memory.readings import DISAGREEMENT_BYTES, MemorySnapshot, Reading
from lib_lora_guard.messages import Message

GB = 1 << 30
WHY = Message("readings.not_counted")
MISSING = Reading(None, "test", WHY)
FIELDS = [field.name for field in dataclasses.fields(MemorySnapshot) if field.name != "system"]


def snapshot(system="Linux", **numbers):
    """A snapshot with `numbers` in GB; everything else is missing."""
    assert set(numbers) <= set(FIELDS)
    known = {name: Reading(round(number * GB), "test") for name, number in numbers.items()}
    return MemorySnapshot(system, **{name: known.get(name, MISSING) for name in FIELDS})


def in_gb(number):
    return None if number is None else number / GB


def test_a_reading_has_a_number_or_a_reason():
    assert (Reading(0, "test").bytes, MISSING.missing) == (0, "nothing counts it here")
    with pytest.raises(ValueError, match="a number or a reason, not None and None"):
        Reading(None, "test")
    with pytest.raises(ValueError, match="a number or a reason, not 1 and"):
        Reading(1, "test", WHY)


def test_readings_are_listed_by_name():
    listed = dict(snapshot(rss=1).readings())
    assert list(listed) == FIELDS
    assert (listed["rss"].bytes, listed["pinned"]) == (GB, MISSING)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"vram_free": 5, "vram_reserved": 4, "vram_active": 1}, 8),
        ({"vram_free": 5, "vram_reserved": 1, "vram_active": 4}, 5),
        ({"vram_free": 11, "vram_reserved": 4, "vram_active": 1}, 12),
        ({"vram_free": 5}, 5),
        ({"vram_free": 5, "vram_reserved": 4}, 5),
        ({"vram_free": 11.6, "vram_free_nvml": 4.5}, 4.5),
        ({"vram_free": 11, "vram_free_nvml": 4, "vram_reserved": 3, "vram_active": 1}, 6),
        ({"vram_free": 5, "vram_free_nvml": 4.75}, 5),
        ({"vram_free": 5, "vram_free_nvml": 4.74}, 4.74),
        ({"vram_free": 5, "vram_free_nvml": 7}, 5),
        ({"vram_free_nvml": 7}, 7),
        ({}, None),
        ({"vram_total": 0, "vram_free": 0}, 0),
    ],
    ids=[
        "what torch holds unused counts",
        "statistics that cross",
        "above the total",
        "no statistics",
        "half of the statistics",
        "Windows and another program",
        "what torch holds is ours in NVML's count too",
        "256 MB apart is the moment",
        "more than that is not",
        "NVML says more",
        "NVML alone",
        "nothing known",
        "a card without memory",
    ],
)
def test_usable_vram(numbers, expected):
    found = snapshot(**{"vram_total": 12, **numbers}).usable_vram_bytes
    assert in_gb(found) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("numbers", "floor", "expected"),
    [
        ({"ram_available": 16}, 4, 12),
        ({"ram_available": 16}, 20, 0),
        ({"ram_available": 16, "ram_cgroup_room": 6}, 4, 2),
        ({"ram_available": 16, "ram_cgroup_room": 60}, 4, 12),
        ({"ram_available": 100}, 0, 32),
        ({"ram_cgroup_room": 6}, 0, None),
        ({}, 0, None),
    ],
)
def test_fast_ram_is_physical_and_above_the_floor(numbers, floor, expected):
    assert in_gb(snapshot(ram_total=32, **numbers).fast_ram_bytes(floor * GB)) == expected


def test_swap_is_not_fast():
    plain = snapshot(ram_total=32, ram_available=3)
    swap = snapshot(ram_total=32, ram_available=3, swap_total=64, swap_free=64, ram_and_swap_cgroup_room=50)
    assert swap.fast_ram_bytes(0) == plain.fast_ram_bytes(0) == 3 * GB


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"ram_available": 3}, 3),
        ({"ram_available": 3, "swap_total": 8, "swap_free": 5}, 8),
        ({"ram_available": 3, "swap_total": 0, "swap_free": 0}, 3),
        ({"ram_available": 3, "swap_total": 8, "swap_free": 5, "ram_and_swap_cgroup_room": 4}, 4),
        ({"ram_available": 3, "swap_total": 8, "swap_free": 5, "ram_and_swap_cgroup_room": 40}, 8),
        ({"ram_available": 40, "swap_total": 8, "swap_free": 50}, 40),
        ({"ram_available": 3, "ram_and_swap_cgroup_room": 0}, 0),
        ({"swap_free": 5}, None),
    ],
)
def test_alive_on_linux_is_ram_and_swap_and_the_control_group(numbers, expected):
    assert in_gb(snapshot(ram_total=32, **numbers).alive_ram_bytes) == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"commit_limit": 20, "commit_charge": 17, "commit_room": 3}, 3),
        ({"commit_limit": 20, "commit_charge": 17, "commit_room": 1}, 1),
        ({"commit_limit": 20, "commit_charge": 17}, 3),
        ({"commit_limit": 20, "commit_charge": 21}, 0),
        ({"commit_room": 3}, 3),
        ({"commit_limit": 20}, None),
        ({}, None),
    ],
    ids=["both agree", "a job allows less", "room unknown", "above the limit", "room alone", "half", "nothing"],
)
def test_alive_on_windows_is_what_may_be_committed(numbers, expected):
    """RAM that is free is not enough there, and a page file's free part says nothing: commits reserve it unused."""
    found = snapshot("Windows", ram_total=32, ram_available=15, swap_total=8, swap_free=8, **numbers)
    assert in_gb(found.alive_ram_bytes) == expected


def test_alive_on_a_mac_is_what_is_available():
    mac = snapshot("Darwin", ram_total=32, ram_available=9, swap_total=4, swap_free=4)
    assert in_gb(mac.alive_ram_bytes) == 9


readings = st.one_of(st.just(MISSING), st.integers(0, 1 << 62).map(lambda number: Reading(number, "test")))
snapshots = st.builds(
    MemorySnapshot, st.sampled_from(["Windows", "Linux", "Darwin"]), **dict.fromkeys(FIELDS, readings)
)


@settings(deadline=None, max_examples=300)
@given(snapshots, st.integers(0, 1 << 62))
def test_budgets_are_between_nothing_and_everything(found, floor):
    usable, fast, alive = found.usable_vram_bytes, found.fast_ram_bytes(floor), found.alive_ram_bytes
    swap = found.swap_total.bytes or 0
    ram, limit = found.ram_total.bytes, found.commit_limit.bytes
    most = {"Windows": limit, "Linux": None if ram is None else ram + swap, "Darwin": ram}[found.system]
    for budget, total in ((usable, found.vram_total.bytes), (fast, ram), (alive, most)):
        assert budget is None or 0 <= budget <= (budget if total is None else total)
    assert (fast is None) == (found.ram_available.bytes is None)
    assert (usable is None) == (found.vram_free.bytes is None and found.vram_free_nvml.bytes is None)
    if fast is not None and found.ram_cgroup_room.bytes is not None:
        assert fast <= found.ram_cgroup_room.bytes
    if alive is not None and found.system == "Linux" and found.ram_and_swap_cgroup_room.bytes is not None:
        assert alive <= found.ram_and_swap_cgroup_room.bytes
    driver, nvml = found.vram_free.bytes, found.vram_free_nvml.bytes
    if usable is not None and None not in (driver, nvml) and driver - nvml > DISAGREEMENT_BYTES:
        trusted = dataclasses.replace(found, vram_free=found.vram_free_nvml)
        assert usable == trusted.usable_vram_bytes


@settings(deadline=None, max_examples=100)
@given(snapshots, st.integers(0, 1 << 62), st.integers(0, 1 << 62))
def test_a_higher_floor_never_leaves_more(found, one, other):
    low, high = sorted((one, other))
    if found.ram_available.bytes is not None:
        assert found.fast_ram_bytes(high) <= found.fast_ram_bytes(low)
