"""The short way of a layer: its values on every storage in four bits, and what it must not keep or do."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same
from support.reference import merge_reference
from support.short_way import bnb_parameter, take_short_way

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.forge.raw_weights import ForgeWeight
from lib_lora_guard.hosts.neo.raw_weights import NeoWeight
from lib_lora_guard.kernels.factors import Sides
from lib_lora_guard.kernels.stored import Fp8
from lib_lora_guard.kernels.twin import dequantised, with_factors
from lib_lora_guard.patching import fused, low_rank
from lib_lora_guard.patching.bypass import Bypass, call_of_layer
from lib_lora_guard.patching.fused_choice import CHOICE, Key, Twin
from lib_lora_guard.patching.marked_class import class_of, mark, unmark

SHAPE = 24, 64


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    with torch.no_grad():
        yield take_short_way(monkeypatch)


class Layer(torch.nn.Module):
    """As Forge's 4-bit layer: its own code multiplies with a dense weight."""

    def __init__(self, parameter, dense):
        super().__init__()
        self.weight, self.dense = parameter, dense
        self.bias = torch.nn.Parameter(rand(dense.shape[0], seed=9), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dense, self.bias)


def entries(*strengths):
    return [[s, host_value("lora", SHAPE, n + 1), 1.0, None, None] for n, s in enumerate(strengths)]


def ratios_of(layer, stack):
    """Magnitude over norm of each DoRA that is the first term on its rows."""
    found = {}
    for index, (_, (kind, values), _, part, _) in enumerate(stack):
        if kind == "lora" and values[4] is not None:
            rows = layer.dense if part is None else layer.dense.narrow(*part)
            found[index] = values[4].flatten() / (rows.norm(dim=1) + torch.finfo(torch.float32).eps)
    return found


def patched(layer, stack, raw=None):
    hook = Bypass(
        "layer.weight",
        tuple(parse_term(one, {}) for one in stack),
        SHAPE,
        ratios_of(layer, stack),
        lambda layer: layer.bias,
    )
    hook.fused = fused.Fused(raw or ForgeWeight(lambda: False), hook.program.one_pass)
    hook.attach(layer)
    mark(layer, "test", call=call_of_layer)
    return hook


def wanted(layer, stack, x):
    weight = merge_reference(stack, layer.dense.double())
    return torch.nn.functional.linear(x.double(), weight, layer.bias.double())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("tokens", [(3, 64), (2, 5, 64)])
def test_four_bits(kind, tokens, passes):
    layer, x, stack = Layer(*bnb_parameter(rand(*SHAPE, seed=4), kind)), rand(*tokens, seed=3), entries(0.8)
    base = layer(x)
    hook = patched(layer, stack)
    assert_same(layer(x), wanted(layer, stack, x), base)
    assert len(passes) == 1
    # A single token: bitsandbytes multiplies with the stored numbers, and the bypass adds to that.
    one = rand(1, 64, seed=5)
    assert_same(layer(one), wanted(layer, stack, one), class_of(layer).forward(layer, one))
    assert len(passes) == 1
    hook.detach(layer)
    assert torch.equal(layer(x), base)
    unmark(layer)
    assert torch.equal(layer(x), base)


@pytest.fixture
def products(monkeypatch):
    """Has calls with one token go to a product, by plain torch; returns the list that gets an entry for each."""
    found = []

    def output(stored, factors, token, bias):
        found.append((stored.kind, factors.rank))
        return torch.nn.functional.linear(token, with_factors(dequantised(stored, token.dtype), factors), bias)

    monkeypatch.setattr(CHOICE, "multiplies_tokens", True)
    for of_earlier_tests in ("_failed", "_late"):
        monkeypatch.setattr(CHOICE, of_earlier_tests, set())
    monkeypatch.setattr(fused, "token_output", output)
    return found


@pytest.mark.parametrize("host", [ForgeWeight, NeoWeight])
def test_one_token_has_a_product_with_the_loras_in_it(host, passes, products):
    layer, x, stack = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(1, 64, seed=3), entries(0.8)
    layer.weight_function, layer.bias_function = [], []
    base = layer(x)
    hook = patched(layer, stack, host(lambda: False))
    for token in (x, x[0], x.view(1, 1, 64)):
        found = layer(token)
        assert found.shape == (*token.shape[:-1], 24)
        assert_same(found.view(1, 24), wanted(layer, stack, x), base)
    assert (products, passes) == ([("nf4 64 by fp32", 4)] * 3, [])
    # Two tokens are not one: the same layer, called either way.
    two = rand(2, 64, seed=5)
    assert_same(layer(two), wanted(layer, stack, two), class_of(layer).forward(layer, two))
    assert_same(layer(x), wanted(layer, stack, x), base)
    assert (len(products), len(passes)) == (4, 1)
    hook.detach(layer)
    assert torch.equal(layer(x), base)


