"""What would fit instead, and what its file is called."""

import pytest

from lib_lora_guard.models.architecture import Architecture
from lib_lora_guard.models.text import NEEDED
from lib_lora_guard.planning.instead import Saving, file_bytes, file_name, instead
from lib_lora_guard.planning.predict import ModelFacts, Weight
from lib_lora_guard.planning.usual_parts import USUAL_PARTS, VAE_KIND, usual_parts
from lib_lora_guard.replay import known_models

MATRICES = frozenset({"a", "b"})


def model(value_bytes=2, is_unet=False):
    weights = [Weight(name, 1000, 1000 * value_bytes) for name in "ab"] + [Weight("bias", 10, 20)]
    return ModelFacts(weights, 500, wide=value_bytes == 2, activation_bytes=0, compute_bytes=2, is_unet=is_unet)


def found(facts, limit, text=None, architecture="Flux"):
    """The first change with which the bytes of everything stay below `limit`."""
    one = instead(
        facts,
        [],
        MATRICES,
        text,
        lambda m, _: m.denoiser_bytes + m.other_bytes,
        architecture,
        lambda size: size <= limit,
    )
    return one and (one.format, one.text and one.text.name)


@pytest.mark.parametrize(
    ("limit", "text", "expected"),
    [
        (4400, Saving("small", 200), (None, "small")),
        (2700, Saving("small", 200), ("GGUF Q8_0", None)),
        (2500, None, ("GGUF Q6_K", None)),
        (2500, Saving("small", 200), ("GGUF Q8_0", "small")),
        (1800, None, ("GGUF Q4_K", None)),
        (1500, None, None),
    ],
)
def test_the_change_that_keeps_most_is_named(limit, text, expected):
    assert found(model(), limit, text) == expected


def test_formats_that_a_model_is_not_published_in_are_not_named():
    assert found(model(is_unet=True), 2600, architecture="SDXL") == ("fp8", None)
    assert found(model(is_unet=True), 2400, architecture="SDXL") is None
    assert found(model(), 1660, architecture="Flux") == ("NF4", None)
    assert found(model(), 1660, architecture="Chroma") is None
    # No larger file than the present one.
    assert found(model(value_bytes=0.6), 10_000) == ("NF4", None)


def test_files_are_called_as_usual():
    assert file_name("flux1-dev-fp8_e4m3fn", "GGUF Q4_K") == "flux1-dev-Q4_K_S.gguf"
    assert file_name("flux1-dev-bnb-nf4-v2", "GGUF Q8_0") == "flux1-dev-Q8_0.gguf"
    assert file_name("flux1-dev-Q8_0", "GGUF Q6_K") == "flux1-dev-Q6_K.gguf"
    assert file_name("fp8", "fp8") == "fp8-fp8.safetensors"
    assert file_bytes(model(), MATRICES, "GGUF Q4_K") == int(2000 * 144 / 256 + 40)
    assert file_bytes(model(), MATRICES, "fp8") == 2020


def test_every_text_encoder_that_is_needed_has_a_size():
    for architecture, kinds in NEEDED.items():
        assert architecture is not None
        assert [one.kind for one in USUAL_PARTS[architecture.value]] == [*kinds, VAE_KIND]
    assert set(USUAL_PARTS) == {architecture.value for architecture in NEEDED}
    assert set(USUAL_PARTS) <= {architecture.value for architecture in Architecture}
    assert (usual_parts(None), usual_parts("HiDream")) == ((), ())


def test_sizes_are_those_of_users_logs():
    """Flux's text encoders with T5 fp8, as Forge prints them: 5154 to 5227 MB."""
    clip, t5, vae = usual_parts("Flux")
    assert clip.bytes + t5.bytes == known_models.flux_text_bytes(1, False, True)
    assert (round(vae.bytes / 2**20, 2)) == 159.87
    assert [usual_parts("Flux 2", width)[0].name for width in (15360, 7680, 12288)] == [
        "Mistral 3 24B fp8",
        "Qwen3 4B",
        "Qwen3 8B fp8",
    ]
