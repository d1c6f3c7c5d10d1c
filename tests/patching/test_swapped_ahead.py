"""Swapped weights come one layer ahead: which, when, and what is given back. The link is played: it notes what it is asked."""

import contextlib
import gc
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.patching import fused_choice, swapped_ahead
from lib_lora_guard.patching.fused_choice import FusedChoice, Twin
from lib_lora_guard.patching.swapped_ahead import SWITCH, SwappedAhead

CARD = torch.device("cuda:0")
OF_ITS_OWN, ONE_AHEAD = ["copy 0", "copy 1", "copy 2"], ["copy 0", "begin 1", "begin 2"]
"""What three layers ask of the link in a step."""


class Layer:
    """A swapped layer; `place` tells its weight from others', each of 8 bytes a tensor."""

    def __init__(self, place, count=1, spare_bytes=0):
        self.place, self.is_in_ram, self.spare_bytes = place, True, spare_bytes
        self.tensors = tuple(torch.full((2,), float(place)) for _ in range(count))

    def in_ram(self):
        return self.tensors if self.is_in_ram else None


class Link:
    """Copies are clones. `under_way` are those that the forward pass has not waited for."""

    def __init__(self):
        self.log, self.under_way, self.error, self.is_pinned, self.is_here = [], [], None, True, True

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
        # It may be waited for twice, after an interrupt.
        self.under_way = [one for one in self.under_way if one is not begun]
        return self.is_here

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


def asked_in_a_step(ahead, link, layers):
    link.log.clear()
    step(ahead, layers)
    return link.log


def test_from_the_second_step_on_all_but_the_first_are_there_when_they_are_called(ahead, link, layers):
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"]
    for _ in range(2):
        link.log.clear()
        step(ahead, layers)
        assert link.log == ["copy 0", "begin 1", "begin 2"]
    assert not link.under_way, "nothing is on its way across the end of a step"


class Model:
    """Steps are its steps."""


@pytest.mark.parametrize(("spare_bytes", "second"), [(15, False), (16, True), (1000, True)])
def test_a_second_one_is_on_its_way_where_the_room_that_is_planned_has_it(ahead, link, spare_bytes, second):
    layers = [Layer(place, spare_bytes=spare_bytes) for place in range(5)]
    step(ahead, layers)
    for _ in range(2):
        link.log.clear()
        for layer in layers:
            ahead.bring(layer, layer.tensors, CARD)
            assert len(link.under_way) == min(1 + second, 4 - layer.place)
        assert link.log == ["copy 0", *(f"begin {place}" for place in range(1, 5))]


def test_the_first_one_comes_with_the_step_from_the_second_step_on(ahead, link, layers):
    model = Model()
    for begun in (["copy 0", "copy 1", "copy 2"], ["begin 0", "begin 1", "begin 2"]):
        link.log.clear()
        ahead.step_begins(model)
        assert link.log == begun[:1] * ("begin" in begun[0])
        step(ahead, layers)
        assert link.log == begun
    assert not link.under_way
    ahead.drop()
    link.log.clear()
    ahead.step_begins(model)
    assert link.log == ["begin 0"], "of the next image too"
    ahead.step_begins(model)
    assert len(link.under_way) == 1, "a step that ended before its first layer leaves nothing"


def test_two_come_with_the_step_where_there_is_room(ahead, link):
    model, layers = Model(), [Layer(place, spare_bytes=16) for place in range(4)]
    for _ in range(2):
        link.log.clear()
        ahead.step_begins(model)
        assert len(link.under_way) in (0, 2)
        step(ahead, layers)
    assert link.log == [f"begin {place}" for place in range(4)]


def test_each_model_begins_with_its_own_first_layer(ahead, link, layers):
    models, own = (Model(), Model()), (layers, [Layer(7)])
    for _ in range(2):
        for model, of_model in zip(models, own, strict=True):
            link.log.clear()
            ahead.step_begins(model)
            step(ahead, of_model)
    assert link.log == ["begin 7"]
    ahead.step_begins(models[0])
    link.log.clear()
    ahead.step_begins(Model())
    assert link.log == [], "nothing is known of it"
    assert not link.under_way, "nor will it take what was begun for another"


def test_what_is_called_outside_a_step_is_no_models_first(ahead, link, layers):
    """The text encoder runs in the same image, and nobody says so."""
    model, encoder = Model(), Layer(7)
    step(ahead, [encoder])
    ahead.step_begins(model)
    step(ahead, layers)
    step(ahead, [encoder])
    ahead.drop()
    step(ahead, [encoder])
    link.log.clear()
    ahead.step_begins(model)
    assert link.log == ["begin 0"]


