"""Weights of swapped layers in pinned RAM. The card is played by ordinary memory: what counts is which tensor lies where."""

import gc
from types import SimpleNamespace

import pytest
import torch
from support.page_locks import Driver

from lib_lora_guard.runtime import ram_copies
from lib_lora_guard.runtime.ram_copies import SMALLEST_BYTES, RamCopies
from lib_lora_guard.units import GB


class Ram:
    total, available = 64 * GB, 32 * GB


@pytest.fixture
def ram(monkeypatch):
    memory = Ram()
    monkeypatch.setattr(ram_copies, "has_ram_for_pinned", lambda: memory.total >= 32 * GB)
    monkeypatch.setattr(ram_copies.psutil, "virtual_memory", lambda: memory)
    return memory


def linear(width=1024, dtype=torch.float16):
    made = torch.nn.Linear(width, 1024).requires_grad_(False).to(dtype)
    assert made.weight.nbytes >= SMALLEST_BYTES > made.bias.nbytes
    return made


def four_bit_state(nested):
    """What bitsandbytes has beside a 4-bit weight."""
    inner = four_bit_state(False) if nested else None
    return SimpleNamespace(
        absmax=torch.rand(1001),
        code=torch.rand(16),
        offset=torch.tensor(0.25) if nested else None,
        nested=nested,
        state2=inner,
    )


def is_locked(layer, driver):
    return layer.weight.data_ptr() in driver.locked


def to_card(pinned, layer):
    before = pinned.before_card(layer) if pinned.works else {}
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()
    pinned.on_card(layer, before)


@pytest.mark.parametrize(("free_gb", "keeps"), [(5, True), (4, False)])
def test_a_copy_in_ordinary_ram_is_kept_where_others_have_enough(ram, free_gb, keeps):
    ram.available = free_gb * GB
    copies, layer = RamCopies(lambda: True, Driver()), linear()
    assert copies.before_card(layer) == {}
    assert copies.keeps_all() is keeps
    assert copies.before_card(layer, returns=True)
    assert not RamCopies(lambda: False, Driver()).keeps_all()


def test_switched_off_what_is_pinned_keeps_no_copy(ram):
    is_on, layer = [True], linear()
    pinned = RamCopies(lambda: is_on[0], Driver())
    pinned.pin([layer])
    assert pinned.pinned_bytes([layer]) > 0
    is_on[0] = False
    foreseen = pinned.pinned_bytes([layer])
    to_card(pinned, layer)
    assert foreseen == pinned.kept_bytes([layer]) == 0


@pytest.mark.parametrize("has", ["a buffer", "a part elsewhere"])
def test_a_pinned_layer_that_keeps_no_copy_does_not_count_as_one_that_does(ram, has):
    layer, pinned = linear(), RamCopies(lambda: True, Driver())
    pinned.pin([layer])
    if has == "a buffer":
        layer.register_buffer("table", torch.zeros(2))
    else:
        layer.bias = torch.nn.Parameter(layer.bias.to("meta"), requires_grad=False)
    foreseen = pinned.pinned_bytes([layer])
    to_card(pinned, layer)
    assert foreseen == pinned.kept_bytes([layer]) == 0


def test_a_large_weight_goes_to_pinned_ram_and_a_bias_stays(ram):
    layer, driver = linear(), Driver()
    pinned = RamCopies(lambda: True, driver)
    bits, weight, bias = layer.weight.clone(), layer.weight, layer.bias.data_ptr()
    assert pinned.pin([layer]) == weight.nbytes == pinned.bytes
    assert layer.weight is weight
    assert is_locked(layer, driver)
    assert torch.equal(layer.weight, bits)
    assert layer.bias.data_ptr() == bias
    assert pinned.pin([layer]) == 0


def test_ram_is_ram_whatever_device_torch_takes_otherwise(ram):
    layer, driver = linear(), Driver()
    bits = layer.weight.clone()
    with torch.device("meta"):
        assert RamCopies(lambda: True, driver).pin([layer])
    assert is_locked(layer, driver)
    assert torch.equal(layer.weight, bits)


