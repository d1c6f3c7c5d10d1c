"""Forge's patches as requests for the engine: what can be read is read once, and one bad file takes no other with it."""

import types

import pytest
import torch
from support.make import host_value, rand

from lib_lora_guard.adapters import DiffAdapter, LoraAdapter
from lib_lora_guard.adapters.patch_tuples import OWN_KIND, value_of
from lib_lora_guard.hosts.forge import patches as forge_patches
from lib_lora_guard.hosts.forge.patches import PatchReader
from lib_lora_guard.runtime.factor_copies import own

FILE = ("C:\\loras\\style.safetensors", 0.8, 1.0, False)


@pytest.fixture
def reader():
    return PatchReader(types.SimpleNamespace(extra_weight_calculators={}))


@pytest.fixture
def parsed(monkeypatch):
    """The values that were parsed."""
    values, parse = [], forge_patches.parse_value
    monkeypatch.setattr(forge_patches, "parse_value", lambda value, *more: values.append(value) or parse(value, *more))
    return values


def entry(value, strength=0.8):
    return [strength, value, 1.0, None, None]


def stack(*values, identifier=FILE):
    return {identifier: {f"{n}.weight": [entry(value)] for n, value in enumerate(values)}}


def own_value(seed=1):
    adapter = LoraAdapter(rand(8, 2, seed=seed), rand(2, 8, seed=seed + 1), 2.0)
    own(adapter.tensors())
    return value_of(adapter)


def adapters(requests):
    return [term.adapter for request in requests for terms in request.terms.values() for term in terms]


def test_each_lora_is_a_request_in_the_order_of_the_stack(reader):
    patches = stack(host_value("lora", (8, 8), 1)) | stack(own_value(), identifier="key of another extension")
    first, second = reader.requests(patches)
    assert (first.label, first.strength, list(first.terms)) == ("style.safetensors", 0.8, ["0.weight"])
    assert (second.label, second.strength) == ("key of another extension", 1.0)
    assert [term.origin for request in (first, second) for term in request.terms["0.weight"]] == [0, 1]


def test_files_that_the_guard_has_read_are_never_parsed(reader, parsed):
    patches = stack(own_value(1), own_value(3))
    assert reader.device_elements(patches, merges_whole_tensors=True) == 4 * 16
    first, second = adapters(reader.requests(patches)), adapters(reader.requests(patches))
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert parsed == []


@pytest.mark.parametrize("kind", ["lora", "lora_mid", "loha", "loha_mid", "lokr", "lokr_factors", "glora", "diff"])
def test_tuples_of_others_are_parsed_once_for_the_room_and_all_refreshes(reader, parsed, kind):
    shape = (8, 8, 3, 3) if "mid" in kind else (8, 8)
    patches = stack(host_value(kind, shape, 1))
    reader.device_elements(patches, merges_whole_tensors=True)
    first = adapters(reader.requests(patches))
    for strength in (0.5, 0.2):
        changed = {(FILE[0], strength, *FILE[2:]): {"0.weight": [entry(patches[FILE]["0.weight"][0][1], strength)]}}
        reader.device_elements(changed, merges_whole_tensors=True)
        assert [a is b for a, b in zip(adapters(reader.requests(changed)), first, strict=True)] == [True]
    assert len(parsed) == 1


def test_what_was_counted_is_not_held_after_the_refresh(reader, parsed):
    patches = stack(host_value("lora", (8, 8), 1))
    reader.device_elements(patches, merges_whole_tensors=True)
    reader.requests({})
    assert reader._counted == {}


def test_factors_of_the_host_are_copied_and_those_of_the_guard_are_not(reader):
    value, mine = host_value("lora", (8, 8), 1), own_value()
    theirs, ours = adapters(reader.requests(stack(value, mine)))
    assert torch.equal(theirs.up, value[1][0])
    assert theirs.up is not value[1][0]
    assert ours is mine.adapter


@pytest.mark.parametrize("merges", [True, False])
def test_whole_tensors_take_no_place_on_the_device_where_they_are_merged(reader, merges):
    patches = stack(("diff", (torch.ones(8, 8),)), (torch.ones(4, 4),), ("set", (torch.ones(2, 2),)), own_value())
    assert reader.device_elements(patches, merges) == 32 + (0 if merges else 64 + 16 + 4)


def test_values_that_cannot_be_read_take_no_place_on_the_device(reader):
    patches = stack(("lora", (torch.ones(2, 2),)), "text", own_value()) | {"broken": {"w": [[1.0]]}}
    assert reader.device_elements(patches, merges_whole_tensors=True) == 32


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (("nonsense", ()), "kind 'nonsense' is not known"),
        (("lora", (torch.full((8, 2), float("nan")), torch.ones(2, 8), None, None, None)), "NaN or Inf"),
        (("lora", (torch.ones(8, 2), torch.ones(2, 8), "two", None, None)), "cannot be read"),
    ],
)
def test_a_lora_that_cannot_be_read_is_refused_and_the_others_are_not(reader, value, why):
    bad, good = reader.requests(stack(value) | stack(own_value(), identifier=("good", 1.0, 1.0, False)))
    assert why in bad.refused
    assert "0.weight" in bad.refused
    assert (bad.terms, good.refused, len(good.terms)) == ({}, None, 1)


def test_where_memory_ends_no_lora_is_refused_for_it(reader, monkeypatch):
    monkeypatch.setattr(
        "lib_lora_guard.runtime.factor_copies.own_copy", lambda tensor: (_ for _ in ()).throw(MemoryError)
    )
    with pytest.raises(MemoryError):
        reader.requests(stack(host_value("lora", (8, 8), 1)))
    assert reader._counted == {}


def test_kinds_of_other_extensions_are_looked_up_at_each_refresh(reader):
    value = ("theirs", (torch.ones(8, 8),))
    assert "kind 'theirs' is not known" in reader.requests(stack(value))[0].refused
    reader._lora.extra_weight_calculators["theirs"] = lambda weight, strength, content: weight
    assert adapters(reader.requests(stack(value)))[0].name == "theirs"


def test_an_adapter_without_a_tuple_of_the_host_comes_back_as_it_is(reader, parsed):
    adapter = DiffAdapter(rand(8, seed=1), scale=2.0)
    own(adapter.tensors())
    value = value_of(adapter)
    assert value[0] == OWN_KIND
    assert adapters(reader.requests(stack(value))) == [adapter]
    assert parsed == []


def test_dora_as_trained_is_one_adapter_as_long_as_it_is_used(reader, parsed):
    value = host_value("lora", (8, 8), 1, dora="output")
    first = adapters(reader.requests(stack(value), as_trained=True))
    assert first[0].as_trained
    assert adapters(reader.requests(stack(value), as_trained=True))[0] is first[0]
    assert not adapters(reader.requests(stack(value)))[0].as_trained
    assert len(parsed) == 2
