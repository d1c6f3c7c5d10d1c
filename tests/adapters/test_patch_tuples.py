"""Patches of the host, read and written."""

import copy
import operator
import pickle

import pytest
import torch
from support.adapter_contract import CONV, LINEAR, entry
from support.make import rand

from lib_lora_guard.adapters import DiffAdapter, Ia3Adapter, parse_term, parse_value
from lib_lora_guard.adapters.patch_tuples import OWN_KIND, AdapterTuple, ComingTuple, calculate_own_kind, value_of
from lib_lora_guard.errors import LoraMismatchError


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ([1.0, ("nonsense", ()), 1.0, None, None], "kind 'nonsense' is not known"),
        ([1.0, ("lora", (1, 2)), 1.0, None, None], "does not have the fields"),
        ([1.0, ("lora", (1, 2, 3, 4, 5, 6)), 1.0, None, None], "3 to 5 are expected, found 6"),
        ([1.0, ("diff", ()), 1.0, None, None], "1 are expected, found 0"),
        ([1.0, ("lora", None), 1.0, None, None], "does not have the fields"),
        ([1.0, "text", 1.0, None, None], "type str is not known"),
        ([1.0], "1 fields, 5 are expected"),
    ],
)
def test_an_unknown_patch_is_refused_in_words(patch, message):
    with pytest.raises(LoraMismatchError, match=message):
        parse_term(patch, {})


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("lora", LINEAR),
        ("lora_mid", CONV),
        ("loha", LINEAR),
        ("loha_mid", CONV),
        ("lokr", LINEAR),
        ("lokr_factors", LINEAR),
        ("lokr_mid", CONV),
        ("glora", LINEAR),
        ("set", LINEAR),
    ],
)
@pytest.mark.parametrize("dora", [None, "output"])
def test_what_is_read_from_a_host_tuple_is_written_as_the_same_tuple(kind, shape, dora):
    name, content = entry(kind, shape, dora=dora)[1]
    written, fields = value_of(parse_value((name, content), {}))
    assert written == name
    assert len(fields) == len(content)
    assert all(a is b or a == b for a, b in zip(fields, content, strict=True))


def test_a_difference_is_written_under_its_name_and_read_without_one_too():
    diff = rand(*LINEAR, seed=1)
    assert value_of(parse_value((diff,), {})) == ("diff", (diff,))


def test_an_adapter_that_no_host_tuple_says_exactly_travels_whole():
    scaled = DiffAdapter(rand(8, seed=1), scale=0.5)
    scales = Ia3Adapter(rand(24, seed=2), on_input=False)
    dora = parse_value(entry("lora", LINEAR, dora="output")[1], {}).with_dora_as_trained()
    for adapter in (scaled, scales, dora):
        assert value_of(adapter) == (OWN_KIND, (adapter,))
        assert parse_value(value_of(adapter), {}) is adapter
    weight = rand(8, seed=3)
    assert torch.allclose(calculate_own_kind(weight.clone(), 2.0, (scaled,)), weight + scaled.diff)


def test_unused_places_at_the_end_of_a_patch_are_left_out():
    up, down = rand(24, 4, seed=1), rand(4, 16, seed=2)
    adapter = parse_value(("lora", [up, down, 2, *[None] * 13]), {})
    assert adapter.up is up
    assert (adapter.alpha, adapter.mid, adapter.magnitude) == (2.0, None, None)


def test_a_nested_patch_holds_the_stack_on_its_own_base():
    adapter = parse_value(entry("nested", LINEAR)[1], {})
    assert (adapter.kind, len(adapter.terms)) == ("nested", 1)
    assert parse_value(value_of(adapter), {}) is adapter


def test_a_written_value_carries_its_adapter_and_is_the_hosts_tuple_to_everything_else():
    adapter = parse_value(entry("lora", LINEAR)[1], {})
    value = value_of(adapter)
    assert value.adapter is adapter
    assert isinstance(value, tuple)
    kind, fields = value
    assert (kind, len(value), type(fields)) == ("lora", 2, tuple)
    assert value == ("lora", fields)
    assert hash(("diff", 1)) == hash(AdapterTuple(("diff", 1), adapter))


@pytest.mark.parametrize(
    "make",
    [
        copy.copy,
        copy.deepcopy,
        lambda value: value[:],
        lambda value: (*value,),
        tuple,
        lambda value: pickle.loads(pickle.dumps(value)),
    ],
    ids=["copy", "deepcopy", "slice", "unpacked", "tuple", "pickle"],
)
def test_whatever_is_made_of_a_written_value_is_a_plain_tuple_that_has_to_be_read(make):
    adapter = parse_value(entry("lora", LINEAR)[1], {})
    made = make(value_of(adapter))
    assert type(made) is tuple
    again = parse_value(made, {})
    assert again is not adapter
    assert torch.equal(again.up, adapter.up)
    assert again.alpha == adapter.alpha


def test_a_deep_copy_of_a_stack_shares_no_tensor_with_it():
    adapter = parse_value(entry("lora", LINEAR)[1], {})
    patches = {"w": [[1.0, value_of(adapter), 1.0, None, None]]}
    up = copy.deepcopy(patches)["w"][0][1][1][0]
    up.zero_()
    assert adapter.up.any()


LOOKS = {
    "an item": lambda content: content[0],
    "a slice": lambda content: content[1:],
    "unpacking": lambda content: [*content],
    "a call with them": lambda content: max(*content),
    "a tuple of them": tuple,
    "a list of them": list,
    "a value in it": lambda content: 2 in content,
    "its equal": lambda content: content == (1, 2),
    "another from the left": lambda content: operator.ne((1, 2), content),
    "a sum": lambda content: operator.add(content, (3,)),
    "a sum from the left": lambda content: operator.add((0,), content),
    "a product": lambda content: 2 * content,
    "its text": repr,
    "an index": lambda content: content.index(2),
    "a count": lambda content: content.count(2),
    "a copy": copy.copy,
    "a pickle": lambda content: pickle.loads(pickle.dumps(content)),
    "a pattern": lambda content: _first_of(content),
}


def _first_of(content):
    match content:
        case (first, _):
            return first


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whatever_looks_into_a_content_that_is_still_read_waits_and_finds_what_a_tuple_has(look):
    waited = []
    content = ComingTuple((1, 2), lambda: waited.append(1))
    assert (isinstance(content, tuple), len(content), waited) == (True, 2, [])
    assert look(content) == look((1, 2))
    assert waited


def test_what_keeps_the_values_from_coming_is_raised_where_they_are_read():
    def wait():
        raise LoraMismatchError.of("lora.patch_fields", count=1)

    value = value_of(parse_value(entry("lora", LINEAR)[1], {}), wait)
    assert value[0] == "lora"
    with pytest.raises(LoraMismatchError):
        value[1][0]
    with pytest.raises(LoraMismatchError):
        parse_value(tuple(value), {})