@pytest.mark.parametrize("inference", [False, True])
def test_weights_made_in_inference_mode_are_pinned_too(ram, inference):
    with torch.inference_mode(inference):
        layer = linear()
    driver = Driver()
    bits = layer.weight.clone()
    assert RamCopies(lambda: True, driver).pin([layer])
    assert layer.weight.is_inference() == inference
    assert is_locked(layer, driver)
    assert torch.equal(layer.weight, bits)


@pytest.mark.parametrize(
    ("total", "available", "is_on", "pins"),
    [
        (64 * GB, 32 * GB, True, 3),
        (64 * GB, 32 * GB, False, 0),
        (16 * GB, 12 * GB, True, 0),
        (64 * GB, 4 * GB + 5_000_000, True, 2),
        (64 * GB, 3 * GB, True, 0),
    ],
)
def test_no_more_is_pinned_than_ram_has_room_for(ram, total, available, is_on, pins):
    ram.total, ram.available = total, available
    layers, driver = [linear() for _ in range(3)], Driver()
    assert RamCopies(lambda: is_on, driver).pin(layers) == pins * layers[0].weight.nbytes
    assert [is_locked(layer, driver) for layer in layers] == [place < pins for place in range(3)]


def test_at_most_an_eighth_of_ram_is_pinned(ram, monkeypatch):
    monkeypatch.setattr(ram_copies, "SHARE_OF_RAM", 5_000_000 / ram.total)
    layers = [linear() for _ in range(3)]
    pinned = RamCopies(lambda: True, Driver())
    assert pinned.pin(layers) == 2 * layers[0].weight.nbytes
    assert pinned.pin(layers) == 0


def test_a_driver_that_refuses_is_asked_no_more(ram, caplog):
    layers, driver = [linear() for _ in range(3)], Driver(most=1)
    pinned = RamCopies(lambda: True, driver)
    bits = [layer.weight.clone() for layer in layers]
    assert pinned.pin(layers) == layers[0].weight.nbytes
    driver.most = 99
    assert pinned.pin(layers) == 0
    assert not pinned.works
    assert all(torch.equal(layer.weight, one) for layer, one in zip(layers, bits, strict=True))


def test_a_layer_that_was_pinned_leaves_the_card_without_a_copy(ram):
    layer, driver = linear(), Driver()
    pinned = RamCopies(lambda: True, driver)
    assert pinned.pinned_bytes([layer]) == 0
    pinned.pin([layer])
    # The bias is too small to be pinned, and keeps its copy all the same.
    assert pinned.pinned_bytes([layer]) == layer.weight.nbytes
    in_ram, bits = layer.weight.data_ptr(), layer.weight.clone()
    to_card(pinned, layer)
    assert pinned.pinned_bytes([layer]) == 0
    assert layer.weight.data_ptr() != in_ram
    assert pinned.kept_bytes([layer]) == layer.weight.nbytes + layer.bias.nbytes
    assert pinned.leave(layer)
    assert layer.weight.data_ptr() == in_ram
    assert torch.equal(layer.weight, bits)
    assert pinned.kept_bytes([layer]) == 0
    assert not pinned.leave(layer)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_was_changed_on_the_card_is_copied(ram, name):
    layer = linear()
    pinned = RamCopies(lambda: True, Driver())
    pinned.pin([layer])
    to_card(pinned, layer)
    getattr(layer, name).view(-1)[17] += 1
    bits = layer.weight.clone()
    assert not pinned.leave(layer)
    assert torch.equal(layer.weight, bits)
    assert pinned.kept_bytes([layer]) == 0


