"""The memory that a merge needs beyond its result, counted."""

import pytest
import torch
from patching.terms import term
from support.live_memory import LiveMemory
from support.make import rand
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.patching.merging import merge
from lib_lora_guard.units import MB

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes in new storages alive at once."""

    def __init__(self, *known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize(
    ("kind", "more", "slices_at_once"),
    # Beside the slice itself, loha makes two products, glora and DoRA a delta, a sum and one more.
    [
        ("lora", {}, 1),
        ("diff", {}, 1),
        ("set", {}, 1),
        ("loha", {}, 3),
        ("glora", {}, 4),
        ("lora", {"dora": "output"}, 4),
    ],
)
def test_a_merge_in_16_bits_needs_a_few_slices_beyond_its_result(kind, more, slices_at_once):
    shape = (2048, 128)
    weight, terms = rand(*shape, seed=9).to(torch.bfloat16), [term(kind, shape, **more)]
    tensors = list(terms[0].adapter.tensors())
    factors = 0 if kind in ("diff", "set") else sum(t.numel() * 4 for t in tensors)
    slice_bytes = 64 * 128 * 4
    with LiveBytes(weight, *tensors) as counted:
        result = merge(weight, terms, device=CPU, out_dtype=torch.bfloat16, slice_bytes=slice_bytes)
    beyond = counted.peak - result.numel() * 2
    assert 0 < beyond <= slices_at_once * slice_bytes + factors + 4096, f"{beyond / slice_bytes:.2f} slices"
    with LiveBytes(weight, *tensors) as counted:
        merge(weight, terms, device=CPU, out_dtype=torch.bfloat16, slice_bytes=1 << 30)
    assert counted.peak > result.numel() * 2 + 8 * slice_bytes, "the count sees what is not sliced"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "glora"])
def test_a_merge_needs_its_result_and_a_few_slices(kind, dtype):
    for rows in (2048, 8192):
        weight, terms = rand(rows, 512, seed=1).to(dtype), [term(kind, (rows, 512))]
        if kind == "lokr":
            sides = rand(rows // 32, 16, seed=2), rand(32, 32, seed=3)
            terms = [parse_term([0.8, ("lokr", (sides[0], sides[1], None, *[None] * 6)), 1.0, None, None], {})]
        with LiveMemory(weight, *terms[0].adapter.tensors()) as memory:
            result = merge(weight, terms, device=torch.device("cpu"), out_dtype=dtype, slice_bytes=MB)
        # The rows in fp32, their delta, and another of that size where one delta is made of two (LoHa), or its factors in
        # the dtype of the weight.
        assert memory.peak_bytes - result.nbytes <= 4.5 * MB, f"{memory.peak_bytes / MB:.1f} MB for {rows} rows"


def test_a_lokr_of_few_large_blocks_is_merged_whole():
    """A slice has to hold whole blocks: two of 4096 rows make the weight. Then the weight in fp32 and its delta."""
    weight, terms = rand(8192, 512, seed=1), [term("lokr", (8192, 512))]
    with LiveMemory(weight, *terms[0].adapter.tensors()) as memory:
        merge(weight, terms, device=torch.device("cpu"), out_dtype=torch.float32, slice_bytes=MB)
    assert memory.peak_bytes <= 2.25 * weight.nbytes
