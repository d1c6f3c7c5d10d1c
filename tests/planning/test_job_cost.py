"""The choice of what lies on the card while a model runs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.image_days import PROMPTS, STORAGES, TEXT_ENCODERS, compared

from lib_lora_guard.planning.job_cost import Job, Links, Neighbour, State, choose, runs_from_ram, ways
from lib_lora_guard.units import GB, MB

CARDS = st.sampled_from([6, 8, 10, 12, 16, 24])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(STORAGES)),
    st.sampled_from(TEXT_ENCODERS),
    CARDS,
    st.floats(3, 50),
    st.floats(0.2, 1),
    st.integers(1, 60),
    st.sampled_from(sorted(PROMPTS)),
)
def test_it_is_never_more_than_3_percent_worse_than_the_best_policy(storage, text, free, link, out, steps, prompts):
    """Every link and card, counted independently: `support.image_days`."""
    links = Links(link * 1e9, link * out * 1e9, link * 1e9)
    facts = {"denoiser": int(STORAGES[storage] * GB), "text": int(text * GB), "free": free * GB, "steps": steps}
    guard, others = compared(PROMPTS[prompts], links=links, **facts)
    assert guard <= 1.03 * min(others.values())


def test_it_is_not_stocks_policy():
    """Twenty steps of an fp8 Flux on 12 GB, every prompt new: Forge moves both models for each."""
    facts = {"denoiser": int(11.9 * GB), "text": int(4.9 * GB), "free": 12 * GB, "steps": 20}
    guard, others = compared(PROMPTS["each"], links=Links(), **facts)
    assert guard < 0.7 * others["stock"]


TEXT = Neighbour(1608 * MB, 1608 * MB)
"""A text encoder in the room that it found beside the denoiser."""


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


def test_what_the_calls_need_is_free_in_every_way():
    state = fp8_on_12_gb()
    for way in ways(state, Job(), Links()):
        free = state.free_bytes + sum(way.leaving_bytes) - way.comes_bytes
        assert free >= state.need_bytes + (state.swapping_bytes if way.swapped_bytes else 0)
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


def test_a_model_that_the_host_is_about_to_place_gets_its_room():
    state = fp8_on_12_gb(outside_bytes=11_907 * MB, on_card_bytes=0, free_bytes=10_527 * MB)
    for calls in (1, 20):
        assert choose(state, Job(calls), Links()).comes_bytes > 8_000 * MB


def test_a_model_of_few_passes_stays_in_ram_where_leaving_costs_more():
    assert runs_from_ram(1, Links())
    assert runs_from_ram(2, Links())
    assert not runs_from_ram(8, Links())
    # Where RAM is as fast as the card's link, two copies cost as much as coming and leaving.
    assert not runs_from_ram(2, Links(7e9, 7e9, 7e9))
