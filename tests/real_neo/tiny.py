"""The tiny models of Forge Neo's rows: their sizes, and a Neo that takes them.

Neo has the sizes of several models as numbers in its code: those of every language model, of Chroma's and Anima's denoisers, and
the widths by which it tells Z-Image from Lumina 2. `shrink()` puts the sizes of this file in their place, in the process that
makes the files and in the servers that load them. All else is Neo's own: state dicts, engines, prompts, samplers, LoRA names.
"""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

MARKER = "lora_guard_tiny"
"""A tensor in a tiny checkpoint: the name of its model, as bytes."""

CONFIGS = Path(os.environ["FORGE_ROOT"]) / "models" / "lora_guard_tiny"
"""Copies of Neo's configurations, with small sizes in them."""

TEXT = 64
"""Width of every text encoder."""

CLIP = {
    "hidden_size": TEXT,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "projection_dim": TEXT,
}
T5 = {"d_model": TEXT, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
KL = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
WAN_VAE = {"base_dim": 16, "num_res_blocks": 1}
LLM = {"hidden_size": TEXT, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
LLM_CONFIGS = {
    "Qwen3_06B": "Qwen3_06BConfig",
    "Qwen3_4B": "Qwen3_4BConfig",
    "Qwen25_7BVLI": "Qwen25_7BVLI_Config",
    "Gemma2_2B": "Gemma2_2B_Config",
    "Ministral3_3B": "Ministral3_3BConfig",
    "Qwen3VL": "Qwen3VL_4BConfig",
}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One model.

    Args:
        title: its name in docs/neo.md.
        guess: the class of Neo's list of models.
        network: module and class of its denoiser.
        sizes: arguments of that class.
        encoders: text encoder's folder of configurations -> (class in Neo, prefix of its keys in the file).
        vae: small sizes of its VAE.
        spelling: how its LoRAs are named (`make_models.NAMED`).
        text_spelling: prefixes of LoRA modules by folder, where LoRAs for its text encoder are published.
        settings: of the image.
        prompt: Anima pads it with zeros to 512 tokens, among which a short one is lost.
        share: what the LoRA adds, as a share of each weight. Random nets show less of it than trained ones.
    """

    title: str
    guess: str
    network: tuple
    sizes: dict
    encoders: dict
    vae: dict
    spelling: str
    text_spelling: dict = dataclasses.field(default_factory=dict)
    settings: dict = dataclasses.field(default_factory=lambda: {"cfg_scale": 1})
    prompt: str = "a cat"
    share: float = 0.4


def _unet(context, **sizes):
    return {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "use_spatial_transformer": True,
        "context_dim": context,
        "use_checkpoint": False,
        **sizes,
    }


def _llm(cls, key):
    return {"text_encoder": (cls, f"text_encoders.{key}.")}


_FLUX = {"hidden_size": 256, "context_in_dim": TEXT, "num_heads": 2, "depth": 2, "depth_single_blocks": 2}
_CLIP_TEXT = "transformer.text_model.encoder."
MODELS = {
    "sd15": Tiny(
        "SD 1.5",
        "SD15",
        ("unet", "IntegratedUNet2DConditionModel"),
        _unet(
            TEXT,
            num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 1, 1, 1],
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            transformer_depth_middle=1,
            num_heads=8,
            adm_in_channels=None,
        ),
        {"text_encoder": ("CLIP", "cond_stage_model.")},
        KL,
        "kohya, U-Net",
        {"text_encoder": "lora_te_"},
        {"cfg_scale": 7},
    ),
    "sdxl": Tiny(
        "SDXL",
        "SDXL",
        ("unet", "IntegratedUNet2DConditionModel"),
        _unet(
            2 * TEXT,
            num_res_blocks=[2, 2, 2],
            channel_mult=[1, 1, 1],
            transformer_depth=[0, 0, 2, 2, 3, 3],
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 3, 3, 3],
            transformer_depth_middle=3,
            num_head_channels=64,
            use_linear_in_transformer=True,
            num_classes="sequential",
            adm_in_channels=TEXT + 1536,
        ),
        {
            "text_encoder": ("CLIP", "conditioner.embedders.0."),
            "text_encoder_2": ("CLIP", "conditioner.embedders.1.model."),
        },
        KL,
        "kohya, U-Net",
        {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        {"cfg_scale": 7},
    ),
    "flux": Tiny(
        "Flux.1",
        "FluxSchnell",
        ("flux", "IntegratedFluxTransformer2DModel"),
        {
            **_FLUX,
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": TEXT,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": False,
        },
        {"text_encoder": ("CLIP", "text_encoders.clip_l."), "text_encoder_2": ("T5", "text_encoders.t5xxl.")},
        KL,
        "diffusers, Flux",
        {"text_encoder": "lora_te1_"},
    ),
    "klein": Tiny(
        "Flux.2 Klein",
        "Flux2K4B",
        ("flux", "IntegratedFluxTransformer2DModel"),
        {
            **_FLUX,
            "in_channels": 128,
            "out_channels": 128,
            "context_in_dim": 3 * TEXT,
            "vec_in_dim": None,
            "axes_dim": [32, 32, 32, 32],
            "mlp_ratio": 3.0,
            "theta": 2000,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "txt_ids_dims": [3],
            "patch_size": 1,
            "guidance_embed": False,
        },
        _llm("Qwen3_4B", "qwen3_4b.transformer"),
        KL,
        "ai-toolkit",
    ),
    "chroma": Tiny(
        "Chroma",
        "Chroma",
        ("chroma", "IntegratedChromaTransformer2DModel"),
        {
            **_FLUX,
            "in_channels": 64,
            "out_channels": 64,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "in_dim": 64,
            "out_dim": 256,
            "hidden_dim": 128,
            "n_layers": 2,
            "txt_ids_dims": [],
            "vec_in_dim": None,
        },
        {"text_encoder": ("T5", "text_encoders.t5xxl.")},
        KL,
        "ai-toolkit",
    ),
    "qwen": Tiny(
        "Qwen-Image",
        "QwenImage",
        ("qwen", "QwenImageTransformer2DModel"),
        {"num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": TEXT, "in_channels": 64},
        _llm("Qwen25_7BVLI", "qwen25_7b"),
        WAN_VAE,
        "ai-toolkit",
    ),
    "zimage": Tiny(
        "Z-Image",
        "ZImage",
        ("lumina", "NextDiT"),
        {
            "in_channels": 16,
            "dim": 256,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": TEXT,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        _llm("Qwen3_4B", "qwen3_4b.transformer"),
        KL,
        "ai-toolkit, Z-Image",
    ),
    "lumina": Tiny(
        "Lumina 2",
        "Lumina2",
        ("lumina", "NextDiT"),
        {
            "in_channels": 16,
            "dim": 192,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 1,
            "qk_norm": True,
            "cap_feat_dim": TEXT,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 4.0,
        },
        _llm("Gemma2_2B", "gemma2_2b"),
        KL,
        "kohya",
        {"text_encoder": "lora_te_"},
    ),
    "krea": Tiny(
        "Krea 2",
        "Krea2",
        ("krea", "SingleStreamDiT"),
        {
            "features": 256,
            "channels": 16,
            "patch": 2,
            "layers": 2,
            "heads": 2,
            "kvheads": 1,
            "txtlayers": 12,
            "txtdim": TEXT,
            "txtheads": 1,
            "txtkvheads": 1,
        },
        _llm("Qwen3VL", "qwen3vl_4b.transformer"),
        WAN_VAE,
        "ai-toolkit",
    ),
    "anima": Tiny(
        "Anima",
        "Anima",
        ("anima", "Anima"),
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 256,
            "concat_padding_mask": True,
            "crossattn_emb_channels": TEXT,
            "adaln_lora_dim": 32,
            "num_blocks": 2,
            "num_heads": 2,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_t_extrapolation_ratio": 1.0,
        },
        _llm("Qwen3_06B", "qwen3_06b.transformer"),
        WAN_VAE,
        "kohya",
        {"text_encoder": "lora_te_"},
        prompt="a cat and a dog, " * 60,
    ),
    "ernie": Tiny(
        "ERNIE-Image",
        "ErnieImage",
        ("ernie", "ErnieImageModel"),
        {
            "hidden_size": 256,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 512,
            "text_in_dim": TEXT,
        },
        _llm("Ministral3_3B", "ministral3_3b.transformer"),
        KL,
        "ai-toolkit",
    ),
    "wan": Tiny(
        "Wan 2.x",
        "WAN21_T2V",
        ("wan", "WanModel"),
        {
            "model_type": "t2v",
            "dim": 256,
            "out_dim": 16,
            "num_heads": 2,
            "ffn_dim": 512,
            "num_layers": 2,
            "in_dim": 16,
            "text_dim": TEXT,
            "patch_size": (1, 2, 2),
        },
        {"text_encoder": ("T5", "text_encoders.umt5xxl.")},
        WAN_VAE,
        "ai-toolkit",
        share=1.0,
    ),
}


def repository(model):
    """The model's folder among Neo's configurations."""
    from huggingface_guess import model_list

    return getattr(model_list, model.guess).huggingface_repo


def _guess(stock, sd):
    from huggingface_guess import model_list

    marker = sd.pop(MARKER, None) if MARKER in sd else sd.pop(f"model.diffusion_model.{MARKER}", None)
    if marker is None:
        return stock(sd)
    model = MODELS[bytes(marker.tolist()).decode()]
    result = getattr(model_list, model.guess)(dict(model.sizes))
    result.unet_config |= model.sizes
    result.unet_key_prefix = ["model.diffusion_model."]
    result.huggingface_repo = str(CONFIGS / result.huggingface_repo)
    return result


def shrink():
    """Puts the sizes above in place of Neo's."""
    import huggingface_guess
    import torch
    from backend.nn.llm import llama

    huggingface_guess.guess = functools.partial(_guess, huggingface_guess.guess)
    for name, config in LLM_CONFIGS.items():
        setattr(llama, config, functools.partial(getattr(llama, config), **LLM))
        # Neo compares the configuration with its own numbers.
        setattr(llama, name, functools.partial(lambda stock, _: stock({}), getattr(llama, name)))
    llama.LLMAdapter = functools.partial(
        llama.LLMAdapter, source_dim=TEXT, target_dim=TEXT, model_dim=TEXT, num_layers=2, num_heads=2
    )
    # The parts that look at pictures, which no image here uses.
    llama.qwen_vl.Qwen2VLVisionTransformer = lambda **_: torch.nn.Module()
    llama.Qwen3VLVisionModel = lambda _: torch.nn.Module()


def small_configs(model):
    """A copy of the model's configurations, with its sizes in it."""
    neo, target = Path(os.environ["FORGE_ROOT"]) / "backend" / "huggingface", CONFIGS / repository(model)
    shutil.copytree(neo / repository(model), target, dirs_exist_ok=True)
    if model.guess == "Chroma":
        # T5's vocabulary, which this folder of Neo does not hold in a form that every transformers reads.
        shutil.copy(
            neo / "black-forest-labs" / "FLUX.1-schnell" / "tokenizer_2" / "tokenizer.json", target / "tokenizer"
        )
    edits = {"vae": model.vae} | {
        folder: {"CLIP": CLIP, "T5": T5}.get(cls, {}) for folder, (cls, _) in model.encoders.items()
    }
    for folder, edit in edits.items():
        path = target / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    return target
