"""The panel's memory: the guard's own numbers, which add up, each with its source; what is missing is said."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.memory.nvml import GpuProcess, GpuProcesses
from lib_lora_guard.memory.readings import MemorySnapshot, Reading
from lib_lora_guard.messages import Message
from lib_lora_guard.planning.last_plan import LastPlan
from lib_lora_guard.reporting.status import PanelStatus, as_json
from lib_lora_guard.ui.memory_figures import memory_figures, other_programs, step_need

MB = 1 << 20
CACHE = "kept by torch, free for the next step"
WHY = Message("readings.cuda_not_started")
FIELDS = [field.name for field in dataclasses.fields(MemorySnapshot) if field.name != "system"]
SOURCES = {"vram_free_nvml": "NVML", "vram_ours": "NVML", "vram_total": "driver", "vram_free": "driver"}


def snapshot(system="Linux", **numbers):
    """A snapshot with `numbers` in MB; everything else is missing."""
    assert set(numbers) <= set(FIELDS)
    known = {
        name: Reading(int(n * MB), SOURCES.get(name, "torch" if "vram" in name else "system"))
        for name, n in numbers.items()
    }
    return MemorySnapshot(system, **{name: known.get(name, Reading(None, "nobody", WHY)) for name in FIELDS})


CARD = {"vram_total": 12000, "vram_free": 5000, "vram_reserved": 6000, "vram_active": 5500, "vram_ours": 6400}
RAM = {"ram_total": 32000, "ram_available": 20000, "rss": 9000, "swap_total": 8000, "swap_free": 7000}


def used(figure):
    return {str(amount.name): amount.mb for amount in figure.used}


def test_vram_is_ours_others_and_free_as_the_guard_plans_with_it():
    taken = snapshot(**CARD, vram_free_nvml=4900, vram_others=700)
    vram = memory_figures(taken)[0]
    # What torch holds and does not use is free for the next step, and has a part of its own.
    assert (vram.free_mb, vram.total_mb) == (5000, 12000)
    assert used(vram) == {"this Forge": 5900, "other programs and the driver": 600, CACHE: 500}
    assert (vram.free_mb + used(vram)[CACHE]) * MB == taken.usable_vram_bytes
    assert vram.source == "as told by: driver; torch; NVML"


def test_on_windows_nvmls_free_vram_counts():
    vram = memory_figures(snapshot("Windows", **CARD, vram_free_nvml=1000))[0]
    assert vram.free_mb == 1000
    assert used(vram) == {"this Forge": 5900, "other programs and the driver": 4600, CACHE: 500}
    assert vram.source == "as told by: NVML; torch"


def test_ram_is_what_the_guard_plans_with():
    ram = memory_figures(snapshot(**RAM))[1]
    assert (ram.free_mb, ram.total_mb, used(ram)) == (20000, 32000, {"this Forge": 9000, "everything else": 3000})
    assert [(str(a.name), a.mb, a.source) for a in ram.beside] == [("page file (swap) left", 7000, "system")]
    in_group = snapshot(**RAM, ram_cgroup_room=4000)
    assert memory_figures(in_group)[1].free_mb * MB == in_group.fast_ram_bytes(0) == 4000 * MB


def test_windows_says_what_it_lets_this_process_commit():
    ram = memory_figures(snapshot("Windows", **RAM, commit_limit=40000, commit_charge=35000, commit_room=5000))[1]
    assert [(str(a.name), a.mb) for a in ram.beside] == [("left with the page file, before Windows refuses", 5000)]
    unknown = memory_figures(snapshot("Windows", **RAM))[1].beside[0]
    assert (unknown.mb, unknown.missing) == (None, WHY)


def test_without_a_card_the_figures_say_why():
    vram, ram = memory_figures(snapshot())
    assert (vram.total_mb, vram.missing, ram.missing) == (None, WHY, WHY)
    assert vram.used == ()
    told = as_json(PanelStatus("m", True, "1", memory=(vram, ram)), "zh")
    assert told["memory"][0]["missing"].startswith("CUDA 尚未启动")
    assert told["memory"][0]["total_mb"] is None


def test_every_number_is_listed_with_its_source_or_its_reason():
    vram, ram = memory_figures(snapshot(**CARD, **RAM))
    listed = {str(a.name): a for a in (*vram.numbers, *ram.numbers)}
    assert len(listed) == len(FIELDS), "each field of a snapshot has a name of its own"
    assert (listed["VRAM held by torch"].mb, listed["VRAM held by torch"].source) == (6000, "torch")
    assert (listed["VRAM free, by NVML"].mb, listed["VRAM free, by NVML"].missing) == (None, WHY)
    only = Reading(None, "Windows", Message("readings.not_windows"))
    linux = dataclasses.replace(snapshot(**RAM), commit_limit=only, commit_charge=only, commit_room=only)
    assert len(memory_figures(linux)[1].numbers) == len(ram.numbers) - 3


numbers = st.one_of(st.none(), st.integers(0, 1 << 40))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["Windows", "Linux", "Darwin"]), st.lists(numbers, min_size=len(FIELDS), max_size=len(FIELDS)))
def test_whatever_is_known_the_parts_add_up(system, drawn):
    readings = (Reading(n, "x", WHY if n is None else None) for n in drawn)
    figures = memory_figures(MemorySnapshot(system, **dict(zip(FIELDS, readings, strict=True))))
    for figure in figures:
        if figure.missing is not None:
            assert (figure.free_mb, figure.used) == (None, ())
            continue
        assert all(amount.mb >= 0 for amount in figure.used)
        assert figure.free_mb + sum(amount.mb for amount in figure.used) == pytest.approx(figure.total_mb)
    as_json(PanelStatus("m", True, "1", memory=figures))


def others(*held):
    return GpuProcesses(
        tuple(GpuProcess(n, name, None if mb is None else int(mb * MB)) for n, (name, mb) in enumerate(held))
    )


def test_programs_are_named_where_closing_them_helps():
    taken = snapshot(**CARD, vram_others=9000)
    found = other_programs(taken, others(("game", 200), ("browser", 57), ("", 40)))
    assert found.mb == 297
    assert [(a.name, a.mb) for a in found.largest] == [("game", 200), ("browser", 57)]
    assert other_programs(taken, others(("game", 200), ("browser", 56))) is None
    assert other_programs(taken, others(("", 4000))) is None, "nobody can close what has no name"
    assert other_programs(taken, others()) is None
    many = other_programs(taken, others(*((f"p{n}", 100) for n in range(6))))
    assert (len(many.largest), many.more, many.mb) == (4, True, 600)


def test_windows_names_programs_without_their_part():
    found = other_programs(snapshot(**CARD, vram_others=900), others(("a", None), ("b", None)))
    assert found.mb == 900
    assert [(a.name, a.mb, a.missing) for a in found.largest] == [
        (name, None, "the driver does not tell it per program, as always on Windows") for name in ("a", "b")
    ]
    assert other_programs(snapshot(**CARD, vram_others=256), others(("a", None))) is None
    assert other_programs(snapshot(**CARD), others(("a", None))) is None


def test_a_step_is_the_sum_of_its_parts():
    found = step_need(LastPlan("KModel", 6480 * MB, 5750 * MB, 331 * MB, 1530 * MB, 100 * MB))
    assert {str(a.name): a.mb for a in found.parts} == {
        "the model": 5750, "LoRAs beside it": 331, "ControlNets and the like": 100, "kept free for computing": 1530,
    }  # fmt: skip
    assert (found.model, found.mb, found.copied_mb) == ("KModel", 7711, 730)
    whole = step_need(LastPlan("KModel", 5 * MB, 5 * MB, 0, MB))
    assert ([str(a.name) for a in whole.parts], whole.copied_mb) == (["the model", "kept free for computing"], 0)
    assert step_need(None) is None
