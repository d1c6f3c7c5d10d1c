"""A LoRA judged by its header is judged as by its tensors: header tensors against torch's meta device, kind by kind."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.adapters import Slice, Term
from lib_lora_guard.adapters.files import parse_tensors
from lib_lora_guard.errors import LoraFileError
from lib_lora_guard.files.header_tensor import HeaderTensor, is_tensor
from lib_lora_guard.planning import costs
from lib_lora_guard.planning.cheap import forms_of, pays
from lib_lora_guard.planning.mode import WeightFacts, choose_mode

NUMBERS = ("alpha", "on_input", "scalar")


def lora(out, inner, *kernel, rank=2):
    points = (1,) * len(kernel)
    return {"lora_up.weight": (out, rank, *points), "lora_down.weight": (rank, inner, *kernel)}


def tucker(out, inner, *kernel):
    points = (1,) * len(kernel)
    return {
        "lora_up.weight": (out, 2, *points), "lora_down.weight": (3, inner, *points), "lora_mid.weight": (2, 3, *kernel),
    }  # fmt: skip


def loha(out, inner, *kernel):
    return {"hada_w1_a": (out, 2), "hada_w1_b": (2, flat(inner, kernel)),
            "hada_w2_a": (out, 3), "hada_w2_b": (3, flat(inner, kernel))}  # fmt: skip


def loha_cores(out, inner, *kernel):
    sides = {f"hada_w{n}_a": (2, out) for n in (1, 2)} | {f"hada_w{n}_b": (2, inner) for n in (1, 2)}
    return {**sides, **{f"hada_t{n}": (2, 2, *(kernel or (1, 1))) for n in (1, 2)}}


def lokr(out, inner, *kernel):
    return {"lokr_w1": (4, 2), "lokr_w2_a": (out // 4, 2), "lokr_w2_b": (2, flat(inner, kernel) // 2)}


def flat(inner, kernel):
    for size in kernel:
        inner *= size
    return inner


KINDS = {
    "lora": lora,
    "wide lora": lambda out, inner, *k: lora(out, 2 * inner, *k),
    "tucker": tucker,
    "dora by row": lambda out, inner, *k: {**lora(out, inner, *k), "dora_scale": (out, 1)},
    "dora by column": lambda out, inner, *k: {**lora(out, inner, *k), "dora_scale": (1, inner)},
    "peft": lambda out, inner, *k: {
        "lora_A.weight": (2, inner, *k), "lora_B.weight": (out, 2, *(1 for _ in k)), "lora_B.bias": (out,),
        "lora_magnitude_vector": (out,),
    },
    "loha": loha,
    "loha with dora": lambda out, inner, *k: {**loha(out, inner, *k), "dora_scale": (out, 1)},
    "loha with cores": loha_cores,
    "lokr": lokr,
    "lokr of whole sides": lambda out, inner, *k: {"lokr_w1": (4, 2), "lokr_w2": (out // 4, inner // 2, *k)},
    "lokr of products": lambda out, inner, *k: {
        "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (out // 4, 2), "lokr_w2_b": (2, flat(inner, k) // 2),
    },
    "lokr with a core": lambda out, inner, *k: {
        "lokr_w1": (4, 2), "lokr_w2_a": (2, out // 4), "lokr_w2_b": (2, inner // 2), "lokr_t2": (2, 2, *(k or (1, 1))),
    },
    "lokr with dora": lambda out, inner, *k: {**lokr(out, inner, *k), "dora_scale": (out, 1)},
    "glora": lambda out, inner, *k: {
        "a1.weight": (inner, 2), "a2.weight": (2, inner), "b1.weight": (out, 2), "b2.weight": (2, inner, *k),
    },
    "old glora": lambda out, inner, *k: {
        "a1.weight": (2, inner), "a2.weight": (inner, 2), "b1.weight": (2, inner, *k), "b2.weight": (out, 2),
    },
    "glora with a core": lambda out, inner, *k: {
        "a1.weight": (inner, 2), "a2.weight": (2, inner), "b1.weight": (out, 2), "b2.weight": (2, inner),
        "bm.weight": (2, 2, *(k or (1, 1))),
    },
    "oft": lambda out, inner, *k: {"oft_blocks": (out // 4, 4, 4), "rescale": (out, 1)},
    "boft": lambda out, inner, *k: {"oft_blocks": (2, out // 4, 4, 4)},
    "peft oft": lambda out, inner, *k: {"oft_R.weight": (flat(inner, k) // 4, 6)},
    "peft boft": lambda out, inner, *k: {"boft_R": (1, flat(inner, k) // 4, 4, 4), "boft_s": (out, 1)},
    "ia3": lambda out, inner, *k: {"weight": (out, 1), "on_input": ()},
    "peft ia3": lambda out, inner, *k: {"ia3_l": (out, 1)},
    "peft ia3 on the input": lambda out, inner, *k: {"ia3_l": (1, inner)},
    "diff": lambda out, inner, *k: {"diff": (out, inner, *k), "diff_b": (out,)},
    "set": lambda out, inner, *k: {"set_weight": (out, inner, *k), "base_layer.bias": (out,)},
}  # fmt: skip
WEIGHTS = [(8, 8), (16, 8), (16, 8, 3, 3), (16, 8, 1, 1), (8,)]


def both(shapes, numbers, dtype):
    """The same tensors as a header gives them, and on torch's meta device with their numbers read."""
    headers, metas = {}, {}
    for name, shape in shapes.items():
        is_read = name in numbers and all(size == 1 for size in shape)
        # Older torch fills no fp8, and no fp16 with what is infinite there.
        wanted = getattr(torch, dtype)
        filled_as = torch.float64 if wanted.is_floating_point else wanted
        value, device = numbers.get(name, 0), None if is_read else "meta"
        tensor = torch.full(shape, value, dtype=filled_as, device=device).to(wanted)
        number = float(tensor) if is_read and not tensor.is_complex() else None
        headers[f"module.{name}"], metas[f"module.{name}"] = HeaderTensor(shape, dtype, number), tensor
    return headers, metas


