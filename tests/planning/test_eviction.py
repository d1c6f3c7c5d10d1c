import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora_guard.planning.eviction import Coming, Resident, plan_eviction
from lib_lora_guard.units import GB, MB

FLUX = Resident(int(9.5 * GB), int(9.4 * GB), returns=True)
T5 = Coming(int(4.9 * GB), int(4.8 * GB), passes=2)


def test_a_model_that_fits_evicts_none():
    plan = plan_eviction(T5, GB, 6 * GB, [FLUX])
    assert plan.leaving_bytes == (0,)
    assert plan.swapped_bytes == 0
    assert plan.moved_bytes == T5.outside_bytes


def test_a_text_encoder_of_one_prompt_runs_swapped_beside_the_denoiser():
    plan = plan_eviction(T5, GB, int(2.2 * GB), [FLUX])
    assert plan.leaving_bytes == (0,)
    assert plan.swapped_bytes == pytest.approx(3.7 * GB, abs=MB)
    # Forge: 9.5 GB away, 4.9 in, 4.9 away, 9.5 back.
    assert plan.moved_bytes < 9 * GB < 28 * GB


def test_a_model_that_runs_often_gets_exactly_the_room_it_needs():
    often = Coming(T5.outside_bytes, T5.swappable_bytes, passes=None)
    plan = plan_eviction(often, GB, int(2.2 * GB), [FLUX])
    assert plan.swapped_bytes == 0
    assert plan.leaving_bytes == (T5.outside_bytes + GB - int(2.2 * GB),)


def test_many_passes_are_worth_a_move():
    for passes, swaps in ((1, True), (2, True), (40, False)):
        plan = plan_eviction(Coming(T5.outside_bytes, T5.swappable_bytes, passes), GB, int(2.2 * GB), [FLUX])
        assert (plan.swapped_bytes > 0) is swaps, passes


def test_a_decode_takes_what_it_lacks_and_not_the_whole_denoiser():
    vae = Coming(160 * MB, 150 * MB, passes=1)
    plan = plan_eviction(vae, int(2.6 * GB), int(2.2 * GB), [FLUX])
    assert plan.leaving_bytes[0] <= int(0.4 * GB) + 160 * MB + 1
    # The weights in RAM cannot make room for activations.
    assert plan.leaving_bytes[0] + plan.swapped_bytes >= int(2.6 * GB) + 160 * MB - int(2.2 * GB)


def test_models_are_evicted_in_their_order():
    small, other = Resident(GB, GB, returns=False), Resident(GB, GB, returns=False)
    plan = plan_eviction(Coming(GB // 2, 0, None), GB, GB, [small, other])
    assert plan.leaving_bytes == (GB // 2, 0)
    assert plan_eviction(Coming(2 * GB, 0, None), 0, GB // 2, [small, other]).leaving_bytes == (GB, GB // 2)


def test_a_model_that_cannot_be_split_leaves_as_a_whole():
    plan = plan_eviction(Coming(GB // 2, 0, None), GB, GB, [Resident(3 * GB, GB // 4, returns=True)])
    assert plan.leaving_bytes == (3 * GB,)


def test_a_model_larger_than_the_device_is_swapped_in_part():
    plan = plan_eviction(Coming(12 * GB, 11 * GB, None), GB, 8 * GB, [Resident(2 * GB, 2 * GB, returns=False)])
    assert plan.leaving_bytes == (2 * GB,)
    assert plan.swapped_bytes == 3 * GB


amounts = st.integers(0, 24 * GB)


@st.composite
def models(draw):
    on_device = draw(amounts)
    return Resident(on_device, draw(st.integers(0, on_device)), draw(st.booleans()))


@given(
    amounts.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.one_of(st.none(), st.integers(1, 60)),
    amounts,
    amounts,
    st.lists(models(), max_size=4),
)
def test_eviction_makes_the_missing_room_where_it_can_and_no_more(weights, passes, need, free, residents):
    outside, swappable = weights
    plan = plan_eviction(Coming(outside, swappable, passes), need, free, residents)
    short = outside + need - free
    assert 0 <= plan.swapped_bytes <= swappable
    for leaving, resident in zip(plan.leaving_bytes, residents, strict=True):
        assert leaving in (0, resident.on_device_bytes) or leaving <= resident.swappable_bytes
    found = sum(plan.leaving_bytes) + plan.swapped_bytes
    everything = sum(r.on_device_bytes for r in residents) + swappable
    assert found >= min(short, everything)
    if short <= 0:
        assert found == 0
    # Only a resident that cannot be taken apart may give more than was missing.
    if all(r.swappable_bytes == r.on_device_bytes for r in residents):
        assert found <= max(0, short)