def test_what_is_called_between_two_steps_is_not_begun_at_the_end_of_each(ahead, link, layers):
    """The text encoder runs for the next image of the same request."""
    model, encoder = Model(), Layer(7)
    for between in ([], [encoder], [], [], []):
        ahead.step_begins(model)
        step(ahead, layers)
        ahead.step_ends()
        assert not link.under_way, "others want the memory"
        step(ahead, between)
    link.log.clear()
    ahead.step_begins(model)
    step(ahead, layers)
    assert link.log == ["begin 0", "begin 1", "begin 2"]


def test_what_is_called_after_a_step_without_swapped_layers_is_not_its_first(ahead, link):
    """The model lies on the card, and the text encoder that runs after it does not."""
    model, encoder = Model(), Layer(7)
    ahead.step_begins(model)
    ahead.step_ends()
    step(ahead, [encoder])
    link.log.clear()
    ahead.step_begins(model)
    assert link.log == []


def test_a_first_layer_that_is_not_called_any_more_is_begun_for_nothing_once(ahead, link, layers):
    """Its weight goes the long way by now, as those of all others."""
    model = Model()
    ahead.step_begins(model)
    step(ahead, layers)
    ahead.step_ends()
    for begun in (["begin 0"], []):
        link.log.clear()
        ahead.step_begins(model)
        assert link.log == begun
        ahead.step_ends()
        assert not link.under_way
    ahead.step_begins(model)
    step(ahead, layers)
    ahead.step_ends()
    link.log.clear()
    ahead.step_begins(model)
    assert link.log == ["begin 0"], "learnt again"


def test_the_end_of_a_step_leaves_the_copies_of_another_thread_alone(ahead, link, layers):
    step(ahead, layers)
    ahead.bring(layers[0], layers[0].tensors, CARD)
    thread = threading.Thread(target=ahead.step_ends)
    thread.start()
    thread.join()
    assert len(link.under_way) == 1


def test_a_layer_that_is_called_twice_is_not_taken_for_the_beginning(ahead, link, layers):
    model = Model()
    for _ in range(3):
        link.log.clear()
        ahead.step_begins(model)
        step(ahead, [layers[0], layers[1], layers[1], layers[2]])
    assert link.log[0] == "begin 0"


def test_another_first_layer_is_learnt_and_what_has_come_for_nothing_is_given_back(ahead, link):
    model, layers = Model(), [Layer(place, spare_bytes=1000) for place in range(4)]
    ahead.step_begins(model)
    step(ahead, layers)
    ahead.step_begins(model)
    assert len(link.under_way) == 2
    link.log.clear()
    step(ahead, layers[2:])
    assert link.log == ["copy 2", "begin 3"]
    link.log.clear()
    ahead.step_begins(model)
    assert link.log == ["begin 2", "begin 3"]


def test_a_first_layer_that_lies_on_the_card_by_now_needs_nothing(ahead, link, layers):
    model = Model()
    ahead.step_begins(model)
    step(ahead, layers)
    layers[0].is_in_ram = False
    link.log.clear()
    ahead.step_begins(model)
    step(ahead, layers[1:])
    assert link.log == ["copy 1", "begin 2"]


def test_no_step_of_a_thread_waits_with_the_copies_of_another(ahead, link, layers):
    model = Model()
    ahead.step_begins(model)
    step(ahead, layers)
    ahead.step_begins(model)
    thread = threading.Thread(target=ahead.step_begins, args=(Model(),))
    thread.start()
    thread.join()
    assert not link.under_way


