"""Merging in slices: the same values as merging whole, and what happens when memory ends."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.make import host_value, rand
from support.measure import assert_same_and_faults_seen, same_bits
from support.reference import merge_reference
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.adapters import DiffAdapter, LoraAdapter, Slice, Term, parse_term
from lib_lora_guard.adapters.base import Adapter, apply_terms
from lib_lora_guard.patching import merging
from lib_lora_guard.patching.merging import SLICE_BYTES, SMALLEST_SLICE_BYTES, merge, term_rows
from lib_lora_guard.weights.storage import MB

CPU = torch.device("cpu")


NO_MEMORY = torch.cuda.OutOfMemoryError
EPS = 2.0**-24


def entry(kind, shape, seed=1, strength=0.8, strength_model=1.0, offset=None, function=None, **more):
    return [strength, host_value(kind, shape, seed, **more), strength_model, offset, function]


def terms_of(*entries):
    return tuple(parse_term(e, {}) for e in entries)


def sliced(weight, terms, rows, out_dtype=torch.float32, device=CPU):
    row_bytes = 4 * weight[0].numel() if weight.dim() else 4
    return merge(weight, terms, device=device, out_dtype=out_dtype, slice_bytes=rows * row_bytes)


def whole(weight, terms, out_dtype=torch.float32):
    return apply_terms(weight.float().clone(), terms).to(out_dtype)


@pytest.fixture
def slices(monkeypatch):
    """The shapes that were computed, in order."""
    seen = []

    def counting(weight, terms):
        seen.append(tuple(weight.shape))
        return apply_terms(weight, terms)

    monkeypatch.setattr(merging, "apply_terms", counting)
    return seen


EXACT = {
    "diff": ((22, 16), [entry("diff", (22, 16))]),
    "diff of a convolution": ((22, 4, 3, 3), [entry("diff", (22, 4, 3, 3))]),
    "diff of a bias": ((22,), [[0.8, (rand(22, seed=1),), 1.0, None, None]]),
    "set": ((22, 16), [entry("set", (22, 16)), entry("diff", (22, 16), 2, -0.3)]),
    "model strength": ((22, 16), [entry("diff", (22, 16), strength_model=0.7)]),
    "part of the rows": (
        (22, 16),
        [entry("diff", (9, 16), offset=(0, 3, 9), strength_model=0.5), entry("diff", (22, 16), 2)],
    ),
    "part of the columns": ((22, 16), [entry("diff", (22, 6), offset=(1, 5, 6), strength_model=0.5)]),
    "Kronecker": ((24, 16), [entry("lokr", (24, 16))]),
}


@pytest.mark.parametrize("rows", [1, 5, 12, 21])
@pytest.mark.parametrize("name", EXACT)
def test_elementwise_kinds_merged_in_slices_have_the_bits_of_a_merge_of_the_whole(name, rows, slices):
    shape, entries = EXACT[name]
    weight, terms = rand(*shape, seed=9), terms_of(*entries)
    result = sliced(weight, terms, rows)
    # A block of a Kronecker product that is larger than the slice is not cut.
    assert len(slices) > 1 or (name == "Kronecker" and rows < 12)
    assert same_bits(result, whole(weight, terms))


MATRICES = {
    "lora": ((24, 16), [entry("lora", (24, 16))]),
    "two loras": ((24, 16), [entry("lora", (24, 16)), entry("lora", (24, 16), 2, -0.4, rank=2)]),
    "lora of a convolution": ((24, 6, 3, 3), [entry("lora", (24, 6, 3, 3))]),
    "tucker": ((24, 6, 3, 3), [entry("lora_mid", (24, 6, 3, 3))]),
    "dora": ((24, 16), [entry("lora", (24, 16), dora="output")]),
    "loha": ((24, 16), [entry("loha", (24, 16))]),
    "glora": ((24, 16), [entry("glora", (24, 16))]),
    "q and v": (
        (24, 16),
        [entry("lora", (8, 16), 1, offset=(0, 0, 8)), entry("lora", (8, 16), 2, 0.5, offset=(0, 16, 8))],
    ),
    "input part": ((24, 16), [entry("lora", (24, 5), offset=(1, 3, 5), strength_model=0.9)]),
}


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", MATRICES)
def test_matrix_products_merged_in_slices_equal_the_reference(name, rows, slices):
    shape, entries = MATRICES[name]
    weight = rand(*shape, seed=9)
    reference = merge_reference(entries, weight.double())
    assert_same_and_faults_seen(lambda t: sliced(weight, tuple(t), rows), terms_of(*entries), reference, weight)
    assert len(slices) > 2


@pytest.mark.parametrize("rows", [1, 7, 64, 500])
def test_a_lora_merged_in_slices_differs_by_the_order_of_its_sums_alone(rows):
    """Two sums of `rank` products and the weight, in whatever order, lie within 2 (rank + 2) roundings of each other, of the sum
    of the absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 3.1)."""
    weight = rand(600, 96, seed=9)
    (term,) = terms = terms_of(entry("lora", (600, 96), rank=16))
    adapter = term.adapter
    size = weight.abs() + term.strength * adapter.scale * (adapter.up.abs() @ adapter.down.abs())
    error = (sliced(weight, terms, rows) - whole(weight, terms)).abs()
    assert bool((error <= 2 * (16 + 2) * EPS * size).all())


@dataclass(frozen=True, eq=False)
class Doubled(Adapter):
    """Multiplies its rows by numbers of its own; not additive, and says which rows it was asked for."""

    kind = "doubled"
    factors: torch.Tensor
    asked: tuple = ()

    def check(self, shape, *, may_expand):
        assert shape[0] == self.factors.shape[0]

    def rows(self, start, length):
        return replace(self, factors=self.factors[start : start + length], asked=(start, length))

    def patch(self, weight, strength, function):
        return weight.mul_(self.factors.reshape(-1, *[1] * (weight.dim() - 1)).mul(strength))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_stack_of_row_wise_kinds_in_any_slices_has_the_bits_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3), label="shape"))
    terms = []
    for n in range(data.draw(st.integers(1, 3), label="terms")):
        part, target = None, shape
        if data.draw(st.booleans(), label="part"):
            dim = data.draw(st.integers(0, len(shape) - 1))
            start = data.draw(st.integers(0, shape[dim] - 1))
            part = Slice(dim, start, data.draw(st.integers(1, shape[dim] - start)))
            target = part.shape_in(shape)
        row_wise = Doubled(rand(target[0], seed=n)) if data.draw(st.booleans()) else DiffAdapter(rand(*target, seed=n))
        terms.append(Term(row_wise, 0.7, data.draw(st.sampled_from([1.0, 0.5])), part))
    weight = rand(*shape, seed=50)
    before = weight.clone()
    rows = data.draw(st.integers(1, shape[0]), label="rows")
    assert same_bits(sliced(weight, tuple(terms), rows), whole(weight, terms))
    assert same_bits(weight, before)


def test_some_rows_of_an_adapter_on_a_part_of_the_rows():
    term = Term(Doubled(torch.arange(10.0)), 0.5, 0.9, Slice(0, 20, 10), None, 3)
    shape = (40, 8)
    assert term_rows(term, 0, 20, shape) == "nothing"
    assert term_rows(term, 30, 10, shape) == "nothing"
    inside = term_rows(term, 24, 4, shape)
    assert (inside.part, inside.adapter.asked) == (Slice(0, 0, 4), (4, 4))
    assert (inside.strength, inside.strength_model, inside.origin) == (0.5, 0.9, 3)
    across = term_rows(term, 15, 8, shape)
    assert (across.part, across.adapter.asked) == (Slice(0, 5, 3), (0, 3))
    around = term_rows(term, 0, 40, shape)
    assert (around.part, around.adapter.asked) == (Slice(0, 20, 10), (0, 10))


def test_some_rows_of_an_adapter_on_a_part_of_the_columns_keep_the_part():
    term = Term(Doubled(torch.arange(40.0)), 0.5, part=Slice(1, 2, 3))
    rows = term_rows(term, 6, 7, (40, 8))
    assert (rows.part, rows.adapter.asked) == (Slice(1, 2, 3), (6, 7))


def test_a_row_function_and_a_scalar_cannot_be_cut_into_rows():
    term = Term(DiffAdapter(rand(8, 4, seed=1)), 1.0, function=lambda d: d.flip(0))
    assert term_rows(term, 0, 4, (8, 4)) is None
    assert term_rows(Term(DiffAdapter(torch.ones(())), 1.0), 0, 1, ()) is None


WHOLE = {
    "row function": ((24, 16), [entry("lora", (24, 16), function=lambda d: d.flip(0))]),
    "magnitude of the columns": ((24, 16), [entry("lora", (24, 16), dora="input")]),
    "nested": ((24, 16), [entry("nested", (24, 16))]),
    "one of two": ((24, 16), [entry("diff", (24, 16)), entry("nested", (24, 16))]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_kinds_that_need_the_whole_weight_get_it(name, slices):
    shape, entries = WHOLE[name]
    weight = rand(*shape, seed=9)
    result = sliced(weight, terms_of(*entries), 2)
    assert slices[-1] == shape
    assert slices.count(shape) == len([s for s in slices if len(s) == len(shape)]), "no slice was computed in vain"
    assert same_bits(result, whole(weight, terms_of(*entries)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_that_widen_a_weight_are_merged_whole(dtype, slices):
    wide = Term(LoraAdapter(rand(24, 4, seed=1), rand(4, 40, seed=2)), 0.5)
    weight = rand(24, 16, seed=9).to(dtype)
    result = sliced(weight, (wide,), 2, dtype)
    assert result.shape == (24, 40)
    assert same_bits(result, whole(weight, (wide,), dtype))
    grown = Term(DiffAdapter(rand(8, 9, 3, 3, seed=1)), 0.5)
    weight = rand(6, 4, 3, 3, seed=9).to(dtype)
    result = sliced(weight, (grown,), 2, dtype)
    assert result.shape == (8, 9, 3, 3)
    assert same_bits(result, whole(weight, (grown,), dtype))
    assert slices == [(24, 16), (6, 4, 3, 3)]


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [3, 100])
def test_16_bit_weights_are_rounded_once(out_dtype, rows):
    weight = rand(22, 16, seed=9).to(out_dtype)
    terms = terms_of(entry("diff", (22, 16), 1, 0.01), entry("diff", (22, 16), 2, 0.01))
    twice = apply_terms(apply_terms(weight.float(), terms[:1]).to(out_dtype).float(), terms[1:]).to(out_dtype)
    result = sliced(weight, terms, rows, out_dtype)
    assert same_bits(result, whole(weight, terms, out_dtype))
    assert not same_bits(result, twice)


def test_a_64_bit_weight_is_merged_in_64_bits():
    weight = rand(8, 4, seed=9).double() + 1e-12
    zero = Term(DiffAdapter(torch.zeros(8, 4)), 1.0)
    assert same_bits(sliced(weight, (zero,), 4, torch.float64), weight)


@pytest.mark.parametrize("shape", [(), (0, 4), (1,)])
def test_scalars_and_empty_weights_can_be_merged(shape):
    weight = torch.full(shape, 0.25)
    result = merge(weight, (Term(DiffAdapter(torch.ones(shape)), 0.5),), device=CPU, out_dtype=torch.float32)
    assert (result.shape, result.dtype) == (shape, torch.float32)
    assert torch.equal(result, weight + 0.5)


@pytest.mark.parametrize("slice_rows", [2, 100])
def test_the_result_is_contiguous_and_not_an_inference_tensor(slice_rows):
    with torch.inference_mode():
        weight = rand(8, 4, 3, 3, seed=9).to(memory_format=torch.channels_last)
        terms = terms_of(entry("diff", (8, 4, 3, 3)), entry("lora", (8, 4, 3, 3), 2))
        result = sliced(weight, terms, slice_rows)
        copy = merge(weight, (), device=CPU, out_dtype=torch.float32)
    assert result.is_contiguous()
    assert not result.is_inference()
    assert same_bits(copy, weight)
    assert copy.data_ptr() != weight.data_ptr()
    result.add_(1)


def test_the_default_slice_is_64_mb():
    assert SLICE_BYTES == 64 * MB
    assert SMALLEST_SLICE_BYTES == MB


def short_of_memory(monkeypatch, allowed, floor=64):
    """`allowed(weight)` says whether a slice can be had. Returns the sizes tried, in rows."""
    tried = []

    def apply(weight, terms):
        tried.append((weight.device.type, weight.shape[0]))
        if not allowed(weight):
            raise NO_MEMORY("planted")
        return apply_terms(weight, terms)

    monkeypatch.setattr(merging, "apply_terms", apply)
    monkeypatch.setattr(merging, "SMALLEST_SLICE_BYTES", floor)
    return tried


def test_out_of_memory_the_slices_are_halved_and_finished_rows_stay(monkeypatch):
    weight, terms = rand(64, 16, seed=9), terms_of(entry("diff", (64, 16)))
    tried = short_of_memory(monkeypatch, lambda w: w.shape[0] <= 8)
    assert same_bits(sliced(weight, terms, 32), whole(weight, terms))
    assert [rows for _, rows in tried] == [32, 16, *[8] * 8]
    calls = []
    tried = short_of_memory(monkeypatch, lambda w: len(calls.append(0) or calls) != 3)
    assert same_bits(sliced(weight, terms, 16), whole(weight, terms))
    assert [rows for _, rows in tried] == [16, 16, 16, *[8] * 4]


@pytest.mark.parametrize("kind", ["diff", "nested"])
def test_the_cpu_merges_a_weight_that_the_device_has_no_memory_for(monkeypatch, kind):
    """The meta device stands for a GPU that has none left."""
    weight, terms = rand(64, 16, seed=9), terms_of(entry(kind, (64, 16)))
    tried = short_of_memory(monkeypatch, lambda w: w.device.type == "cpu", floor=16 * 64)
    result = sliced(weight, terms, 32, device=torch.device("meta"))
    assert same_bits(result, whole(weight, terms))
    if kind == "diff":
        assert tried == [("meta", 32), ("meta", 16), ("cpu", 32), ("cpu", 32)]
    else:
        assert tried[-1] == ("cpu", 64)


@pytest.mark.parametrize("kind", ["diff", "nested"])
def test_the_error_when_neither_device_nor_cpu_has_memory(monkeypatch, kind):
    weight, terms = rand(64, 16, seed=9), terms_of(entry(kind, (64, 16)))
    before = weight.clone()
    short_of_memory(monkeypatch, lambda w: False)
    with pytest.raises(MemoryError, match=r"no memory left to patch a weight of \[64, 16\], not even .*on the CPU"):
        sliced(weight, terms, 32)
    assert same_bits(weight, before)


def test_the_error_when_the_result_finds_no_memory(monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: planted")

    weight, terms = rand(64, 16, seed=9), terms_of(entry("diff", (64, 16)))
    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(MemoryError, match=r"no memory left for a patched weight of \[64, 16\], not even in RAM"):
        sliced(weight, terms, 32)


@pytest.mark.parametrize("error", [NO_MEMORY("planted"), MemoryError("planted"), RuntimeError("planted")], ids=repr)
@pytest.mark.parametrize("step", range(1, 9))
def test_a_failed_allocation_at_any_step_leaves_the_original_unchanged(monkeypatch, step, error):
    """Every allocation in turn fails once: of the result, of the slices, of the factors inside an adapter."""
    weight = rand(64, 16, seed=9).to(torch.bfloat16)
    terms = terms_of(entry("lora", (64, 16)), entry("diff", (64, 16), 2))
    before, wanted = weight.clone(), whole(weight, terms, torch.bfloat16)
    done = []

    class FailsOnce(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.addmm_, torch.ops.aten._to_copy):
                done.append(func)
                if len(done) == step:
                    raise error
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(merging, "SMALLEST_SLICE_BYTES", 64)
    with FailsOnce():
        if type(error) is RuntimeError or step == 1:
            with pytest.raises((RuntimeError, MemoryError), match=r"planted|not even in RAM"):
                sliced(weight, terms, 16, torch.bfloat16)
        else:
            # bf16 keeps 8 bits: a last bit of fp32 may turn a rounding, by one step at most.
            result = sliced(weight, terms, 16, torch.bfloat16)
            assert float((result.float() - wanted.float()).abs().max()) <= 2**-7 * float(wanted.abs().max())
    assert len(done) >= step
    assert same_bits(weight, before)


def test_an_adapter_whose_rows_have_another_shape_is_refused():
    @dataclass(frozen=True, eq=False)
    class Wider(Doubled):
        def patch(self, weight, strength, function):
            return torch.cat([weight, weight], 1)

    weight = rand(8, 4, seed=9)
    with pytest.raises(ValueError, match=r"a slice of rows gives \[2, 8\], the weight is \[2, 4\]"):
        sliced(weight, (Term(Wider(torch.ones(8)), 1.0),), 2)


def test_a_tensor_that_another_extension_returns_is_copied():
    theirs = rand(8, 4, seed=1)
    term = parse_term([1.0, ("theirs", ()), 1.0, None, None], {"theirs": lambda weight, strength, value: theirs})
    result = merge(rand(8, 4, seed=9), (term,), device=CPU, out_dtype=torch.float32)
    assert same_bits(result, theirs)
    assert result.data_ptr() != theirs.data_ptr()


class Calls(TorchDispatchMode):
    """Names what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_weight_of_one_slice_is_merged_in_few_calls():
    """A model has hundreds of them, and each call takes the processor as long as it takes a card."""
    weight, terms = rand(64, 32, seed=3).to(torch.bfloat16), terms_of(entry("lora", (64, 32)))
    with torch.no_grad(), Calls() as calls:
        merged = merge(weight, terms, device=CPU, out_dtype=torch.bfloat16)
    assert [name for name in calls.names if name not in ("view", "detach", "_unsafe_view", "t")] == [
        "_to_copy",
        "addmm_",
        "_to_copy",
    ]
    with torch.no_grad(), Calls() as calls:
        assert same_bits(
            merging._merge_slices(weight, terms, CPU, torch.bfloat16, 1 << 20, [(0, 64, list(terms))]), merged
        )
    assert len(calls.names) > 5


