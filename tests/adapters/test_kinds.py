"""Every kind of patch tuple against the written-out reference, in float64 and with planted faults."""

import pytest
import torch
from support.make import host_value, rand
from support.measure import assert_same, assert_same_and_faults_seen
from support.reference import merge_reference

from lib_lora_guard.adapters import apply_terms, parse_term
from lib_lora_guard.errors import LoraMismatchError

LINEAR, CONV = (24, 16), (12, 8, 3, 3)
ADDITIVE = [
    ("lora", LINEAR),
    ("lora", CONV),
    ("lora_mid", CONV),
    ("loha", LINEAR),
    ("loha", CONV),
    ("loha_mid", CONV),
    ("lokr", LINEAR),
    ("lokr", CONV),
    ("lokr_factors", LINEAR),
    ("lokr_mid", CONV),
    ("diff", LINEAR),
    ("diff", CONV),
]
SQUARE = (16, 16)
MORE = [
    ("lokr_left", LINEAR),
    ("glora_old", LINEAR),
    ("glora_old", SQUARE),
    ("glora", SQUARE),
    ("glora_conv", CONV),
    ("loha_plain", LINEAR),
]
OTHERS = [("glora", LINEAR), ("set", LINEAR), ("nested", LINEAR)]


def entry(kind, shape, seed=1, strength=0.8, strength_model=1.0, offset=None, function=None, **more):
    return [strength, host_value(kind, shape, seed, **more), strength_model, offset, function]


def run_on(weight):
    return lambda terms: apply_terms(weight.clone(), terms)


def check(entries, weight):
    terms = [parse_term(e, {}) for e in entries]
    for term in terms:
        term.check(tuple(weight.shape), may_expand=False)
    reference = merge_reference(entries, weight)
    assert_same_and_faults_seen(run_on(weight), terms, reference, weight, limit=1e-10)


@pytest.mark.parametrize(("kind", "shape"), [*ADDITIVE, *MORE, ("glora", LINEAR), ("nested", LINEAR)])
def test_kind_alone(kind, shape):
    check([entry(kind, shape)], rand(*shape, seed=9).double())


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("lora", LINEAR), ("lora", CONV), ("loha", LINEAR), ("lokr", LINEAR), ("glora", LINEAR)]
)
def test_dora(kind, shape, axis):
    check([entry(kind, shape, dora=axis)], rand(*shape, seed=9).double())


def test_set_ignores_the_strength():
    weight = rand(*LINEAR, seed=9).double()
    wanted = entry("set", LINEAR, strength=0.1)
    assert torch.equal(run_on(weight)([parse_term(wanted, {})]), wanted[1][1][0].double())


@pytest.mark.parametrize(("kind", "shape"), [*ADDITIVE, ("glora", LINEAR)])
def test_strength_model_scales_the_base(kind, shape):
    check([entry(kind, shape, strength_model=0.5)], rand(*shape, seed=9).double())


@pytest.mark.parametrize("offset", [(0, 8, 8), (1, 4, 8)])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "glora"])
def test_offset_changes_only_its_part(kind, offset):
    shape = (8, LINEAR[1]) if offset[0] == 0 else (LINEAR[0], 8)
    weight = rand(*LINEAR, seed=9).double()
    wanted = entry(kind, shape, offset=offset)
    check([wanted], weight)
    patched = run_on(weight)([parse_term(wanted, {})])
    rest = [i for i in range(weight.shape[offset[0]]) if not offset[1] <= i < offset[1] + offset[2]]
    assert torch.equal(
        patched.index_select(offset[0], torch.tensor(rest)), weight.index_select(offset[0], torch.tensor(rest))
    )


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_function_swaps_rows(kind):
    check([entry(kind, LINEAR, function=lambda d: d.flip(0))], rand(*LINEAR, seed=9).double())


