"""Every cheap form against the patched weight computed apart, on linear layers and convolutions, alone and in stacks."""

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same_and_faults_seen, contribution_error
from support.reference import merge_reference

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.guard import PlainAccess
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.norms import ratios_of
from lib_lora_guard.planning.cheap import forms_of

LINEAR, CONV, POINT = (24, 16), (12, 8, 3, 3), (12, 8, 1, 1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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
    handles = hook.attach(layer)
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()
        assert getattr(hook._unscaled_input, "x", None) is None


def check(layer, entries, x):
    base = layer(x).clone()
    patched = merge_reference(entries, layer.weight.detach().double()).float()
    reference = torch.func.functional_call(layer, {"weight": patched}, (x,))
    terms = [parse_term(e, {}) for e in entries]
    assert_same_and_faults_seen(lambda stack: run(layer, stack, x), terms, reference, base)


@pytest.mark.parametrize("shape", [LINEAR, CONV, POINT], ids=str)
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("loha", {"rank": 3}),
        ("loha_plain", {"rank": 8}),
        ("lokr", {}),
        ("lora", {"dora": "output"}),
        ("lora", {"dora": "input"}),
        ("lora", {"model": 0.7}),
        ("lora", {"function": lambda d: torch.cat([d[4:], d[:4]])}),
    ],
    ids=str,
)
def test_one_term(shape, kind, more):
    check(make_layer(shape), [entry(kind, shape, **more)], make_input(shape))


@pytest.mark.parametrize("kind", ["lokr_factors", "lokr_left"])
def test_lokr_with_factorised_sides(kind):
    check(make_layer(LINEAR), [entry(kind, LINEAR, rank=2)], make_input(LINEAR))
    check(make_layer((64, 64)), [entry(kind, (64, 64), rank=2)], make_input((64, 64)))


def test_lokr_convolution_with_a_factorised_second_side():
    value = (
        "lokr",
        (rand(2, 2, seed=1), None, 2.0, None, None, rand(6, 2, seed=2), rand(2, 4 * 9, seed=3), None, None),
    )
    check(make_layer(CONV), [[0.8, value, 1.0, None, None]], make_input(CONV))


def test_dora_on_a_tucker_lora():
    check(make_layer(CONV), [entry("lora_mid", CONV, dora="output")], make_input(CONV))
    check(make_layer(CONV), [entry("lora_mid", CONV, dora="input")], make_input(CONV))


@pytest.mark.parametrize("settings", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_convolution_settings(kind, settings):
    check(make_layer(CONV, **settings), [entry(kind, CONV, rank=2)], make_input(CONV))


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=str)
def test_the_order_of_a_stack_counts(shape):
    stack = [
        entry("lora", shape, 1, 0.6),
        entry("lora", shape, 2, 0.9, dora="output"),
        entry("loha", shape, 3, -0.4, rank=2),
        entry("lora", shape, 4, 0.7, model=0.8),
        entry("lokr", shape, 5, 0.3),
    ]
    check(make_layer(shape), stack, make_input(shape))
    check(make_layer(shape), [stack[1], stack[1], stack[3]], make_input(shape))
    check(make_layer(shape), [entry("lora", shape, 2, 0.5, dora="input"), *stack[2:]], make_input(shape))


def test_parts_of_the_output_and_of_the_input():
    stack = [
        entry("lora", (8, 16), 1, 0.6, (0, 8, 8), dora="output"),
        entry("lokr", (8, 16), 2, 0.9, (0, 16, 8)),
        entry("loha", (8, 16), 3, 0.9, (0, 0, 8), rank=2),
        entry("lokr", (24, 8), 4, 0.5, (1, 8, 8)),
        entry("loha", (24, 8), 5, 0.5, (1, 4, 8), rank=2),
        entry("lora", (8, 16), 6, 0.5, (0, 4, 8), model=0.6),
    ]
    for item in stack:
        check(make_layer(LINEAR), [item], make_input(LINEAR))
    check(make_layer(LINEAR), stack, make_input(LINEAR))
    parts = [entry("lokr", (4, 8, 3, 3), 1, 0.6, (0, 4, 4)), entry("loha", (12, 4, 3, 3), 2, 0.6, (1, 2, 4), rank=2)]
    check(make_layer(CONV), parts, make_input(CONV))


def test_a_layer_without_bias_and_one_called_by_keyword():
    layer = torch.nn.Linear(16, 24, bias=False)
    check(layer, [entry("lora", LINEAR, dora="output")], make_input(LINEAR))
    x, terms = make_input(LINEAR), [parse_term(entry("lora", LINEAR, dora="input"), {})]
    access = PlainAccess(torch.nn.Sequential(layer))
    site = PlainAccess(model := torch.nn.Sequential(layer)).site("0.weight")
    assert access.name == "Sequential"
    assert model is not None
    hook = Bypass(
        "k",
        tuple(terms),
        site.shape,
        ratios_of(PlainAccess(model), site, terms, forms_of(terms, site.shape), torch.device("cpu")),
    )
    positional = run(layer, terms, x)
    handles = hook.attach(layer)
    assert torch.equal(layer(input=x), positional)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["lokr", "lokr_factors", "loha"])
def test_fp16_does_not_overflow_with_inputs_up_to_3e4(kind):
    shape = (64, 64)
    layer = torch.nn.Linear(64, 64, bias=False).half()
    layer.weight.data.zero_()
    name, fields = host_value(kind, shape, 1, rank=4)
    factors = [f for f in fields if isinstance(f, torch.Tensor)]
    # One factor far too large, one far too small: the product is that of a common LoRA.
    factors[0].mul_(1e-5)
    factors[1 if kind != "lokr_factors" else 2].mul_(30.0)
    x = (rand(32, 64, seed=3).sign() * 3e4).half()
    terms = [parse_term([1.0, (name, fields), 1.0, None, None], {})]
    true = x.double() @ merge_reference([[1.0, (name, fields), 1.0, None, None]], layer.weight.double()).T
    assert 1 < true.abs().max() < 6e4
    output = run(layer, terms, x)
    assert torch.isfinite(output).all()
    # fp16 keeps 11 bits; factors, two activations and the result are each rounded once.
    assert contribution_error(output, true, torch.zeros_like(true)) < 6 * 2**-11


@pytest.mark.parametrize("dora", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_dora_is_nearer_than_twice_the_error_of_a_16_bit_patched_weight(dora, dtype):
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
