"""LG-R01 to LG-R10 at their edges: the number to go on with, whether the rule speaks, and the numbers in what it says."""

import inspect
import math
import re
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_lora_guard.memory import rules
from lib_lora_guard.memory.readings import DISAGREEMENT_BYTES, Reading, usable_vram_bytes
from lib_lora_guard.memory.rules import SHRINKING_BYTES
from lib_lora_guard.messages import Message
from lib_lora_guard.messages.catalogue import TEXTS
from lib_lora_guard.units import GB, MB

TOTAL = 12 * GB
NAN, INF = math.nan, math.inf
IDEOGRAPH = re.compile("[\u4e00-\u9fff]")


def check(finding, rule, key, *numbers):
    """The finding is `rule`'s, and both languages say every number."""
    assert finding.rule == rule
    assert finding.says.key == key
    english, chinese = finding.says.text("en"), finding.says.text("zh")
    assert english == str(finding.says)
    assert english.strip()
    assert IDEOGRAPH.search(chinese)
    assert not IDEOGRAPH.search(english)
    for number in numbers:
        for text in (english, chinese):
            assert re.search(rf"(?<![\d.]){re.escape(str(number))}(?![\d.]*\d)", text), (number, text)
    for text in (english, chinese):
        assert "{" not in text


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [(0, 0), (0.0, 0), (-0.0, 0), (1, 1), (0.5, 0.5), (TOTAL - 1, TOTAL - 1), (TOTAL, TOTAL), (float(TOTAL), TOTAL)],
)
def test_a_request_within_the_device_is_left_alone(asked, wanted):
    assert rules.request_bytes(asked, TOTAL) == (wanted, None)


@pytest.mark.parametrize("asked", [1e30, 1e29, INF, 10**30])
def test_r01_everything(asked):
    wanted, finding = rules.request_bytes(asked, TOTAL)
    assert wanted == INF
    check(finding, "LG-R01", "rule.everything", "953674316406250018963456.00")


@pytest.mark.parametrize("asked", [TOTAL + 1, TOTAL + MB, 200 * GB, math.nextafter(1e29, 0)])
def test_r02_above_the_card(asked):
    wanted, finding = rules.request_bytes(asked, TOTAL)
    assert wanted == TOTAL
    check(finding, "LG-R02", "rule.above_total", f"{asked / MB:.0f}", 12288)


@pytest.mark.parametrize("asked", [-1, -16185.96 * MB, -1e30])
def test_r03_less_than_nothing(asked):
    wanted, finding = rules.request_bytes(asked, TOTAL)
    assert wanted == 0
    check(finding, "LG-R03", "rule.negative", f"{asked / MB:.0f}".lstrip("-"))


def test_r03_infinitely_less_than_nothing():
    wanted, finding = rules.request_bytes(-INF, TOTAL)
    assert wanted == 0
    check(finding, "LG-R03", "rule.negative")


def test_r03_no_number():
    wanted, finding = rules.request_bytes(NAN, TOTAL)
    assert wanted == 0
    check(finding, "LG-R03", "rule.not_a_number")


@pytest.mark.parametrize("left", [0, 1, GB, TOTAL - 1, TOTAL, 1024.75 * MB])
def test_r04_a_slider_on_the_card_is_left_alone(left):
    found, finding = rules.inference_bytes(left, TOTAL)
    assert (found, finding) == (int(left), None)
    assert isinstance(found, int)


def test_r04_a_slider_above_the_card():
    """A user's log: 'GPU Weights' pasted from a larger card."""
    left = round(-16185.96 * MB)
    found, finding = rules.inference_bytes(left, TOTAL)
    assert found == 0
    check(finding, "LG-R04", "rule.slider_above", 12288, 12288 + 16186, 16186, 1024)
    assert rules.inference_bytes(-1, TOTAL)[0] == 0
    assert rules.inference_bytes(-1, TOTAL)[1].says.key == "rule.slider_above"


