"""The cards whose rates are assumed, how they are named, and how tokens are counted."""

import pytest

from lib_lora_guard.models import Architecture
from lib_lora_guard.planning import activations
from lib_lora_guard.planning import tokens as tokens_module
from lib_lora_guard.planning.rates import DEFAULT_GPU, RATES, nearest_rates, rates_of
from lib_lora_guard.planning.tokens import Picture, tokens_for

SQUARE = Picture(1024, 1024)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 3060", "RTX 3060"),
        ("3060", "RTX 3060"),
        ("rtx3060ti", "RTX 3060 Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("GTX 1660", "GTX 1660"),
        ("H100", "H100"),
        ("h-200", "H200"),
    ],
)
def test_cards_are_found_however_they_are_written(written, name):
    assert rates_of(written).name == name


@pytest.mark.parametrize("written", ["", "RTX", "RTX 9999", "RX 7900", "60", "RTX 3060 Super"])
def test_an_unknown_card_is_an_error_with_the_list(written):
    with pytest.raises(ValueError, match=r"expected one of GTX 1060, .*RTX 5090.*, found .*; take the one nearest"):
        rates_of(written)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 4070 Super", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "RTX 3080"),
        ("3080 Ti", "RTX 3080"),
        ("RTX 4050", "RTX 4060"),
        ("GTX 1080", "GTX 1060"),
        ("GTX 1650 Super", "GTX 1650"),
        ("RTX 3060", "RTX 3060"),
        ("Tesla T4", "RTX 2070"),
        ("NVIDIA A100-SXM4-80GB", "RTX 5090"),
        ("NVIDIA RTX A4000", "RTX 3070"),
        ("NVIDIA L40S", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("RTX 9999", "RTX 5090"),
        ("RTX 6060", "RTX 5060"),
        ("GTX 970", "GTX 1060"),
    ],
)
def test_the_known_card_nearest_to_another_is_taken(written, name):
    assert nearest_rates(written, 8 << 30).name == name


@pytest.mark.parametrize("written", ["RTX", "RX 7900 XTX", "Arc A770", "Quadro RTX 6000", "RTX 6000", "显卡"])
@pytest.mark.parametrize(
    ("vram_gb", "name"),
    [(None, "RTX 3060"), (0.5, "RTX 2060"), (6, "RTX 2060"), (7, "RTX 4060"), (24, "RTX 3090"), (24.1, "RTX 5090"), (80, "H100")],
)  # fmt: skip
def test_a_name_that_tells_no_relative_is_counted_by_its_memory(written, vram_gb, name):
    assert nearest_rates(written, None if vram_gb is None else int(vram_gb * 2**30)).name == name


@pytest.mark.parametrize("written", ["", " ", "60", "9999", "970", "-7", "!?"])
def test_what_is_no_name_is_an_error(written):
    with pytest.raises(ValueError, match="expected one of"):
        nearest_rates(written)


def test_every_rate_is_plausible_and_larger_cards_are_not_slower():
    assert rates_of(DEFAULT_GPU).name == "RTX 3060"
    for card in RATES.values():
        assert 1e11 < card.memory_bytes_per_second < 1e13
        assert 1e12 < card.matrix_flops < 1e15
        assert 1e10 < card.pinned < 6e10
        assert card.pageable_to_ram < card.pageable_to_gpu < card.pinned
        assert card.compute_bytes == (4 if card.name.startswith("GTX 16") else 2)
    order = ["RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090", "RTX 4090", "RTX 5090", "H100"]
    assert [RATES[n].matrix_flops for n in order] == sorted(RATES[n].matrix_flops for n in order)


def test_pcie_is_what_the_slot_gives():
    # 16 lanes of generation 4 carry 31.5 GB/s, 8 of generation 4 half of that; 80 % of either are reached.
    assert RATES["RTX 3060"].pinned == pytest.approx(25.2e9, rel=0.01)
    assert RATES["RTX 4060"].pinned == pytest.approx(12.6e9, rel=0.01)
    assert RATES["H100"].pinned == pytest.approx(50.4e9, rel=0.01)  # measured: 50


