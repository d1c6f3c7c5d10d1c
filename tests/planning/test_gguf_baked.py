"""GGUF weights in the plan: what baking makes of them, and who counts it."""

import dataclasses
import math

import pytest
from support.fake_models import flux_linears, flux_shapes

from lib_lora_guard.files.gguf_types import GGUF_TYPES
from lib_lora_guard.planning.gguf_baked import FORGE_BLOCKS, baked_bytes, growth_bytes, value_bytes
from lib_lora_guard.planning.predict import FORGE_READS, INFERENCE_BYTES, ModelFacts, Way, Weight, predict
from lib_lora_guard.planning.rates import RATES
from lib_lora_guard.replay import known_models
from lib_lora_guard.units import GB

SHAPES = flux_shapes()
LINEARS = flux_linears(SHAPES)


def flux(form):
    """Flux-dev with its matrices in a GGUF type, without LoRAs."""
    weights = []
    for name, shape in SHAPES.items():
        values = math.prod(shape)
        stored = (
            values * FORGE_BLOCKS[form].stored_bytes // FORGE_BLOCKS[form].values if name in LINEARS else values * 2
        )
        weights.append(Weight(name, values, baked_bytes(form, stored) if name in LINEARS else stored, stored))
    return ModelFacts(weights, 0, False, activation_bytes=GB // 2, compute_bytes=2)


def ways(model, vram_bytes):
    return dict(zip(Way, predict(model, [], vram_bytes, 64 * GB, RATES["RTX 3060"]), strict=True))


def test_the_table_is_of_the_format_and_of_what_forge_reads():
    assert set(FORGE_BLOCKS) == {*FORGE_READS, "BF16"}
    types = {t.name: t for t in GGUF_TYPES.values()}
    for name, blocks in FORGE_BLOCKS.items():
        assert (blocks.values, blocks.stored_bytes) == types[name][1:], name


@pytest.mark.parametrize(
    ("form", "stored", "expected"), [("Q4_K", 288, 320), ("Q5_K", 352, 352), ("F16", 7, 7), ("?", 5, 5)]
)
def test_bytes_once_baked(form, stored, expected):
    assert baked_bytes(form, stored) == expected
    assert growth_bytes(form, stored) == expected - stored


def test_known_models_are_counted_baked():
    assert (value_bytes("Q4_K"), value_bytes("Q8_0"), value_bytes("BF16")) == (0.625, 34 / 32, 2)
    assert known_models.FLUX_STORAGES["Q8_0"].block_bytes == value_bytes("Q8_0")


def test_forge_places_by_the_file_and_the_guard_by_what_it_takes():
    """A card where Q4_K fits by its file and not as it is baked: with Forge it is on the card all the same."""
    model = flux("Q4_K")
    stored, baked = sum(w.placed_bytes for w in model.weights), model.denoiser_bytes
    assert 0.09 < baked / stored - 1 < 1 / 9
    found = ways(model, stored + INFERENCE_BYTES)
    for way in (Way.FORGE_MERGE, Way.FORGE_ON_THE_FLY):
        assert (found[way].swapped_bytes, found[way].weights_on_gpu_bytes) == (0, baked)
    guard = found[Way.GUARD]
    assert guard.swapped_bytes > 0
    assert guard.weights_on_gpu_bytes + guard.swapped_bytes == baked
    assert guard.weights_on_gpu_bytes <= stored
    assert guard.fits
    # What it grows by is missing in the step: seen where a step uses what Forge leaves for it.
    busy = dataclasses.replace(model, activation_bytes=INFERENCE_BYTES - 200 * 2**20)
    assert ways(busy, stored + INFERENCE_BYTES)[Way.FORGE_ON_THE_FLY].excess_bytes > 400 * 2**20
    assert ways(busy, stored + INFERENCE_BYTES)[Way.GUARD].excess_bytes == 0
    # Without growth both ask the same of the card; where that is not enough, the guard leaves less of it idle.
    even = flux("Q5_K")
    for one in (model, even):
        assert {way.swapped_bytes for way in ways(one, one.denoiser_bytes + INFERENCE_BYTES).values()} == {0}
    short = ways(even, even.denoiser_bytes + INFERENCE_BYTES - 1)
    assert short[Way.FORGE_MERGE].swapped_bytes == short[Way.FORGE_ON_THE_FLY].swapped_bytes
    # 1280 MB of Forge's against 256, to one of the largest layers on each side.
    less = short[Way.FORGE_MERGE].swapped_bytes - short[Way.GUARD].swapped_bytes
    assert less == pytest.approx(1024 * 2**20, abs=max(weight.bytes for weight in even.weights))
    assert short[Way.GUARD].swapped_bytes > 0
