"""Errors measured against what the LoRA itself contributes: a lost LoRA hides inside 1e-3 of an output."""

import dataclasses
import gc

import torch

from lib_lora_guard.adapters import LoraAdapter


def contribution_error(result, reference, base):
    """`||result - reference|| / ||reference - base||`, in float64: 0 is exact, 1 is a lost LoRA."""
    result, reference, base = (t.detach().double().cpu() for t in (result, reference, base))
    contribution = (reference - base).norm()
    assert contribution > 0, "the LoRA of this test does nothing, so nothing is tested"
    return float((result - reference).norm() / contribution)


def fp32_limit(reference, base):
    """Design section 5: 1e-4 of the contribution plus 1e-6 of the output (fp32 sums of a few thousand products)."""
    reference, base = reference.double(), base.double()
    return 1e-4 + 1e-6 * float(reference.norm() / (reference - base).norm())


def assert_same(result, reference, base, limit=None):
    error = contribution_error(result, reference, base)
    limit = fp32_limit(reference, base) if limit is None else limit
    assert error <= limit, f"error {error:.2e} of the LoRA's own contribution, allowed {limit:.2e}"


def planted_faults(terms):
    """Wrong stacks that every equality test must tell from the right one, as (name, terms)."""
    terms = list(terms)
    yield "layer skipped", []
    yield "strength 5 % off", [dataclasses.replace(t, strength=t.strength * 1.05) for t in terms]
    if any(isinstance(t.adapter, LoraAdapter) and t.adapter.alpha is not None for t in terms):
        ignored = [
            dataclasses.replace(t, adapter=dataclasses.replace(t.adapter, alpha=None))
            if isinstance(t.adapter, LoraAdapter)
            else t
            for t in terms
        ]
        yield "alpha ignored", ignored
    if len(terms) > 1:
        yield "one of two LoRAs dropped", terms[:-1]


def assert_same_and_faults_seen(run, terms, reference, base, limit=None):
    """`run(terms)` equals `reference`, and for every planted fault it does not."""
    limit = fp32_limit(reference, base) if limit is None else limit
    assert_same(run(terms), reference, base, limit)
    for name, wrong in planted_faults(terms):
        error = contribution_error(run(wrong), reference, base)
        assert error > 2 * limit, f"fault '{name}' would not be seen: error {error:.2e}, limit {limit:.2e}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.detach().contiguous().view(torch.uint8) for t in (a, b))
    return torch.equal(one, other.to(one.device))


def live_tensors():
    """How many tensors Python holds, and the bytes of their storages, each storage counted once. With `nothing_of_others`.

    Exact where resident memory is not: in a process that has run other tests the C library serves from, and returns,
    blocks of theirs, which moves RSS by megabytes either way.
    """
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return len(found), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())