def test_r04_a_slider_below_nothing():
    found, finding = rules.inference_bytes(TOTAL + 512 * MB, TOTAL)
    assert found == TOTAL
    check(finding, "LG-R04", "rule.slider_below", 512, 12288 + 512, 12288, 0)
    assert rules.inference_bytes(TOTAL + 1, TOTAL)[0] == TOTAL
    assert rules.inference_bytes(1e30, TOTAL)[0] == TOTAL


@pytest.mark.parametrize("left", [NAN, INF, -INF])
@pytest.mark.parametrize(("total", "kept"), [(TOTAL, GB), (GB, GB), (512 * MB, 512 * MB), (0, 0)])
def test_r04_a_slider_that_is_no_number(left, total, kept):
    found, finding = rules.inference_bytes(left, total)
    assert found == kept
    check(finding, "LG-R04", "rule.slider_not_a_number", f"{total / MB:.0f}", 1024)


def test_r05_a_step_gets_what_it_needs():
    assert rules.room_for_a_step(GB, 0, "KModel") == (GB, None)
    assert rules.room_for_a_step(GB, GB, "KModel") == (GB, None)
    found, finding = rules.room_for_a_step(GB, GB + 1, "KModel")
    assert found == GB + 1
    assert finding.rule == "LG-R05"
    found, finding = rules.room_for_a_step(700 * MB, 2500 * MB, "KModel")
    assert found == 2500 * MB
    check(finding, "LG-R05", "rule.step", 700, 2500)
    assert "KModel" in finding.says
    assert "KModel" in finding.says.text("zh")


def test_r06_factors_are_counted():
    assert rules.with_factors(5 * GB, 0) == (5 * GB, None)
    assert rules.with_factors(5 * GB, -1) == (5 * GB, None)
    assert rules.with_factors(5 * GB, 1)[0] == 5 * GB + 1
    found, finding = rules.with_factors(5 * GB, 321 * MB)
    assert found == 5 * GB + 321 * MB
    check(finding, "LG-R06", "rule.factors", 321)


def test_r07_the_lower_of_two_numbers_where_they_disagree():
    assert rules.free_vram_bytes(3 * GB, None) == (3 * GB, None)
    assert rules.free_vram_bytes(-1, None) == (0, None)
    assert rules.free_vram_bytes(3 * GB, 3 * GB) == (3 * GB, None)
    assert rules.free_vram_bytes(3 * GB, 9 * GB) == (3 * GB, None)
    assert rules.free_vram_bytes(3 * GB, 3 * GB - DISAGREEMENT_BYTES) == (3 * GB, None)
    found, finding = rules.free_vram_bytes(3 * GB, 3 * GB - DISAGREEMENT_BYTES - 1)
    assert found == 3 * GB - DISAGREEMENT_BYTES - 1
    check(finding, "LG-R07", "rule.disagreement", 3072, 3072 - 256)
    assert rules.free_vram_bytes(GB, 0)[0] == 0
    assert rules.free_vram_bytes(GB, -1)[0] == 0


def test_r08_ram_that_is_slow_and_ram_that_is_not_there():
    assert rules.ram_for(4 * GB, 4 * GB, 8 * GB, "the text encoder") is None
    assert rules.ram_for(0, 0, 0, "nothing") is None
    slow = rules.ram_for(4 * GB + 1, 4 * GB, 8 * GB, "the text encoder")
    check(slow, "LG-R08", "rule.ram_slow", 4096)
    assert rules.ram_for(8 * GB, 4 * GB, 8 * GB, "the text encoder").says.key == "rule.ram_slow"
    refused = rules.ram_for(8 * GB + 1, 4 * GB, 8 * GB, "the text encoder")
    check(refused, "LG-R08", "rule.ram_refused", 8192, 1)
    for finding in (slow, refused):
        assert "the text encoder" in finding.says
    # In a control group, what the system would kill for may be less than what is fast.
    check(rules.ram_for(13 * GB, 14 * GB, 10 * GB, "a model"), "LG-R08", "rule.ram_refused", 13312, 10240, 3)


@pytest.mark.parametrize(("missing", "advice"), [(1, 1), (GB, 1), (GB + 1, 2), (5 * GB - 1, 5)])
def test_r08_says_how_much_larger_the_page_file_must_be(missing, advice):
    finding = rules.ram_for(8 * GB + missing, GB, 8 * GB, "a model")
    assert f"at least {advice} GB larger" in finding.says
    assert f"至少增大 {advice} GB" in finding.says.text("zh")


