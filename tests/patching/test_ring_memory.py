"""The ring of memory that threads fill and a card reads: first in, first out."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.patching import ring_memory
from lib_lora_guard.patching.ring_memory import RingMemory

SIZE = 100
CPU = torch.device("cpu")


class Event:
    """A card's, which has not come to it until the test says so."""

    made: ClassVar[list["Event"]] = []

    def __init__(self):
        self.is_done, self.recorded = False, 0
        Event.made.append(self)

    def record(self, stream):
        self.is_done, self.recorded = False, self.recorded + 1

    def query(self):
        return self.is_done

    def synchronize(self):
        self.is_done = True


@pytest.fixture(autouse=True)
def events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [])


def places(spans):
    return {place for span in spans for place in range(span.start, span.start + span.memory.numel())}


# Each number is a span of that size; 0 gives the oldest one back, -1 has the card read one, -2 joins the two oldest ones.
@settings(max_examples=300)
@given(st.lists(st.integers(-2, SIZE // 2), max_size=60))
def test_spans_in_use_never_overlap_and_room_is_found_where_it_is(moves):
    ring, waiting, reading = RingMemory(SIZE, CPU), [], []
    Event.made.clear()
    for move in moves:
        if move == 0 and waiting:
            span = waiting.pop(0)
            ring.give(span, stream="any")
            reading.append(span)
        elif move == -1 and reading:
            reading.pop(0).read.is_done = True
        elif move == -2 and len(waiting) > 1 and waiting[0].end == waiting[1].start:
            before = places(waiting[:2])
            waiting[:2] = [ring.joined(waiting[:2])]
            assert places(waiting[:1]) == before
        elif move > 0:
            in_use = [*reading, *waiting]
            span = ring.take(move)
            if span is None:
                # Neither behind the last one nor, where the first ones are free, at the beginning.
                first, last = in_use[0], in_use[-1]
                end = last.start + last.memory.numel()
                gaps = [first.start - end] if last.start < first.start else [SIZE - end, first.start]
                assert all(gap < move for gap in gaps)
                continue
            assert span.memory.numel() == len(span.bytes) == move
            assert len(places([*in_use, span])) == len(places(in_use)) + move
            waiting.append(span)
    # What is given back can be waited for, and then all of the ring is there again.
    for span in waiting:
        ring.give(span, stream="any")
    while ring.take(SIZE) is None:
        ring.wait()
    assert len(Event.made) <= len(moves)


def test_joined_spans_are_read_at_once_and_free_together():
    ring = RingMemory(SIZE, CPU)
    spans = [ring.take(size) for size in (20, 30, 40)]
    for number, span in enumerate(spans):
        span.bytes[:] = bytes([number]) * len(span.bytes)
    joined = ring.joined(spans[1:])
    assert joined.memory.tolist() == [1] * 30 + [2] * 40
    assert ring.taken_bytes == 90
    ring.give(spans[0])
    ring.give(joined, "stream")
    assert len(Event.made) == 1
    assert ring.taken_bytes == 70
    joined.read.is_done = True
    assert ring.taken_bytes == 0
    assert ring.joined([joined]) is joined
    with pytest.raises(ValueError, match="from byte 50 on is not behind one that ends at 20"):
        ring.joined([spans[0], spans[2]])


def test_a_span_is_written_through_either_view_of_it():
    ring = RingMemory(SIZE, CPU)
    ring.take(30)
    span = ring.take(20)
    span.bytes[:3] = b"abc"
    assert bytes(span.memory[:3].tolist()) == b"abc"
    span.memory.fill_(7)
    assert set(span.bytes) == {7}


def test_a_span_that_the_card_has_not_read_is_in_use_and_its_event_is_used_again():
    ring = RingMemory(SIZE, CPU)
    first, second = ring.take(50), ring.take(50)
    ring.give(second, "stream")  # out of order: it waits for the first one
    second.read.is_done = True
    assert ring.take(1) is None
    ring.give(first, "stream")
    assert ring.take(1) is None
    assert ring.taken_bytes == 100
    first.read.is_done = True
    third = ring.take(10)
    assert ring.taken_bytes == 10
    ring.give(third, "stream")
    assert len(Event.made) == 2
    assert sorted(event.recorded for event in Event.made) == [1, 2]


def test_a_span_that_nobody_reads_is_free_at_once():
    ring = RingMemory(SIZE, CPU)
    ring.give(ring.take(SIZE))
    assert ring.take(SIZE).start == 0
    ring.forget()
    assert ring.take(SIZE).start == 0


def test_more_than_the_ring_holds_is_refused_instead_of_waited_for():
    with pytest.raises(ValueError, match="101 of 100 bytes"):
        RingMemory(SIZE, CPU).take(SIZE + 1)


def test_where_the_driver_locks_no_ram_the_ring_is_ordinary_memory(monkeypatch):
    original, asked = torch.empty, []

    def empty(*args, pin_memory=False, **named):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **named)

    monkeypatch.setattr(ring_memory.torch, "empty", empty)
    ring = RingMemory(SIZE, torch.device("cuda"))
    assert (asked, ring.is_pinned) == ([True, False], False)
    assert ring.take(SIZE).memory.numel() == SIZE


def test_few_views_are_kept(monkeypatch):
    monkeypatch.setattr(ring_memory, "MOST_VIEWS", 3)
    ring = RingMemory(SIZE, CPU)
    for size in range(1, 20):
        span = ring.take(size)
        assert span.memory.numel() == size
        ring.give(span)
        assert len(ring._views) <= 3
