"""Alpha over rank, and a magnitude, on every kind that has them."""

import pytest
import torch
from support.adapter_contract import CONV, LINEAR, assert_as_reference, entry
from support.make import host_value, rand
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_guard.adapters import parse_term


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize(
    ("kind", "shape"), [("lora", LINEAR), ("lora", CONV), ("loha", LINEAR), ("lokr", LINEAR), ("glora", LINEAR)]
)
def test_a_dora_of_every_ranked_kind_is_as_the_reference(kind, shape, axis):
    assert_as_reference([entry(kind, shape, dora=axis)], rand(*shape, seed=9).double())


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_only_an_adapter_with_a_magnitude_is_taken_as_trained(kind):
    plain = parse_term(entry(kind, LINEAR), {}).adapter
    dora = parse_term(entry(kind, LINEAR, dora="output"), {}).adapter
    assert (plain.is_dora, dora.is_dora) == (False, True)
    assert plain.with_dora_as_trained() is plain
    assert dora.with_dora_as_trained().as_trained


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("loha", 4), ("lokr", None), ("lokr_factors", 4)])
def test_scale_is_alpha_over_rank_or_1_without_either(kind, rank):
    adapter = parse_term(entry(kind, LINEAR, alpha=3.0), {}).adapter
    assert adapter.rank == rank
    assert adapter.scale == (1.0 if rank is None else 0.75)
    assert parse_term(entry(kind, LINEAR, alpha=None), {}).adapter.scale == 1.0


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "glora"])
def test_a_magnitude_costs_passes_in_fp32(kind):
    plain = parse_term(entry(kind, LINEAR), {}).adapter
    dora = parse_term(entry(kind, LINEAR, dora="output"), {}).adapter
    assert dora.patch_cost().in_fp32
    assert dora.patch_cost().passes >= plain.patch_cost().passes
    assert dora.forge_patch_cost().passes > plain.forge_patch_cost().passes


@pytest.mark.parametrize(("kind", "products"), [("lokr", 0), ("lokr_factors", 2), ("loha", 2)])
@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, 0.7), (torch.float16, 0.7), (torch.float16, 2e5)])
def test_the_product_of_a_lokr_or_loha_is_made_and_added_in_one_pass(kind, products, dtype, strength):
    adapter = parse_term([1.0, host_value(kind, (24, 16), 3, rank=4), 1.0, None, None], {}).adapter
    # Small enough that fp16 holds what the largest strength adds, which torch takes for no factor of fp16.
    adapter = adapter.map(lambda factor: factor * (0.01 if strength > 1 else 1))
    weight = rand(24, 16, seed=1).to(dtype)
    wanted = adapter.patch(weight.double(), strength, lambda delta: delta)  # a function needs the delta alone
    with _Made() as made:
        found = adapter.patch(weight, strength, None)
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    if strength < 1:
        assert made.names == [*["mm"] * products, "addcmul_"]


class _Made(TorchDispatchMode):
    """Notes torch's operations, without views and copies of factors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name in ("mm", "mul", "mul_", "add", "add_", "addcmul_"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))