def test_names_of_architectures_are_those_of_the_models_package():
    known = {a.value for a in Architecture}
    named = {*tokens_module._TEXT_TOKENS, *tokens_module._UNETS, *tokens_module.ONE_PASS}
    assert named <= known


@pytest.mark.parametrize(
    ("architecture", "key", "shape", "expected"),
    [
        (Architecture.FLUX, "double_blocks.3.img_attn.qkv.weight", (9216, 3072), 4096),
        (Architecture.FLUX, "double_blocks.3.txt_mlp.0.weight", (12288, 3072), 512),
        (Architecture.FLUX, "double_blocks.3.img_mod.lin.weight", (18432, 3072), 1),
        (Architecture.FLUX, "single_blocks.3.linear1.weight", (21504, 3072), 4608),
        (Architecture.FLUX, "single_blocks.3.modulation.lin.weight", (9216, 3072), 1),
        (Architecture.FLUX, "model.diffusion_model.vector_in.in_layer.weight", (3072, 768), 1),
        (Architecture.FLUX, "txt_in.weight", (3072, 4096), 512),
        (Architecture.FLUX, "transformer_blocks.3.attn.add_q_proj.weight", (3072, 3072), 512),
        (Architecture.FLUX, "transformer_blocks.3.attn.to_q.weight", (3072, 3072), 4096),
        (Architecture.FLUX, "transformer_blocks.3.norm1.linear.weight", (18432, 3072), 1),
        (Architecture.FLUX, "single_transformer_blocks.3.proj_mlp.weight", (12288, 3072), 4608),
        (Architecture.CHROMA, "single_blocks.3.linear1.weight", (21504, 3072), 2 * 4608),
        (Architecture.CHROMA, "distilled_guidance_layer.in_proj.weight", (5120, 64), 2),
        (Architecture.SD3, "joint_blocks.3.context_block.attn.qkv.weight", (4608, 1536), 2 * 333),
        (Architecture.SD3, "joint_blocks.3.x_block.attn.qkv.weight", (4608, 1536), 2 * 4096),
        (Architecture.SD3, "joint_blocks.3.x_block.adaLN_modulation.1.weight", (9216, 1536), 2),
        (Architecture.SDXL, "input_blocks.1.0.in_layers.2.weight", (320, 320, 3, 3), 2 * 16384),
        (Architecture.SDXL, "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", (640, 640), 2 * 4096),
        (Architecture.SDXL, "input_blocks.8.1.transformer_blocks.0.ff.net.2.weight", (1280, 5120), 2 * 1024),
        (Architecture.SDXL, "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight", (1280, 2048), 2 * 77),
        (Architecture.SDXL, "input_blocks.1.0.emb_layers.1.weight", (320, 1280), 2),
        (None, "blocks.1.attn.qkv.weight", (64, 64), 4096),
    ],
)
def test_tokens_of_a_layer(architecture, key, shape, expected):
    assert tokens_for(architecture, SQUARE).of(key, shape) == expected


def test_batch_and_size_scale_tokens():
    assert (
        tokens_for(Architecture.FLUX, Picture(512, 768, 3)).of("double_blocks.0.img_mlp.0.weight", (4, 4))
        == 3 * 32 * 48
    )
    # Sides that are no multiple of a patch are filled up.
    assert tokens_for(Architecture.FLUX, Picture(1000, 1000)).image == 63 * 63


def test_activations_of_flux_are_those_measured_in_the_whole_model():
    shapes = {f"double_blocks.{n}.img_attn.proj.weight": (3072, 3072) for n in range(9)}
    needed = activations.step(tokens_for(Architecture.FLUX, SQUARE), SQUARE, shapes, 2).used_bytes
    # Measured on an H200: peak 22.66 GiB with 22.11 GiB of bf16 weights, nothing swapped.
    assert needed / 2**30 == pytest.approx(22.66 - 22.11, rel=0.1)
