"""The part of a LoRA that survives rounding to a low-bit format, measured on one weight of the model."""

import pytest
import torch
from patching.terms import term
from support.make import rand

from lib_lora_guard.adapters import apply_terms
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.patching.merge_loss import merge_loss
from lib_lora_guard.weights import Nf4Codec, PlainCodec, Q8_0Codec, ScaledFp8Codec, StoredLinear

SIZES = {"small": (64, 64), "large": (512, 256), "largest": (1024, 256)}
WEIGHTS = {name: rand(*shape, seed=n, scale=0.05) for n, (name, shape) in enumerate(SIZES.items())}


def attachments_of(codec, terms):
    """Every weight in the format of `codec`, with `terms` on some of them."""
    model = torch.nn.ModuleDict({name: StoredLinear(codec, weight, None) for name, weight in WEIGHTS.items()})
    engine = Engine()
    engine.change(PlainAccess(model), [LoraRequest("a", 1.0, {f"{name}.weight": t for name, t in terms.items()})])
    return model, list(engine.attached.values())


def on(*names):
    return {name: [term("lora", SIZES[name], strength=0.3)] for name in names}


def test_weights_of_16_bits_lose_nothing():
    assert merge_loss(attachments_of(PlainCodec(torch.bfloat16, "bf16"), on(*SIZES))[1]) is None


@pytest.mark.parametrize("codec", [Q8_0Codec(), Nf4Codec()], ids=lambda codec: codec.format)
def test_the_cosine_is_that_of_the_rounded_delta_and_the_true_one(codec):
    terms = on("small", "large", "largest")
    model, attachments = attachments_of(codec, terms)
    loss = merge_loss(attachments)
    assert (loss.key, loss.format, loss.weights) == ("large.weight", codec.format, 3), "the smallest that is typical"
    base = model["large"].decode(torch.float32)
    true = apply_terms(base.clone(), terms["large"])
    rounded = codec.decode(codec.encode(true), torch.float32)
    wanted = torch.nn.functional.cosine_similarity((rounded - base).flatten(), (true - base).flatten(), dim=0)
    assert loss.cosine == pytest.approx(float(wanted), abs=1e-5)
    assert 0 < loss.cosine < 1


def test_more_bits_keep_more_of_the_lora():
    nf4, q8 = (merge_loss(attachments_of(codec, on("large"))[1]).cosine for codec in (Nf4Codec(), Q8_0Codec()))
    assert nf4 < q8


def test_a_small_weight_is_measured_if_there_is_no_larger_one():
    assert merge_loss(attachments_of(Nf4Codec(), on("small"))[1]).key == "small.weight"


def test_a_format_that_cannot_be_written_has_no_cosine():
    loss = merge_loss(attachments_of(ScaledFp8Codec(), on("large"))[1])
    assert (loss.weights, loss.cosine) == (1, None)
