"""The memory taken by a part of the work is its own: not what was there before, not what a part within it took
or left behind."""

import threading

import pytest
import torch

from lib_lora_guard.memory.calibration_peaks import Count, Peaks, TorchCounter

CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Allocator:
    """Counts as torch's does: in use now, and the most since the last reset."""

    def __init__(self):
        self.used = self.top = self.reads = 0
        self.active_more = self.reserved_more = 0

    def take(self, size):
        self.used += size
        self.top = max(self.top, self.used)

    def pass_by(self, size):
        self.take(size)
        self.take(-size)

    def read(self, device):
        self.reads += 1
        return Count(self.used, self.top, self.top + self.active_more, self.top + self.reserved_more)

    def reset(self, device):
        self.top = self.used


@pytest.fixture
def allocator():
    return Allocator()


@pytest.fixture
def peaks(allocator):
    return Peaks(allocator)


def test_a_part_counts_from_the_memory_at_its_start(allocator, peaks):
    allocator.take(1000)
    allocator.pass_by(5000)
    with peaks.part(CARD) as part:
        allocator.pass_by(300)
        allocator.take(20)
        allocator.pass_by(200)
    assert (part.peak_bytes, part.stays_bytes) == (300, 20)
    with peaks.part(CARD) as part:
        pass
    assert (part.peak_bytes, part.stays_bytes) == (0, 0)
    assert allocator.reads == 4


def test_memory_freed_within_a_part_does_not_lower_its_peak(allocator, peaks):
    allocator.take(1000)
    with peaks.part(CARD) as part:
        allocator.take(-600)
        allocator.pass_by(500)
    assert (part.peak_bytes, part.stays_bytes) == (0, -600)


def test_a_part_within_a_part_counts_for_itself(allocator, peaks):
    allocator.take(100)
    with peaks.part(CARD) as outer:
        allocator.pass_by(40)
        with peaks.part(CARD) as inner:
            allocator.pass_by(9000)
            allocator.take(700)
            with peaks.part(CARD) as innermost:
                allocator.take(50)
                allocator.pass_by(1)
        allocator.pass_by(60)
    assert (innermost.peak_bytes, innermost.stays_bytes) == (51, 50)
    assert (inner.peak_bytes, inner.stays_bytes) == (9000, 750)
    assert (outer.peak_bytes, outer.stays_bytes) == (60, 750)


def test_a_decode_after_models_made_room(allocator, peaks):
    """The denoiser leaves and the VAE comes while the decode is under way already."""
    allocator.take(12_000)
    with peaks.part(CARD) as decode:
        with peaks.part(CARD):
            allocator.take(-9_000)
            allocator.take(160)
        allocator.pass_by(4_000)
    assert decode.peak_bytes == 4_000


def test_peaks_of_two_threads_at_once_are_unknown(allocator, peaks):
    with peaks.part(CARD) as mine:
        thread = threading.Thread(target=lambda: theirs.append(run(peaks)))
        theirs = []
        thread.start()
        thread.join()
        with peaks.part(CARD) as inner:
            allocator.pass_by(3)
    assert (mine.peak_bytes, theirs, inner.peak_bytes) == (None, [None], 3)
    assert run(peaks) == 0


def run(peaks):
    with peaks.part(CARD) as part:
        pass
    return part.peak_bytes


def test_two_devices_at_once_are_not_told_apart(peaks):
    with peaks.part(CARD) as one, peaks.part(OTHER) as other:
        pass
    assert (one.peak_bytes, other.peak_bytes) == (None, None)


def test_an_error_leaves_no_peak_and_no_open_part(allocator, peaks):
    seen = []

    def fails():
        with peaks.part(CARD) as outer, peaks.part(CARD) as inner:
            seen.extend([outer, inner])
            allocator.take(5)
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert [part.peak_bytes for part in seen] == [None, None]
    assert peaks._open == []


def test_peaks_from_before_a_reset_are_kept_for_the_display(allocator, peaks):
    allocator.active_more, allocator.reserved_more = 10, 1000
    allocator.pass_by(700)
    assert run(peaks) == 0
    allocator.pass_by(200)
    assert run(peaks) == 0
    assert (peaks.active_peak, peaks.reserved_peak) == (710, 1700)
    peaks.forget()
    assert run(peaks) == 0
    assert (peaks.active_peak, peaks.reserved_peak) == (10, 1000)


def test_a_driver_that_does_not_count_costs_the_measurement_alone(allocator, peaks, monkeypatch):
    def refuse(device):
        allocator.reads += 1
        raise RuntimeError("no statistics here")

    monkeypatch.setattr(allocator, "read", refuse)
    assert [run(peaks), run(peaks)] == [None, None]
    assert allocator.reads == 1, "not asked again"


def test_torchs_numbers(monkeypatch):
    held = {
        "allocated_bytes": {"all": {"current": 3, "peak": 8}},
        "active_bytes": {"all": {"current": 4, "peak": 9}},
        "reserved_bytes": {"all": {"current": 20, "peak": 30}},
    }
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: held)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    counter = TorchCounter()
    assert counter.read(CARD) == Count(3, 8, 9, 30)
    counter.reset(CARD)
    assert asked == [CARD]
    held.clear()
    assert counter.read(CARD) == Count(0, 0, 0, 0), "a card that was never used"
