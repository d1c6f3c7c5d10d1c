"""Every architecture we name, told from the real names and sizes of diffusers' models, and from LoRA files for them."""

import warnings

import diffusers
import pytest
import torch

from lib_lora_guard.models import Architecture, accepts, detect_lora, detect_model

A = Architecture
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def unet(context, attention, depth, channels=(320, 640, 1280), **config):
    """`attention`: which levels have any, top first."""
    kinds = [CROSS if has else PLAIN for has in attention]
    return (
        "UNet2DConditionModel",
        {
            "block_out_channels": channels,
            "down_block_types": tuple(kind.format("Down") for kind in kinds),
            "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
            "transformer_layers_per_block": depth,
            "cross_attention_dim": context,
            **config,
        },
    )


FOUR = (320, 640, 1280, 1280)
XL = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
MODELS = {
    A.SD1: unet(768, (1, 1, 1, 0), 1, FOUR),
    A.SD2: unet(1024, (1, 1, 1, 0), 1, FOUR, use_linear_projection=True),
    A.SDXL: unet(2048, (0, 1, 1), (1, 2, 10), projection_class_embeddings_input_dim=2816, **XL),
    A.KOLORS: unet(
        2048,
        (0, 1, 1),
        (1, 2, 10),
        projection_class_embeddings_input_dim=5632,
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        **XL,
    ),
    A.SDXL_REFINER: unet(
        1280, (0, 1, 1, 0), 4, (384, 768, 1536, 1536), projection_class_embeddings_input_dim=2560, **XL
    ),
    A.SVD: ("UNetSpatioTemporalConditionModel", {}),
    A.CASCADE: (
        "StableCascadeUNet",
        {
            "block_out_channels": (256, 256),
            "down_num_layers_per_block": (2, 2),
            "up_num_layers_per_block": (2, 2),
            "num_attention_heads": (4, 4),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            "clip_text_in_channels": 1280,
            "clip_text_pooled_in_channels": 1280,
            "clip_image_in_channels": 768,
            "conditioning_dim": 256,
        },
    ),
    A.SD3: ("SD3Transformer2DModel", {"caption_projection_dim": 1152}),
    A.FLUX: ("FluxTransformer2DModel", {"guidance_embeds": True}),
    A.CHROMA: ("ChromaTransformer2DModel", {}),
    A.FLUX2: ("Flux2Transformer2DModel", {}),
    A.AURAFLOW: ("AuraFlowTransformer2DModel", {}),
    A.HIDREAM: (
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "caption_channels": (4096, 4096),
            "num_layers": 1,
            "num_single_layers": 1,
            "llama_layers": (0, 1),
        },
    ),
    A.HUNYUAN_DIT: ("HunyuanDiT2DModel", {"hidden_size": 1408, "in_channels": 4, "patch_size": 2}),
    A.ANIMA: (
        "CosmosTransformer3DModel",
        {"num_attention_heads": 16, "num_layers": 1, "max_size": (8, 16, 16), "extra_pos_embed_type": None},
    ),
    A.COSMOS: ("CosmosTransformer3DModel", {"num_attention_heads": 40, "num_layers": 1, "max_size": (8, 16, 16)}),
    A.ERNIE_IMAGE: ("ErnieImageTransformer2DModel", {}),
    A.HUNYUAN_IMAGE: ("HunyuanImageTransformer2DModel", {}),
    A.KREA2: ("Krea2Transformer2DModel", {}),
    A.HUNYUAN_VIDEO: ("HunyuanVideoTransformer3DModel", {}),
    A.LTX: ("LTXVideoTransformer3DModel", {}),
    A.LUMINA2: ("Lumina2Transformer2DModel", {}),
    A.PIXART: ("PixArtTransformer2DModel", {"sample_size": 32, "caption_channels": 4096}),
    A.QWEN_IMAGE: ("QwenImageTransformer2DModel", {}),
    A.SANA: ("SanaTransformer2DModel", {}),
    A.WAN: ("WanTransformer3DModel", {}),
    A.Z_IMAGE: ("ZImageTransformer2DModel", {}),
}
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
MODELS[A.SD3][1].update(num_attention_heads=24, num_layers=24, caption_projection_dim=1536)
MORE = [(A.SD3, ("SD3Transformer2DModel", SD35_LARGE)), (A.WAN, ("WanTransformer3DModel", {"num_attention_heads": 12}))]
ALL = [*MODELS.items(), *MORE]
IDS = [f"{architecture.name.lower()}{n}" for n, (architecture, _) in enumerate(ALL)]
ALIKE = {a: alike for alike in ({A.FLUX, A.CHROMA}, {A.SDXL, A.KOLORS}, {A.ANIMA, A.COSMOS}) for a in alike}
"""Pairs whose LoRA files cannot always be told apart and fit each other's layers."""
SAME_QUERIES = {A.SD1, A.SD2, A.SDXL_REFINER, A.LTX, A.ANIMA}
"""Nothing but to_q layers: the text's width is not seen, and others have queries of the same names and sizes."""


@pytest.fixture(scope="module")
def shapes_of():
    made = {}

    def get(name, config):
        key = name, repr(config)
        if key not in made:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # diffusers' own, about its default sizes and classes
                model = getattr(diffusers, name)(**config)
            made[key] = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return made[key]

    return get


def lora(shapes, spell, only=""):
    file = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and len(shape) == 2 and only in name and "embedding" not in name.split(".")[-2]:
            up, down = spell(module)
            file[up], file[down] = (shape[0], 4), (4, shape[1])
    return file


def peft(module, component="transformer"):
    return f"{component}.{module}.lora_B.weight", f"{component}.{module}.lora_A.weight"


def kohya(module):
    name = "lora_unet_" + module.replace(".", "_")
    return f"{name}.lora_up.weight", f"{name}.lora_down.weight"


@pytest.mark.parametrize(("architecture", "made"), ALL, ids=IDS)
def test_models(architecture, made, shapes_of):
    shapes = shapes_of(*made)
    for prefix in ("", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model."):
        assert detect_model({prefix + name: shape for name, shape in shapes.items()}) is architecture


@pytest.mark.parametrize("spell", [peft, kohya])
@pytest.mark.parametrize("only", ["", "attn", "to_q"])
@pytest.mark.parametrize(("architecture", "made"), ALL, ids=IDS)
def test_loras(architecture, made, only, spell, shapes_of):
    file = lora(shapes_of(*made), spell, only)
    if not file:
        pytest.skip("this architecture names its attention otherwise")
    found = detect_lora(file)
    if only == "to_q" and architecture in SAME_QUERIES:
        assert found is None
        return
    assert found in ALIKE.get(architecture, {architecture})
    # The matrix: of all models, only its own kind takes it.
    assert {model for model in MODELS if accepts(model, found)} == ALIKE.get(architecture, {architecture})
