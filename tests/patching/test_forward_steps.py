"""Every cheap form alone, against the patched weight computed apart, on linear layers and convolutions."""

import pytest
import torch
from patching.patched_layers import CONV, LINEAR, POINT, check, entry, make_input, make_layer, run
from support.make import host_value, rand
from support.measure import contribution_error
from support.reference import merge_reference

from lib_lora_guard.adapters import Slice, parse_term
from lib_lora_guard.errors import LayerError
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching.bypass import Bypass
from lib_lora_guard.patching.forward_steps import ScaleStep
from lib_lora_guard.patching.layer_call import LayerCall
from lib_lora_guard.patching.low_rank import JoinedLowRank

OUT_OF_MEMORY = OutOfMemory[0]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


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
    ids=["LoHa", "LoHa without alpha", "LoKr", "DoRA by row", "DoRA by column", "model strength", "rows turned"],
)
def test_one_adapter_of_each_kind(shape, kind, more):
    check(make_layer(shape), [entry(kind, shape, **more)], make_input(shape))


@pytest.mark.parametrize("kind", ["lokr_factors", "lokr_left"])
def test_a_lokr_with_factorised_sides_on_a_linear_layer(kind):
    check(make_layer(LINEAR), [entry(kind, LINEAR, rank=2)], make_input(LINEAR))
    check(make_layer((64, 64)), [entry(kind, (64, 64), rank=2)], make_input((64, 64)))


def test_a_lokr_with_a_factorised_side_on_a_convolution():
    value = (
        "lokr",
        (rand(2, 2, seed=1), None, 2.0, None, None, rand(6, 2, seed=2), rand(2, 4 * 9, seed=3), None, None),
    )
    check(make_layer(CONV), [[0.8, value, 1.0, None, None]], make_input(CONV))


@pytest.mark.parametrize("settings", [{"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_stride_dilation_and_padding_of_a_convolution_hold_for_the_adapter(kind, settings):
    check(make_layer(CONV, **settings), [entry(kind, CONV, rank=2)], make_input(CONV))


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


def test_the_error_when_the_factors_find_no_memory_names_their_size(monkeypatch):
    layer, x = torch.nn.Linear(16, 24), rand(8, 16, seed=3)
    hook, output = Bypass("block.qkv.weight", (parse_term(entry("lora", (24, 16)), {}),), (24, 16)), layer(x)

    def no_memory(*args):
        raise OUT_OF_MEMORY("planted")

    monkeypatch.setattr(JoinedLowRank, "_make_blocks", no_memory)
    with pytest.raises(
        LayerError, match=r"block\.qkv\.weight: no memory left for 0\.0 MB of LoRA factors\. Use fewer LoRAs"
    ):
        hook(layer, (x,), {}, output)


STEP_OF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
"""The largest error of one rounding, relative to the number: half of its last bit."""


@pytest.mark.parametrize("dtype", STEP_OF, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("part", [None, Slice(0, 5, 20)], ids=["all rows", "some rows"])
@pytest.mark.parametrize("spread", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("shape", [(7, 32), (2, 32, 3, 3)], ids=["linear", "convolution"])
def test_rows_that_are_scaled_are_as_near_as_one_rounding_allows(dtype, has_bias, part, spread, shape):
    generator = torch.Generator().manual_seed(5)
    rows = 32 if part is None else part.length
    factor = 1 + spread * torch.randn(rows, 1, generator=generator)
    bias = torch.randn(32, generator=generator).to(dtype) if has_bias else None
    y = torch.randn(shape, generator=generator).mul_(3).to(dtype)
    weight_shape = (32, 8) if len(shape) == 2 else (32, 8, 1, 1)
    call = LayerCall("a", torch.nn.Identity(), y, y.clone(), weight_shape, set())
    ScaleStep(factor, part, lambda layer: bias).run(call)

    whole = torch.ones(32, dtype=torch.float64)
    (whole if part is None else part.of(whole)).copy_(factor.flatten())
    spatial = [1] * (len(shape) - 2)
    off = (torch.zeros(32, dtype=torch.float64) if bias is None else bias.double()).view(-1, *spatial)
    wanted = whole.view(-1, *spatial) * (y.double() - off) + off
    change = wanted - y.double()
    # The result is rounded once, and the factor's change once before; 1 % for the sums of it in fp32.
    allowed = STEP_OF[dtype] * 1.01 * (wanted.abs() + change.abs()) + 4 * 2**-24 * (y.abs() + off.abs())
    assert ((call.output.double() - wanted).abs() <= allowed).all()
    assert change.abs().max() > 20 * allowed.min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_row_of_next_to_nothing_may_be_scaled_beyond_fp16(dtype, has_bias):
    factor = torch.tensor([[1e5], [1.5]])
    bias = torch.tensor([1e-6, 2.0]).to(dtype) if has_bias else None
    y = torch.tensor([[1e-3, 4.0]]).to(dtype)
    call = LayerCall("a", torch.nn.Identity(), y, y.clone(), (2, 8), set())
    ScaleStep(factor, None, lambda layer: bias).run(call)
    off = torch.zeros(2, dtype=torch.float64) if bias is None else bias.double()
    wanted = factor.double().flatten() * (y.double() - off) + off
    assert call.output.double() == pytest.approx(wanted, rel=2 * STEP_OF[dtype])