def described(value):
    if is_tensor(value):
        return tuple(value.shape), value.dtype
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return tuple(map(described, value)) if isinstance(value, tuple) else value


def said(call):
    try:
        return described(call())
    except Exception as error:
        return type(error), str(error)


def judgement(tensors, weight):
    """All that is asked of a file's adapters before there are values."""
    try:
        adapters = parse_tensors(Path("a.safetensors"), tensors).adapters
    except LoraFileError as error:
        return str(error)
    found = {}
    for place, adapter in adapters.items():
        terms = [Term(adapter, 0.5)]
        slices = [Term(adapter, 0.5, part=Slice(0, 0, weight[0] // 2)), Term(adapter, 1.0, part=Slice(1, 0, 4))]
        facts = WeightFacts("key", weight, "bf16", True, can_bypass=True, can_on_the_fly=True)
        calls = {
            "fields": lambda a=adapter: a,
            "bytes": lambda a=adapter: a.bytes,
            "tensors": lambda a=adapter: tuple(a.tensors()),
            "mapped": lambda a=adapter: a.map(lambda tensor: tensor.flatten()),
            "is DoRA": lambda a=adapter: (a.is_dora, a.covers_bias),
            "scale": lambda a=adapter: getattr(a, "scale", None),
            "rank": lambda a=adapter: a.rank,
            "form": lambda a=adapter: a.cheap_forward(),
            "fits": lambda t=terms: t[0].check(weight, may_expand=False),
            "widens": lambda t=terms: t[0].check(weight, may_expand=True),
            "fits half": lambda t=slices: t[0].check(weight, may_expand=False),
            "first half": lambda a=adapter: a.rows(0, weight[0] // 2),
            "second half": lambda a=adapter: a.rows(weight[0] // 2, weight[0] // 2),
            "odd rows": lambda a=adapter: a.rows(3, 2),
            "rows that are not there": lambda a=adapter: a.rows(weight[0], 4),
            "cheap forms": lambda t=terms: forms_of(t, weight),
            "pays": lambda t=terms: tuple(pays(forms_of(t, weight), one_token) for one_token in (True, False)),
            "mode": lambda t=terms, f=facts: choose_mode(f, t),
            "bypass": lambda t=terms: costs.bypass_cost(t, forms_of(t, weight), weight, 77, 2),
            "parts": lambda t=slices: costs.bypass_cost(t, forms_of(t, weight), weight, 77, 2),
            "on the fly": lambda t=terms: costs.on_the_fly_cost(t, weight, True, 2),
            "by Forge": lambda t=terms: costs.forge_on_the_fly_cost(t, weight, True, 2),
        }
        found[place] = {name: said(call) for name, call in calls.items()}
    return found


def assert_alike(shapes, numbers, dtype, weight):
    headers, metas = both(shapes, numbers, dtype)
    assert judgement(headers, weight) == judgement(metas, weight)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_judged_alike(kind, weight):
    shapes = KINDS[kind](*(weight if len(weight) > 1 else (8, 8)))
    assert_alike(shapes, {"on_input": 1.0}, "float32", weight)
    shapes |= {"alpha": (), "scalar": (1,)}
    assert_alike(shapes, {"on_input": 1.0, "alpha": 3.0, "scalar": 0.5}, "bfloat16", weight)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_damaged_files_are_judged_alike(data):
    """Every factor may have another shape than its kind wants."""
    weight = data.draw(st.sampled_from(WEIGHTS))
    shapes = KINDS[data.draw(st.sampled_from(sorted(KINDS)))](*(weight if len(weight) > 1 else (8, 8)))
    shapes = {**shapes, **data.draw(st.sampled_from([{}, {"alpha": ()}, {"alpha": (2,)}, {"dora_scale": (8, 1)}]))}
    names = [name for name in sorted(shapes) if name not in NUMBERS]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        shapes[name] = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 16]), max_size=4)))
    if data.draw(st.booleans()):
        shapes.pop(data.draw(st.sampled_from(names)))
    alpha = data.draw(st.sampled_from([1.0, 0.0, -2.0, 1e38, float("nan"), float("inf")]))
    dtype = data.draw(st.sampled_from(["float16", "bfloat16", "float32", "float8_e4m3fn", "int64", "complex64"]))
    if dtype == "int64":
        alpha = 1.0
    assert_alike(shapes, {"alpha": alpha, "on_input": 0.0}, dtype, weight)
