"""Schedules of strengths: what a prompt may say, and the numbers that come of it step by step."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lora_guard.planning.schedule import Schedule, ScheduleError, parse, read_strengths

STRENGTHS = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 3))


def strengths(text, steps):
    """The strengths of all steps of a pass, as a WebUI reports them: 0, 0, 1, 2, ... steps - 2."""
    return [parse(text).at(max(0, done - 1), steps) for done in range(steps)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", [1] * 7),
        ("0@0,1@1", [0, 0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("1@1;0@0", [0, 0, 0.2, 0.4, 0.6, 0.8, 1]),
        (" 0 ~ 0 , 1 @ 1 ", [0, 0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("0@0,1@0.5,0@1", [0, 0, 0.4, 0.8, 0.8, 0.4, 0]),
        ("0.25@0.5,1@1", [0.25, 0.25, 0.25, 0.25, 0.4, 0.7, 1]),
        ("1@0,0@0.4", [1, 1, 0.5, 0, 0, 0, 0]),
        ("0@2,1@4", [0, 0, 0, 0, 0.5, 1, 1]),
        ("0@0.5,1@2", [0, 0, 1 / 3, 1, 1, 1, 1]),  # one position above 1 makes all of them steps
        ("0@0,0@0.4,1@0.4,1@1", [0, 0, 0, 1, 1, 1, 1]),  # a jump
        ("0.7@0.3", [0.7] * 7),
        ("0@0,0.5", [0, 0, 0.1, 0.2, 0.3, 0.4, 0.5]),  # a pair without a position lies at the end
        ("0.5,1@1", [0.5] * 7),  # a number alone in the first place is the whole schedule
        ("-1@0,1@1", [-1, -1, -0.6, -0.2, 0.2, 0.6, 1]),
        ("1e-1@0,1@1", [0.1, 0.1, 0.28, 0.46, 0.64, 0.82, 1]),
    ],
)
def test_strengths_of_each_step(text, expected):
    assert strengths(text, 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("steps", "expected"), [(0, 1.0), (1, 0.0), (2, 0.0), (3, 0.0)])
def test_passes_too_short_for_a_schedule_have_a_strength_too(steps, expected):
    assert parse("0@0,1@1").at(0, steps) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "0@", "@1", "0@0,", "0@0@1", "0@0,x@1", "nan", "inf@0,1@1", "0@nan", "1e31", "0:1"]
)
def test_a_malformed_schedule_names_the_text_and_what_was_expected(text):
    with pytest.raises(ScheduleError) as caught:
        parse(text)
    assert str(caught.value) == (f"its strength '{text}' is neither a number nor a schedule such as 0@0,1@0.5,0@1")


def test_a_long_text_is_named_by_its_beginning():
    with pytest.raises(ScheduleError) as caught:
        parse("x" * 5000)
    assert len(str(caught.value)) < 200


@given(st.lists(st.tuples(STRENGTHS, st.integers(0, 40)), min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_between_two_points_a_strength_goes_straight_from_one_to_the_other(points, steps, data):
    text = ",".join(f"{strength}@{position}" for strength, position in points)
    schedule, ordered = parse(text), sorted(points, key=lambda point: point[1])
    last = ordered[-1][1]
    step = data.draw(st.integers(0, 45))
    x = step if last > 1 else (step / (steps - 2) if steps > 2 else float(step > 0))
    before = [p for p in ordered if p[1] <= x] or ordered[:1]
    after = [p for p in ordered if p[1] > x] or [before[-1]]
    low, high = sorted((before[-1][0], after[0][0]))
    assert low - 1e-9 <= schedule.at(step, steps) <= high + 1e-9
    if before[-1][1] == x or after[0] == before[-1]:
        assert schedule.at(step, steps) == before[-1][0]


@given(STRENGTHS, STRENGTHS, st.integers(3, 60))
def test_a_ramp_is_monotone_and_ends_exactly(first, last, steps):
    values = strengths(f"{first}@0,{last}@1", steps)
    rising = [(b - a) * (1 if last >= first else -1) for a, b in itertools.pairwise(values)]
    assert min(rising) >= -1e-12
    assert (values[0], values[-1]) == (first, last)


@given(STRENGTHS, st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=4), st.integers(0, 60))
def test_equal_strengths_are_the_plain_number_to_the_bit(strength, positions, steps):
    schedule = parse(",".join(f"{strength}@{position}" for position in positions))
    assert schedule.is_constant
    assert {schedule.at(step, steps) for step in range(steps + 1)} == {strength} == {parse(str(strength)).at(0, steps)}


@given(st.lists(st.tuples(STRENGTHS, st.sampled_from([0, 0.2, 0.5, 1, 3, 20])), min_size=1), st.integers(3, 30))
def test_the_numbers_are_those_of_numpy_interp(points, steps):
    # What the extension whose syntax this is computes with.
    numpy = pytest.importorskip("numpy")
    ordered = sorted(points, key=lambda point: point[1])
    schedule = Schedule(tuple((position, strength) for strength, position in ordered))
    positions, values = [p for _, p in ordered], [s for s, _ in ordered]
    for step in range(steps):
        x = step / (steps - 2) if positions[-1] <= 1 else step
        assert schedule.at(step, steps) == pytest.approx(float(numpy.interp(x, positions, values)), abs=1e-12)


def first(arguments):
    """The strengths of the first step of a tag: text encoder, model, and both in the hires pass."""
    items = [item.split("=", 2) for item in arguments.split(":")]
    read = read_strengths([i[0] for i in items if len(i) == 1 and i[0]], {i[0]: i[1] for i in items if len(i) == 2})
    return tuple(s.start for s in (read.text, read.model, read.hires_text, read.hires_model))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", (1, 1, 1, 1)),
        ("0.5", (0.5, 0.5, 0.5, 0.5)),
        ("0.5:0.7", (0.5, 0.7, 0.5, 0.7)),
        ("0.5:0.7:8", (0.5, 0.7, 0.5, 0.7)),  # the third is the rank of a DyLoRA
        ("0.5@0,1@1:hr=0.6", (0.5, 0.5, 0.6, 0.6)),
        ("te=0.5@0,1@1", (0.5, 0.5, 0.5, 0.5)),
        ("unet=0.5@0,1@1", (1, 0.5, 1, 0.5)),
        ("unet=0.5@0,1@1:hrte=0.3", (1, 0.5, 0.3, 0.5)),
        ("hr=0.6:hrte=0.5", (1, 1, 0.5, 0.6)),
        ("hr=0.6:hrunet=0.5@0,1@1", (1, 1, 0.6, 0.5)),
        ("0.2:0.3:te=0.4:unet=0.5", (0.4, 0.5, 0.4, 0.5)),
        ("0.8@0.15,0@0.3:hr=0", (0.8, 0.8, 0, 0)),
        ("te=:hr=", (1, 1, 1, 1)),
        ("dyn=4:lbw=ALL", (1, 1, 1, 1)),
    ],
)
def test_arguments_of_a_tag_fall_back_on_one_another(arguments, expected):
    assert first(arguments) == expected


def test_a_malformed_strength_anywhere_in_a_tag_is_an_error():
    with pytest.raises(ScheduleError, match="'0@0,'"):
        read_strengths(["1"], {"hrunet": "0@0,"})