def test_a_weight_whose_memory_lies_across_is_merged_at_once_into_memory_that_does_not():
    weight, terms = rand(32, 64, seed=3).t(), terms_of(entry("lora", (64, 32)))
    merged = merge(weight, terms, device=CPU, out_dtype=torch.float32)
    assert merged.is_contiguous()
    assert same_bits(merged, whole(weight.contiguous(), terms))


class Named(torch.Tensor):
    """A tensor of another library."""


def test_a_weight_that_is_more_than_a_tensor_is_merged_into_a_tensor():
    weight, terms = rand(64, 32, seed=3), terms_of(entry("lora", (64, 32)))
    merged = merge(weight.as_subclass(Named), terms, device=CPU, out_dtype=torch.float32)
    assert type(merged) is torch.Tensor
    assert same_bits(merged, whole(weight, terms))


LARGE = torch.finfo(torch.float16).max


def hostile_values():
    """Tensors, and whether all their numbers are finite."""
    nan, inf = float("nan"), float("inf")
    fine = [
        torch.full((300, 300), LARGE, dtype=torch.float16),  # its norm in fp16 is not
        torch.full((40, 40), 1e38),
        torch.full((40,), 1e300, dtype=torch.float64),
        torch.zeros(3, 3, dtype=torch.bfloat16),
        torch.ones(2, 0),
        torch.tensor(2.0),
        torch.ones(4, 4).to(torch.float8_e4m3fn),
    ]
    wrong = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for value in (nan, inf, -inf):
            tensor = torch.ones(70, 70, dtype=dtype)
            tensor[69, 69] = value
            wrong.append(tensor)
    both = torch.ones(9, 9)
    both[1, 1], both[8, 8] = inf, -inf
    return [(one, True) for one in fine] + [(one, False) for one in (*wrong, both)]