def test_stack_is_applied_in_order():
    stack = [
        entry("lora", LINEAR, 1),
        entry("glora", LINEAR, 2),
        entry("diff", LINEAR, 3),
        entry("loha", LINEAR, 4, dora="output"),
        entry("lokr", LINEAR, 5),
    ]
    weight = rand(*LINEAR, seed=9).double()
    check(stack, weight)
    # glora and DoRA look at the weight, so another order is another result: the test above is able to see it.
    with pytest.raises(AssertionError, match="contribution"):
        assert_same(
            run_on(weight)([parse_term(e, {}) for e in reversed(stack)]), merge_reference(stack, weight), weight, 1e-3
        )


def test_a_nested_patch_can_be_applied_again_and_again():
    weight = rand(*LINEAR, seed=9).double()
    terms = [parse_term(entry("nested", LINEAR), {})]
    assert torch.equal(run_on(weight)(terms), run_on(weight)(terms))


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_on_a_16_bit_weight_is_rounded_once(dtype, axis):
    """Magnitudes near the norms, as training leaves them: one step of bf16 at 1.0 is more than what they change."""
    weight = rand(64, 96, seed=1, scale=0.02).to(dtype)
    up, down = rand(64, 4, seed=2, scale=0.01), rand(4, 96, seed=3, scale=0.01)
    norms = weight.double().norm(dim=1 if axis == "output" else 0, keepdim=True)
    magnitude = (norms * (1 + 0.005 * rand(*norms.shape, seed=4).double())).float()
    entries = [[1.0, ("lora", (up, down, 4.0, None, magnitude)), 1.0, None, None]]
    true = merge_reference(entries, weight.double())
    found = apply_terms(weight.clone(), [parse_term(entries[0], {})])
    once = (true.to(dtype).double() - true).norm()
    # The product of the factors is rounded before; it is small, so it adds little.
    assert float((found.double() - true).norm() / once) <= 1.1


def test_a_difference_may_have_ones_at_the_end_of_its_shape():
    weight, diff = rand(8, 6, seed=1), rand(8, 6, 1, 1, seed=2)
    term = parse_term([0.5, (diff,), 1.0, None, None], {})
    term.check((8, 6), may_expand=False)
    assert torch.allclose(apply_terms(weight.clone(), [term]), weight + 0.5 * diff[:, :, 0, 0])


def test_a_widening_dora_may_scale_the_columns_it_brings():
    value = host_value("lora", (24, 40), 1, dora="input")
    parse_term([1.0, value, 1.0, None, None], {}).check((24, 16), may_expand=True)


def test_foreign_kind_is_calculated_by_its_owner():
    calculators = {"theirs": lambda weight, strength, v: weight + strength * v[0].to(weight)}
    value = rand(*LINEAR, seed=3)
    weight = rand(*LINEAR, seed=9).double()
    entries = [[0.5, ("theirs", (value,)), 1.0, None, None]]
    assert_same(
        run_on(weight)([parse_term(e, calculators) for e in entries]),
        merge_reference(entries, weight, calculators),
        weight,
        1e-12,
    )


def test_flux_tools_lora_widens_an_input_projection():
    weight = rand(24, 16, seed=9).double()
    term = parse_term(entry("lora", (24, 40)), {})
    term.check((24, 16), may_expand=True)
    patched = apply_terms(weight.clone(), [term])
    up, down, alpha = term.adapter.up.double(), term.adapter.down.double(), 2.0
    wanted = torch.cat([weight, torch.zeros(24, 24, dtype=torch.double)], 1) + 0.8 * (alpha / 4) * up @ down
    assert patched.shape == (24, 40)
    assert_same(patched, wanted, torch.cat([weight, torch.zeros(24, 24, dtype=torch.double)], 1), 1e-12)
    with pytest.raises(LoraMismatchError, match=r"gives \[24, 40\], the weight is \[24, 16\]"):
        term.check((24, 16), may_expand=False)


