"""The memory kept free beside the weights: the host's numbers, checked by the rules and corrected by measured peaks."""

import math

import pytest
from support.fake_device import CARD, Memory, Model, Module, Placed

from lib_lora_guard.runtime.needs import Needs, Reservations
from lib_lora_guard.runtime.rule_log import RuleLog


class Told(RuleLog):
    def __init__(self):
        super().__init__()
        self.rules, self.models = [], []

    def tell(self, finding, model=None):
        if finding is not None:
            self.rules.append(finding.rule)
            self.models.append(model)


class Corrections:
    """`decode` and `load`: bytes to add."""

    def __init__(self, decode=0, load=0):
        self.decode, self.load, self.asked = decode, load, []

    def decode_bytes(self):
        return self.decode

    def load_bytes(self, models, device):
        self.asked = list(models)
        return self.load


MODEL = Model(Module(outside=3_000))


def needs(estimate=0.0, hard=0.0, factors=0, rest=1_000.0, corrections=None, placed=()):
    """The needs, the rules that changed a number, and the memory."""
    memory, told = Memory(total=10_000, rest=rest), Told()
    memory.models = list(placed)
    found = Reservations(memory, told, corrections or Corrections()).needs([MODEL], CARD, estimate, hard, factors)
    return found, told.rules, memory


@pytest.mark.parametrize(
    ("found", "free"),
    [
        (Needs(1_000, 800, 0), 1_000),
        (Needs(1_000, 1_200, 0), 1_200),
        (Needs(1_000, 1_200, 300), 1_500),
        (Needs(1_000, 1_200, 300, factor_bytes=200), 1_500),
        (Needs(1_000, 1_200, 300, estimate_correction_bytes=50, hard_correction_bytes=7), 1_557),
        (Needs(1_000, 1_200, 300, estimate_correction_bytes=-500), 1_300),
        (Needs(1_000, 1_200, 300, hard_correction_bytes=-500), 1_200),
    ],
)
def test_the_larger_of_setting_and_step_counts_and_what_is_needed_beside_both(found, free):
    assert found.free_bytes == free


def test_numbers_in_range_stay():
    found, rules, _ = needs(900, 250, factors=200)
    assert found == Needs(1_000, 900, 250, 200)
    assert rules == ["LG-R06"], "factors are logged"


@pytest.mark.parametrize(
    ("estimate", "becomes", "rule"),
    [(-5.0, 0, "LG-R03"), (math.nan, 0, "LG-R03"), (10_001, 10_000, "LG-R02"), (1e30, 10_000, "LG-R01")],
)
def test_a_request_out_of_range_is_put_right(estimate, becomes, rule):
    found, rules, _ = needs(estimate=estimate)
    assert found.estimate_bytes == becomes
    assert rules[0] == rule
    found, rules, _ = needs(hard=estimate)
    assert found.hard_bytes == becomes
    assert rules[0] == rule


@pytest.mark.parametrize(("rest", "becomes"), [(-1.0, 0), (10_001.0, 10_000), (math.nan, 10_000)])
def test_a_setting_out_of_range_is_put_right_in_the_host(rest, becomes):
    found, rules, memory = needs(rest=rest)
    assert found.inference_bytes == memory.rest == becomes
    assert rules == ["LG-R04"]


def test_a_setting_in_range_is_not_touched():
    _, _, memory = needs(rest=1_000.5)
    assert memory.rest == 1_000.5


def test_a_step_above_the_setting_is_logged_with_its_correction():
    assert needs(estimate=1_000)[1] == []
    assert needs(estimate=1_001)[1] == ["LG-R05"]
    assert needs(estimate=900, corrections=Corrections(decode=101))[1] == ["LG-R05"]


def test_a_finding_about_a_load_is_of_its_model():
    told = Told()
    Reservations(Memory(total=10_000, rest=-1.0), told, Corrections()).needs([MODEL], CARD, 2_000, 50, 50)
    of_model = dict(zip(told.rules, told.models, strict=True))
    assert of_model == {"LG-R04": None, "LG-R05": MODEL.model, "LG-R06": MODEL.model}


def test_corrections_are_kept_apart_from_predictions():
    found, _, _ = needs(estimate=1_500, hard=100, corrections=Corrections(decode=30, load=-20))
    assert found == Needs(1_000, 1_500, 100, 0, estimate_correction_bytes=30, hard_correction_bytes=-20)


def test_corrections_end_with_the_card():
    found, _, _ = needs(estimate=9_000, corrections=Corrections(decode=700, load=700))
    assert (found.estimate_correction_bytes, found.hard_correction_bytes) == (700, 300)
    assert found.free_bytes == 10_000
    found, _, _ = needs(estimate=9_000, corrections=Corrections(decode=5_000, load=700))
    assert (found.estimate_correction_bytes, found.hard_correction_bytes) == (1_000, 0)


def test_only_models_that_are_still_to_come_have_a_correction_of_their_load():
    corrections = Corrections()
    needs(corrections=corrections)
    assert corrections.asked == [MODEL.model]
    needs(corrections=corrections, placed=[Placed(Model(MODEL.model))])
    assert corrections.asked == []
