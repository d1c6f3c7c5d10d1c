"""Room is made on a device for what is missing, whatever the host."""

import logging

import pytest
import torch
from support.fake_device import CARD, Memory, Model, Module, Placed, Ram

from lib_lora_guard.memory import rules
from lib_lora_guard.planning.eviction import Coming
from lib_lora_guard.planning.job_cost import Links, State
from lib_lora_guard.runtime import job_costs
from lib_lora_guard.runtime.host import Swapped
from lib_lora_guard.runtime.job_costs import JobCosts
from lib_lora_guard.runtime.jobs import Jobs, Pass
from lib_lora_guard.runtime.needs import Needs
from lib_lora_guard.runtime.room import Room
from lib_lora_guard.runtime.rule_log import RuleLog

NO_RAM = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


@pytest.fixture
def lines(caplog):
    # The sizes here are those of a toy: too small for a line that all read.
    caplog.set_level(logging.DEBUG, logger="lib_lora_guard")
    return lambda: [record.getMessage() for record in caplog.records]


def room_on(*placed, ram=None, **memory):
    found = Memory(**memory)
    found.models = list(placed)
    return Room(found, ram or Ram(), RuleLog()), found


def placed(on, **settings):
    return Placed(Model(Module(on)), **settings)


NOTHING = Coming(0, 0, None)


def test_nothing_leaves_while_enough_is_free():
    one = placed(6_000, swappable=6_000)
    room, memory = room_on(one)
    plan = room.make_room(CARD, NOTHING, 4_000, [])
    assert plan.leaving_bytes == (0,)
    assert one.module.on == 6_000
    assert memory.calls == ["drop"]


def test_only_the_missing_bytes_leave():
    one = placed(6_000, swappable=6_000)
    room, memory = room_on(one)
    room.make_room(CARD, NOTHING, 4_700, [])
    assert (one.module.on, one.away, one.unloaded) == (5_300, 700, False)
    assert memory.calls[-2:] == ["empty", "drop"]


def test_a_model_leaves_whole_if_its_rest_could_not_run(lines):
    one = placed(6_000, swappable=500)
    room, _ = room_on(one)
    room.make_room(CARD, NOTHING, 4_700, [])
    assert one.unloaded
    assert one.module.on == 0
    assert any("leaves the card" in line for line in lines())


def test_a_model_to_keep_stays_and_so_does_another_stack_on_its_module():
    one, other = placed(4_000, swappable=4_000), placed(4_000, swappable=4_000)
    room, _ = room_on(one, other)
    room.make_room(CARD, NOTHING, 9_000, [Model(one.module, loras=["style"])])
    assert one.module.on == 4_000
    assert other.module.on == 0


@pytest.mark.parametrize(("need", "calls"), [(4_000, 0), (4_001, 1)])
def test_models_that_the_host_has_forgotten_are_asked_for_only_if_room_is_missing(need, calls):
    room, memory = room_on(placed(4_000, swappable=4_000))
    memory.forgotten = [placed(2_000)]
    room.make_room(CARD, NOTHING, need, [])
    assert memory.calls.count("take back") == calls


@pytest.mark.parametrize(
    ("error", "raises"), [(RuntimeError(NO_RAM), False), (MemoryError(), False), (RuntimeError("CUDA error"), True)]
)
@pytest.mark.parametrize("swappable", [6_000, 0])
def test_a_model_that_cannot_leave_for_lack_of_ram_stays(lines, error, raises, swappable):
    one = placed(6_000, swappable=swappable)
    one.error = error
    room, memory = room_on(one)
    if raises:
        with pytest.raises(RuntimeError, match="CUDA error"):
            room.make_room(CARD, NOTHING, 4_700, [])
        return
    room.make_room(CARD, NOTHING, 4_700, [])
    assert one.module.on == 6_000
    assert not one.unloaded
    assert any(line.startswith("Module could not leave the card for lack of RAM") for line in lines())
    assert "empty" in memory.calls


@pytest.mark.parametrize(("ram_room", "leaves"), [(699, False), (700, True), (None, True)])
@pytest.mark.parametrize("swappable", [700, 0])
def test_no_more_is_moved_into_ram_than_fits(lines, ram_room, leaves, swappable):
    one = placed(700, swappable=swappable)
    room, memory = room_on(one, ram=Ram(ram_room), total=700)
    room.make_room(CARD, NOTHING, 700, [])
    assert (one.module.on == 0) is leaves
    assert ("empty" in memory.calls) is leaves
    assert any("could not leave the card" in line for line in lines()) is not leaves


def test_after_a_crash_in_unloading_no_more_leaves_than_ram_is_fast_for():
    one = placed(6_000, swappable=6_000)
    room, _ = room_on(one, ram=Ram(fast=1_500))
    room.make_room(CARD, NOTHING, 10_000, [])
    assert (one.module.on, one.unloaded) == (4_500, False)


# -- before a load


def needs(free):
    return Needs(free, 0, 0)