def test_inpaint_diff_grows_a_convolution():
    weight, diff = rand(8, 4, 3, 3, seed=1), rand(8, 9, 3, 3, seed=2)
    patched = apply_terms(weight.clone(), [parse_term([1.0, (diff,), 1.0, None, None], {})])
    assert patched.shape == (8, 9, 3, 3)
    assert torch.allclose(patched[:, :4], weight + diff[:, :4])
    assert torch.allclose(patched[:, 4:], diff[:, 4:])


@pytest.mark.parametrize(
    ("kind", "made_for", "applied_to", "message"),
    [
        ("lora", (24, 16), (24, 32), r"up @ down gives \[24, 16\], the weight is \[24, 32\]"),
        ("lora", (24, 16), (16, 24), r"up @ down gives \[24, 16\]"),
        ("lora_mid", CONV, (12, 8, 5, 5), r"up @ down gives \[12, 72\]"),
        ("loha", (24, 16), (24, 32), r"LoHa gives \[24, 16\]"),
        ("lokr", (24, 16), (24, 32), r"LoKr gives \[24, 16\]"),
        ("lokr_factors", (24, 16), (12, 16), r"LoKr gives \[24, 16\]"),
        ("glora", (24, 16), (24, 32), r"GLoRA"),
        ("diff", (24, 16), (24, 32), r"diff gives \[24, 16\]"),
        ("set", (24, 16), (24, 32), r"set gives \[24, 16\]"),
        ("nested", (24, 16), (24, 32), r"nested patch gives \[24, 16\]"),
    ],
)
def test_a_wrong_shape_is_named_before_anything_is_computed(kind, made_for, applied_to, message):
    term = parse_term(entry(kind, made_for), {})
    with pytest.raises(LoraMismatchError, match=message):
        term.check(applied_to, may_expand=False)


@pytest.mark.parametrize("offset", [(0, 20, 8), (2, 0, 4), (0, -1, 4), (0, 0, 0)])
def test_an_offset_outside_the_weight_is_refused(offset):
    with pytest.raises(LoraMismatchError, match="addresses entries"):
        parse_term(entry("lora", (8, 16), offset=offset), {}).check(LINEAR, may_expand=False)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ([1.0, ("nonsense", ()), 1.0, None, None], "kind 'nonsense' is not known"),
        ([1.0, ("lora", (1, 2)), 1.0, None, None], "does not have the fields"),
        ([1.0, "text", 1.0, None, None], "type str is not known"),
        ([1.0], "1 fields, 5 are expected"),
    ],
)
def test_an_unknown_patch_is_refused_in_words(patch, message):
    with pytest.raises(LoraMismatchError, match=message):
        parse_term(patch, {})


def test_factors_of_zero_rank_are_refused():
    term = parse_term([1.0, ("lora", (torch.zeros(24, 0), torch.zeros(0, 16), 1.0, None, None)), 1.0, None, None], {})
    with pytest.raises(LoraMismatchError, match="no pair of matrices"):
        term.check(LINEAR, may_expand=False)


@pytest.mark.parametrize(("kind", "shape"), [*ADDITIVE, *OTHERS])
def test_map_converts_every_tensor_and_the_bytes_are_counted(kind, shape):
    adapter = parse_term(entry(kind, shape), {}).adapter
    half = adapter.map(lambda t: t.half())
    assert all(t.dtype == torch.float16 for t in half.tensors())
    assert half.bytes * 2 == adapter.bytes > 0


def test_identity_sees_tensors_and_numbers():
    value = host_value("lora", LINEAR, 1)
    term = parse_term([0.8, value, 1.0, None, None], {})
    assert term.identity() == parse_term([0.8, value, 1.0, None, None], {}).identity()
    assert term.identity() != parse_term([0.9, value, 1.0, None, None], {}).identity()
    assert term.identity() != parse_term([0.8, host_value("lora", LINEAR, 1), 1.0, None, None], {}).identity()