def test_a_parameter_that_moving_has_replaced_is_put_back_as_it_was(ram):
    """bitsandbytes makes another object for the card, whose scales lie there."""
    layer = linear()
    pinned = RamCopies(lambda: True, Driver())
    pinned.pin([layer])
    parameter, before = layer.weight, pinned.before_card(layer)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    pinned.on_card(layer, before)
    assert pinned.leave(layer)
    assert layer.weight is parameter


def test_a_card_without_room_for_a_sum_keeps_no_copy_and_ends_nothing(ram, monkeypatch):
    layer = linear()
    copies = RamCopies(lambda: True, Driver())
    copies.pin([layer])

    def full(values):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(ram_copies, "checksum", full)
        to_card(copies, layer)
    assert copies.kept_bytes([layer]) == 0
    layer.weight.data = layer.weight.data.clone()
    copies.pin([layer])
    to_card(copies, layer)
    monkeypatch.setattr(ram_copies, "checksum", full)
    assert not copies.leave(layer)


def test_another_kind_of_parameter_is_not_taken_for_the_copy(ram):
    class Other(torch.nn.Parameter):
        pass

    layer = linear()
    pinned = RamCopies(lambda: True, Driver())
    pinned.pin([layer])
    before = pinned.before_card(layer)
    layer.weight = Other(layer.weight.data.clone(), requires_grad=False)
    pinned.on_card(layer, before)
    assert not pinned.leave(layer)


def test_pinned_ram_is_given_back_with_its_layer_and_with_what_the_host_moved_itself(ram):
    gone, moved, driver = linear(), linear(), Driver()
    pinned = RamCopies(lambda: True, driver)
    pinned.pin([gone, moved])
    del gone
    gc.collect()
    assert len(driver.locked) == 1
    moved.weight.data = moved.weight.data.clone()
    assert pinned.pin([]) == 0
    assert (driver.locked, pinned.bytes) == ({}, 0)


def test_copies_of_layers_on_the_card_are_given_back_where_ram_is_short(ram):
    there, swapped, driver = linear(), linear(), Driver()
    pinned = RamCopies(lambda: True, driver)
    pinned.pin([there, swapped])
    to_card(pinned, there)
    assert pinned.drop_unused() == there.weight.nbytes + there.bias.nbytes
    assert is_locked(swapped, driver)
    assert not pinned.leave(there)
    assert pinned.drop_unused() == 0


def fails(*arguments, **named):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def test_ram_that_ends_while_weights_are_pinned_ends_nothing_else(ram, monkeypatch, caplog):
    layers, driver = [linear(), linear()], Driver()
    copies, before = RamCopies(lambda: True, driver), layers[1].weight.data_ptr()
    assert copies.pin(layers[:1]) == copies.bytes == layers[0].weight.nbytes
    with monkeypatch.context() as patch, caplog.at_level("INFO", "lib_lora_guard"):
        patch.setattr(torch, "empty", fails)
        assert copies.pin(layers) == 0
    assert "no room to pin 2 MB" in caplog.text
    assert is_locked(layers[0], driver)
    assert layers[1].weight.data_ptr() == before
    # It may have been for a moment only.
    assert copies.pin(layers) == layers[1].weight.nbytes


@pytest.mark.parametrize("is_locked_before", [False, True])
def test_an_interrupt_while_the_driver_locks_leaves_nothing_locked_and_forgotten(ram, is_locked_before):
    class Interrupted(Driver):
        def register(self, tensor):
            if is_locked_before:
                super().register(tensor)
            raise KeyboardInterrupt

        def release(self, tensor):
            self.locked.pop(tensor.data_ptr(), None)

    layer, driver = linear(), Interrupted()
    copies, before = RamCopies(lambda: True, driver), layer.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt):
        copies.pin([layer])
    assert layer.weight.data_ptr() == before
    assert copies.bytes == layer.weight.nbytes
    copies.pin([])
    assert (driver.locked, copies.bytes) == ({}, 0)


