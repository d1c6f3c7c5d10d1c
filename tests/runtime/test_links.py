"""The speed of the links between RAM and the card is measured once and kept."""

import itertools
import json

import pytest
import torch

from lib_lora_guard.planning.job_cost import Links
from lib_lora_guard.runtime import links
from lib_lora_guard.runtime.links import FILE_NAME, LEAST, MOST, PROBE_BYTES, LinkRates, Measured, keep, measure, read

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_the_median_of_three_copies_counts():
    # The ends of three copies in each direction; one of each is disturbed.
    seconds = [0.01, 5.0, 0.02, 0.1, 0.2, 7.0]
    ticks = iter([0.0, *itertools.accumulate(part for each in seconds for part in (each, 0.0))])
    found = measure(CPU, clock=lambda: next(ticks))
    assert found.to_card == pytest.approx(PROBE_BYTES / 0.02)
    assert found.to_ram == pytest.approx(PROBE_BYTES / 0.2)
    assert found.pinned == found.to_card


def test_a_clock_that_stands_still_gives_no_rate_beyond_belief():
    assert measure(CPU, clock=lambda: 1.0) == Measured(MOST, MOST, MOST)


def test_rates_are_kept_by_card(tmp_path):
    keep(tmp_path, "one", Measured(7e9, 2e9, 12e9))
    keep(tmp_path, "two", Measured(25e9, 8e9, 26e9))
    assert read(tmp_path) == {"one": Measured(7e9, 2e9, 12e9), "two": Measured(25e9, 8e9, 26e9)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 0, "cards": {}}',
        '{"version": 2, "cards": []}',
        '{"version": 1, "cards": {"one": [1e9, 1e9, 1e9]}}',
        "[" * 100_000,
    ]
    + [
        json.dumps({"version": 2, "cards": {"one": rates}})
        for rates in (None, [1e9], [1e9, 1e9, "7"], [1e9, LEAST / 2, 1e9])
    ],
)
def test_a_file_that_was_edited_counts_for_nothing(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    assert read(tmp_path) == {}
    keep(tmp_path, "one", Measured(7e9, 2e9, 12e9))
    assert read(tmp_path) == {"one": Measured(7e9, 2e9, 12e9)}


class Card:
    """torch.cuda as far as it is asked."""

    def __init__(self, monkeypatch):
        self.measured = 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(links, "measure", self.measure)

    def measure(self, device):
        self.measured += 1
        if self.measured > 1:
            raise torch.cuda.OutOfMemoryError
        return Measured(7e9, 2e9, 12e9)


def test_a_card_is_measured_once_by_all_processes(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    rates = LinkRates(lambda: tmp_path)
    assert rates.of(CARD) == rates.of(CARD) == LinkRates(lambda: tmp_path).of(CARD) == Links(7e9, 2e9, 7e9)
    assert card.measured == 1


def test_ram_copies_come_at_the_rate_of_pinned_ram_and_leave_again_for_nothing(tmp_path, monkeypatch):
    Card(monkeypatch)
    pins = True
    rates = LinkRates(lambda: tmp_path, lambda: pins)
    assert rates.of(CARD) == Links(12e9, 2e9, 12e9, keeps_copies=True)
    pins = False
    assert rates.of(CARD) == Links(7e9, 2e9, 7e9)


def test_a_card_without_room_has_the_usual_rates_and_is_asked_again(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    card.measured = 1
    rates = LinkRates(lambda: tmp_path)
    assert rates.of(CARD) == rates.of(CARD) == Links()
    assert card.measured == 3
    assert read(tmp_path) == {}


def test_nothing_is_measured_without_a_card_or_a_folder(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    assert LinkRates(lambda: None).of(CARD) == LinkRates(lambda: tmp_path).of(CPU) == Links()
    assert card.measured == 0
