"""A merge by products in fp32 of 16-bit factors: on a card alone. Here the CPU stands for the card, and has such a product."""

import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lora_guard.adapters import Slice, Term
from lib_lora_guard.adapters.loha import LohaAdapter
from lib_lora_guard.adapters.lora import LoraAdapter
from lib_lora_guard.memory.out_of_memory import OutOfMemory
from lib_lora_guard.patching import merging
from lib_lora_guard.patching.wide_product import SWITCH, WideProduct

CPU = torch.device("cpu")
HALVES = (torch.float16, torch.bfloat16)


def mm(up, down, *, out_dtype):
    assert out_dtype is torch.float32
    return up.float() @ down.float()


def wide(product=mm):
    return WideProduct(product, devices=("cpu",))


def numbers(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def lora(
    rows, columns, rank=4, strength=0.7, dtype=torch.bfloat16, seed=0, part=None, function=None, model=1.0, **more
):
    up, down = numbers(rows, rank, dtype=dtype, seed=seed), numbers(rank, columns, dtype=dtype, seed=seed + 1)
    return Term(LoraAdapter(up=up, down=down, alpha=rank / 2, **more), strength, model, part, function)


def assert_rounded_once(found, weight, terms):
    """Half a unit of the last place, and what fp32 loses of the sum."""
    exact, summed = weight.double(), weight.double().abs()
    for term in terms:
        up, down = (one.flatten(1).double() for one in (term.adapter.up, term.adapter.down))
        factor = term.strength * term.adapter.scale
        exact = exact + (factor * (up @ down)).view(exact.shape)
        summed = summed + (abs(factor) * (up.abs() @ down.abs())).view(exact.shape)
    assert ((found.double() - exact).abs() <= torch.finfo(found.dtype).eps / 2 * exact.abs() + 2**-20 * summed).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("of_factors", HALVES)
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
def test_it_is_rounded_once_and_the_weight_is_only_read(dtype, of_factors, weight, up, down):
    data = numbers(*weight, dtype=dtype)
    before = data.clone()
    factors = numbers(*up, dtype=of_factors), numbers(*down, dtype=of_factors)
    term = Term(LoraAdapter(*factors, alpha=2.0), -0.6)
    found = wide().merged(data, [term])
    assert found.shape == data.shape
    assert found.is_contiguous()
    assert found.dtype is dtype
    assert torch.equal(data, before)
    assert_rounded_once(found, data, [term])
    # More than an added zero: a LoRA that is left out would pass for one that is small.
    assert (found != data).float().mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(
    strengths=st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=4),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 99),
)
def test_several_are_rounded_once_too(strengths, dtype, seed):
    data = numbers(32, 24, dtype=dtype)
    terms = [lora(32, 24, 3, strength, dtype, seed + place) for place, strength in enumerate(strengths)]
    assert_rounded_once(wide().merged(data, terms), data, terms)


@pytest.mark.parametrize("slice_bytes", [1 << 20, 24 * 4 * 7])
def test_merges_take_it_whole_and_in_slices(monkeypatch, slice_bytes):
    taken = []

    def counted(up, down, *, out_dtype):
        taken.append(len(up))
        return mm(up, down, out_dtype=out_dtype)

    data, term = numbers(40, 24), lora(40, 24)
    monkeypatch.setattr(merging, "SMALLEST_SLICE_BYTES", 1)
    monkeypatch.setattr(merging, "WIDE_PRODUCT", wide(counted))
    found = merging.merge(data, [term], device=CPU, out_dtype=torch.bfloat16, slice_bytes=slice_bytes)
    assert sum(taken) == 40
    assert_rounded_once(found, data, [term])


