"""The choice of what lies on the card while a model runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_days import OTHERS, PROMPTS, STACKS, STORAGES, TEXT_ENCODERS, compared

from lib_lora_guard.planning.job_cost import Job, Links, Neighbour, State, choose, runs_from_ram, ways
from lib_lora_guard.units import GB, MB

CARDS = st.sampled_from([6, 8, 10, 12, 16, 24])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(STORAGES)),
    st.sampled_from(TEXT_ENCODERS),
    CARDS,
    st.floats(3, 50),
    st.floats(0.03, 1),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from(sorted(PROMPTS)),
    st.sampled_from(sorted(OTHERS)),
    st.sampled_from(sorted(STACKS)),
)
def test_it_is_never_more_than_3_percent_worse_than_the_best_policy(
    storage, text, free, link, out, keeps, steps, prompts, others, stack
):
    """Every link and card, with ControlNets and refiners and with large stacks, counted independently: `support.image_days`."""
    links = Links(link * 1e9, link * out * 1e9, link * 1e9, keeps)
    facts = {"denoiser": int(STORAGES[storage] * GB), "text": int(text * GB), "free": free * GB, "steps": steps}
    control, refiner = (int(size * GB) for size in OTHERS[others])
    facts |= {"control": control, "refiner": refiner, "factors": STACKS[stack]}
    guard, found = compared(PROMPTS[prompts], links=links, **facts)
    assert guard <= 1.03 * min(found.values())


@pytest.mark.parametrize(
    ("others", "stack", "of_stocks"),
    [
        ("none", "none", 0.7),
        ("none", "three of 1 GB", 0.7),
        ("ControlNet of 3.3 GB", "none", 0.7),
        # Both models come and go whole; what is left is the text encoder.
        ("refiner of 6.5 GB", "none", 0.95),
    ],
)
def test_it_is_not_stocks_policy(others, stack, of_stocks):
    """Twenty steps of an fp8 Flux on 12 GB, every prompt new: Forge moves both models for each."""
    facts = {"denoiser": int(11.9 * GB), "text": int(4.9 * GB), "free": 12 * GB, "steps": 20}
    control, refiner = (int(size * GB) for size in OTHERS[others])
    facts |= {"control": control, "refiner": refiner, "factors": STACKS[stack]}
    guard, found = compared(PROMPTS["each"], links=Links(), **facts)
    assert guard < of_stocks * found["stock"]


TEXT = Neighbour(1608 * MB, 1608 * MB)
"""A text encoder in the room that it found beside the denoiser."""


WHOLE = 11_907 * MB


def fp8_on_12_gb(**changed):
    facts = {
        "outside_bytes": 2754 * MB,
        "on_card_bytes": 9153 * MB,
        "copied_bytes": 0,
        "free_bytes": 1374 * MB,
        "need_bytes": 1375 * MB,
        "swapping_bytes": 256 * MB,
        "neighbours": [TEXT],
    }
    return State(**facts | changed)


@pytest.mark.parametrize(("calls", "leaves"), [(1, False), (50, True)])
def test_a_text_encoder_leaves_where_the_calls_are_worth_it(calls, leaves):
    choice = choose(fp8_on_12_gb(), Job(calls), Links())
    assert (choice.leaving_bytes[0] == TEXT.on_card_bytes) is leaves
    assert choice.grows is leaves


COMING = {"on_card_bytes": 0, "free_bytes": 2600 * MB, "placed_by_host_bytes": 2754 * MB}
ONE_THAT_CANNOT_BE_SWAPPED = [COMING | {"fixed_bytes": fixed_mb * MB} for fixed_mb in (1000, 2000, 2754)]


@pytest.mark.parametrize(
    "changed",
    [{}, {"stays_bytes": 1}, {"free_bytes": 4200 * MB, "stays_bytes": 1}, COMING, *ONE_THAT_CANNOT_BE_SWAPPED],
)
def test_what_the_calls_need_is_free_in_every_way(changed):
    state = fp8_on_12_gb(**changed)
    for way in ways(state, Job(), Links()):
        free = state.free_bytes + sum(way.leaving_bytes) - way.comes_bytes
        is_in_part = way.swapped_bytes + state.stays_bytes > 0
        assert free >= state.need_bytes + (state.swapping_bytes if is_in_part else 0)
        assert way.comes_bytes + way.swapped_bytes == state.outside_bytes


def test_seconds_by_hand():
    """Everything leaves and comes: 1608 MB to RAM, 1351 MB to the card, and 1403 MB copied in each of 50 calls of one image."""
    links = Links(to_card=7e9, to_ram=1.6e9, swapping=7e9)
    choice = choose(fp8_on_12_gb(), Job(calls=50, images=1, new_prompts=0), links)
    assert (choice.comes_bytes, choice.swapped_bytes) == (1351 * MB, 1403 * MB)
    assert choice.seconds == pytest.approx((1608 / 1600 + 1351 / 7000 + 50 * 1403 / 7000) * MB / 1e6)


def test_what_has_a_copy_in_ram_leaves_for_nothing():
    with_copy = fp8_on_12_gb(neighbours=[Neighbour(TEXT.on_card_bytes, TEXT.swappable_bytes, TEXT.on_card_bytes)])
    job = Job(calls=4, images=1, new_prompts=0)
    assert not choose(fp8_on_12_gb(), job, Links()).grows
    choice = choose(with_copy, job, Links())
    assert choice.leaving_bytes == (TEXT.on_card_bytes,)
    assert choice.grows


def test_a_copy_is_counted_once():
    """Of 600 MB that leave for the calls 500 have a copy. None of the 1000 MB that leave for the decode has one then."""
    state = State(0, 5000 * MB, 500 * MB, 1000 * MB, 1500 * MB, 100 * MB, [])
    (choice, *same) = ways(state, Job(calls=2, decode_bytes=2600 * MB, images=1), Links(7e9, 1e9, 7e9))
    assert set(same) <= {choice}
    assert choice.comes_bytes == -600 * MB
    assert choice.seconds == pytest.approx((100 / 1000 + 2 * 600 / 7000 + 1000 / 1000) * MB / 1e6)


@pytest.mark.parametrize("copied", [0, 300, 1608])
def test_of_what_leaves_for_the_decode_the_part_that_has_a_copy_costs_nothing(copied):
    """The text encoder stays beside four calls, and leaves 1000 MB for the decode."""
    text = Neighbour(1608 * MB, 1608 * MB, copied * MB)
    state = State(100 * MB, 9000 * MB, 0, 3000 * MB, 500 * MB, 256 * MB, [text])
    job = Job(calls=4, decode_bytes=3900 * MB, images=1, new_prompts=0)
    found = ways(state, job, Links(7e9, 1e9, 7e9))
    choice = next(way for way in found if (way.leaving_bytes, way.comes_bytes) == ((0,), 100 * MB))
    assert choice.seconds == pytest.approx((100 / 7000 + max(0, 1000 - copied) / 1000) * MB / 1e6)


@pytest.mark.parametrize(("pinned", "comes"), [(1769, True), (0, False)])
def test_what_lies_in_pinned_ram_comes_for_four_steps_and_leaves_for_the_decode_for_nothing(pinned, comes):
    """An NF4 Flux with 8 GB on a measured machine: it comes three times, instead of twelve copies of as much. Without a copy it would
    leave with 1.3 GB/s.
    """
    links = Links(to_card=40e9, to_ram=1.3e9, swapping=40e9, keeps_copies=True)
    state = State(1769 * MB, 4620 * MB, 0, 3220 * MB, 1355 * MB, 256 * MB, [], pinned_bytes=pinned * MB)
    choice = choose(state, Job(calls=4, decode_bytes=3340 * MB), links)
    assert (choice.comes_bytes, choice.grows) == ((1769 * MB, True) if comes else (0, False))
    if comes:
        # For the decode 1889 MB leave: 1769 have their copy, and 120 have to be copied. All of them come back for two more images.
        assert choice.seconds == pytest.approx((1769 / 40_000 + 120 / 1300 + 2 * 1889 / 40_000) * MB / 1e6)
    else:
        assert choice.seconds == pytest.approx((12 * 1769 / 40_000 + 120 / 1300 + 2 * 120 / 40_000) * MB / 1e6)


def test_a_controlnet_that_the_host_places_keeps_no_copy_of_its_own():
    """Counted as pinned it left for the decode for nothing, and the denoiser's last GB, which does, stayed away: 1.18 s instead of 0.80."""
    links = Links(to_card=25e9, to_ram=1.3e9, swapping=25e9, keeps_copies=True)
    control, away = 3300 * MB, 1000 * MB
    facts = {"placed_by_host_bytes": control, "pinned_bytes": away}
    state = State(control + away, 4000 * MB, 0, 6000 * MB, 1355 * MB, 256 * MB, [], **facts)
    choice = choose(state, Job(calls=4, decode_bytes=3300 * MB), links)
    assert choice.grows
    # 1600 MB leave for the decode, of which 1000 have a copy; all of them come back for two more images.
    assert choice.seconds == pytest.approx((4300 / 25_000 + 600 / 1300 + 2 * 1600 / 25_000) * MB / 1e6)
    stays = next(way for way in ways(state, Job(calls=4, decode_bytes=3300 * MB), links) if not way.grows)
    # The ControlNet alone comes, and 600 MB leave without a copy.
    assert stays.seconds == pytest.approx(
        (3300 / 25_000 + 12 * 1000 / 25_000 + 600 / 1300 + 2 * 600 / 25_000) * MB / 1e6
    )


