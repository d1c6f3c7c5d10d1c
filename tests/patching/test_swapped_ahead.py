"""Swapped weights come one layer ahead: which, when, and what is given back. The link is played: it notes what it is asked."""

import contextlib
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.patching import fused_choice, swapped_ahead
from lib_lora_guard.patching.fused_choice import FusedChoice, Twin
from lib_lora_guard.patching.swapped_ahead import SWITCH, SwappedAhead

CARD = torch.device("cuda:0")


class Layer:
    """A swapped layer; `place` tells its weight from others'."""

    def __init__(self, place, count=1):
        self.place, self.is_in_ram = place, True
        self.tensors = tuple(torch.full((2,), float(place)) for _ in range(count))

    def in_ram(self):
        return self.tensors if self.is_in_ram else None


class Link:
    """Copies are clones. `under_way` are those that the forward pass has not waited for."""

    def __init__(self):
        self.log, self.under_way, self.error, self.is_pinned = [], [], None, True

    def copy(self, tensors, device):
        self.log.append(f"copy {tensors[0].flatten()[0].item():.0f}")
        return tuple(one.clone() for one in tensors)

    def begin(self, tensors, device):
        if self.error is not None:
            raise self.error
        self.log.append(f"begin {tensors[0].flatten()[0].item():.0f}")
        begun = object()
        self.under_way.append(begun)
        return tuple(one.clone() for one in tensors), begun

    def wait(self, begun, device):
        self.under_way.remove(begun)

    def is_fast(self, tensors):
        return self.is_pinned


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def ahead(link):
    return SwappedAhead(link)


@pytest.fixture
def layers():
    return [Layer(place) for place in range(3)]


def step(ahead, layers):
    for layer in layers:
        there = ahead.bring(layer, layer.tensors, CARD)
        for one, mine in zip(there, layer.tensors, strict=True):
            assert torch.equal(one, mine)
            assert one is not mine


def test_from_the_second_step_on_all_but_the_first_are_there_when_they_are_called(ahead, link, layers):
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"]
    for _ in range(2):
        link.log.clear()
        step(ahead, layers)
        assert link.log == ["copy 0", "begin 1", "begin 2"]
    assert not link.under_way, "nothing is on its way across the end of a step"


def test_an_image_begins_with_the_order_of_the_last_one_and_leaves_nothing(ahead, link, layers):
    step(ahead, layers)
    ahead.drop()
    link.log.clear()
    step(ahead, layers[:2])
    assert link.log == ["copy 0", "begin 1", "begin 2"]
    assert len(link.under_way) == 1
    ahead.drop()
    assert not link.under_way, "the forward pass waits before the memory is used again"
    assert ahead._upcoming is None


def test_a_layer_that_is_on_the_card_by_now_is_not_copied_and_another_order_is_learnt(ahead, link, layers):
    step(ahead, layers)
    layers[1].is_in_ram = False
    link.log.clear()
    step(ahead, [layers[0], layers[2]])
    assert link.log == ["copy 0", "copy 2"]
    link.log.clear()
    step(ahead, [layers[0], layers[2]])
    assert link.log == ["copy 0", "begin 2"]


def test_what_has_come_for_another_weight_is_not_taken(ahead, link, layers):
    """Between two calls another program gives the next layer a new weight."""
    step(ahead, layers)
    ahead.bring(layers[0], layers[0].tensors, CARD)
    other = (torch.full((2,), 7.0),)
    (found,) = ahead.bring(layers[1], other, CARD)
    assert torch.equal(found, other[0])
    assert link.log[-2:] == ["copy 7", "begin 2"]


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_the_same_memory_as_something_else_is_not_taken(ahead, link, layers, change):
    step(ahead, layers)
    ahead.bring(layers[0], layers[0].tensors, CARD)
    mine = layers[1].tensors[0]
    other = mine.view(1, 2) if change == "shape" else mine.view(torch.int32)
    (found,) = ahead.bring(layers[1], (other,), CARD)
    assert (found.shape, found.dtype) == (other.shape, other.dtype)


