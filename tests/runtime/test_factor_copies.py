"""A factor is copied once and a patch value is read once, for as long as a stack uses what came of it."""

import gc
import weakref

import pytest
import torch
from support.make import rand

from lib_lora_guard.adapters import LoraAdapter, parse_value
from lib_lora_guard.adapters.patch_tuples import OWN_KIND, value_of
from lib_lora_guard.errors import LoraMismatchError
from lib_lora_guard.runtime.factor_copies import FactorCopies, OwnAdapters, own


class Reader:
    """Reads values, and counts how often."""

    def __init__(self, calculators=None):
        self.calculators, self.count = calculators or {}, 0

    def __call__(self, value):
        self.count += 1
        return parse_value(value, self.calculators)


def lora(seed=1, alpha=2.0, magnitude=None):
    return "lora", (rand(8, 2, seed=seed), rand(2, 8, seed=seed + 1), alpha, None, magnitude)


def test_a_tensor_of_the_host_is_copied_once_while_the_copy_is_used():
    copies, tensor = FactorCopies(), rand(3, seed=1)
    assert copies.known(tensor) is None
    copy = copies(tensor)
    assert copy is not tensor
    assert copies(tensor) is copies.known(tensor) is copy
    gone = weakref.ref(copy)
    del copy
    gc.collect()
    assert gone() is None
    assert copies.known(tensor) is None


def test_a_tensor_that_the_guard_has_read_is_never_copied():
    tensor = rand(3, seed=1)
    own([tensor])
    assert FactorCopies()(tensor) is tensor


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(LoraMismatchError):
        FactorCopies()(torch.tensor([1.0, float("nan")]))


def test_a_value_of_the_host_is_read_once_and_copied():
    adapters, read, value = OwnAdapters(), Reader(), lora()
    adapter = adapters.of(value, read)
    assert adapters.of(value, read) is adapter
    assert read.count == 1
    assert torch.equal(adapter.up, value[1][0])
    assert adapter.up is not value[1][0]


def test_the_same_tensors_and_numbers_in_another_tuple_are_the_same_adapter():
    adapters, read, value = OwnAdapters(), Reader(), lora()
    adapter = adapters.of(value, read)
    assert adapters.of(("lora", [*value[1]]), read) is adapter
    assert read.count == 1


@pytest.mark.parametrize("place", range(5))
def test_another_tensor_or_number_is_another_adapter(place):
    adapters, read, value = OwnAdapters(), Reader(), lora(magnitude=rand(8, 1, seed=5))
    adapter = adapters.of(value, read)
    fields = list(value[1])
    fields[place] = {2: 3.0, 3: None, 4: None}.get(place, torch.clone(fields[place]) if place < 2 else None)
    if place == 3:
        fields[3], fields[0] = rand(2, 2, 1, 1, seed=9), fields[0].reshape(8, 2, 1, 1)
    other = adapters.of(("lora", tuple(fields)), read)
    assert other is not adapter
    assert read.count == 2


def test_an_adapter_goes_when_no_stack_uses_it_although_the_host_keeps_its_tensors():
    adapters, read, value = OwnAdapters(), Reader(), lora()
    gone = weakref.ref(adapters.of(value, read))
    gc.collect()
    assert gone() is None
    assert adapters.known(value) is None
    assert adapters.of(value, read) is not None
    assert read.count == 2


def test_tensors_of_the_host_are_not_held():
    adapters, value = OwnAdapters(), lora()
    adapter, gone = adapters.of(value, Reader()), weakref.ref(value[1][0])
    del value
    gc.collect()
    assert gone() is None
    assert adapter.up.shape == (8, 2)


def test_a_value_made_from_an_adapter_of_the_guard_is_never_read():
    adapter = LoraAdapter(rand(8, 2, seed=1), rand(2, 8, seed=2), 2.0)
    own(adapter.tensors())
    adapters, read = OwnAdapters(), Reader()
    assert adapters.of(value_of(adapter), read) is adapter
    assert adapters.of(value_of(adapter), read, as_trained=True) is adapter, "it is no DoRA"
    assert read.count == 0


def test_a_dora_as_trained_is_made_once():
    adapter = LoraAdapter(rand(8, 2, seed=1), rand(2, 8, seed=2), 2.0, magnitude=rand(8, 1, seed=3))
    own(adapter.tensors())
    adapters, read = OwnAdapters(), Reader()
    trained = adapters.of(value_of(adapter), read, as_trained=True)
    assert trained.as_trained
    assert trained.up is adapter.up
    assert adapters.of(value_of(adapter), read, as_trained=True) is trained
    assert adapters.of(value_of(adapter), read) is adapter
    assert read.count == 0


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(8, 8), [1.0, (torch.ones(8, 8),), 1.0, None, None]],
        ("theirs", (torch.ones(8, 8),)),
        ("lora", (torch.ones(8, 2), torch.ones(2, 8), torch.tensor(2.0), None, None)),
        (OWN_KIND, (LoraAdapter(torch.ones(8, 2), torch.ones(2, 8)),)),
    ],
    ids=["nested", "kind of another extension", "alpha is a tensor", "own kind that was copied"],
)
def test_a_value_that_may_have_changed_unnoticed_is_read_each_time(value):
    adapters, read = OwnAdapters(), Reader({"theirs": lambda weight, strength, value: weight})
    held = [adapters.of(value, read), adapters.of(value, read)]
    assert read.count == len(held)


@pytest.mark.parametrize("value", [(), (torch.ones(2), 3), ("lora", None), ("lora", ("two", None)), 7, None])
def test_a_value_of_no_known_form_is_refused_as_its_reader_does(value):
    adapters = OwnAdapters()
    assert adapters.known(value) is None
    with pytest.raises(LoraMismatchError):
        adapters.of(value, Reader())
