"""The architectures of diffusers and transformers in small, with inputs for them, and LoRAs of their size.

Widths that tell an architecture (what a U-Net's attention sees of the text, a text encoder's own) are the real ones.
"""

import copy
import functools

import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .end_to_end import fill
from .make import rand

STRENGTH = 0.8
"""What all files of these tests are applied with."""


def unet(context, **config):
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=context,
        attention_head_dim=4, sample_size=8, **config,
    )  # fmt: skip


def sd15():
    return unet(
        768,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl():
    return unet(
        2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )


BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 4096, "num_layers": 2}
ROPE = {"axes_dims_rope": (2, 2, 4), "num_single_layers": 1, "in_channels": 64}


def flux():
    return FluxTransformer2DModel(**BLOCKS, **ROPE, pooled_projection_dim=768, guidance_embeds=True)


def chroma():
    return ChromaTransformer2DModel(
        **BLOCKS, **ROPE, approximator_num_channels=8, approximator_hidden_dim=20, approximator_layers=2
    )


def sd3():
    return SD3Transformer2DModel(
        **BLOCKS, in_channels=4, sample_size=8, pos_embed_max_size=8, caption_projection_dim=16,
        pooled_projection_dim=10, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def clip(cls, width, layers):
    return cls(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2, vocab_size=50,
            projection_dim=12, bos_token_id=0, eos_token_id=1, attn_implementation="eager",
        )
    )  # fmt: skip


def t5():
    return T5EncoderModel(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, feed_forward_proj="gated-gelu")
    )


IMAGE, TOKENS = rand(1, 4, 8, 8, seed=1), torch.tensor([[0, 7, 9, 3, 1]])
TIME = torch.tensor([500.0])


def text_of(width):
    return rand(1, 3, width, seed=2)


def into_flux(model, **more):
    return model(
        hidden_states=rand(1, 16, 64, seed=3),
        encoder_hidden_states=text_of(4096),
        timestep=TIME / 1000,
        img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        txt_ids=torch.zeros(3, 3),
        **more,
    ).sample


FORWARD = {
    "sd15": lambda m: m(IMAGE, TIME, text_of(768)).sample,
    "sdxl": lambda m: (
        m(
            IMAGE,
            TIME,
            text_of(2048),
            added_cond_kwargs={"text_embeds": rand(1, 6, seed=4), "time_ids": torch.arange(6.0)[None]},
        ).sample
    ),
    "flux": lambda m: into_flux(m, pooled_projections=rand(1, 768, seed=5), guidance=torch.tensor([3.5])),
    "chroma": into_flux,
    "sd3": lambda m: m(IMAGE, text_of(4096), rand(1, 10, seed=6), TIME).sample,
    "clip_l": lambda m: m(TOKENS).last_hidden_state,
    "clip_g": lambda m: m(TOKENS).text_embeds,
    "t5": lambda m: m(TOKENS).last_hidden_state,
}
MAKE = {
    "sd15": sd15,
    "sdxl": sdxl,
    "flux": flux,
    "chroma": chroma,
    "sd3": sd3,
    "clip_l": lambda: clip(CLIPTextModel, 768, 2),
    "clip_g": lambda: clip(CLIPTextModelWithProjection, 1280, 1),
    "t5": t5,
}
DENOISERS = ("sd15", "sdxl", "flux", "chroma", "sd3")


@functools.cache
def model_of(name):
    """One model of each kind for all tests: they leave it as it was."""
    return fill(MAKE[name]())


def forward_of(name):
    def forward(model):
        with torch.no_grad():
            return FORWARD[name](model).clone()

    return forward


def layers_of(model):
    """Every linear layer and convolution, by name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n != "text_projection"}


def small_lora(shape, seed, rank=4):
    """up and down of a layer: contributions of about a tenth of its weight."""
    up = rand(shape[0], rank, *[1] * (len(shape) - 2), seed=2 * seed, scale=0.1)
    down = rand(rank, *shape[1:], seed=2 * seed + 1, scale=torch.Size(shape[1:]).numel() ** -0.5)
    return up, down


def delta_of(up, down, alpha):
    return alpha / down.shape[0] * (up.double().flatten(1) @ down.double().flatten(1))


def with_deltas(model, deltas):
    """A copy with `{layer: [(first row, delta)]}` added in float64 and rounded once."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, parts in deltas.items():
            weight = model.get_submodule(layer).weight
            wide = weight.double().flatten(1)
            for first, delta in parts:
                wide[first : first + len(delta)] += STRENGTH * delta
            weight.copy_(wide.reshape(weight.shape))
    return model


def fused(model, strength):
    """With diffusers' own `fuse_lora`; transformers has none, and there peft's layers are merged as it merges them."""
    if hasattr(model, "fuse_lora"):
        model.fuse_lora(lora_scale=strength)
        return model
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(strength)
            module.merge()
    return model
