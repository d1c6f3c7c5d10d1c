"""A bypass gives what the patched weight gives, on every shape of layer; faults are planted to show that it is seen."""

import sys
import threading

import pytest
import torch
from patching.patched_layers import LINEAR, call_hook, check, entry, make_input, run
from support.make import rand
from support.measure import contribution_error
from support.reference import merge_reference
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching import bypass
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.norms import ratios_of
from lib_lora_guard.planning.cheap import forms_of


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("tokens", [(16,), (5, 16), (2, 7, 16), (2, 3, 4, 16)])
def test_a_lora_on_a_linear_layer_with_any_number_of_batch_dimensions(tokens):
    check(torch.nn.Linear(16, 24), [entry("lora", (24, 16))], rand(*tokens, seed=3))


def test_several_loras_of_different_ranks_and_scales_on_one_layer():
    stack = [
        entry("lora", (24, 16), 1),
        entry("lora", (24, 16), 2, -0.3, rank=8, alpha=3.0),
        entry("lora", (24, 16), 3, 0.1, rank=1, alpha=None),
    ]
    check(torch.nn.Linear(16, 24), stack, rand(2, 7, 16, seed=3))


def test_loras_on_q_k_and_v_of_a_fused_layer_with_one_on_the_whole():
    slices = [entry("lora", (8, 16), n, 0.5 + n / 10, (0, 8 * n, 8), rank=2 + n) for n in range(3)]
    check(torch.nn.Linear(16, 24), [*slices, entry("lora", (24, 16), 9)], rand(2, 7, 16, seed=3))


def test_loras_on_parts_of_the_input():
    slices = [entry("lora", (24, 8), n, 0.5, (1, 8 * n, 8)) for n in range(2)]
    check(torch.nn.Linear(16, 24), slices, rand(2, 7, 16, seed=3))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2},
        {"dilation": 2},
        {"padding": 0},
        {"padding": "same"},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lora", "lora_mid"])
def test_loras_on_a_convolution_with_any_settings(kind, settings):
    layer = torch.nn.Conv2d(8, 12, 3, **{"padding": 1, **settings})
    check(layer, [entry(kind, (12, 8, 3, 3)), entry("lora", (12, 8, 3, 3), 4, 0.3, rank=2)], rand(2, 8, 9, 9, seed=3))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(torch.nn.Conv1d, (12, 8, 3)), (torch.nn.Conv2d, (12, 8, 1, 1)), (torch.nn.Conv3d, (12, 8, 3, 3, 3))],
)
def test_loras_on_convolutions_of_one_two_and_three_dimensions(layer, shape):
    values = ("lora", (rand(12, 4, *[1] * (len(shape) - 2), seed=1), rand(4, *shape[1:], seed=2), 2.0, None, None))
    check(
        layer(8, 12, shape[2], padding=shape[2] // 2),
        [[0.8, values, 1.0, None, None]],
        rand(2, 8, *[6] * (len(shape) - 2), seed=3),
    )


def test_loras_on_parts_of_a_convolution_in_channels_last():
    layer = torch.nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last)
    x = rand(2, 8, 9, 9, seed=3).contiguous(memory_format=torch.channels_last)
    check(
        layer, [entry("lora", (4, 8, 3, 3), 1, offset=(0, 4, 4)), entry("lora", (12, 4, 3, 3), 2, offset=(1, 2, 4))], x
    )


