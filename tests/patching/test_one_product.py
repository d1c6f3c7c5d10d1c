"""A merge by one product in 16 bits: on a card alone, where it is asked what it rounds. Here the CPU stands for the card."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.adapters import Slice, Term
from lib_lora_guard.adapters.loha import LohaAdapter
from lib_lora_guard.adapters.lora import LoraAdapter
from lib_lora_guard.patching import merging, one_product

CPU = torch.device("cpu")
HALVES = (torch.float16, torch.bfloat16)
FLAGS = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _the_cpu_is_a_card(monkeypatch):
    monkeypatch.setattr(one_product, "_is_suited", lambda device: True)
    monkeypatch.setattr(one_product, "_rounds_once", {})
    monkeypatch.setattr(one_product, "_failures", {})


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def lora(rows, columns, rank=4, strength=0.7, dtype=torch.bfloat16, part=None, seed=0, **more):
    up, down = numbers(rows, rank, dtype=dtype, seed=seed), numbers(rank, columns, dtype=dtype, seed=seed + 1)
    return Term(LoraAdapter(up=up, down=down, alpha=rank / 2, **more), strength, part=part)


def exactly(weight, terms):
    """The stack in fp64, and the sum of what was added without its signs."""
    exact, summed = weight.double(), weight.double().abs()
    for term in terms:
        rows = slice(None) if term.part is None else slice(term.part.start, term.part.start + term.part.length)
        up, down = (one.flatten(1).double() for one in (term.adapter.up, term.adapter.down))
        factor = term.strength * term.adapter.scale
        exact[rows] += (factor * (up @ down)).view(exact[rows].shape)
        summed[rows] += (abs(factor) * (up.abs() @ down.abs())).view(exact[rows].shape)
    return exact, summed


def assert_rounded_once(found, weight, terms):
    exact, summed = exactly(weight, terms)
    # Half a unit of the last place, and what fp32 loses of the sum.
    assert ((found.double() - exact).abs() <= torch.finfo(found.dtype).eps / 2 * exact.abs() + 2**-20 * summed).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("weight", "up", "down"),
    [
        ((40, 24), (40, 4), (4, 24)),
        ((40, 24), (40, 1), (1, 24)),
        ((24, 16, 3, 3), (24, 4, 1, 1), (4, 16, 3, 3)),
        ((24, 16, 1, 1), (24, 4), (4, 16)),
        ((24, 16), (24, 160), (160, 16)),
    ],
)
def test_it_is_rounded_once_and_the_weight_is_only_read(dtype, weight, up, down):
    data = numbers(*weight, dtype=dtype)
    before = data.clone()
    term = Term(LoraAdapter(up=numbers(*up, dtype=dtype), down=numbers(*down, dtype=dtype), alpha=2.0), -0.6)
    found = one_product.merged(data, [term], dtype)
    assert found.shape == data.shape
    assert found.is_contiguous()
    assert found.dtype is dtype
    assert torch.equal(data, before)
    assert_rounded_once(found, data, [term])
    # What fp32 makes of it differs where the last bits of its sums do: seldom, and by one place.
    wide = merging._merge_slices(data, (term,), CPU, dtype, 1 << 30, merging._slices((term,), 0, data, 1 << 30))
    assert (found != wide).float().mean() < 0.01


def test_merges_take_it(monkeypatch):
    data, term = numbers(40, 24), lora(40, 24)
    taken = []
    monkeypatch.setattr(
        one_product, "_add", lambda rows, term, add=one_product._add: (taken.append(1), add(rows, term))
    )
    found = merging.merge(data, [term], device=CPU, out_dtype=torch.bfloat16)
    assert taken == [1]
    assert_rounded_once(found, data, [term])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_loras_on_rows_of_their_own_are_one_rounding_each(data):
    rows, columns = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 16))
    terms, start = [], 0
    while start < rows and data.draw(st.booleans()):
        start = data.draw(st.integers(start, rows - 1))
        length = data.draw(st.integers(1, rows - start))
        rank, strength = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, -0.8, 1.3]))
        terms.append(lora(length, columns, rank, strength, part=Slice(0, start, length), seed=start))
        start += length
    terms = data.draw(st.permutations(terms))
    weight = numbers(rows, columns)
    found = one_product.merged(weight, terms, weight.dtype)
    if not terms:
        assert found is None
    else:
        assert_rounded_once(found, weight, terms)


@pytest.mark.parametrize(
    "terms",
    [
        [lora(40, 24), lora(40, 24, seed=5)],
        [lora(20, 24, part=Slice(0, 0, 20)), lora(21, 24, part=Slice(0, 19, 21))],
        [lora(40, 12, part=Slice(1, 0, 12))],
        [lora(40, 24, dtype=torch.float16)],
        [lora(40, 24, dtype=torch.float32)],
        [lora(40, 24, magnitude=torch.ones(40, 1))],
        [lora(40, 24, reshaped=True)],
        [lora(40, 24, mid=torch.ones(4, 4, 1, 1, dtype=torch.bfloat16))],
        [Term(lora(40, 24).adapter, 0.7, strength_model=0.5)],
        [Term(lora(40, 24).adapter, 0.7, function=torch.neg)],
        [
            Term(
                LohaAdapter(
                    w1a=numbers(40, 2), w1b=numbers(2, 24), w2a=numbers(40, 2), w2b=numbers(2, 24), alpha=1.0
                ),
                0.7,
            )
        ],
        [],
    ],
)  # fmt: skip
def test_all_else_goes_the_other_way(terms):
    assert one_product.merged(numbers(40, 24), terms, torch.bfloat16) is None


def test_other_weights_go_the_other_way():
    term = lora(40, 24)
    wide = numbers(40, 24, dtype=torch.float32)
    assert one_product.merged(wide, [lora(40, 24, dtype=torch.float32)], torch.float32) is None
    assert one_product.merged(numbers(40, 24), [term], torch.float32) is None
    assert one_product.merged(numbers(24, 40).t(), [term], torch.bfloat16) is None
    assert one_product.merged(numbers(40), [term], torch.bfloat16) is None


def rounds_the_product_first(self, up, down, *, alpha):
    return self.add_((up @ down).mul_(alpha))


def sums_in_16_bits(self, up, down, *, alpha):
    total = torch.zeros_like(self)
    for rank in range(up.shape[1]):
        total += up[:, rank : rank + 1] * down[rank]
    return self.copy_((self.float() + alpha * total.float()).to(self.dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("product", [rounds_the_product_first, sums_in_16_bits])
def test_a_card_that_rounds_more_than_once_is_found_out(monkeypatch, dtype, product):
    monkeypatch.setattr(torch.Tensor, "addmm_", product)
    assert not one_product.rounds_once(CPU, dtype)
    assert one_product.merged(numbers(40, 24, dtype=dtype), [lora(40, 24, dtype=dtype)], dtype) is None
    monkeypatch.undo()
    # Asked once.
    assert one_product._rounds_once == {} or not one_product._rounds_once[CPU, dtype]


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (torch.cuda.OutOfMemoryError("no memory"), 5),
        (MemoryError(), 5),
        (RuntimeError("cublas has no such product"), one_product.MOST_FAILURES),
        (NotImplementedError("addmm"), one_product.MOST_FAILURES),
    ],
)
def test_a_product_that_fails_leaves_it_to_fp32(monkeypatch, error, times):
    data, term, calls = numbers(40, 24), lora(40, 24), []

    def fail(rows, term):
        calls.append(rows.zero_())
        raise error

    monkeypatch.setattr(one_product, "_add", fail)
    for _ in range(5):
        assert_rounded_once(merging.merge(data, [term], device=CPU, out_dtype=torch.bfloat16), data, [term])
    # An error may have been of the moment, but not three of them.
    assert len(calls) == times


@pytest.mark.parametrize("dtype", HALVES)
def test_partial_sums_of_16_bits_are_not_allowed_meanwhile_and_again_afterwards(monkeypatch, dtype):
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(FLAGS, name) for name in names}
    assert all(before.values())
    seen, addmm = [], torch.Tensor.addmm_

    def look(self, *given, **more):
        seen.append([name for name in names if not getattr(FLAGS, name)])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return addmm(self, *given, **more)

    monkeypatch.setattr(torch.Tensor, "addmm_", look)
    data, term = numbers(40, 24, dtype=dtype), lora(40, 24, dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        one_product.merged(data, [term], dtype)
    # Two products that the card was asked with, and the first one of the merge.
    assert seen == [[names[HALVES.index(dtype)]]] * 3
    assert {name: getattr(FLAGS, name) for name in names} == before


def test_the_switch_and_other_devices(monkeypatch):
    monkeypatch.undo()
    card = torch.device("cuda", 0)
    assert not one_product._is_suited(CPU)
    assert one_product._is_suited(card) == (torch.version.hip is None)
    if hasattr(FLAGS, "allow_fp16_accumulation"):
        # The host has all its products summed in fp16.
        FLAGS.allow_fp16_accumulation = True
        try:
            assert not one_product._is_suited(card)
        finally:
            FLAGS.allow_fp16_accumulation = False
    monkeypatch.setenv("LORA_GUARD_ONE_PRODUCT", "0")
    assert not one_product._is_suited(card)
    assert one_product.merged(numbers(40, 24), [lora(40, 24)], torch.bfloat16) is None


def test_what_leaves_the_range_is_infinite_as_in_fp32():
    data = torch.full((4, 4), 6e4, dtype=torch.float16)
    up, down = torch.ones(4, 1, dtype=torch.float16), torch.full((1, 4), 6e4, dtype=torch.float16)
    term = Term(LoraAdapter(up=up, down=down, alpha=1.0), 1.0)
    found = one_product.merged(data, [term], torch.float16)
    assert torch.isinf(found).all()
