"""Our routes against diffusers' own converters: every row of every converted weight must come from where we say.

Each original-layout checkpoint holds a different number in every row, so that a converted weight shows which rows it
was made of. Widths that do not change are 1; the shapes told to NameMap are the real ones.
"""

from types import SimpleNamespace

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as checkpoints
from support.layout_names import as_diffusers, check, check_both_ways, flat
from support.original_layouts import REFINER, SD15, SDXL, Checkpoint, bfl, ldm_unet, mmdit, open_clip
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lib_lora_guard.models import NameMap, Route

# ---- U-Nets


@pytest.mark.parametrize("layout", [SD15, SDXL, REFINER], ids=["sd15", "sdxl", "refiner"])
def test_unet(layout):
    checkpoint = Checkpoint(ldm_unet(**layout))
    whole = {"model.diffusion_model." + name: ids for name, ids in checkpoint.tensors.items()}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if "label" in layout else None}
    converted = checkpoints.convert_ldm_unet_checkpoint(whole, config)
    assert len(converted) == len(whole)
    check_both_ways(checkpoint, converted, "unet", count=len(whole))


# ---- transformers


@pytest.mark.parametrize("chroma", [False, True], ids=["flux", "chroma"])
def test_flux_and_chroma(chroma):
    checkpoint = Checkpoint(bfl(3072, 2, 1, chroma=chroma))  # the converters know no other width
    convert = (
        checkpoints.convert_chroma_transformer_checkpoint_to_diffusers
        if chroma
        else checkpoints.convert_flux_transformer_checkpoint_to_diffusers
    )
    converted = convert(dict(checkpoint.tensors))
    # Two tensors more for each of q, k, v that was one, and three for linear1.
    assert len(converted) == len(checkpoint.tensors) + 2 * 2 * (2 * 2) + 2 * 3
    check_both_ways(checkpoint, converted, "transformer", count=len(converted))


def test_sd3():
    checkpoint = Checkpoint(mmdit(16, 3, dual=(0, 1)))
    converted = checkpoints.convert_sd3_transformer_checkpoint_to_diffusers(
        {**checkpoint.tensors, "pos_embed": torch.zeros(1, 4, 16)}
    )
    assert len(converted) - 1 == len(checkpoint.tensors) + 2 * 2 * (3 + 3 + 2)
    check_both_ways(checkpoint, converted, "transformer", count=len(converted) - 1)


# ---- text encoders


@pytest.mark.parametrize(
    ("prefix", "width", "hints"),
    [
        ("conditioner.embedders.1.model.", 1280, ("text_encoder_2.", "lora_te2_", "clip_g.")),
        ("conditioner.embedders.0.model.", 1280, ("lora_te_", "lora_te2_", "clip_g.")),
        ("cond_stage_model.model.", 1024, ("text_encoder.", "lora_te_", "lora_te1_")),
    ],
    ids=["sdxl", "refiner", "sd2"],
)
def test_open_clip(prefix, width, hints):
    checkpoint = Checkpoint([(prefix + module, *rest) for module, *rest in open_clip(width, 2)])
    config = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    converted = checkpoints.convert_open_clip_checkpoint(config, dict(checkpoint.tensors), prefix)
    assert len(converted) == len(checkpoint.tensors) + 2 * 2 * 2

    def spell(module):
        for hint in hints:
            yield hint + (flat(module) if hint.endswith("_") else module)

    assert check(NameMap(checkpoint.shapes), spell, converted, checkpoint.tensors) == len(converted)
    # The other way round: a transformers encoder, asked for the checkpoint's names.
    names = NameMap(checkpoint.shapes_of(converted))
    check(names, lambda module: [module.removeprefix(prefix)], checkpoint.tensors, converted)


# ---- real modules of diffusers and transformers


def tiny(cls, **config):
    with torch.device("meta"):
        return cls(**config)


UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "sample_size": 8,
}
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 12, "in_channels": 4, "num_layers": 2,
}  # fmt: skip
ROPE = {"axes_dims_rope": (2, 2, 4), "num_single_layers": 1}
REAL = {
    "sd15": lambda: tiny(
        UNet2DConditionModel,
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sdxl": lambda: tiny(
        UNet2DConditionModel,
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    ),
    "unclip": lambda: tiny(
        UNet2DConditionModel,
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=6,
    ),
    "sd3": lambda: tiny(
        SD3Transformer2DModel,
        **TRANSFORMER,
        sample_size=8,
        pos_embed_max_size=8,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_every_module_of_a_real_model(name):
    check_identity(REAL[name](), "transformer" if name == "sd3" else "unet")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, about a class it makes itself
def test_every_module_of_a_real_flux_and_chroma():
    check_identity(
        tiny(FluxTransformer2DModel, **TRANSFORMER, **ROPE, pooled_projection_dim=10, guidance_embeds=True),
        "transformer",
    )
    check_identity(
        tiny(
            ChromaTransformer2DModel,
            **TRANSFORMER,
            **ROPE,
            approximator_num_channels=8,
            approximator_hidden_dim=24,
            approximator_layers=2,
        ),
        "transformer",
    )


def check_identity(model, component):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = NameMap(shapes)
    modules = {name.rpartition(".")[0] for name in shapes}
    assert len(modules) > 30
    for module in modules:
        for spelled in as_diffusers(component)(module):
            assert names.routes(spelled) == (Route(module),), spelled
        assert names.parameter(module) == module + ".weight"


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("width", [16, 768])
def test_every_module_of_a_real_clip(cls, width):
    """Whichever way transformers nests it: files say text_model, transformers 5's CLIPTextModel does not."""
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        projection_dim=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in cls(config).named_parameters()}
    names = NameMap(shapes)
    for module in {name.rpartition(".")[0] for name in shapes}:
        inner = module.removeprefix("text_model.")
        inner = inner if inner == "text_projection" else "text_model." + inner
        for spelled in (f"text_encoder.{inner}", inner, f"base_model.model.{inner}", f"clip_l.{inner}"):
            assert names.routes(spelled) == (Route(module),), spelled
        for prefix in ("lora_te_", "lora_te1_"):
            assert names.routes(prefix + flat(inner)) == (Route(module),)
        assert names.routes("lora_te2_" + flat(inner)) == ()  # that is CLIP-G
        assert names.routes("lora_unet_" + flat(inner)) == ()


def test_every_module_of_a_real_t5():
    config = T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in T5EncoderModel(config).named_parameters()}
    names = NameMap(shapes)
    for module in {name.rpartition(".")[0] for name in shapes}:
        for spelled in (module, f"t5.{module}", f"text_encoder_3.{module}", f"text_encoder_2.{module}"):
            assert names.routes(spelled) == (Route(module),)
        for prefix in ("lora_te2_", "lora_te3_"):
            assert names.routes(prefix + flat(module)) == (Route(module),)


@pytest.mark.parametrize("fault", ["shifted", "swapped"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    checkpoint = Checkpoint(mmdit(16, 2, dual=()))
    converted = checkpoints.convert_sd3_transformer_checkpoint_to_diffusers(
        {**checkpoint.tensors, "pos_embed": torch.zeros(1, 4, 16)}
    )
    del converted["pos_embed.pos_embed"]
    names = NameMap(checkpoint.shapes)
    right = names.routes

    def wrong(name):
        return tuple(
            Route(r.module, r.part and type(r.part)(0, r.part.start // 2, r.part.length), r.source, False)
            if fault == "shifted"
            else Route(r.module, r.part, r.source, not r.swap_halves)
            for r in right(name)
        )

    monkeypatch.setattr(names, "routes", wrong)
    with pytest.raises(AssertionError):
        check(names, as_diffusers("transformer"), converted, checkpoint.tensors)
