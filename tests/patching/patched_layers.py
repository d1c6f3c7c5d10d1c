"""Layers with a bypass on them, compared with the patched weight that is computed apart."""

import torch
from support.make import host_value, rand
from support.measure import assert_same_and_faults_seen
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.low_rank import Entry, JoinedLowRank
from lib_lora_guard.patching.norms import ratios_of
from lib_lora_guard.planning.cheap import forms_of

LINEAR, CONV, POINT = (24, 16), (12, 8, 3, 3), (12, 8, 1, 1)


def entry(kind, shape, seed=1, strength=0.8, offset=None, model=1.0, function=None, **more):
    return [strength, host_value(kind, shape, seed, **more), model, offset, function]


def make_layer(shape, **settings):
    torch.manual_seed(0)
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    return torch.nn.Conv2d(shape[1], shape[0], shape[2], **{"padding": shape[2] // 2, **settings})


def make_input(shape):
    return rand(2, 7, shape[1], seed=3) if len(shape) == 2 else rand(2, shape[1], 9, 9, seed=3)


def run(layer, terms, x):
    model = torch.nn.Sequential(layer)
    access = PlainAccess(model)
    site = access.site("0.weight")
    hook = Bypass(
        "0.weight",
        tuple(terms),
        site.shape,
        ratios_of(access, site, terms, forms_of(terms, site.shape), torch.device("cpu")),
        access.bias,
    )
    hook.attach(layer)
    try:
        return model(x)
    finally:
        hook.detach(layer)
        assert not hook._unscaled


def check(layer, entries, x):
    base = layer(x).clone()
    patched = merge_reference(entries, layer.weight.detach().double()).float()
    reference = torch.func.functional_call(layer, {"weight": patched}, (x,))
    terms = [parse_term(e, {}) for e in entries]
    assert_same_and_faults_seen(lambda stack: run(layer, stack, x), terms, reference, base)


def call_hook(layer, terms, x, shape):
    """The output of a bypass called by hand, without attaching it."""
    output = layer(x)
    return Bypass("layer.weight", tuple(terms), shape)(layer, (x,), {}, output)


def joined_of(terms, shape):
    return JoinedLowRank([Entry(t.adapter.cheap_forward(), t.strength, t.part) for t in terms], shape)