def test_r09_a_model_shrinks_for_no_reason():
    before = 9000 * MB
    assert rules.share_on_device(before, before, False, "KModel") is None
    assert rules.share_on_device(before, before + GB, False, "KModel") is None
    assert rules.share_on_device(before, before - SHRINKING_BYTES + 1, False, "KModel") is None
    assert rules.share_on_device(before, 0, True, "KModel") is None
    finding = rules.share_on_device(before, before - SHRINKING_BYTES, False, "KModel")
    check(finding, "LG-R09", "rule.shrinking", 9000, 8968)
    assert "KModel" in finding.says
    assert SHRINKING_BYTES < 45 * MB, "what Forge loses with each change"


def test_r10_nothing_changed():
    assert rules.unload_request(has_changed=True) is None
    check(rules.unload_request(has_changed=False), "LG-R10", "rule.nothing_changed")


def test_every_rule_has_its_sentences_and_every_fact_is_in_both():
    keys = {key for key in TEXTS if key.startswith("rule.")} - {"rule.line"}
    assert keys == set(re.findall(r'"(rule\.\w+)"', inspect.getsource(rules)))

    def fields(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for key in keys:
        english, chinese = TEXTS[key]["en"], TEXTS[key]["zh"]
        assert fields(english) == fields(chinese), key


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-(10**31), 10**31),
    st.integers(-4 * GB, 96 * GB),
)
totals = st.integers(0, 192 * GB)


@given(numbers, totals)
@example(1e29, TOTAL)
@example(math.nextafter(1e29, 0), TOTAL)
@example(5e-324, 0)
def test_a_request_is_within_the_card_or_everything(asked, total):
    wanted, finding = rules.request_bytes(asked, total)
    assert wanted == INF or 0 <= wanted <= total
    assert (wanted == INF) == (asked >= 1e29)
    # The rule speaks exactly where it changed something.
    assert (finding is None) == (wanted == asked and asked != INF)
    if finding is not None:
        check(finding, finding.rule, finding.says.key)
    again, said = rules.request_bytes(wanted, total)
    assert again == wanted
    assert said is None or wanted == INF


@given(numbers, totals)
def test_the_sliders_rest_stays_within_the_card(left, total):
    found, finding = rules.inference_bytes(left, total)
    assert isinstance(found, int)
    assert 0 <= found <= total
    assert (finding is None) == (0 <= left <= total)
    if finding is not None:
        check(finding, "LG-R04", finding.says.key)
    assert rules.inference_bytes(found, total) == (found, None)


@example(GB, GB - DISAGREEMENT_BYTES - 1)
@example(GB, GB - DISAGREEMENT_BYTES)
@example(GB, GB - DISAGREEMENT_BYTES + 1)
@given(totals, st.one_of(st.none(), totals))
def test_the_rule_and_the_snapshot_trust_the_same_number(by_torch, by_nvml):
    readings = [None if n is None else Reading(n, "test") for n in (by_torch, by_nvml)]
    missing = Reading(None, "test", Message("readings.not_counted"))
    usable = usable_vram_bytes(readings[0], missing, missing, missing, readings[1])
    assert rules.free_vram_bytes(by_torch, by_nvml)[0] == usable


@given(totals, st.one_of(st.none(), st.integers(-GB, 192 * GB)))
def test_free_memory_is_never_negative_nor_more_than_torch_says(by_torch, by_nvml):
    found, finding = rules.free_vram_bytes(by_torch, by_nvml)
    assert 0 <= found <= by_torch
    assert (finding is None) == (found == by_torch) or by_torch == 0


@given(totals, totals, totals)
def test_a_step_never_gets_less_than_either_number(left, estimate, factors):
    found, finding = rules.room_for_a_step(left, estimate, "KModel")
    assert found == max(left, estimate)
    assert (finding is None) == (found == left)
    assert rules.with_factors(found, factors)[0] == found + factors
