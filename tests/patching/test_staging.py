"""Factors go to the card before the first call, many in one copy, with every bit as it was."""

from unittest.mock import Mock

import pytest
import torch

from lib_lora_guard.adapters import LowRank
from lib_lora_guard.patching import staging
from lib_lora_guard.patching.low_rank import (
    Entry,
    JoinedLowRank,
    ScaleVectors,
    Scaling,
    _joined,
    _settled,
    balanced,
)
from lib_lora_guard.patching.staging import Ring, bring
from lib_lora_guard.patching.waiting_factors import waiting

CPU, META = torch.device("cpu"), torch.device("meta")


def factors(out, rank, inner, dtype=torch.float16, **more):
    return LowRank(torch.randn(out, rank).to(dtype), torch.randn(rank, inner).to(dtype), 0.5, **more)


def joined(*terms):
    return JoinedLowRank([Entry(term, 0.8) for term in terms], (terms[0].up.shape[0], terms[0].down.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pinned", [False])
def test_every_tensor_arrives_with_its_bits(dtype, pinned):
    tensors = [torch.randn(shape).to(dtype) for shape in [(3,), (7, 5), (0, 4), (64, 16, 3, 3), ()]]
    tensors.append(torch.randn(6, 8).to(dtype).t())
    found = Ring(CPU, pinned).send(tensors)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, found, strict=True))
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1, "one copy for all of them"
    assert not any(
        one.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        for one, own in zip(found, tensors, strict=True)
    )