def without_norms(*_):
    raise RuntimeError("no norms here")


@pytest.mark.parametrize("norms", ["torch's", "an error", "none"])
def test_many_tensors_are_asked_about_at_once_and_doubtful_ones_alone(monkeypatch, norms):
    cases = hostile_values()
    cases = cases[::2] + cases[1::2]
    if norms == "an error":
        monkeypatch.setattr(torch, "_foreach_norm", without_norms)
    elif norms == "none":
        monkeypatch.delattr(torch, "_foreach_norm")
    assert merging.are_finite([tensor for tensor, _ in cases]) == [is_fine for _, is_fine in cases]
    assert merging.are_finite([]) == []


def test_what_is_finite_beyond_doubt_is_not_asked_about_alone(monkeypatch):
    alone = []
    monkeypatch.setattr(merging, "is_finite", lambda tensor: alone.append(tensor) or True)
    tensors = [torch.ones(5, 5, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float16)]
    assert merging.are_finite(tensors) == [True] * 3
    assert alone == []


def test_where_memory_ends_for_many_each_is_asked_about_alone(monkeypatch):
    def full(*_):
        raise NO_MEMORY("full")

    monkeypatch.setattr(torch, "_foreach_norm", full)
    tensors = [torch.ones(3), torch.tensor([float("inf")])]
    assert merging.are_finite(tensors) == [True, False]
    monkeypatch.setattr(merging, "is_finite", full)
    with pytest.raises(NO_MEMORY):
        merging.are_finite(tensors)