def test_switched_off_a_step_begins_nothing(link, layers, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    ahead, model = SwappedAhead(link), Model()
    for _ in range(2):
        ahead.step_begins(model)
        step(ahead, layers)
    assert not any("begin" in line for line in link.log)


def test_an_image_begins_with_the_order_of_the_last_one_and_leaves_nothing(ahead, link, layers):
    step(ahead, layers)
    ahead.drop()
    link.log.clear()
    step(ahead, layers[:2])
    assert link.log == ["copy 0", "begin 1", "begin 2"]
    assert len(link.under_way) == 1
    ahead.drop()
    assert not link.under_way, "the forward pass waits before the memory is used again"
    assert not ahead._upcoming


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
    link.error = None
    assert asked_in_a_step(ahead, link, layers) == OF_ITS_OWN, "torch would empty its cache in each layer"
    ahead.drop()
    assert asked_in_a_step(ahead, link, layers) == ONE_AHEAD


def test_a_driver_that_refuses_a_stream_is_asked_once(ahead, link, layers):
    step(ahead, layers)
    link.error = RuntimeError("no streams here")
    step(ahead, layers)
    link.error, _ = None, link.log.clear()
    ahead.drop()
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"]


def test_an_error_of_the_next_layer_does_not_cost_this_one_its_weight(ahead, link, layers, monkeypatch):
    def fails():
        raise AttributeError("no scales any more")

    step(ahead, layers)
    monkeypatch.setattr(layers[1], "in_ram", fails)
    link.log.clear()
    step(ahead, layers)
    assert link.log == ["copy 0", "copy 1", "copy 2"]


def test_what_is_begun_for_nothing_is_begun_once(ahead, link, layers):
    """After the last layer of one model another model was run: that is no order of a step. Nor is a layer that goes another way by now."""
    step(ahead, layers[:2])
    step(ahead, layers[2:])
    for begun in (["copy 0", "begin 1", "begin 2"], ["copy 0", "begin 1"], ["copy 0", "begin 1"]):
        link.log.clear()
        step(ahead, layers[:2])
        assert link.log == begun
    assert not link.under_way


def test_a_first_layer_that_one_step_has_left_out_is_not_begun_at_the_end_of_the_next_images_steps(ahead, link, layers):
    for order in ([0, 1, 2], [1, 2], [0, 1, 2]):
        step(ahead, [layers[place] for place in order])
    ahead.drop()
    step(ahead, layers)
    assert not link.under_way


def test_the_last_layer_of_an_image_has_no_next_one(ahead, link, layers):
    step(ahead, layers[:2])
    ahead.drop()
    step(ahead, layers[2:])
    ahead.drop()
    step(ahead, layers[:2])
    assert not link.under_way


def test_a_card_copies_by_itself_what_is_pinned_all_of_it():
    link, asked = swapped_ahead.CudaLink(), []

    class Values:
        nbytes = 8

        def __init__(self, address, is_pinned):
            self.data_ptr, self.is_pinned = lambda: address, lambda: asked.append(address) or is_pinned

    assert link.is_fast((Values(1, True), Values(2, True)))
    assert not link.is_fast((Values(1, True), Values(3, False)))
    assert not link.is_fast((Values(2, True), Values(3, False)))
    assert asked == [1, 2, 3, 3], "what is pinned once"


def test_of_how_many_places_it_is_kept_that_they_are_pinned_has_an_end(monkeypatch):
    monkeypatch.setattr(swapped_ahead, "MOST_PLACES", 3)
    link = swapped_ahead.CudaLink()
    for address in range(10):
        values = torch.zeros(2)
        monkeypatch.setattr(values, "data_ptr", lambda address=address: address)
        monkeypatch.setattr(values, "is_pinned", lambda: True)
        assert link.is_fast((values,))
        assert len(link._pinned) <= 3


def test_on_another_stream_each_layer_copies_its_own(ahead, link, layers):
    """The memory of what was begun is that of the stream before: it would be written to again while this one reads."""
    step(ahead, layers)
    link.is_here = False
    link.log.clear()
    step(ahead, layers)
    assert [line for line in link.log if "copy" in line] == ["copy 0", "copy 1", "copy 2"]


def test_where_a_layer_has_no_room_what_was_begun_is_given_back(ahead, link, layers):
    step(ahead, layers)
    step(ahead, layers[:1])
    assert len(link.under_way) == 1
    ahead.give_way()
    assert not link.under_way
    assert not ahead._upcoming
    assert asked_in_a_step(ahead, link, layers) == OF_ITS_OWN, "the next layer would have no room either"
    ahead.drop()
    assert asked_in_a_step(ahead, link, layers) == ONE_AHEAD


class Stream:
    """Notes in the order of the calls what a card would do on it."""

    def __init__(self, name, log):
        self.name, self.log = name, log
        self.cuda_stream, self.device_index = id(self), CARD.index

    def wait_stream(self, other):
        self.log.append((self.name, f"waits for all of {other.name}"))

    def wait_event(self, event):
        self.log.append((self.name, f"waits for {event.name}"))


class Event:
    def __init__(self, log):
        self.name, self.log = "nothing", log

    def record(self, stream):
        self.name = f"{stream.name} at {len([one for one in self.log if one[0] == stream.name])}"


@pytest.fixture(params=[True, False], ids=["by address", "by object"])
def streams(request, monkeypatch):
    """The streams of a card that is not there, and what is done on them. Memory is of the stream on which it was taken."""
    log = []
    main, side, other = (Stream(name, log) for name in ("main", "side", "other"))
    now, card = [main], [CARD.index]

    def set_stream(stream):
        now[0], card[0] = stream, stream.device_index

    def copy(self, values, non_blocking=False):
        log.append((now[0].name, f"copies {values[0].item():.0f}" if non_blocking else "waits for the processor"))
        return self.set_(values.clone())

    def empty(shape, dtype, device):
        log.append((now[0].name, "has memory"))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: card[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: card.__setitem__(0, index))
    raw = (lambda index: now[0].cuda_stream if index == CARD.index else 0) if request.param else None
    monkeypatch.setattr(swapped_ahead, "_RAW_STREAM", raw)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    return log, now, other


def test_a_card_copies_beside_the_forward_pass_and_each_waits_for_the_other(streams):
    log, now, other = streams
    link, tensors = swapped_ahead.CudaLink(), (torch.full((2,), 3.0), torch.full((2,), 4.0))
    there, begun = link.begin(tensors, CARD)
    assert log == [
        ("main", "has memory"),
        ("main", "has memory"),
        # What was computed in that memory before.
        ("side", "waits for main at 2"),
        ("side", "copies 3"),
        ("side", "copies 4"),
    ]
    assert [one[0].item() for one in there] == [3.0, 4.0]
    log.clear()
    assert link.wait(begun, CARD)
    assert log == [("main", "waits for side at 3")], "for both copies"
    log.clear()
    now[0] = other
    assert not link.wait(begun, CARD)
    assert log == [("main", "waits for side at 3")], "the memory goes back to the stream on which it was taken"


def test_the_thread_stays_on_its_card(streams):
    """The model's is another one, and torch's streams bring their card with them."""
    torch.cuda.set_device(CARD.index + 1)
    swapped_ahead.CudaLink().begin((torch.full((2,), 3.0),), CARD)
    assert torch.cuda.current_device() == CARD.index + 1


def test_an_event_that_was_waited_for_is_used_again(streams):
    log, _, _ = streams
    link, tensors = swapped_ahead.CudaLink(), (torch.full((2,), 3.0),)
    _, first = link.begin(tensors, CARD)
    _, second = link.begin(tensors, CARD)
    assert first.done is not second.done, "both are under way"
    link.wait(first, CARD)
    _, third = link.begin(tensors, CARD)
    assert third.done is first.done
    # As after an interrupt between the wait and the note that it was: no earlier place than the copy's own.
    link.wait(first, CARD)
    assert log[-1] == ("main", "waits for side at 6")
    link.wait(second, CARD)
    assert log[-1] == ("main", "waits for side at 4")


@pytest.mark.parametrize("error", [RuntimeError("a copy fails"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_copies_that_end_half_way_are_waited_for_before_their_memory_is_used_again(streams, monkeypatch, error):
    log, now, _ = streams
    copy = torch.Tensor.copy_

    def second_fails(self, values, non_blocking=False):
        if values[0].item() == 4.0:
            raise error
        return copy(self, values, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", second_fails)
    with pytest.raises(type(error)):
        swapped_ahead.CudaLink().begin((torch.full((2,), 3.0), torch.full((2,), 4.0)), CARD)
    assert log[-2:] == [("side", "copies 3"), ("main", "waits for all of side")]
    assert now[0].name == "main", "what comes next is computed where it was"


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


def test_an_interrupt_at_any_line_leaves_no_copy_under_way_and_no_wrong_weight():
    """The memory of a copy that nobody waits for would be written to while it comes."""
    places = set()

    def interrupted(after):
        link, layers, model = Link(), [Layer(place, spare_bytes=1000) for place in range(4)], Model()
        ahead, lines = SwappedAhead(link), iter(range(after))
        ahead.step_begins(model)
        step(ahead, layers)

        def trace(frame, event, argument):
            if frame.f_code.co_filename != swapped_ahead.__file__:
                return None
            if event == "line" and next(lines, None) is None:
                sys.settrace(None)
                places.add(frame.f_lineno)
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            ahead.step_begins(model)
            step(ahead, layers)
            ahead.drop()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            # The image ends.
            ahead.drop()
            assert not link.under_way
            step(ahead, layers[::-1])
            step(ahead, layers)
        return False

    after = 0
    while interrupted(after):
        after += 1
    assert len(places) > 50


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 0, 1]), st.lists(st.integers(0, 4), max_size=6)), max_size=5),
    st.sets(st.integers(0, 9)),
    st.sampled_from([0, 16, 24, 1000]),
)
def test_whatever_is_called_in_whatever_order_each_call_gets_its_own_weight(steps, drops, spare_bytes):
    """Steps of two models, or of which nobody says that they begin; layers that are called twice, left out, or in another order; an
    end of the image in between."""
    link, models, calls = Link(), (Model(), Model()), 0
    ahead, layers = SwappedAhead(link), [Layer(place, 1 + place % 2, spare_bytes) for place in range(5)]
    for number, order in steps:
        if number is not None:
            ahead.step_begins(models[number])
        for place in order:
            step(ahead, [layers[place]])
            assert len(link.under_way) <= (2 if spare_bytes else 1)
            assert len(link.under_way) == len(ahead._upcoming)
            calls += 1
            if calls in drops:
                ahead.drop()
                assert not link.under_way


def test_of_this_process_there_is_one():
    assert isinstance(swapped_ahead.AHEAD, SwappedAhead)
