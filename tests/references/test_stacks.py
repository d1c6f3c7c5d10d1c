"""Stacks of mixed kinds on parts of a fused weight, in every storage of our own, against the reference in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.end_to_end import one_thread  # noqa: F401  # a fixture for all tests here
from support.make import host_value, rand
from support.measure import assert_same_and_faults_seen, same_bits
from support.reference import merge_reference

from lib_lora_guard.adapters import DiffAdapter, parse_term
from lib_lora_guard.adapters.boft import BoftAdapter
from lib_lora_guard.adapters.ia3 import Ia3Adapter
from lib_lora_guard.adapters.oft import OftAdapter, PeftOftAdapter
from lib_lora_guard.adapters.patch_tuples import OWN_KIND
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.weights import (
    GGUF_DECODERS,
    Nf4Codec,
    PlainCodec,
    Q4_0Codec,
    Q8_0Codec,
    ScaledFp8Codec,
    StoredLinear,
)

SHAPE = (48, 256)
X = rand(2, 7, 256, seed=1)
WIDE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODECS = {
    **{name: PlainCodec(dtype, name) for name, dtype in WIDE.items()},
    "fp8": ScaledFp8Codec(),
    "nf4": Nf4Codec(),
    "Q8_0": Q8_0Codec(),
    "Q4_0": Q4_0Codec(),
}
K_SCALES = {"Q4_K": {0: 2e-4, 2: 2e-4}, "Q6_K": {208: 3e-5}}
"""Where the fp16 scales of a block lie, and values for them that give weights of about 0.05."""


class Attention(torch.nn.Module):
    """Answers with its projections too: what attention evens out is seen there."""

    def __init__(self, qkv):
        super().__init__()
        self.qkv = qkv

    def forward(self, x):
        y = self.qkv(x)
        q, k, v = y.chunk(3, -1)
        return torch.cat([torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v, y], -1)


def stored(name):
    weight, bias = rand(*SHAPE, seed=2) / 16, rand(SHAPE[0], seed=3)
    if name in CODECS:
        return StoredLinear(CODECS[name], weight, bias)
    decoder = GGUF_DECODERS[name]
    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (SHAPE[0], decoder.block_bytes), generator=generator, dtype=torch.uint8)
    for place, scale in K_SCALES[name].items():
        scales = torch.full((SHAPE[0], 1), scale, dtype=torch.float16)
        blocks[:, place : place + 2] = scales.view(torch.uint8)
    return StoredLinear.from_parts(decoder, {"data": blocks}, SHAPE, bias)


# ---- kinds that the host has no tuple for, written out in float64


def rotation(blocks):
    """Cayley's transform of each block, as one matrix: `(I + S)(I - S)^-1`."""
    skew, eye = (blocks - blocks.mT).double(), torch.eye(blocks.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((eye + skew) @ torch.linalg.inv(eye - skew)))


def turned_rows(weight, strength, content):
    flat = weight.flatten(1)
    return (flat + strength * (rotation(content[0]).T @ flat - flat)).reshape(weight.shape)