def test_a_model_that_the_host_is_about_to_place_gets_its_room():
    state = fp8_on_12_gb(outside_bytes=WHOLE, on_card_bytes=0, free_bytes=10_527 * MB, placed_by_host_bytes=WHOLE)
    for calls in (1, 20):
        assert choose(state, Job(calls), Links()).comes_bytes > 8_000 * MB


def test_a_model_of_few_passes_stays_in_ram_where_leaving_costs_more():
    assert runs_from_ram(1, Links())
    assert runs_from_ram(2, Links())
    assert not runs_from_ram(8, Links())
    # Where RAM is as fast as the card's link, two copies cost as much as coming and leaving.
    assert not runs_from_ram(2, Links(7e9, 7e9, 7e9))
    # With its copy kept it leaves for nothing.
    assert not runs_from_ram(2, Links(keeps_copies=True))


NF4, CARD = 6861 * MB, 8192 * MB
STEP = 1372 * MB
STACKS_ON_8_GB = [(0, 6564), (20 * 30, 5964), (3 * 1024, 3492)]
"""MB of the stack's factors (none, many small ones, three large ones), and of an NF4 Flux on a card of 8 GB beside them."""


@pytest.mark.parametrize(("factors", "on_card"), STACKS_ON_8_GB)
def test_a_model_gets_the_room_that_a_stack_leaves(factors, on_card):
    """8192 - 1372 for a step - the factors - 256 for swapping; a text encoder is not worth 20 calls of the difference."""
    need = STEP + factors * MB
    state = State(NF4, 0, 0, CARD - TEXT.on_card_bytes, need, 256 * MB, [TEXT], placed_by_host_bytes=NF4)
    choice = choose(state, Job(calls=20, images=1, new_prompts=0), Links(to_card=7e9, to_ram=1.6e9, swapping=7e9))
    assert (choice.leaving_bytes[0], choice.comes_bytes) == (TEXT.on_card_bytes, on_card * MB)
    assert choice.swapped_bytes == NF4 - on_card * MB
    seconds = 1608 / 1600 + on_card / 7000 + 20 * (6861 - on_card) / 7000
    assert choice.seconds == pytest.approx(seconds * MB / 1e6)