def test_calls_with_one_token_and_with_more_have_answers_of_their_own(passes, products, monkeypatch):
    """In one image a layer may be called either way: prompts go together where memory allows it."""

    class TokensAlone(Twin):
        def ready(self, kind, device, dtype, rank):
            return kind.startswith("token")

    monkeypatch.setattr(CHOICE, "compiler", TokensAlone())
    layer, one, two = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(1, 64, seed=3), rand(2, 64, seed=5)
    patched(layer, entries(0.8))
    for first in (one, two):
        with CHOICE.image():
            for x in (first, two, one, one, two):
                layer(x)
    assert (len(products), len(passes)) == (3 + 2, 0)
    monkeypatch.setattr(TokensAlone, "ready", lambda self, kind, *_: not kind.startswith("token"))
    monkeypatch.setattr(CHOICE, "_late", set())
    with CHOICE.image():
        for x in (one, two, one, two):
            layer(x)
    assert (len(products), len(passes)) == (5, 2)


def test_kernels_for_one_token_are_compiled_with_those_of_a_stack(products, monkeypatch):
    asked = []
    monkeypatch.setattr(
        CHOICE.compiler, "prepare", lambda kinds, device, dtype, ranks, soon: asked.append((kinds, ranks))
    )
    layer = Layer(*bnb_parameter(rand(*SHAPE, seed=4)))
    hook = patched(layer, entries(0.8))
    key = hook.fused.key(layer, torch.device("cpu"), torch.float32)
    assert key == Key("nf4 64 by fp32", torch.device("cpu"), torch.float32, 4)
    CHOICE.prepare([key, key._replace(kind="dora nf4 64 by fp32"), key._replace(kind="fp8 e4m3")])
    assert asked == [(["dora nf4 64 by fp32", "fp8 e4m3", "nf4 64 by fp32", "token nf4 64 by fp32"], (4,))]


@pytest.mark.parametrize("why", ["no kernel", "a DoRA", "switched off", "an error", "no memory"])
def test_one_token_goes_the_long_way_where_it_has_to(why, passes, products, monkeypatch, caplog):
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(1, 64, seed=3)
    stack = [dora(0.8)] if why == "a DoRA" else entries(0.8)
    base = layer(x)
    patched(layer, stack)
    asked = []

    def output(*given):
        asked.append(given)
        if why == "an error":
            raise RuntimeError("the driver says no")
        if why == "no memory":
            raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(fused, "token_output", output)
    if why == "switched off":
        monkeypatch.setattr(CHOICE, "multiplies_tokens", False)
    for _ in range(2):
        assert_same(layer(x), wanted(layer, stack, x), base)
    assert passes == []
    assert len(asked) == {"no kernel": 2, "an error": 1, "no memory": 2}.get(why, 0)
    assert ("token nf4 64 by fp32" in caplog.text) is (why == "an error")


def test_several_strengths_and_their_change_between_two_calls(monkeypatch, passes):
    # As on a card, where LoRAs are joined along the rank.
    monkeypatch.setattr(low_rank, "joins_on", lambda device: True)
    layer, x, stack = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3), entries(0.8, -0.3, 0.5)
    base = layer(x)
    hook = patched(layer, stack)
    assert_same(layer(x), wanted(layer, stack, x), base)
    stack = entries(0.2, 0.9, 0.5)
    joined = hook.low_rank
    joined.exchange(low_rank.Scaling(joined.scales_at(one[0] for one in stack), low_rank.ScaleVectors()))
    assert_same(layer(x), wanted(layer, stack, x), base)
    assert len(passes) == 2