def test_a_matrix_lora_on_a_1x1_convolution_and_a_convolution_lora_on_a_linear():
    value = ("lora", (rand(12, 4, seed=1), rand(4, 8, seed=2), 2.0, None, None))
    check(torch.nn.Conv2d(8, 12, 1), [[0.8, value, 1.0, None, None]], rand(2, 8, 5, 5, seed=3))
    value = ("lora", (rand(12, 4, 1, 1, seed=1), rand(4, 8, 1, 1, seed=2), 2.0, None, None))
    check(torch.nn.Linear(8, 12), [[0.8, value, 1.0, None, None]], rand(2, 8, seed=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_error_is_at_most_twice_that_of_a_merge_into_16_bits(dtype):
    # The yardstick of the design: Forge's fp16-LoRA path, which adds the delta to the weight in the compute dtype.
    layer = torch.nn.Linear(256, 256, bias=False).to(dtype)
    layer.weight.data.mul_(8)
    value = (
        "lora",
        (rand(256, 8, seed=1, scale=0.1).to(dtype), rand(8, 256, seed=2, scale=0.1).to(dtype), 4.0, None, None),
    )
    entries, x = [[0.8, value, 1.0, None, None]], rand(64, 256, seed=3).to(dtype)
    base = layer.weight.double() @ x.double().T
    true = merge_reference(entries, layer.weight.double()) @ x.double().T
    online = merge_reference(entries, layer.weight.detach())
    theirs = contribution_error(torch.nn.functional.linear(x, online).T, true, base)
    ours = contribution_error(call_hook(layer, [parse_term(e, {}) for e in entries], x, (256, 256)).T, true, base)
    assert ours <= 2 * theirs


def test_a_layer_without_bias_and_a_call_by_keyword():
    layer = torch.nn.Linear(16, 24, bias=False)
    check(layer, [entry("lora", LINEAR, dora="output")], make_input(LINEAR))
    x, terms = make_input(LINEAR), [parse_term(entry("lora", LINEAR, dora="input"), {})]
    model = torch.nn.Sequential(layer)
    access = PlainAccess(model)
    site = access.site("0.weight")
    forms = forms_of(terms, site.shape)
    hook = Bypass("k", tuple(terms), site.shape, ratios_of(access, site, terms, forms, torch.device("cpu")))
    positional = run(layer, terms, x)
    hook.attach(layer)
    assert torch.equal(layer(input=x), positional)
    hook.detach(layer)


class OutputSized(TorchDispatchMode):
    """Counts new storages of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.seen = numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * self.numel:
                self.seen[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_lora_adds_in_place_and_allocates_its_rank_activation_alone(kind):
    if kind == "linear":
        layer, x, value = torch.nn.Linear(64, 96), rand(500, 64, seed=3), entry("lora", (96, 64))
    else:
        layer, x, value = torch.nn.Conv2d(64, 96, 1), rand(1, 64, 20, 20, seed=3), entry("lora", (96, 64, 1, 1))
    output = layer(x)
    with OutputSized(96 * 64) as counted:
        result = Bypass("k", (parse_term(value, {}),), tuple(layer.weight.shape))(layer, (x,), {}, output)
    assert result.data_ptr() == output.data_ptr(), "added in place"
    assert set(counted.seen) <= {x.untyped_storage().data_ptr(), output.untyped_storage().data_ptr()}


class Slow(torch.nn.Linear):
    """Its call waits in the middle."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        result = super().forward(x)
        self.inside.set()
        assert self.go_on.wait(20)
        return result


def dora_by_column(layer):
    terms = [parse_term(entry("lora", LINEAR, dora="input"), {})]
    model = torch.nn.Sequential(layer)
    access = PlainAccess(model)
    site = access.site("0.weight")
    ratios = ratios_of(access, site, terms, forms_of(terms, site.shape), torch.device("cpu"))
    return Bypass("k", tuple(terms), site.shape, ratios)


def test_hooks_before_and_after_a_layer_go_when_no_call_is_between_them():
    layer, x = Slow(16, 24), make_input(LINEAR)
    layer.go_on.set()
    base, hook = layer(x).clone(), dora_by_column(layer)
    hook.attach(layer)
    patched = layer(x).clone()
    layer.inside.clear()
    layer.go_on.clear()
    found = []
    call = threading.Thread(target=lambda: found.append(call_without_grad(layer, x)))
    call.start()
    assert layer.inside.wait(20)
    going = threading.Thread(target=hook.detach, args=(layer,))
    going.start()
    going.join(0.1)
    assert going.is_alive(), "it did not wait for the call"
    layer.go_on.set()
    for thread in (call, going):
        thread.join(20)
    assert torch.equal(found[0], patched)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert torch.equal(layer(x), base)


def test_a_call_that_began_before_the_hooks_came_has_nothing_of_them():
    layer, x = Slow(16, 24), make_input(LINEAR)
    layer.go_on.set()
    base, hook = layer(x).clone(), dora_by_column(layer)
    layer.inside.clear()
    layer.go_on.clear()
    found = []
    # Some hook, so that torch looks for hooks after the call too.
    layer.register_forward_hook(lambda *_: None)
    call = threading.Thread(target=lambda: found.append(call_without_grad(layer, x)))
    call.start()
    assert layer.inside.wait(20)
    hook.attach(layer)
    layer.go_on.set()
    call.join(20)
    assert torch.equal(found[0], base)
    assert not torch.equal(layer(x), base)


def call_without_grad(layer, x):
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("two_hooks", [False, True])
def test_attach_and_detach_finish_what_was_left_half_done(two_hooks):
    layer = torch.nn.Linear(16, 24)
    hook = dora_by_column(layer) if two_hooks else Bypass("k", (parse_term(entry("lora", LINEAR), {}),), LINEAR)
    x = make_input(LINEAR)
    hook.attach(layer)
    patched = layer(x).clone()
    hook.detach(layer)
    # As `register_forward_hook` leaves it that was interrupted before it noted that the hook takes keywords.
    layer.register_forward_hook(hook)
    if two_hooks:
        layer.register_forward_pre_hook(hook.scale_input)
    hook.attach(layer)
    hook.attach(layer)
    assert torch.equal(layer(x), patched)
    tables = [v for k, v in vars(layer).items() if "forward" in k and "hooks" in k and isinstance(v, dict)]
    hook.detach(layer)
    assert not any(tables)


def test_a_bypass_takes_the_place_of_another_in_the_same_hook():
    layer, order = torch.nn.Linear(16, 24), []
    first, second = (Bypass("k", (parse_term(entry("lora", LINEAR, seed), {}),), LINEAR) for seed in (1, 2))
    first.attach(layer)
    layer.register_forward_hook(lambda *_: order.append("users"))
    assert second.take_place_of(first, layer)
    assert next(iter(layer._forward_hooks.values())) is second
    assert first not in layer._forward_hooks.values()
    assert not second.take_place_of(first, layer)
    x = make_input(LINEAR)
    changed = layer(x).clone()
    second.detach(layer)
    second.attach(layer)
    assert torch.equal(layer(x), changed)


def test_a_hook_that_comes_and_goes_in_another_thread_disturbs_no_call():
    """At every instruction of the bypass, as another thread might."""
    layer, x = torch.nn.Linear(16, 24), rand(2, 16, seed=3)
    hook = Bypass("layer.weight", (parse_term(entry("lora", (24, 16)), {}),), (24, 16))
    hook.owns_output = True
    hook.attach(layer)
    wanted, places = layer(x), 0

    def trace(frame, event, argument):
        nonlocal places
        if frame.f_code.co_filename != bypass.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            places += 1
            layer._forward_hooks[9] = hook
            del layer._forward_hooks[9]
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = layer(x)
    finally:
        sys.settrace(before)
    assert torch.equal(found, wanted)
    assert places > 50