OTHERS = {
    "no terms": (numbers(40, 24), []),
    "another weight's dtype": (numbers(40, 24, dtype=torch.float32), [lora(40, 24)]),
    "one dimension": (numbers(40), [lora(40, 1)]),
    "rows apart": (numbers(40, 48)[:, ::2], [lora(40, 24)]),
    "factors in fp32": (numbers(40, 24), [lora(40, 24, dtype=torch.float32)]),
    "factors of two dtypes": (
        numbers(40, 24),
        [Term(LoraAdapter(numbers(40, 4), numbers(4, 24, dtype=torch.float16), alpha=None), 1.0)],
    ),
    "a part": (numbers(40, 24), [lora(20, 24, part=Slice(0, 10, 20))]),
    "a function": (numbers(40, 24), [lora(40, 24, function=lambda change: change * 2)]),
    "a factor of the model": (numbers(40, 24), [lora(40, 24, model=0.5)]),
    "a DoRA": (numbers(40, 24), [lora(40, 24, magnitude=numbers(40, 1))]),
    "a core": (numbers(40, 4, 3, 3), [lora(40, 4, mid=numbers(4, 4, 3, 3))]),
    "fewer columns": (numbers(40, 24), [lora(40, 20)]),
    "more columns": (numbers(40, 24), [lora(40, 28)]),
    "another kind": (
        numbers(40, 24),
        [Term(LohaAdapter(numbers(40, 4), numbers(4, 24), numbers(40, 4), numbers(4, 24), alpha=None), 1.0)],
    ),
    "another kind behind a plain one": (numbers(40, 24), [lora(40, 24), lora(40, 24, model=0.5)]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_it_is_not_for_goes_the_other_way(case):
    product = wide()
    assert product.merged(*OTHERS[case]) is None
    # It was not tried: what fails is not asked again.
    for dtype in HALVES:
        assert product.merged(numbers(40, 24), [lora(40, 24, dtype=dtype)]) is not None


def test_fp16_is_not_taken_where_sums_in_fp16_are_allowed(monkeypatch):
    """Neo's users allow it with a flag: torch's product of fp16 may then sum in fp16, whatever it returns."""
    data, term = numbers(40, 24), lora(40, 24, dtype=torch.float16)
    assert wide().merged(data, [term]) is not None
    monkeypatch.setattr("lib_lora_guard.patching.wide_product._sums_in_fp16", lambda dtype: dtype is torch.float16)
    assert wide().merged(data, [term]) is None
    assert wide().merged(data, [lora(40, 24)]) is not None


def test_another_device_or_dtype_of_the_result_is_refused():
    data, term = numbers(40, 24), lora(40, 24)
    assert wide().merged(data, [term], torch.empty(40, 24)) is None
    assert wide().merged(data, [term], torch.empty(40, 24, dtype=torch.bfloat16, device="meta")) is None
    assert WideProduct(mm, devices=("cuda",)).merged(data, [term]) is None


def test_a_torch_without_it_is_asked_once(monkeypatch):
    asked = []

    def without(up, down, **more):
        asked.append(1)
        raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")

    data, term = numbers(40, 24), lora(40, 24)
    product = wide(without)
    monkeypatch.setattr(merging, "WIDE_PRODUCT", product)
    for _ in range(3):
        assert_rounded_once(merging.merge(data, [term], device=CPU, out_dtype=torch.bfloat16), data, [term])
    assert asked == [1]


def test_the_end_of_memory_ends_one_merge_alone():
    left = [1]

    def full(up, down, *, out_dtype):
        if left and left.pop():
            raise OutOfMemory[0]("CUDA out of memory. Tried to allocate 2.00 MiB")
        return mm(up, down, out_dtype=out_dtype)

    data, term, product = numbers(40, 24), lora(40, 24), wide(full)
    assert product.merged(data, [term]) is None
    assert product.merged(data, [term]) is not None


def test_a_dtype_that_fails_leaves_the_other():
    def of_halves_alone(up, down, *, out_dtype):
        if up.dtype is torch.bfloat16:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return mm(up, down, out_dtype=out_dtype)

    data, product = numbers(40, 24), wide(of_halves_alone)
    of_fp16, of_bf16 = lora(40, 24, dtype=torch.float16), lora(40, 24)
    assert product.merged(data, [of_fp16, of_bf16]) is None
    assert product.merged(data, [of_fp16]) is not None
    assert product.merged(data, [of_bf16]) is None


def test_a_failure_leaves_nothing_alive(caplog):
    """A log that keeps its records would keep the card's memory with an error's frames."""
    made = []

    def second_fails(up, down, *, out_dtype):
        if made:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        found = mm(up, down, out_dtype=out_dtype)
        made.append(weakref.ref(found))
        return found

    caplog.set_level(logging.DEBUG)
    assert wide(second_fails).merged(numbers(40, 24), [lora(40, 24), lora(40, 24)]) is None
    assert "CUBLAS_STATUS_NOT_SUPPORTED" in caplog.text
    assert made[0]() is None


def test_several_take_no_more_memory_than_two():
    alive, most = [], []

    def counted(up, down, *, out_dtype):
        found = mm(up, down, out_dtype=out_dtype)
        alive.append(weakref.ref(found))
        most.append(sum(one() is not None for one in alive))
        return found

    data, terms = numbers(40, 24), [lora(40, 24, seed=seed) for seed in range(4)]
    assert_rounded_once(wide(counted).merged(data, terms), data, terms)
    # The sum lies in the first one's memory.
    assert most == [1, 2, 2, 2]


def test_what_is_more_than_a_tensor_is_merged_in_its_own_calls():
    class Counted(torch.Tensor):
        pass

    assert wide().merged(numbers(40, 24).as_subclass(Counted), [lora(40, 24)]) is None


def test_amds_cards_are_left_out(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert wide().merged(numbers(40, 24), [lora(40, 24)]) is None


def test_the_switch(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    assert wide().merged(numbers(40, 24), [lora(40, 24)]) is None