def test_another_card_gets_copies_of_its_own(ahead, link, layers):
    step(ahead, layers)
    ahead.bring(layers[0], layers[0].tensors, CARD)
    ahead.bring(layers[1], layers[1].tensors, torch.device("cuda:1"))
    assert link.log[-2:] == ["copy 1", "begin 2"]


def test_from_ordinary_ram_nothing_comes_ahead(ahead, link, layers):
    link.is_pinned = False
    step(ahead, layers)
    step(ahead, layers)
    assert not any("begin" in line for line in link.log)


def test_where_memory_ends_each_layer_copies_its_own_to_the_end_of_the_image(ahead, link, layers):
    step(ahead, layers)
    link.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    step(ahead, layers)
    link.error, _ = None, link.log.clear()
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"], "torch would empty its cache in each layer"
    ahead.drop()
    link.log.clear()
    step(ahead, layers)
    assert link.log == ["copy 0", "begin 1", "begin 2"]


def test_a_driver_that_refuses_a_stream_is_asked_once(ahead, link, layers):
    step(ahead, layers)
    link.error = RuntimeError("no streams here")
    step(ahead, layers)
    link.error, _ = None, link.log.clear()
    ahead.drop()
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"]


def test_a_second_thread_takes_nothing_of_the_first(ahead, link, layers):
    step(ahead, layers)
    ahead.bring(layers[0], layers[0].tensors, CARD)
    assert len(link.under_way) == 1
    thread = threading.Thread(target=lambda: ahead.bring(layers[1], layers[1].tensors, CARD))
    thread.start()
    thread.join()
    assert link.log[-2:] == ["copy 1", "begin 2"]
    assert len(link.under_way) == 1, "the first one's was waited for"


def test_layers_that_are_gone_are_forgotten(ahead, link, layers):
    step(ahead, layers)
    del layers[1:]
    gc.collect()
    ahead.bring(layers[0], layers[0].tensors, CARD)
    assert link.log[-1] == "copy 0"
    assert len(ahead._after) == 0 or all(one() is None for one in ahead._after.values())


def test_switched_off_or_without_a_card_each_layer_copies_its_own(link, layers, monkeypatch):
    off = torch.device("cpu")
    ahead = SwappedAhead(link)
    for _ in range(2):
        for layer in layers:
            ahead.bring(layer, layer.tensors, off)
    assert not any("begin" in line for line in link.log)
    monkeypatch.setenv(SWITCH, "0")
    switched = SwappedAhead(link)
    step(switched, layers)
    step(switched, layers)
    assert not any("begin" in line for line in link.log)


def test_the_end_of_an_image_drops_what_was_begun(link, layers, monkeypatch):
    ahead = SwappedAhead(link)
    monkeypatch.setattr(fused_choice, "AHEAD", ahead)
    choice = FusedChoice(Twin())
    step(ahead, layers)
    with choice.image():
        with choice.image():
            step(ahead, layers[:1])
        assert len(link.under_way) == 1, "a detailer's image is inside another"
    assert not link.under_way
    with contextlib.suppress(KeyboardInterrupt), choice.image():
        step(ahead, layers[:1])
        raise KeyboardInterrupt
    assert not link.under_way


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=6), max_size=5), st.sets(st.integers(0, 9)))
def test_whatever_is_called_in_whatever_order_each_call_gets_its_own_weight(steps, drops):
    """Layers that are called twice in a step, left out, or in another order; an end of the image in between."""
    link = Link()
    ahead, layers, calls = SwappedAhead(link), [Layer(place, 1 + place % 2) for place in range(5)], 0
    for order in steps:
        for place in order:
            step(ahead, [layers[place]])
            assert len(link.under_way) <= 1
            calls += 1
            if calls in drops:
                ahead.drop()
                assert not link.under_way


def test_of_this_process_there_is_one():
    assert isinstance(swapped_ahead.AHEAD, SwappedAhead)