PARTS = {
    # Of diffusers' files: query, key and value of one layer, of several ranks, and some of them alone.
    "rows": [(0, 0, 8, 4, 0.8), (0, 8, 8, 4, 0.8), (0, 16, 8, 4, 0.8)],
    "ranks": [(0, 0, 8, 2, 0.8), (0, 16, 8, 5, -0.3)],
    "over each other": [(0, 4, 12, 4, 0.8), (0, 8, 16, 4, 0.4), None],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_loras_on_parts_of_the_output_go_the_short_way_too(parts, passes, monkeypatch):
    monkeypatch.setattr(low_rank, "joins_on", lambda device: True)
    stack = [
        entries(0.6)[0]
        if part is None
        else [part[4], host_value("lora", (part[2], 64), n, rank=part[3]), 1.0, part[:3], None]
        for n, part in enumerate(parts)
    ]
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3)
    base = layer(x)
    hook = patched(layer, stack)
    assert_same(layer(x), wanted(layer, stack, x), base)
    ((_, factors),) = passes
    assert factors.up.shape == (24, hook.low_rank.rank)


def dora(strength, seed=1, part=None):
    shape = SHAPE if part is None else (part[2], SHAPE[1])
    return [strength, host_value("lora", shape, seed, dora="output"), 1.0, part, None]


def loha(strength, part=None):
    shape = SHAPE if part is None else (part[2], SHAPE[1])
    return [strength, host_value("loha", shape, 3, rank=2), 1.0, part, None]


ROWS_SCALED = {
    "a DoRA": ([dora(0.7)], 1, 4),
    "one with a LoRA after it": ([dora(0.7), *entries(0.4)], 1, 8),
    # Of diffusers' files: query and value of one layer.
    "DoRAs on parts": ([dora(0.7, 1, (0, 0, 8)), dora(0.5, 2, (0, 16, 8))], 1, 8),
    "a strength of the model": ([[0.8, entries(1.0)[0][1], 0.9, None, None]], 1, 4),
    "a LoHa": ([loha(0.6)], 0, 2),
    "a LoHa and a strength of the model": ([[0.6, loha(1.0)[1], 0.9, None, None]], 1, 2),
    "a LoHa on a part": ([loha(0.6, (0, 8, 8))], 0, 4),
}


@pytest.mark.parametrize(("stack", "scales", "rank"), ROWS_SCALED.values(), ids=ROWS_SCALED)
def test_a_dora_and_a_loha_go_the_short_way(stack, scales, rank, passes, monkeypatch):
    monkeypatch.setattr(low_rank, "joins_on", lambda device: True)
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3)
    base, one = layer(x), rand(1, 64, seed=5)
    hook = patched(layer, stack)
    before = "dora " * scales + "loha " * (rank == 2)
    assert hook.fused.key(layer, torch.device("cpu"), torch.float32)[::3] == (f"{before}nf4 64 by fp32", rank)
    for factor in (1.0, -0.5):
        terms = [[entry[0] * factor, *entry[1:]] for entry in stack]
        hook.exchange(hook.at_strengths([parse_term(term, {}) for term in terms]))
        assert_same(layer(x), wanted(layer, terms, x), base)
        # The long way: a single token.
        assert_same(layer(one), wanted(layer, terms, one), class_of(layer).forward(layer, one))
    assert [(factors.row_scale is not None, factors.down.shape[0]) for _, factors in passes] == [(scales, rank)] * 2
    assert {factors.times is None for _, factors in passes} == {rank > 2}


@pytest.mark.parametrize(("kind", "of_model"), [("lokr", 1.0), ("lokr_factors", 1.0), ("lokr_left", 0.9)])
def test_a_lokr_in_a_bypass_goes_the_short_way(kind, of_model, passes):
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3)
    base, one = layer(x), rand(1, 64, seed=5)
    stack = [[0.7, host_value(kind, SHAPE, 1, rank=2), of_model, None, None]]
    hook = patched(layer, stack)
    rows = "" if of_model == 1.0 else "dora "  # the strength of the model scales all rows
    assert hook.fused.key(layer, torch.device("cpu"), torch.float32)[::3] == (f"{rows}lokr nf4 64 by fp32", 16)
    for factor in (1.0, -0.5):
        terms = [[entry[0] * factor, *entry[1:]] for entry in stack]
        hook.exchange(hook.at_strengths([parse_term(term, {}) for term in terms]))
        assert_same(layer(x), wanted(layer, terms, x), base)
        # The long way: a single token.
        assert_same(layer(one), wanted(layer, terms, one), class_of(layer).forward(layer, one))
    assert [(type(sides), sides.row_scale is None) for _, sides in passes] == [(Sides, of_model == 1.0)] * 2
    # Columns of the right side that are no multiple of 8 have another kernel.
    other = [[0.7, ("lokr", (rand(3, 16, seed=1), rand(8, 4, seed=2), *[None] * 7)), 1.0, None, None]]
    fresh = Layer(*bnb_parameter(rand(*SHAPE, seed=4)))
    hook = patched(fresh, other)
    assert_same(fresh(x), wanted(fresh, other, x), base)
    assert hook.fused.key(fresh, torch.device("cpu"), torch.float32).rank == 1


