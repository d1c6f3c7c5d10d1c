"""Norms of a weight for DoRA: exact enough for 16 bits, and computed without a dense copy of the weight."""

import pytest
import torch
from patching.patched_layers import CONV, check, entry, make_input, make_layer, run
from patching.terms import term
from support.live_memory import LiveMemory
from support.make import rand
from support.measure import contribution_error
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching import norms
from lib_lora_guard.planning.cheap import forms_of
from lib_lora_guard.units import MB
from lib_lora_guard.weights import (
    Q8_0Codec,
    ScaledFp8Codec,
    StoredLinear,
    codec,
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_a_dora_on_a_lora_with_a_tucker_core():
    check(make_layer(CONV), [entry("lora_mid", CONV, dora="output")], make_input(CONV))
    check(make_layer(CONV), [entry("lora_mid", CONV, dora="input")], make_input(CONV))


@pytest.mark.parametrize("dora", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dora_in_16_bits_has_at_most_twice_the_error_of_a_merge_into_16_bits(dora, dtype):
    layer = torch.nn.Linear(256, 256).to(dtype)
    layer.weight.data.mul_(8)
    entries = [entry("lora", (256, 256), dora=dora)]
    x = rand(64, 256, seed=3).to(dtype)
    bias = layer.bias.double()
    base = x.double() @ layer.weight.double().T + bias
    merged = merge_reference(entries, layer.weight.double())
    true = x.double() @ merged.T + bias
    theirs = contribution_error(torch.nn.functional.linear(x, merged.to(dtype), layer.bias), true, base)
    assert contribution_error(run(layer, [parse_term(e, {}) for e in entries], x), true, base) <= 2 * theirs


def stored(columns, rows, form):
    weight, bias = rand(rows, columns, seed=1, scale=0.05), None
    if form == "fp32":
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer
    return StoredLinear({"Q8_0": Q8_0Codec(), "fp8": ScaledFp8Codec()}[form], weight, bias)


@pytest.mark.parametrize("form", ["fp32", "fp8", "Q8_0"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_norms_need_the_memory_of_some_rows_and_never_of_the_whole_weight(form, axis, monkeypatch):
    """Live at a time: the rows of a pass decoded, those with the delta, their squares or the like; each one pass large."""
    monkeypatch.setattr(norms, "PASS_BYTES", MB)
    monkeypatch.setattr(codec, "SLICE_VALUES", 1 << 16)
    peaks = []
    for rows in (2048, 8192):
        model = torch.nn.ModuleDict({"layer": stored(512, rows, form)})
        access = PlainAccess(model)
        site = access.site("layer.weight")
        terms = [term("lora", (rows, 512), dora=axis)]
        with LiveMemory(*model.parameters(), *terms[0].adapter.tensors()) as memory:
            found = norms.ratios_of(access, site, terms, forms_of(terms, site.shape), torch.device("cpu"))
        assert found[0].shape == ((rows,) if axis == "output" else (512,))
        peaks.append(memory.peak_bytes - found[0].nbytes)
    # 4 MB and 16 MB of fp32 weight.
    assert max(peaks) <= 5.25 * MB
    assert peaks[1] - peaks[0] <= 0.25 * MB, "it grows with the weight"