def test_tensors_that_a_file_has_side_by_side_go_in_one_copy(monkeypatch):
    """With alphas of two bytes between them, parts of one tensor, one that comes twice, and one that begins between two values."""
    whole = torch.randint(0, 255, (4000,), dtype=torch.uint8)

    def at(start, dtype, *shape):
        return whole[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    half, full = torch.float16, torch.float32
    up = at(130, half, 8, 4)
    tensors = [
        at(0, half, 4, 16),
        up,
        up[2:4],
        at(196, half, 3, 5),
        at(0, half, 4, 16),
        at(1100, half, 50),
        at(1204, full, 7),
    ]
    far, odd = torch.randn(3), at(1236, half, 6, 4).t()
    copied, view = [], staging._Run.raw
    monkeypatch.setattr(staging._Run, "raw", lambda run: copied.append(run.size) or view(run))
    found = Ring(CPU, pinned=False).send([*tensors, far, odd])
    for own, there in zip([*tensors, far, odd], found, strict=True):
        assert own.dtype == there.dtype
        assert torch.equal(own.contiguous().view(torch.uint8), there.contiguous().view(torch.uint8))
    assert sorted(copied) == [12, 132, 226]


def test_a_second_piece_does_not_change_the_first():
    ring, (one, two) = Ring(CPU, pinned=False), torch.randn(2, 500)
    first = ring.send([one])[0]
    second = ring.send([two])[0]
    assert torch.equal(first, one)
    assert torch.equal(second, two)


@pytest.mark.parametrize("size", [500, 20_000])
def test_another_default_device_of_torch_changes_nothing(monkeypatch, size):
    """An extension may have set it for the whole process."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 1024)
    whole = torch.randn(size)
    with torch.device("meta"):
        found = Ring(CPU, pinned=False).send([whole[:100], whole[100:]])
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_tensor_larger_than_a_buffer_goes_alone_and_needs_none(monkeypatch, pinned):
    monkeypatch.setattr(staging, "PIECE_BYTES", 1024)
    monkeypatch.setattr(staging, "SLACK_BYTES", 64)
    large, ring = torch.randn(5_000), Ring(CPU, pinned)
    assert torch.equal(ring.send([large])[0], large)
    ring.settle()


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "terms",
    [
        [factors(24, 4, 16)],
        [factors(24, 4, 16), factors(24, 8, 16, torch.bfloat16), factors(24, 2, 16, torch.float32)],
        [factors(24, 4, 16, row_scale=torch.rand(24), column_scale=torch.rand(16))],
        [factors(24, 4, 16, mid=torch.randn(4, 4).half())],
    ],
    ids=["one", "three dtypes", "DoRA", "Tucker"],
)
def test_copies_made_from_staged_factors_are_those_of_the_first_call(terms, compute):
    stack = joined(*terms)
    tensors = stack.factor_tensors()
    there = dict(zip(map(id, tensors), Ring(CPU, pinned=False).send(tensors), strict=True))
    staged = list(stack._make_blocks(CPU, compute, True, there))
    usual = list(stack._make_blocks(CPU, compute, True))
    for mine, other in zip(staged, usual, strict=True):
        assert torch.equal(mine.down, other.down)
        assert mine.down.dtype == compute
        assert all(torch.equal(a.up, b.up) for a, b in zip(mine.outputs, other.outputs, strict=True))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_terms_joined_before_they_are_converted_are_those_joined_after_it(stored, compute):
    """With rows that have to be made smaller for fp16, and columns of `up` that leave no room for it."""
    wide = [factors(24, 4, 16, torch.float32), factors(24, 8, 16, torch.float32), factors(24, 2, 16, torch.float32)]
    wide[0].down[1] *= 3e3
    wide[1].down[:3] *= 500
    wide[1].up[:, 2] *= 2e4
    terms = [LowRank(one.up.to(stored), one.down.to(stored), one.scale) for one in wide]
    up, down = _joined(terms, CPU, compute)
    pairs = [balanced(one, CPU, compute) for one in terms]
    assert torch.equal(up, torch.cat([one for one, _ in pairs], 1))
    assert torch.equal(down, torch.cat([one for _, one in pairs]))
    assert up.dtype == down.dtype == compute


def test_what_fits_into_a_piece_goes_at_once(monkeypatch):
    sent = []
    real = Ring.send
    monkeypatch.setattr(Ring, "send", lambda ring, tensors: (sent.append(len(tensors)), real(ring, tensors))[1])
    stacks = [joined(factors(32, 4, 32), factors(32, 4, 32)) for _ in range(10)]
    # Four tensors of 256 bytes each.
    monkeypatch.setattr(staging, "PIECE_BYTES", 4 * 1024)
    assert bring(stacks, META, torch.bfloat16) == 10 * 4 * 256
    assert sent == [16, 16, 8]
    assert all(stack.is_resident for stack in stacks)
    assert waiting([]) == []


def test_the_first_call_after_other_strengths_makes_nothing_and_nothing_is_brought_again():
    stack = joined(factors(32, 4, 32), factors(32, 2, 32))
    bring([stack], META, torch.bfloat16)
    assert stack.is_ready
    assert stack.known_parts(META, torch.bfloat16)[0][1].per_rank is None, "one strength"
    block = stack.known_parts(META, torch.bfloat16)[0][0]
    stack.exchange(Scaling(stack.scales_at((0.5, 0.2)), ScaleVectors()))
    assert not stack.is_ready
    assert bring([stack], META, torch.bfloat16) == 0
    ((same, scale),) = stack.known_parts(META, torch.bfloat16)
    assert same is block
    assert scale.per_rank.shape == (6,)
    stack.exchange(Scaling(stack.scales_at((0.1, 0.2)), ScaleVectors()))
    bring([stack], META, torch.float16)
    assert stack.known_parts(META, torch.float16) is None, "a second copy of the factors, for a model of another dtype"


@pytest.mark.parametrize(("device", "place", "copied"), [(META, 4096, False), (META, 4098, True), (CPU, 4098, False)])
def test_a_kept_factor_begins_where_kernels_read_fast(device, place, copied):
    tensor = Mock(device=device, data_ptr=lambda: place)
    assert (_settled(tensor) is tensor.clone()) is copied
    assert (_settled(tensor) is tensor) is not copied


def test_nothing_is_copied_for_the_cpu():
    stack = joined(factors(8, 2, 8))
    assert bring([stack], CPU, torch.float32) == 0
    assert not stack.is_resident


@pytest.mark.parametrize(("gigabytes", "pinned"), [(16, False), (31, True), (32, True), (64, True), (24, False)])
def test_below_32_gb_of_ram_none_is_pinned(monkeypatch, gigabytes, pinned):
    monkeypatch.setattr(staging.psutil, "virtual_memory", lambda: type("Ram", (), {"total": gigabytes << 30}))
    assert staging.has_ram_for_pinned() is pinned
    assert staging.PIECE_BYTES * staging.PINNED_PIECES <= 64 << 20