@pytest.mark.parametrize(
    "stack",
    [
        [[0.7, host_value("lokr", SHAPE, 1), 1.0, None, None], *entries(0.4)],
        [[0.7, host_value("lokr", (8, 64), 1), 1.0, (0, 8, 8), None]],
        [[0.7, host_value("lokr", (24, 32), 1), 1.0, (1, 0, 32), None]],
        [*entries(0.4), dora(0.7)],  # rows that are scaled have a LoRA in them
        [loha(0.6), *entries(0.4)],
        [[0.7, host_value("lora", SHAPE, 1, dora="input"), 1.0, None, None]],
    ],
    ids=[
        "a LoKr and a LoRA",
        "a LoKr on rows",
        "a LoKr on columns",
        "a DoRA after a LoRA",
        "a LoHa and a LoRA",
        "a DoRA by column",
    ],
)
def test_stacks_that_are_no_one_product_go_the_long_way(stack):
    terms = tuple(parse_term(one, {}) for one in stack)
    ratios = {index: torch.ones(64 if len(stack) == 1 else 24) for index in range(2)}
    assert Bypass("layer.weight", terms, SHAPE, ratios).program.one_pass is None


def test_parts_of_the_input_go_the_long_way():
    stack = [[0.8, host_value("lora", (24, 16), 1), 1.0, (1, 8, 16), None]]
    assert Bypass("layer.weight", tuple(parse_term(one, {}) for one in stack), SHAPE).program.one_pass is None
    assert Bypass("w", tuple(parse_term(one, {}) for one in entries(1.0)), SHAPE).program.one_pass is not None


def test_a_weight_that_the_host_moves_away_is_freed(passes):
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3)
    patched(layer, entries(0.8))
    layer(x)
    gone = weakref.ref(layer.weight), weakref.ref(layer.weight.quant_state)
    memory = {layer.weight.data_ptr(), layer.weight.quant_state.absmax.data_ptr()}
    passes.clear()
    # Beside the old one, so that it cannot lie in the same place.
    layer.weight, layer.dense = bnb_parameter(rand(*SHAPE, seed=6))
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is None
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"]
    assert not memory & {one.untyped_storage().data_ptr() for one in tensors}
    stack = entries(0.8)
    assert_same(layer(x), wanted(layer, stack, x), class_of(layer).forward(layer, x))
    assert len(passes) == 1


def test_another_scale_beside_the_same_weight_is_seen(passes):
    dense, x = rand(*SHAPE, seed=4), rand(3, 64, seed=3)
    layer = Layer(torch.nn.Parameter(dense.to(torch.float8_e4m3fn), requires_grad=False), dense)
    patched(layer, entries(0.8))
    for scale in (0.5, 2.0):
        layer.scale_weight = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
        layer(x)
    assert [stored.scale.item() for stored, _ in passes] == [0.5, 2.0]


def test_weights_that_are_elsewhere_go_the_long_way(passes):
    layer, x = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), rand(3, 64, seed=3)
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
    patched(layer, entries(0.8))
    layer(x)
    assert not passes


@pytest.mark.parametrize("nested", [False, True])
def test_a_swapped_weight_comes_as_it_is_stored(passes, monkeypatch, nested):
    layer, card = Layer(*bnb_parameter(rand(*SHAPE, seed=4))), torch.device("meta")
    if nested:
        state, second = layer.weight.quant_state, type("State", (), {})()
        second.code, second.absmax, second.blocksize = torch.zeros(256), torch.zeros(1), 256
        state.nested, state.state2, state.offset = True, second, torch.zeros(())
        state.absmax = state.absmax.to(torch.uint8)
    hook, made = patched(layer, entries(0.8)), []

    def on_card(stored, factors, dtype):
        made.append(stored)
        return torch.empty(SHAPE, device=card)

    monkeypatch.setattr(fused, "fused_weight", on_card)
    assert layer(torch.empty(3, 64, device=card)).shape == (3, 24)
    (stored,) = made
    there = [
        stored.data,
        stored.absmax,
        *([stored.nested.code, stored.nested.scales, stored.nested.offset] if nested else []),
    ]
    assert {tensor.device for tensor in there} == {card}
    assert layer.weight.device == layer.bias.device == torch.device("cpu")
    monkeypatch.setattr(hook.fused, "_raw", ForgeWeight(lambda: True))
    with contextlib.suppress(RuntimeError):
        # Its own code, which here does not bring the weight.
        layer(torch.empty(3, 64, device=card))
    assert len(made) == 1


