"""The speed of the links between RAM and the card is measured once a day, and for each card, slot and driver."""

import itertools

import pytest
import torch

from lib_lora_guard.memory.links_file import KEPT_SECONDS, MOST, Measured, read
from lib_lora_guard.planning.job_cost import Links
from lib_lora_guard.runtime import links
from lib_lora_guard.runtime.links import PROBE_BYTES, LinkRates, measure

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


class Card:
    """torch.cuda and the driver as far as they are asked."""

    def __init__(self, monkeypatch):
        self.measured, self.opened, self.now = 0, 0, 1e9
        self.of_slot, self.of_driver = "PCIe 4 x16", "driver 555"
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(links, "measure", self.measure)

    def rates(self, folder, pins=lambda: False):
        return LinkRates(lambda: folder, pins, lambda: self.now, lambda: self)

    def slot(self, device):
        return self.of_slot

    def driver(self):
        return self.of_driver

    def close(self):
        self.opened += 1

    def measure(self, device):
        self.measured += 1
        if self.measured > 1:
            raise torch.cuda.OutOfMemoryError
        return Measured(7e9, 2e9, 12e9)


def test_a_card_is_measured_once_by_all_processes(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    rates = card.rates(tmp_path)
    assert rates.of(CARD) == rates.of(CARD) == card.rates(tmp_path).of(CARD) == Links(7e9, 2e9, 7e9)
    assert (card.measured, card.opened) == (1, 2)
    assert list(read(tmp_path)) == [f"Card | PCIe 4 x16 | driver 555 | torch {torch.__version__}"]


@pytest.mark.parametrize("change", [{"of_slot": "PCIe 3 x4"}, {"of_driver": "driver 560"}, {"of_driver": ""}])
def test_another_slot_or_driver_is_measured_anew(change, tmp_path, monkeypatch):
    card = Card(monkeypatch)
    card.rates(tmp_path).of(CARD)
    vars(card).update(change, measured=0)
    card.rates(tmp_path).of(CARD)
    assert card.measured == 1
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize("is_new_process", [False, True])
@pytest.mark.parametrize(("seconds", "measured"), [(KEPT_SECONDS, 1), (KEPT_SECONDS + 1, 2), (-KEPT_SECONDS - 1, 2)])
def test_a_measurement_counts_for_a_day(seconds, measured, is_new_process, tmp_path, monkeypatch):
    card = Card(monkeypatch)
    rates = card.rates(tmp_path)
    rates.of(CARD)
    card.now += seconds
    # The second time the card has no room: an old measurement counts for nothing then, either.
    found = (card.rates(tmp_path) if is_new_process else rates).of(CARD)
    assert card.measured == measured
    assert found == (Links(7e9, 2e9, 7e9) if measured == 1 else Links())
    card.measured = 0
    assert rates.of(CARD) == Links(7e9, 2e9, 7e9)
    assert {one.when for one in read(tmp_path).values()} == {card.now if measured == 2 else 1e9}


def test_ram_copies_come_at_the_rate_of_pinned_ram_and_leave_again_for_nothing(tmp_path, monkeypatch):
    pins = True
    rates = Card(monkeypatch).rates(tmp_path, lambda: pins)
    assert rates.of(CARD) == Links(12e9, 2e9, 12e9, keeps_copies=True)
    pins = False
    assert rates.of(CARD) == Links(7e9, 2e9, 7e9)


def test_a_card_without_room_has_the_usual_rates_and_is_asked_again(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    card.measured = 1
    rates = card.rates(tmp_path)
    assert rates.of(CARD) == rates.of(CARD) == Links()
    assert (card.measured, card.opened) == (3, 1)
    assert read(tmp_path) == {}


def test_nothing_is_measured_without_a_card_or_a_folder(tmp_path, monkeypatch):
    card = Card(monkeypatch)
    assert card.rates(None).of(CARD) == card.rates(tmp_path).of(CPU) == Links()
    assert (card.measured, card.opened) == (0, 0)