def test_a_model_that_is_coming_counts_with_what_is_not_on_the_card_yet():
    there, coming = placed(6_000, swappable=6_000), Model(Module(on=0, outside=3_000))
    room, _ = room_on(there)
    room.prepare([coming], CARD, needs(2_000))
    assert there.module.on == 10_000 - 3_000 - 2_000


def test_a_model_that_is_placed_already_counts_with_what_can_come_back():
    """The rest of it was swapped by the host, which does not place it again."""
    there, other = placed(4_000, away=500, swappable=4_000), placed(4_000, swappable=4_000)
    there.module.outside = 2_500
    room, _ = room_on(there, other)
    room.prepare([there.model], CARD, needs(2_000))
    assert (there.module.on, there.away) == (4_500, 0)
    assert other.module.on == 10_000 - 4_500 - 2_000


def test_a_model_gives_room_for_a_larger_picture_if_no_other_can():
    one = placed(6_000, swappable=5_000)
    room, _ = room_on(one)
    room.prepare([one.model], CARD, needs(4_800))
    assert (one.module.on, one.away) == (5_200, 800)
    room.prepare([one.model], CARD, needs(4_300))
    assert (one.module.on, one.away) == (5_700, 300)


def test_a_model_that_the_host_places_for_another_stack_does_not_shrink_before():
    one = placed(6_000, swappable=5_000)
    room, _ = room_on(one)
    room.prepare([Model(one.module, loras=["style"])], CARD, needs(4_800))
    assert (one.module.on, one.away) == (6_000, 0)


def test_a_model_of_few_passes_runs_swapped_beside_one_that_returns(lines):
    denoiser, coming = placed(8_000, swappable=8_000, returns=True), Model(Module(on=0, outside=4_000))
    room, memory = room_on(denoiser)
    memory.passes_of_models = 2
    room.prepare([coming], CARD, needs(500))
    assert denoiser.module.on == 8_000
    assert any("Module comes for a short while (calls: 2)" in line for line in lines())


def test_what_cannot_run_swapped_gets_its_room_beside_a_model_that_returns():
    """Of 10,000 the denoiser has 8,000; 500 stay free, and 1,800 of what comes are there in any case."""
    denoiser, coming = placed(8_000, swappable=8_000, returns=True), Model(Module(on=0, outside=4_000, fixed=1_800))
    room, memory = room_on(denoiser)
    memory.passes_of_models = 2
    room.prepare([coming], CARD, needs(500))
    assert denoiser.module.on == 10_000 - 1_800 - 500


def room_by_cost(*found, **memory):
    """Returns a room that chooses by the job, its costs and its jobs."""
    jobs = Jobs()
    costs = JobCosts(jobs, lambda device: Links(), lambda: True)
    there = Memory(**memory)
    there.models = list(found)
    return Room(there, Ram(), RuleLog(), costs), costs, jobs


def test_a_controlnet_that_is_coming_gets_the_room_of_a_text_encoder():
    """Of 10,000: the denoiser has 5,000 and 1,000 away, the ControlNet needs 3,000, a step 500. The denoiser leaves it its room."""
    there, text = placed(5_000, away=1_000, swappable=5_000, returns=True), placed(4_000, swappable=4_000)
    there.module.outside = 1_000
    control = Model(Module(on=0, outside=3_000))
    room, _, _ = room_by_cost(there, text)
    room.prepare([there.model, control], CARD, needs(500))
    assert (there.module.on, text.module.on) == (6_000, 10_000 - 6_000 - 3_000 - 500)


def test_a_denoiser_does_not_take_the_room_that_a_controlnet_needs():
    there = placed(5_000, away=4_000, swappable=5_000, returns=True)
    there.module.outside = 4_000
    control = Model(Module(on=0, outside=3_000))
    room, _, _ = room_by_cost(there)
    room.prepare([there.model, control], CARD, needs(500))
    assert there.module.on == 10_000 - 3_000 - 500
    # It lies on the card now, with a part away: that comes back beside the denoiser.
    there.module.on, there.module.outside, there.away = 5_000, 4_000, 4_000
    other = placed(2_000, away=1_000)
    other.model, other.module.outside = control, 1_000
    control.model = other.module
    room, _, _ = room_by_cost(there, other)
    room.prepare([there.model, control], CARD, needs(500))
    assert there.module.on + other.module.on == 10_000 - 500


def test_a_model_in_the_same_calls_that_cannot_run_swapped_gets_its_room():
    there, control = placed(8_000, swappable=8_000, returns=True), Model(Module(on=0, outside=3_000, fixed=3_000))
    for swapping in (0, 200):
        room, _, _ = room_by_cost(there)
        room._memory.swapping = swapping
        room.prepare([there.model, control], CARD, needs(500))
        assert there.module.on == 10_000 - 3_000 - 500 - swapping


def test_what_lies_in_pinned_ram_counts_where_the_host_does_not_place_the_model_anew(monkeypatch):
    states = []
    for is_same in (True, False):
        there = placed(5_000, away=1_000, swappable=5_000, returns=True)
        there.module.outside = 1_000
        monkeypatch.setattr(there, "swapped", lambda: Swapped(1_000, 1_000, 700))
        room, costs, _ = room_by_cost(there)
        monkeypatch.setattr(costs, "choose", lambda model, device, state: states.append(state))
        room.prepare([there.model if is_same else Model(there.module)], CARD, needs(500))
    assert [state.pinned_bytes for state in states] == [700, 0]