def test_what_comes_ahead_of_a_swapped_weight_is_what_its_call_copies(monkeypatch):
    class Ahead:
        def bring(self, layer, tensors, device):
            brought.append((layer, tensors))
            return tuple(one.to(device) for one in tensors)

    brought, card = [], torch.device("meta")
    monkeypatch.setattr(fused, "AHEAD", Ahead())
    (parameter, _), facts = bnb_parameter(rand(*SHAPE, seed=4)), fused._Facts()
    assert facts.in_ram() is None, "not called yet"
    facts.stored(fused.Held(parameter, None), torch.bfloat16, card)
    ((layer, tensors),) = brought
    assert layer is facts
    assert facts.spare_bytes == 2 * SHAPE[0] * SHAPE[1] - sum(one.nbytes for one in tensors) > 0, "values of 16 bits"
    assert [one.data_ptr() for one in tensors] == [parameter.data_ptr(), parameter.quant_state.absmax.data_ptr()]
    assert [one.data_ptr() for one in facts.in_ram()] == [one.data_ptr() for one in tensors]
    del parameter, tensors
    brought.clear()
    gc.collect()
    assert facts.in_ram() is None, "nor has it a weight any more"
    parameter, _ = bnb_parameter(rand(*SHAPE, seed=4))
    there = torch.nn.Parameter(parameter.data.to(card), requires_grad=False)
    vars(there).update(vars(parameter))
    facts.stored(fused.Held(there, None), torch.bfloat16, card)
    assert facts.in_ram() is None, "it lies on the card"


@pytest.mark.parametrize("place", ["weight", "product"])
def test_where_memory_ends_the_long_way_has_what_was_begun_for_the_next_layer(monkeypatch, place):
    gave, log = [], []

    class Ahead:
        def bring(self, layer, tensors, device):
            return tuple(one.to(device) for one in tensors)

        def give_way(self):
            gave.append(list(log))

    def ends(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    own = Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda layer, x: (log.append("long way"), own(layer, x))[1])
    layer = Layer(*bnb_parameter(rand(*SHAPE, seed=4)))
    patched(layer, entries(0.8))
    monkeypatch.setattr(fused, "AHEAD", Ahead())
    if place == "weight":
        monkeypatch.setattr(fused, "fused_weight", ends)
    else:
        linear, calls = torch.nn.functional.linear, [ends]
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (calls.pop() if calls else linear)(*args))
    layer(rand(3, 64, seed=3))
    assert gave == [[]], "once, before the long way begins"
    assert log == ["long way"]


def test_a_tensor_of_tensors_is_not_referred_to_weakly(monkeypatch):
    """torch refuses to move one that is."""

    class Weight(SimpleNamespace):
        """As comfy_kitchen's: a tensor that holds its numbers in another one."""

    raw = torch.zeros(*SHAPE, dtype=torch.float8_e4m3fn)
    weight = Weight(_qdata=raw, dtype=torch.bfloat16)
    monkeypatch.setattr(fused, "stored_weight", lambda *_: Fp8(raw))
    facts = fused._Facts()
    for _ in range(2):
        assert (
            facts.stored(fused.Held(weight, None), torch.bfloat16, torch.device("cpu")).data.data_ptr()
            == raw.data_ptr()
        )
    assert weakref.getweakrefcount(weight) == 0
    assert weakref.getweakrefcount(raw) == 1


def test_a_class_of_weights_is_not_asked_in_each_call(monkeypatch):
    asked = []

    class Counting(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    parameter, dense = bnb_parameter(rand(*SHAPE, seed=4))
    weight = Counting(parameter.data, requires_grad=False)
    weight.__dict__.update(parameter.__dict__)
    layer = Layer(weight, dense)
    patched(layer, entries(0.7))
    x = rand(3, 64, seed=3)
    layer(x)
    asked.clear()
    layer(x)
    assert asked == []