@pytest.mark.parametrize(("factors", "on_card"), STACKS_ON_8_GB[1:])
def test_a_stack_that_is_changed_takes_its_room_and_gives_it_back(factors, on_card):
    alone, links = 6564, Links(to_card=7e9, to_ram=1.6e9, swapping=7e9)
    before = State(NF4 - alone * MB, alone * MB, 0, CARD - alone * MB, STEP + factors * MB, 256 * MB, [])
    choice = choose(before, Job(calls=4), links)
    assert (choice.comes_bytes, choice.grows) == (-factors * MB, False)
    # It leaves once, and is copied in each of 4 calls of 3 images; a decode needs none of the card here.
    seconds = factors / 1600 + 12 * (6861 - on_card) / 7000
    assert choice.seconds == pytest.approx(seconds * MB / 1e6)
    after = State(NF4 - on_card * MB, on_card * MB, 0, CARD - on_card * MB, STEP, 256 * MB, [])
    choice = choose(after, Job(calls=4), links)
    assert (choice.comes_bytes, choice.grows) == (factors * MB, True)
    assert choice.seconds == pytest.approx((factors / 7000 + 12 * (6861 - alone) / 7000) * MB / 1e6)


CONTROL = 3379 * MB


def with_control(**changed):
    """The fp8 Flux as far as it came without a ControlNet, which is about to come: of both, 6133 MB lie in RAM."""
    facts = {"outside_bytes": 2754 * MB + CONTROL, "placed_by_host_bytes": CONTROL}
    return fp8_on_12_gb(**facts | changed)


