"""Forge's arithmetic at its edges. The numbers of users' logs are in test_replay, the real functions in contract/."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_models import flux_linears, flux_shapes, sdxl_shapes
from support.forge_arithmetic import Eviction, Loaded, as_logged, evict, vae_encode_bytes

from lib_lora_guard.planning.host_memory import Latent, swap_budget_bytes
from lib_lora_guard.replay import forge_memory as forge
from lib_lora_guard.replay import known_models as models
from lib_lora_guard.replay.forge_memory import Layer, Request
from lib_lora_guard.units import GB, MB


def test_sizes_are_printed_as_forge_prints_them():
    assert as_logged(1536 * MB) == "1536.00 MB"
    assert as_logged(-31528 * MB) == "-31528.00 MB"
    assert as_logged(forge.SENTINEL_BYTES) == "953674316406250018963456.00 MB"


@pytest.mark.parametrize(
    ("total", "weights", "rest", "percent"),
    [(16379, 12000, 4379, 73.26), (48676, 80204, -31528, 164.77), (8192, 8192, 0, 100.0), (8192, 0, 8192, 0.0)],
)
def test_the_slider_is_not_clamped(total, weights, rest, percent):
    assert forge.slider_rest_bytes(total * MB, weights * MB) == rest * MB
    assert round(forge.weights_percent(total * MB, weights * MB), 2) == percent


def test_neos_estimate_of_a_step():
    # Ten times Forge's, for Flux.
    assert forge.neo_estimate_bytes(Latent.of(1024, 1024), 2.8) / MB == pytest.approx(13762.56, abs=1e-9)


def test_neos_free_vram_for_inference():
    rest = 2048 * MB
    assert forge.neo_inference_bytes(rest, 16 * GB, is_windows=False) / MB == pytest.approx(2038.4)
    assert forge.neo_inference_bytes(rest, 15 * GB, is_windows=True) / MB == pytest.approx(2238.4)
    assert forge.neo_inference_bytes(rest, 15 * GB + 1, is_windows=True) / MB == pytest.approx(2438.4)


def test_a_request_counts_a_quarter_of_what_is_loaded_and_the_larger_of_slider_and_estimate():
    assert forge.request_bytes(Request(1000, 400, 50, 70, 9)) == pytest.approx(1.3 * 1100 + 70 + 9)
    assert forge.request_bytes(Request(1000, 400, 90, 70, 9)) == pytest.approx(1.3 * 1100 + 90 + 9)
    assert forge.request_when_loaded_bytes(Request(1000, 400, 50, 70, 9)) == 79
    assert forge.request_bytes(Request()) == GB, "the slider as it comes"


def test_in_august_2024_the_lora_competed_with_the_slider():
    assert forge.early_request_bytes(1000, 100, 40, 50) == 1400
    assert forge.early_request_bytes(1000, 100, 40, 80) == 1420


MODELS = [Loaded("model", 12000), Loaded("text", 9600), Loaded("vae", 160)]
"""As the host lists them: the newest first."""


@pytest.mark.parametrize(
    ("free", "wanted", "unloaded", "left"),
    [
        (5000, 4999, (), 5000),
        (5000, 5000, ("vae",), 5160),  # as much as wanted is not enough
        (5000, 5159, ("vae",), 5160),
        (5000, 5160, ("vae", "text"), 14760),
        (300, 32585, ("vae", "text", "model"), 22060),
        (300, forge.SENTINEL_BYTES, ("vae", "text", "model"), 22060),
    ],
)
def test_forge_evicts_the_oldest_model_first_and_whole(free, wanted, unloaded, left):
    assert evict(MODELS, free, wanted) == Eviction(unloaded, left)


def test_a_model_that_is_kept_stays_and_the_next_one_goes():
    kept = [MODELS[0], MODELS[1], Loaded("vae", 160, can_go=False)]
    assert evict(kept, 100, 200) == Eviction(("text",), 9700)


def test_placement_looks_at_the_slider_alone():
    assert forge.place(5000 * MB, 4000 * MB, 0, 1000 * MB) == forge.Placement(0, None), "nothing left is enough"
    whole = forge.place(7136 * MB, 4897 * MB, 0, 1024 * MB)
    assert whole.swap_budget_bytes is None, "whatever the step itself needs"
    short = forge.place(5000 * MB, 4000 * MB, 0, 1000 * MB, hard_bytes=1)
    assert short == forge.Placement(-1, swap_budget_bytes(5000 * MB, 1000 * MB + 1))


def test_a_model_that_was_placed_before_gets_exactly_that_again():
    assert forge.place(5000 * MB, 4000 * MB, 123 * MB, 2000 * MB).swap_budget_bytes == 123 * MB
    assert forge.place(5000 * MB, 4000 * MB, 0, 2000 * MB).swap_budget_bytes == int(3000 * MB / 1.3)


def test_small_layers_go_first_and_below_the_budget():
    layers = [Layer(100, 1), Layer(50), Layer(30, 2)]
    assert forge.distribute(layers, 84) == forge.Distribution(83, 100), "all biases, then 30 and 50"
    assert forge.distribute(layers, 83) == forge.Distribution(33, 150), "83 is not below 83: one layer less"
    assert forge.distribute(layers, 184) == forge.Distribution(183, 0)
    assert forge.distribute(layers, 0) == forge.Distribution(0, 183)
    assert forge.distribute(layers, 84, fixed_bytes=10) == forge.Distribution(43, 150)


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), max_size=20),
    st.integers(0, 12000),
)
def test_nothing_is_lost_and_the_budget_is_kept(sizes, budget):
    layout = forge.distribute([Layer(*size) for size in sizes], budget)
    assert layout.gpu_bytes + layout.swapped_bytes == sum(map(sum, sizes))
    assert layout.gpu_bytes < max(budget, 1)


def test_the_vae():
    latent = Latent.of(1024, 1024)
    assert forge.vae_decode_bytes(latent, 2) == 2178 * 128 * 128 * 64 * 2
    assert forge.vae_decode_bytes(Latent.of(1024, 1024, 4), 2) == forge.vae_decode_bytes(latent, 2), "batch not counted"
    assert vae_encode_bytes(1024, 512, 4) == 1767 * 1024 * 512 * 4


def test_merging_and_its_backups():
    linear1 = math.prod(models.FLUX_SINGLE["linear1"])
    assert forge.merge_copy_bytes(linear1) == 252 * MB
    assert forge.merge_peak_bytes(linear1) == 756 * MB
    assert forge.backup_ram_bytes(8 * GB, 3 * GB) == forge.BackupRam(11 * GB, 19 * GB)


def test_known_models_have_the_published_shapes():
    shapes = flux_shapes()
    values = sum(math.prod(shape) for shape in shapes.values())
    assert models.flux_bytes("bf16") == 2 * values == 23802816640
    assert models.flux_bytes("fp8") == values
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    assert sorted(matrices) == sorted(shape for shape, _ in models.flux_matrices())
    assert sum(layer.weight_bytes for layer in models.flux_layers("bf16")) == 2 * sum(map(math.prod, matrices))
    placed = models.flux_layers("bf16")
    everything = sum(layer.weight_bytes + layer.extra_bytes for layer in placed) + models.flux_norm_bytes("bf16")
    assert everything == models.flux_bytes("bf16")
    # The layout of the double has toy widths in a few small layers.
    unet = sum(math.prod(shape) for shape in sdxl_shapes().values())
    assert unet == pytest.approx(models.SDXL_UNET_PARAMETERS, rel=1e-5)


def test_the_order_of_the_blocks_is_the_models():
    shapes = flux_shapes()
    places = []
    for kind, blocks, layers in (
        ("double", models.FLUX_DOUBLE_BLOCKS, models.FLUX_DOUBLE),
        ("single", models.FLUX_SINGLE_BLOCKS, models.FLUX_SINGLE),
    ):
        for index in range(blocks):
            for layer, shape in layers.items():
                assert shapes[f"{kind}_blocks.{index}.{layer}.weight"] == shape
                places.append(models.flux_matrices_before(kind, index, layer))
    assert places == list(range(len(flux_linears(shapes))))


def test_a_lora_on_every_layer_of_flux():
    pairs = models.flux_lora_pairs(64)
    # The keys that a log shows for such a file, and its size: 1.39 GB in fp32.
    assert len(pairs) == 504
    assert sum(pairs) * 4 == 1387888640


def test_no_torch_is_needed():
    code = (
        "import sys\nfrom lib_lora_guard.replay import elsewhere, forge_memory, known_models, replay\n"
        "replay.replay_all(); print('torch' in sys.modules)"
    )
    root = Path(forge.__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