class Cuda:
    """torch.cuda as far as the driver is asked: every answer is an error."""

    def __init__(self, monkeypatch, error):
        self.asked, self.error = [], error
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", self.raises)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None: self.raises() if device == "cuda" else zeros(*a))

    def raises(self):
        self.asked.append("next call")
        raise RuntimeError("a late error")

    def fails(self, *arguments):
        self.asked.append("locks")
        if isinstance(self.error, int):
            return self.error
        raise self.error

    cudaHostRegister = cudaHostUnregister = fails  # noqa: N815


@pytest.mark.parametrize(
    "error", [712, RuntimeError("refused"), AssertionError("Torch not compiled with CUDA enabled")]
)
def test_an_error_of_cuda_is_taken_and_goes_no_further(monkeypatch, error):
    memory, cuda = torch.zeros(8), Cuda(monkeypatch, error)
    assert not ram_copies.Driver().register(memory)
    assert cuda.asked == ["locks", "next call"]
    ram_copies.Driver().release(memory)
    assert cuda.asked[2:] == ["next call", "locks", "next call"]


def all_to_card(layers):
    for parameter in layers.parameters():
        parameter.data = parameter.data.clone()


def test_what_a_host_moves_itself_keeps_its_copies_and_leaves_by_them(ram, monkeypatch):
    """A text encoder, which goes and comes whole: its copies lie in ordinary RAM."""
    layers = [linear(), linear()]
    copies = RamCopies(lambda: True, Driver())
    in_ram = [layer.weight.data_ptr() for layer in layers]
    there = set()
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: values.data_ptr() in there)
    with copies.moving(layers, return_all=True):
        for layer in layers:
            all_to_card(layer)
        there |= {parameter.data_ptr() for parameter in layers[0].parameters()}
    # The second one was left in RAM.
    assert [bool(copies.kept_bytes([layer])) for layer in layers] == [True, False]
    with copies.moving(layers):
        assert layers[0].to("cpu") is layers[0]
        layers[1].to("cpu")
    assert layers[0].weight.data_ptr() == in_ram[0]
    assert layers[1].weight.data_ptr() != in_ram[1]
    assert all("to" not in layer.__dict__ for layer in layers)


def test_a_layer_without_a_copy_is_copied_into_ram_and_the_rest_of_it_is_left_to_its_own_move(ram, monkeypatch):
    layer = linear()
    on_card = {layer.weight.data_ptr(), layer.bias.data_ptr()}
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: values.data_ptr() in on_card)
    bits, weight = layer.weight.clone(), layer.weight
    copies = RamCopies(lambda: True, Driver())
    # The bias is too small for this way.
    assert not copies.to_ram(layer)
    assert layer.weight is weight
    assert layer.weight.data_ptr() not in on_card
    assert torch.equal(layer.weight, bits)
    on_card.discard(layer.bias.data_ptr())
    assert copies.to_ram(layer)


def test_what_leaves_a_denoiser_goes_to_pinned_ram_in_one_copy(ram, monkeypatch):
    layers, driver = [linear(), linear(), linear()], Driver()
    layers[0].weight.quant_state = state = four_bit_state(False)
    on_card = {one.data_ptr() for one in (*(layer.weight for layer in layers), state.absmax, state.code)}
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: values.data_ptr() in on_card)
    bits, absmax = [layer.weight.clone() for layer in layers], state.absmax.clone()
    made, zeroed = [], ram_copies._zeroed
    monkeypatch.setattr(ram_copies, "_zeroed", lambda size: made.append(size) or zeroed(size))
    copies = RamCopies(lambda: True, driver)
    # Room for two: the third goes to ordinary RAM.
    ram.available = 4 * GB + 2 * layers[0].weight.nbytes + 1000
    with copies.pinning():
        for layer in layers:
            copies.to_ram(layer)
    assert [is_locked(layer, driver) for layer in layers] == [True, True, False]
    assert all(map(torch.equal, [layer.weight for layer in layers], bits))
    assert torch.equal(state.absmax, absmax)
    assert state.absmax.untyped_storage().data_ptr() == layers[0].weight.data_ptr()
    assert len(made) == 3
    ram.available = 64 * GB
    assert copies.pin(layers[:2]) == 0
    assert len(made) == 3
    # Outside, and switched off, nothing is pinned on the way.
    on_card.add(layers[1].weight.data_ptr())
    copies.to_ram(layers[1])
    assert not is_locked(layers[1], driver)