def test_a_controlnet_counts_as_part_of_the_model():
    """With the text encoder away 1607 MB beside a step are free, 256 of them for swapping: 1351 MB of the ControlNet come, and
    the rest of both is copied in each call, which is worth it from a few calls on.
    """
    links = Links(to_card=7e9, to_ram=1.6e9, swapping=7e9)
    choice = choose(with_control(), Job(calls=20, images=1, new_prompts=0), links)
    assert (choice.leaving_bytes, choice.comes_bytes, choice.swapped_bytes) == ((1608 * MB,), 1351 * MB, 4782 * MB)
    assert not choice.grows, "the host fills the room with the ControlNet"
    assert choice.seconds == pytest.approx((1608 / 1600 + 1351 / 7000 + 20 * 4782 / 7000) * MB / 1e6)
    few = choose(with_control(), Job(calls=1, images=1, new_prompts=1), links)
    assert few.leaving_bytes[0] < TEXT.on_card_bytes
    room = with_control(free_bytes=1374 * MB + 8000 * MB)
    choice = choose(room, Job(calls=20), links)
    assert (choice.leaving_bytes, choice.swapped_bytes, choice.grows) == ((0,), 0, True)
    assert {way.comes_bytes for way in ways(room, Job(), links)} == {CONTROL, room.outside_bytes}


def test_nothing_that_a_refiner_drives_out_is_kept_for_the_next_image():
    """The text encoder leaves after the calls in any case, so it makes room before them; else it stays for the next prompt. Where
    calls are too few for what comes and has to leave again, neither moves.
    """
    state, links = fp8_on_12_gb(), Links(to_card=7e9, to_ram=1.6e9, swapping=7e9)
    assert not choose(state, Job(calls=7, images=1, new_prompts=1), links).grows
    assert not choose(state, Job(calls=2, images=1, new_prompts=1, is_last=True), links).grows
    choice = choose(state, Job(calls=7, images=1, new_prompts=1, is_last=True), links)
    assert (choice.leaving_bytes[0], choice.comes_bytes) == (TEXT.on_card_bytes, 1351 * MB)
    # All of the card goes to RAM once: 1608 MB now, 9153 + 1351 after the calls.
    seconds = (1608 + 9153 + 1351) / 1600 + 1351 / 7000 + 7 * 1403 / 7000
    assert choice.seconds == pytest.approx(seconds * MB / 1e6)
    copied = fp8_on_12_gb(copied_bytes=9153 * MB, neighbours=[Neighbour(1608 * MB, 1608 * MB, 1608 * MB)])
    choice = choose(copied, Job(calls=7, is_last=True), links)
    assert choice.seconds == pytest.approx((1351 / 1600 + 1351 / 7000 + 7 * 1403 / 7000) * MB / 1e6)