@pytest.mark.parametrize(
    ("away", "need", "there_on", "text_on"),
    [
        (1_000, 700, 6_000, 3_000),  # 1,300 are free for 1,000 that can come, and 200 for copies
        (1_000, 900, 6_000, 2_900),
        (0, 1_950, 5_000, 2_850),
        (0, 1_900, 5_000, 3_000),  # half of the room for copies is free: enough
    ],
)
def test_a_model_of_which_a_part_stays_swapped_gets_the_room_for_copies(away, need, there_on, text_on):
    """1,000 bytes of it have a LoRA merged into them and stay in RAM; a text encoder leaves what its copies lack."""
    there, text = placed(5_000, away=away, swappable=5_000, returns=True), placed(3_000, swappable=3_000)
    there.module.outside = 1_000 + away
    room, _, _ = room_by_cost(there, text)
    room._memory.swapping = 200
    room.prepare([there.model], CARD, needs(need))
    assert (there.module.on, text.module.on) == (there_on, text_on)


@pytest.mark.parametrize(
    ("lacks", "needed", "comes"),
    [(0, 0, True), (3_000, 0, True), (3_001, 0, False), (1_000, 2_500, True), (1_001, 2_500, False)],
)
def test_a_text_encoder_stays_in_ram_only_if_a_denoiser_lacks_its_room(lacks, needed, comes):
    """Of 10,000 there are 4,000 free: 500 for the text encoder to run, 500 for what has left of it, 3,000 for the denoiser. In
    its own calls that needs more free, which counts."""
    there, text = placed(5_000, away=lacks, swappable=5_000, returns=True), placed(1_000, away=500, swappable=1_000)
    there.module.outside, text.module.outside = lacks, 500
    room, _, _ = room_by_cost(there, text)
    room._memory.passes_of_models, room._needs[there.module] = 2, needed
    room.prepare([text.model], CARD, needs(500))
    assert (text.module.on == 1_500) is comes


def test_a_job_says_its_last_pass_and_a_host_that_unloads_all_shortens_the_next(monkeypatch):
    """Twice in a row for a detailer's checkpoint: what comes is expected to be there for 2.8 images instead of 3, then less."""
    room, costs, jobs = room_by_cost(placed(3_000))
    state = State(2_000, 4_000, 0, 2_500, 500, 100, [])
    made, choose = [], job_costs.choose
    monkeypatch.setattr(job_costs, "choose", lambda state, job, links: made.append(job) or choose(state, job, links))
    with jobs.job(lambda: Pass(8, is_last=True)):
        costs.choose("Flux", CARD, state)
    for _ in range(3):
        room.note_unloaded()
        costs.choose("Flux", CARD, state)
    assert [(job.calls, job.is_last) for job in made] == [(8, True)] + [(20, False)] * 3
    assert [job.images for job in made] == pytest.approx([3, 3, 1 / 0.36, 1 / 0.488])
    for _ in range(20):
        costs.choose("Flux", CARD, state)
    assert made[-1].images == 3
    Room(Memory(), Ram(), RuleLog()).note_unloaded()


def test_an_image_of_two_passes_says_each_choice_once(caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    _, costs, jobs = room_by_cost(placed(3_000))
    for calls in (20, 8) * 3:
        with jobs.job(lambda calls=calls: Pass(calls)):
            costs.choose("Flux", CARD, State(2_000, 4_000, 0, 700, 500, 100, []))
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["Flux, calls: 20", "Flux, calls: 8"]


def test_caches_in_ram_are_given_back_before_a_load_after_a_crash_in_one():
    ram = Ram()
    room, _ = room_on(ram=ram)
    with room.moving():
        assert ram.careful_with == ["moving"]


# -- after a load


@pytest.mark.parametrize(("unused", "emptied"), [(0, False), (500, False), (501, True)])
def test_the_allocators_cache_is_emptied_only_beyond_what_a_step_takes(monkeypatch, unused, emptied):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000 + unused)
    room, memory = room_on()
    room.give_back_unused(CARD, 500)
    assert ("empty" in memory.calls) is emptied


def test_a_share_that_shrinks_is_logged_unless_the_room_was_needed(lines, monkeypatch):
    monkeypatch.setattr(rules, "SHRINKING_BYTES", 100)
    one = placed(6_000, swappable=6_000)
    room, _ = room_on(one)
    room.watch_share([one.model], CARD)
    room.make_room(CARD, NOTHING, 5_000, [])
    room.watch_share([one.model], CARD)
    assert not any("LG-R09" in line for line in lines())
    one.module.on -= 500
    room.watch_share([one.model], CARD)
    assert sum("LG-R09" in line for line in lines()) == 1
    one.module.on -= 500
    room.forget_share(one.module)
    room.forget_share(None)
    room.watch_share([one.model], CARD)
    assert sum("LG-R09" in line for line in lines()) == 1