def test_a_driver_that_refuses_on_the_way_from_the_card_is_asked_once_and_keeps_nothing_locked(ram, monkeypatch):
    layers, driver, asked = [linear() for _ in range(4)], Driver(most=2), []
    copies, bits = RamCopies(lambda: True, driver), [layer.weight.clone() for layer in layers]
    register = driver.register
    driver.register = lambda memory: asked.append(memory.nbytes) or register(memory)
    # Locked before, but the host has moved its weight since: of no use any more.
    copies.pin(layers[:1])
    all_to_card(layers[0])
    # Held, so that no other memory gets their addresses.
    there = [layer.weight.data for layer in layers[1:]]
    on_card = {data.data_ptr() for data in there}
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: values.data_ptr() in on_card)
    with copies.pinning():
        assert all(copies.to_ram(layer) for layer in layers[1:])
    assert copies.pin(layers) == 0
    assert asked == [layers[0].weight.nbytes] * 3
    assert [is_locked(layer, driver) for layer in layers] == [False, True, False, False]
    assert list(driver.locked) == [layers[1].weight.data_ptr()]
    assert copies.bytes == layers[1].weight.nbytes
    assert all(map(torch.equal, [layer.weight for layer in layers], bits))


def test_without_ram_for_the_short_way_the_host_s_own_move_goes(ram, monkeypatch):
    layer = linear()
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: True)
    before, copies = layer.weight.data_ptr(), RamCopies(lambda: True, Driver())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fails)
        assert not copies.to_ram(layer)
        with copies.moving([layer]):
            assert layer.to("cpu") is layer
    assert layer.weight.data_ptr() == before


def test_a_library_s_own_parameter_is_moved_by_its_own_way_alone(ram, monkeypatch):
    layer = linear()
    layer.weight.quant_state = object()
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: True)
    before = layer.weight.data_ptr()
    assert not RamCopies(lambda: True, Driver()).to_ram(layer)
    assert layer.weight.data_ptr() == before


@pytest.mark.parametrize("nested", [False, True])
def test_the_scales_of_a_4_bit_weight_leave_with_it(ram, monkeypatch, nested):
    layer = linear().requires_grad_(False)
    layer.bias = None
    layer.weight.quant_state = state = four_bit_state(nested)
    inner = state.state2
    card = [layer.weight, state.absmax, state.code] + ([state.offset, inner.absmax, inner.code] if nested else [])
    on_card, bits = {one.data_ptr() for one in card}, [one.clone() for one in card]
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: values.data_ptr() in on_card)
    # `to` of what lies in RAM already makes no copy; of what lies on a card it does.
    monkeypatch.setattr(torch.Tensor, "to", lambda values, device: values.clone())
    assert RamCopies(lambda: True, Driver()).to_ram(layer)
    left = [layer.weight, state.absmax, state.code] + ([state.offset, inner.absmax, inner.code] if nested else [])
    assert not on_card & {one.data_ptr() for one in left}
    assert all(map(torch.equal, left, bits))


def test_switched_off_nothing_leaves_by_the_short_way(ram, monkeypatch):
    layer = linear()
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: True)
    before, copies = layer.weight.data_ptr(), RamCopies(lambda: False, Driver())
    assert not copies.to_ram(layer)
    with copies.moving([layer]):
        assert "to" not in layer.__dict__
    assert layer.weight.data_ptr() == before


def test_nothing_beside_the_card_is_kept_where_ram_is_short(ram):
    layer = linear()
    copies = RamCopies(lambda: True, Driver())
    ram.available = 3 * GB
    with copies.moving([layer], return_all=True):
        all_to_card(layer)
    assert copies.kept_bytes([layer]) == 0


