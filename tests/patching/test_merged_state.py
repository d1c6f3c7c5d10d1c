"""The values that readers of the parameters get: the merge in fp32, rounded once, whatever mode the LoRAs are in."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.live_memory import LiveMemory
from support.make import Net, host_value, rand
from support.measure import contribution_error, same_bits
from support.reference import merge_reference

from lib_lora_guard.adapters import apply_terms, parse_term
from lib_lora_guard.files import Entry, write_safetensors
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.attachment import UnusableTermsError
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.merged_state import Kept, MergedState
from lib_lora_guard.planning.mode import Mode, Wish
from lib_lora_guard.weights import Nf4Codec, Q8_0Codec, ScaledFp8Codec, StoredLinear

FP8 = torch.float8_e4m3fn
STRENGTHS = (0.8, -0.4)


def patches_of(model, seed):
    """Of every kind, on whole weights and on slices of the fused ones: `{key: [(value, offset), ...]}`."""
    patches = {}
    for n, (key, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if key.endswith("qkv.weight"):
            third = shape[0] // 3
            patches[key] = [
                (host_value("lora", (third, shape[1]), seed + n + i), (0, i * third, third)) for i in range(3)
            ]
            patches[key].append((host_value("lora", (shape[0], 8), seed + n + 5), (1, 8, 8)))
        elif len(shape) == 2:
            kind, dora = [("lora", "output"), ("loha", None), ("lokr", None), ("lora", "input")][(n // 5 + seed) % 4]
            patches[key] = [(host_value(kind, shape, seed + n, dora=dora), None)]
        elif len(shape) == 4:
            patches[key] = [(host_value("lora", shape, seed + n), None)]
        else:
            patches[key] = [((rand(*shape, seed=seed + n, scale=0.05),), None)]
    return patches


def stack_of(model):
    return [patches_of(model, 1), patches_of(model, 30)]


def requests(stack):
    return [
        LoraRequest(
            f"lora{origin}",
            strength,
            {k: [parse_term([strength, v, 1.0, o, None], {}, origin) for v, o in vs] for k, vs in patches.items()},
        )
        for origin, (patches, strength) in enumerate(zip(stack, STRENGTHS, strict=True))
    ]


def applied(model, stack, wish=Wish.AUTO):
    engine = Engine()
    report = engine.change(PlainAccess(model), requests(stack), wish)
    assert not report.refused
    assert all(lora.used == len(patches) for lora, patches in zip(report.loras, stack, strict=True))
    return engine


def state_of(engine, suspended=()):
    return MergedState(engine.attached.values(), suspended)


def truth(values, stack, strengths=STRENGTHS):
    """In fp64, written out by the reference."""
    for patches, strength in zip(stack, strengths, strict=True):
        values = {
            key: merge_reference([[strength, v, 1.0, o, None] for v, o in patches.get(key, [])], value.double())
            for key, value in values.items()
        }
    return values


@pytest.mark.parametrize("wish", [Wish.AUTO, Wish.NEVER_MERGE, Wish.ON_THE_FLY, Wish.MERGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_weights_are_the_fp32_merge_rounded_once_in_every_mode(dtype, wish):
    model = Net(32).to(dtype)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    stack = stack_of(model)
    engine = applied(model, stack, wish)
    wanted = truth(before, stack)
    wrong = {
        "strength 5 % off": truth(before, stack, [s * 1.05 for s in STRENGTHS]),
        "second dropped": truth(before, stack[:1], STRENGTHS[:1]),
    }
    merged = state_of(engine).of(model)
    assert set(merged) == set(before)
    for key, weight in merged.items():
        attachment = engine.attached[key]
        assert weight.kept is (Kept.IN_PLACE if attachment.mode is Mode.MERGE else Kept.EXACT)
        value = weight.value()
        assert same_bits(value, apply_terms(before[key].to(torch.float32, copy=True), attachment.terms).to(dtype)), key
        assert (weight.dtype, weight.shape) == (value.dtype, tuple(value.shape))
        # Half a step of the storage (eps / 2 of each value), or what fp32 sums leave.
        limit = max(torch.finfo(dtype).eps / 2, 1e-6) * 1.01 * wanted[key].abs().max()
        assert (value.double() - wanted[key]).abs().max() <= limit, key
        for name, other in wrong.items():
            assert (value.double() - other[key]).abs().max() > limit, f"{key}: fault '{name}' would not be seen"
        if attachment.mode is not Mode.MERGE:
            assert same_bits(weight.parameter, before[key]), "the parameter was changed"


def test_a_part_of_a_model_has_the_names_of_its_own_state_dict():
    model = Net(32)
    engine = applied(model, stack_of(model))
    part = model.blocks[1]
    assert set(state_of(engine).of(part)) == set(part.state_dict())
    assert not state_of(engine).of(Net(32))
    whole = state_of(engine).of(model)
    for key, weight in state_of(engine).of(part).items():
        assert same_bits(weight.value(), whole[f"blocks.1.{key}"].value())


def fp8_model():
    model = Net(32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(FP8)
    return model


def test_plain_fp8_is_merged_and_rounded_to_fp8_as_stock_does():
    model = fp8_model()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    stack = stack_of(model)
    engine = applied(model, stack)
    merged, wanted = state_of(engine).of(model), truth({k: v.float() for k, v in before.items()}, stack)
    assert any(engine.attached[key].mode is Mode.MERGE for key in merged), "small parameters are held in fp32"
    for key, weight in merged.items():
        assert weight.kept is Kept.ROUNDED
        assert weight.dtype == FP8
        value = weight.value()
        assert same_bits(
            value, apply_terms(before[key].to(torch.float32, copy=True), engine.attached[key].terms).to(FP8)
        ), key
        # e4m3 has steps of 1/8: half of that, and 2**-10 below its smallest normal number.
        assert ((value.double() - wanted[key]).abs() <= wanted[key].abs() / 16 * 1.001 + 2**-10).all()
        assert contribution_error(value, wanted[key], before[key].float()) < 0.7, "the LoRA is not in it"


@pytest.mark.parametrize("codec", [Nf4Codec(), Q8_0Codec(), ScaledFp8Codec()], ids=lambda codec: codec.format)
def test_4_bit_gguf_and_scaled_fp8_weights_stay_as_stored(codec):
    model = torch.nn.Sequential(StoredLinear(codec, rand(64, 64, seed=1), rand(64, seed=2)))
    engine = applied(model, [{"0.weight": [(host_value("lora", (64, 64), 3), None)]}] * 2)
    stored = model[0].weight.detach().clone()
    weight = state_of(engine).of(model)["0.weight"]
    assert (weight.kept, weight.format) == (Kept.LEFT_OUT, codec.format)
    assert weight.value().data_ptr() == model[0].weight.data_ptr()
    assert same_bits(weight.value(), stored)


def test_fp8_with_a_scale_beside_it_stays_as_stored():
    model = fp8_model()
    layer = model.blocks[0].proj
    layer.register_parameter("scale_weight", torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False))
    key = "blocks.0.proj.weight"
    engine = applied(model, [{key: [(host_value("lora", (32, 32), 3), None)]}] * 2)
    assert state_of(engine).of(model)[key].kept is Kept.LEFT_OUT


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_suspended_merges_are_in_the_merged_state(dtype):
    model = Net(32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    engine = applied(model, stack_of(model), Wish.PREFER_MERGE)
    wanted = {key: weight.value().clone() for key, weight in state_of(engine).of(model).items()}
    suspended = {k: a for k, a in engine.attached.items() if a.mode is Mode.MERGE}
    assert engine.suspend_merges()
    assert all(same_bits(p, before[k]) for k, p in model.named_parameters())
    merged = state_of(engine, suspended.values()).of(model)
    assert set(merged) == set(wanted)
    for key, weight in merged.items():
        assert not weight.is_in_parameter
        assert same_bits(weight.value(), wanted[key]), key


def test_a_lora_that_widens_a_weight_has_the_new_shape():
    model = torch.nn.Module()
    model.img_in = torch.nn.Conv2d(8, 16, 1, bias=False).requires_grad_(False)
    wider = rand(16, 12, 1, 1, seed=4)
    engine = applied(model, [{"img_in.weight": [((wider,), None)]}, {}])
    merged = model.img_in.weight.detach().clone()
    assert merged.shape == (16, 12, 1, 1)
    suspended = dict(engine.attached)
    engine.suspend_merges()
    weight = state_of(engine, suspended.values()).of(model)["img_in.weight"]
    assert weight.shape == (16, 12, 1, 1)
    assert same_bits(weight.value(), merged)


def test_the_error_for_values_beyond_fp16_names_the_weight():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16).half()).requires_grad_(False)
    engine = applied(model, [{"0.weight": [(host_value("lora", (16, 16), 3), None)]}] * 2)
    attachment = engine.attached["0.weight"]
    too_strong = tuple(dataclasses.replace(term, strength=1e6) for term in attachment.terms)
    attachment.planned = attachment.planned.with_terms(too_strong)
    with pytest.raises(UnusableTermsError, match=r"0\.weight does not fit into fp16"):
        state_of(engine).of(model)["0.weight"].value()


@pytest.mark.parametrize("inference", [False, True])
def test_writing_a_model_holds_one_weight_at_a_time(tmp_path, inference):
    width, layers = 512, 12
    with torch.inference_mode(inference):
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
        model.to(torch.bfloat16).requires_grad_(False)
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        stack = [
            {k: [(host_value("lora", (width, width), s + n), None)] for n, k in enumerate(before)} for s in (1, 50)
        ]
        engine = applied(model, stack, Wish.BYPASS)
        weights = state_of(engine).of(model)
        entries = [Entry(key, weight.dtype, weight.shape, weight.value) for key, weight in weights.items()]
        with LiveMemory(*model.parameters()) as memory:
            write_safetensors(tmp_path / "model.safetensors", entries)
    # One fp32 scratch, its product with the LoRA's factors, and the result; fp16 of the whole model would be twelve.
    one = width * width * 4
    assert memory.peak_bytes <= 3 * one
    assert layers * width * width * 2 > 1.5 * memory.peak_bytes, "the model is too small to tell"
    saved = load_file(tmp_path / "model.safetensors")
    for key, value in saved.items():
        terms = engine.attached[key].terms
        assert same_bits(value, apply_terms(before[key].to(torch.float32, copy=True), terms).to(torch.bfloat16))