def butterfly(weight, strength, content):
    flat = weight.flatten(1)
    for stage, blocks in enumerate(content[0]):
        half = 2**stage * (blocks.shape[1] // 2)
        order = torch.arange(len(flat)).reshape(-1, 2, half).transpose(1, 2).flatten()
        shuffle = torch.eye(len(flat), dtype=torch.float64)[order]
        flat = flat + strength * (shuffle.T @ rotation(blocks) @ shuffle @ flat - flat)
    return flat.reshape(weight.shape)


def turned_columns(weight, strength, content):
    flat = weight.flatten(1)
    return (flat + strength * (flat @ rotation(content[0]) - flat)).reshape(weight.shape)


def scaled(weight, strength, content):
    factor, axis = content
    channels = [1] * weight.dim()
    channels[axis] = -1
    return weight * (1 + strength * factor.double().reshape(channels))


CALCULATORS = {"oft": turned_rows, "boft": butterfly, "peft oft": turned_columns, "ia3": scaled}


def own_kind(kind, shape, seed):
    """`(adapter, content for the calculator of the same name)`."""
    columns = torch.Size(shape[1:]).numel()
    if kind == "oft":
        blocks = rand(shape[0] // 4, 4, 4, seed=seed, scale=0.2)
        return "oft", OftAdapter(blocks), (blocks,)
    if kind == "boft":
        blocks = rand(2, shape[0] // 4, 4, 4, seed=seed, scale=0.2)
        return "boft", BoftAdapter(blocks), (blocks,)
    if kind == "peft oft":
        packed = rand(columns // 4, 6, seed=seed, scale=0.2)
        blocks = torch.zeros(columns // 4, 4, 4)
        upper = torch.triu_indices(4, 4, 1)
        blocks[:, upper[0], upper[1]] = packed
        return "peft oft", PeftOftAdapter(packed, terms=None), (blocks,)
    axis = 1 if kind == "ia3 in" else 0
    factor = rand(shape[axis], seed=seed, scale=0.3)
    return "ia3", Ia3Adapter(factor, on_input=axis == 1), (factor, axis)


def swap_halves(delta):
    return torch.cat(delta.chunk(2)[::-1])


@dataclasses.dataclass(frozen=True)
class Pick:
    """One term of a stack. `part`: (dim, start, length) or None."""

    kind: str
    strength: float
    strength_model: float
    part: tuple | None
    dtype: torch.dtype
    swaps: bool

    def values(self, shape, seed):
        """The host's patch value for the product, and for the reference."""
        if self.part is not None:
            shape = tuple(self.part[2] if dim == self.part[0] else size for dim, size in enumerate(shape))
        if self.kind in OWN:
            name, adapter, content = own_kind(self.kind, shape, seed)
            return (OWN_KIND, (adapter,)), (name, content)
        kind, _, dora = self.kind.partition(" dora ")
        rank = 9 if kind == "loha" and seed % 2 else 4
        value = rounded(host_value(kind, shape, seed, rank=rank, dora=dora or None), self.dtype)
        return value, value

    def patches(self, shape, seed):
        # A function is the host's, and the host hands none to kinds that it does not know.
        function = swap_halves if self.swaps and self.kind not in OWN else None
        rest = [self.strength_model, self.part, function]
        mine, reference = self.values(shape, seed)
        return [self.strength, mine, *rest], [self.strength, reference, *rest]


def rounded(value, dtype):
    """The tensors of a patch value in a file's dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return type(value)(rounded(v, dtype) for v in value) if isinstance(value, (tuple, list)) else value


OWN = ("oft", "boft", "peft oft", "ia3 out", "ia3 in")
LINEAR = (
    *("lora", "lora dora output", "lora dora input", "loha", "loha dora output", "loha_plain", "lokr", "lokr_factors"),
    *("lokr_left", "glora", "glora_old", "diff", "nested", *OWN),
)
CONVOLUTION = (
    *("lora", "lora dora output", "lora dora input", "lora_mid", "loha", "loha_mid", "lokr", "lokr_mid", "glora_conv"),
    *("diff", *OWN),
)
CHEAP = ("lora", "lora dora output", "lora dora input", "loha", "lokr", "lokr_factors", "ia3 out", "ia3 in")
QKV = [None, (0, 0, 16), (0, 16, 16), (0, 32, 16)]


def picks(kinds, parts):
    return st.builds(
        Pick,
        kind=st.sampled_from(kinds),
        strength=st.sampled_from([1.0, 0.6, -0.5, 0.3]),
        strength_model=st.sampled_from([1.0, 1.0, 0.7]),
        part=st.sampled_from(parts),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        swaps=st.sampled_from([False, False, True]),
    )


def stacks(kinds, parts):
    return st.lists(picks(kinds, parts), min_size=2, max_size=4)


def check(model, key, stack, wish, *, merged_dtype=None):
    """The output with the stack on, against the same model with the reference's weight in float64, and planted faults."""
    access, engine = PlainAccess(model), Engine()
    site = access.site(key)
    weight = access.dense(site).double()
    patches = [pick.patches(tuple(weight.shape), seed) for seed, pick in enumerate(stack)]
    terms = [parse_term(mine, {}, origin) for origin, (mine, _) in enumerate(patches)]
    merged = merge_reference([reference for _, reference in patches], weight, CALCULATORS)
    with torch.no_grad():
        base = model(X_OF[type(model)])
        bits = [p.detach().clone() for p in model.parameters()]
        reports = []

        def run(changed):
            requests = [
                LoraRequest(str(n), term.strength, {key: [dataclasses.replace(term, origin=n)]})
                for n, term in enumerate(changed)
            ]
            report = engine.change(access, requests, wish)
            assert not report.is_worrying, report.line()
            reports.append(report)
            return model(X_OF[type(model)])

        run(terms)
        (mode,) = {mode for lora in reports[0].loras for mode in lora.modes}
        limit = None
        if mode == "merge" and merged_dtype not in (None, torch.float32):
            # Rounded once to 16 bits, as it must be. A sum that lies at the middle of two numbers may go either way.
            merged, limit = merged.to(merged_dtype), 2e-3
        reference = reference_output(model, key, merged)
        assert_same_and_faults_seen(run, terms, reference, base, limit)
        engine.change(access, [])
        assert same_bits(model(X_OF[type(model)]), base)
        assert all(same_bits(p, old) for p, old in zip(model.parameters(), bits, strict=True))
    return mode


def reference_output(model, key, weight):
    """The model's own formula in float64 with `weight` in the place of `key`."""
    bias = model.get_parameter(key.replace("weight", "bias")).double()
    if isinstance(model, Attention):
        linear = torch.nn.Linear(*reversed(weight.shape)).double().requires_grad_(False)
        linear.weight, linear.bias = frozen(weight.double()), frozen(bias)
        return Attention(linear)(X.double())
    return torch.nn.functional.conv2d(IMAGE.double(), weight.double(), bias, padding=1)


def frozen(value):
    return torch.nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize("storage", [*CODECS, *K_SCALES])
@settings(max_examples=8, deadline=None)  # 9 storages, and each with its faults
@given(stack=stacks(LINEAR, [*QKV, (1, 64, 128)]), other=st.sampled_from([Wish.BYPASS, Wish.ON_THE_FLY, Wish.MERGE]))
def test_stacks_on_a_fused_weight(storage, stack, other):
    model = Attention(stored(storage))
    dtype = WIDE.get(storage)
    for wish in (Wish.AUTO, other):
        if wish is not Wish.MERGE or dtype is not None:
            mode = check(model, "qkv.weight", stack, wish, merged_dtype=dtype)
            assert mode == wish.value or wish in (Wish.AUTO, Wish.BYPASS)
            has_whole = any(pick.kind in ("diff", "nested") for pick in stack)
            if wish is Wish.AUTO and dtype is not None:
                assert (mode == "merge") == has_whole


IMAGE = rand(2, 8, 6, 6, seed=5)


@settings(max_examples=15, deadline=None)
@given(stack=stacks(CONVOLUTION, [None, None, (0, 0, 8), (0, 8, 8)]))
def test_stacks_on_a_convolution(stack):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, padding=1)).requires_grad_(False)
    model[0].weight.data, model[0].bias.data = rand(16, 8, 3, 3, seed=6) / 8, rand(16, seed=7)
    for wish in Wish:
        check(model, "0.weight", stack, wish)


X_OF = {Attention: X, torch.nn.Sequential: IMAGE}


@settings(max_examples=30, deadline=None)
@given(stack=stacks(CHEAP, QKV), storage=st.sampled_from([*CODECS, *K_SCALES]))
def test_stacks_of_kinds_with_a_cheap_form(stack, storage):
    check(Attention(stored(storage)), "qkv.weight", stack, Wish.BYPASS)


def test_a_stack_of_what_has_a_cheap_form_is_carried_by_the_call_in_every_storage():
    stack = [
        Pick("ia3 in", 0.6, 1.0, None, torch.float32, swaps=False),
        Pick("lora", 0.6, 1.0, (0, 16, 16), torch.bfloat16, swaps=True),
        Pick("lora dora output", -0.5, 0.7, (0, 0, 16), torch.float16, swaps=False),
        Pick("lokr_factors", 1.0, 1.0, None, torch.float16, swaps=False),
    ]
    for storage in (*CODECS, *K_SCALES):
        assert check(Attention(stored(storage)), "qkv.weight", stack, Wish.BYPASS) == "bypass"
        # A scaled input is exact below what is added after it alone.
        assert check(Attention(stored(storage)), "qkv.weight", stack[::-1], Wish.BYPASS) == "on_the_fly"


def test_a_replaced_weight_takes_the_terms_after_it():
    value = rand(*SHAPE, seed=8) / 16
    model = Attention(stored("nf4"))
    engine, access = Engine(), PlainAccess(model)
    patches = [[1.0, ("set", (value,)), 1.0, None, None], [0.6, host_value("lora", SHAPE, 9), 1.0, None, None]]
    reference = merge_reference(patches, access.dense(access.site("qkv.weight")).double())
    terms = [parse_term(patch, {}) for patch in patches]
    with torch.no_grad():
        base = model(X)

        def run(changed):
            engine.change(access, [LoraRequest("a", 1.0, {"qkv.weight": changed})])
            return model(X)

        wanted = reference_output(model, "qkv.weight", reference)
        assert_same_and_faults_seen(run, terms, wanted, base)
        assert not isinstance(terms[0].adapter, DiffAdapter)
        engine.change(access, [])
        assert torch.equal(model(X), base)