def test_a_move_that_fails_leaves_no_trace_on_the_layers(ram):
    layer = linear()
    copies = RamCopies(lambda: True, Driver())
    copies.pin([layer])
    to_card(copies, layer)
    with pytest.raises(MemoryError), copies.moving([layer]):
        raise MemoryError
    assert "to" not in layer.__dict__
    assert copies.leave(layer)


@pytest.mark.parametrize("ends_with", ["the next move", "the guard"])
def test_a_short_way_that_an_interrupt_left_goes_later(ram, monkeypatch, ends_with):
    layers, is_on = [linear(), linear(), linear()], True
    copies = RamCopies(lambda: is_on, Driver())
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: True)
    layers[2].to = theirs = lambda *arguments: None
    own_way = RamCopies._own_way

    def interrupted(copies, layer):
        if "to" in layer.__dict__:
            raise KeyboardInterrupt
        own_way(copies, layer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), copies.moving(layers[:2]):
        patch.setattr(RamCopies, "_own_way", interrupted)
    assert ["to" in layer.__dict__ for layer in layers] == [True, True, True]
    if ends_with == "the next move":
        is_on = False
        with copies.moving(layers):
            assert ["to" in layer.__dict__ for layer in layers] == [False, False, True]
    else:
        copies.give_back()
    assert ["to" in layer.__dict__ for layer in layers] == [False, False, True]
    assert layers[2].to is theirs


def test_a_move_inside_a_move_ends_with_each_layers_own_way(ram, monkeypatch):
    layer, copies = linear(), RamCopies(lambda: True, Driver())
    monkeypatch.setattr(ram_copies, "_lies_on_card", lambda values: True)
    with copies.moving([layer]):
        with copies.moving([layer]):
            assert "to" in layer.__dict__
        layer.to("cpu")
    assert "to" not in layer.__dict__


def test_switched_off_everything_is_given_back_and_swapped_weights_stay_in_place(ram, caplog):
    there, swapped, driver, is_on = linear(), linear(), Driver(), True
    copies = RamCopies(lambda: is_on, driver)
    copies.pin([there, swapped])
    place, bits = swapped.weight.data_ptr(), swapped.weight.clone()
    to_card(copies, there)
    assert not copies.are_unwanted
    is_on = False
    assert copies.are_unwanted
    with caplog.at_level("DEBUG", "lib_lora_guard"):
        copies.give_back()
    assert "4 MB of pinned RAM" in caplog.text
    assert (driver.locked, driver.released, copies.bytes, copies.are_unwanted) == ({}, 2, 0, False)
    assert not copies.leave(there)
    assert swapped.weight.data_ptr() == place
    assert torch.equal(swapped.weight, bits)
    is_on = True
    assert copies.pin([swapped]) == swapped.weight.nbytes


def test_what_is_not_contiguous_or_another_librarys_own_stays(ram):
    layer = linear()
    layer.weight.data = layer.weight.data.t()
    assert RamCopies(lambda: True, Driver()).pin([layer]) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_the_scales_of_a_4_bit_weight_are_pinned_with_it_in_one_piece(ram, nested):
    layer, driver, state = linear(), Driver(), four_bit_state(nested)
    inner = state.state2
    layer.weight.quant_state = state
    before = [layer.weight.clone(), state.absmax.clone()]
    pinned = RamCopies(lambda: True, driver)
    pinned.pin([layer])
    scales = [state.absmax, state.code] + ([state.offset, inner.absmax, inner.code] if nested else [])
    assert {one.untyped_storage().data_ptr() for one in scales} == set(driver.locked) == {layer.weight.data_ptr()}
    assert torch.equal(layer.weight, before[0])
    assert torch.equal(state.absmax, before[1])
    assert not nested or float(state.offset) == 0.25
    assert pinned.pin([layer]) == 0
