"""Tests of the architecture found: small truths by hand, for files that the references cannot make."""

import pytest

from lib_lora_guard.models import Architecture, accepts, detect_lora, detect_model, text
from lib_lora_guard.models.architecture import may_be_for

A = Architecture


def lora(sizes, rank=4):
    """`{module: (out, in)}` as kohya writes it."""
    return {
        key: shape
        for module, (out, inner) in sizes.items()
        for key, shape in {
            f"{module}.lora_up.weight": (out, rank),
            f"{module}.lora_down.weight": (rank, inner),
            f"{module}.alpha": (),
        }.items()
    }


TE = "text_model_encoder_layers_0_self_attn_q_proj"
ATTN1, ATTN2 = "transformer_blocks_0_attn1_to_q", "transformer_blocks_0_attn2_to_k"
LORAS = {
    "kohya sdxl": ({f"lora_unet_input_blocks_4_1_{ATTN2}": (640, 2048)}, A.SDXL),
    "kohya sdxl, self attention only": (
        {"lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q": (1280, 1280)},
        A.SDXL,
    ),
    "kohya sd1": ({f"lora_unet_down_blocks_0_attentions_0_{ATTN2}": (320, 768)}, A.SD1),
    "kohya sd2": ({f"lora_unet_down_blocks_0_attentions_0_{ATTN2}": (320, 1024)}, A.SD2),
    "refiner": ({f"lora_unet_input_blocks_4_1_{ATTN2}": (768, 1280)}, A.SDXL_REFINER),
    "sd1 by its text encoder": (
        {f"lora_unet_down_blocks_0_attentions_0_{ATTN1}": (320, 320), "lora_te_" + TE: (768, 768)},
        A.SD1,
    ),
    "old diffusers": (
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora": (320, 768)},
        A.SD1,
    ),
    "kohya flux": ({"lora_unet_double_blocks_0_img_mod_lin": (18432, 3072)}, A.FLUX),
    "flux or chroma": ({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)}, A.FLUX),
    "diffusers flux": ({"transformer.single_transformer_blocks.0.attn.to_q": (3072, 3072)}, A.FLUX),
    "flux, double blocks only": ({"transformer.transformer_blocks.3.attn.to_q": (3072, 3072)}, A.FLUX),
    "bfl control": ({"single_blocks.0.linear1": (21504, 3072), "img_in": (3072, 128)}, A.FLUX),
    "chroma": ({"diffusion_model.distilled_guidance_layer.in_proj": (5120, 64)}, A.CHROMA),
    "flux 2 dev": ({"lora_unet_double_blocks_0_img_attn_qkv": (18432, 6144)}, A.FLUX2),
    "flux 2 klein": ({"diffusion_model.single_blocks.0.linear1": (27648, 3072)}, A.FLUX2),
    "kohya sd3": ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}, A.SD3),
    "diffusers sd3.5 large": ({"transformer.transformer_blocks.0.attn.to_q": (2432, 2432)}, A.SD3),
    "musubi hunyuan video": ({"lora_unet_double_blocks_0_img_mlp_fc1": (12288, 3072)}, A.HUNYUAN_VIDEO),
    "hunyuan video, by its last block": ({"lora_unet_single_blocks_39_linear2": (3072, 15360)}, A.HUNYUAN_VIDEO),
    "musubi wan": ({"lora_unet_blocks_0_self_attn_q": (5120, 5120)}, A.WAN),
    "wan": ({"diffusion_model.blocks.0.cross_attn.k_img": (5120, 5120)}, A.WAN),
    "cosmos 14b": ({"lora_unet_blocks_0_self_attn_q_proj": (5120, 5120)}, A.COSMOS),
    "anima": ({"lora_unet_blocks_0_self_attn_q_proj": (2048, 2048)}, A.ANIMA),
    "anima, values of the text alone": ({"lora_unet_blocks_3_cross_attn_v_proj": (2048, 1024)}, A.ANIMA),
    "anima, modulations alone": ({"diffusion_model.blocks.0.adaln_modulation_mlp.2": (6144, 256)}, A.ANIMA),
    "anima's adapter": ({"diffusion_model.llm_adapter.blocks.0.cross_attn.q_proj": (1024, 1024)}, A.ANIMA),
    "diffusers anima": ({"transformer.transformer_blocks.0.attn2.to_k": (2048, 1024)}, A.ANIMA),
    "diffusers cosmos": ({"transformer.transformer_blocks.0.attn2.to_k": (5120, 1024)}, A.COSMOS),
    "qwen": ({"lora_unet_transformer_blocks_0_img_mod_1": (18432, 3072)}, A.QWEN_IMAGE),
    "z-image": ({"diffusion_model.layers.0.attention.to_q": (3840, 3840)}, A.Z_IMAGE),
    "lumina 2": ({"lora_unet_layers_0_attention_qkv": (3840, 2304)}, A.LUMINA2),
    "z-image, by its narrow side": ({"lora_unet_layers_29_feed_forward_w2": (3840, 10240)}, A.Z_IMAGE),
    "z-image, modulations alone": ({"diffusion_model.layers.0.adaLN_modulation.0": (15360, 256)}, A.Z_IMAGE),
    "z-image, refiner alone": ({"transformer.noise_refiner.0.attention.to_out.0": (3840, 3840)}, A.Z_IMAGE),
    "diffusers lumina 2": ({"transformer.layers.0.attn.to_k": (768, 2304)}, A.LUMINA2),
    "lumina 2, modulations alone": ({"lora_unet_layers_0_adaLN_modulation_1": (9216, 1024)}, A.LUMINA2),
    "krea 2": ({"diffusion_model.blocks.0.attn.wq": (6144, 6144)}, A.KREA2),
    "kohya krea 2, mlp": ({"lora_unet_blocks_0_mlp_up": (16384, 6144)}, A.KREA2),
    "krea 2, text fusion": ({"transformer.text_fusion.refiner_blocks.0.attn.to_q": (2560, 2560)}, A.KREA2),
    "diffusers krea 2": ({"transformer.transformer_blocks.0.attn.to_v": (1536, 6144)}, A.KREA2),
    "krea 2 or flux 2": ({"transformer.transformer_blocks.0.attn.to_q": (6144, 6144)}, None),
    "hunyuan image, its text": (
        {"transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q": (3584, 3584)},
        A.HUNYUAN_IMAGE,
    ),
    "hunyuan image, single mlp": ({"transformer.single_transformer_blocks.0.proj_mlp": (14336, 3584)}, A.HUNYUAN_IMAGE),
    "krea 2, one late block": ({"transformer.transformer_blocks.27.attn.to_q": (6144, 6144)}, A.KREA2),
    "diffusers wan": ({"transformer.blocks.0.attn1.to_q": (5120, 5120)}, A.WAN),
    "diffusers wan, mlp": ({"transformer.blocks.0.ffn.net.2": (1536, 8960)}, A.WAN),
    "wan, around the blocks": ({"diffusion_model.text_embedding.2": (5120, 5120)}, A.WAN),
    "ernie-image": ({"transformer.layers.0.self_attention.to_q": (3072, 3072)}, A.ERNIE_IMAGE),
    "kohya ernie-image, mlp": ({"lora_unet_layers_3_mlp_linear_fc2": (3072, 8192)}, A.ERNIE_IMAGE),
    "hunyuan image": ({"lora_unet_double_blocks_0_img_attn_qkv": (10752, 3584)}, A.HUNYUAN_IMAGE),
    "hunyuan image, mlp": ({"lora_unet_single_blocks_39_linear2": (3584, 17920)}, A.HUNYUAN_IMAGE),
    "diffusers hunyuan image": ({"transformer.transformer_blocks.19.attn.to_q": (3584, 3584)}, A.HUNYUAN_IMAGE),
    "qwen3 of anima or another": ({"lora_te_layers_0_self_attn_q_proj": (2048, 1024)}, None),
    "gemma 2": ({"lora_te_layers_0_self_attn_q_proj": (2048, 2304)}, None),
    "qwen3 of z-image, klein or krea 2": ({"text_encoder.model.layers.0.self_attn.q_proj": (4096, 2560)}, None),
    "pixart": ({"lora_transformer_transformer_blocks_0_attn1_to_q": (1152, 1152)}, A.PIXART),
    "cascade": ({"lora_prior_unet_down_blocks_0_2_attention_attn_out_proj": (2048, 2048)}, A.CASCADE),
    "hidream": ({"diffusion_model.double_stream_blocks.0.block.attn1.to_q": (2560, 2560)}, A.HIDREAM),
    "auraflow": ({"lora_unet_double_layers_0_attn_w1q": (3072, 3072)}, A.AURAFLOW),
    "auraflow, mlp of a single block": (
        {"transformer.single_transformer_blocks.3.ff.linear_1": (8192, 3072)},
        A.AURAFLOW,
    ),
    "auraflow, out of a single block": (
        {"lora_unet_single_transformer_blocks_3_attn_to_out_0": (3072, 3072)},
        A.AURAFLOW,
    ),
    "auraflow, modulation of a single block": (
        {"transformer.single_transformer_blocks.0.norm1.linear": (18432, 3072)},
        A.AURAFLOW,
    ),
    "sd2 text encoder": ({"lora_te_" + TE: (1024, 1024)}, A.SD2),
    "flux t5": ({"lora_te2_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}, A.FLUX),
    "kohya's t5 of sd3 or flux": ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (4096, 4096)}, None),
    "diffusers' t5 of sd3": ({"text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": (4096, 4096)}, A.SD3),
    "clip_l of anything": ({"lora_te1_" + TE: (768, 768)}, None),
    "unknown": ({"lora_unet_foo_bar": (8, 8)}, None),
    "tiny unet": ({f"lora_unet_down_blocks_0_attentions_0_{ATTN2}": (8, 6)}, None),
}


@pytest.mark.parametrize("case", LORAS)
def test_lora_files(case):
    sizes, expected = LORAS[case]
    assert detect_lora(lora(sizes)) is expected
    peft = {
        key.replace("lora_up", "lora_B").replace("lora_down", "lora_A.default"): shape
        for key, shape in lora(sizes).items()
    }
    assert detect_lora(peft) is expected


@pytest.mark.parametrize("case", [case for case, (_, expected) in LORAS.items() if expected is not None])
def test_the_wrong_metadata_changes_nothing_that_is_sure(case):
    sizes, expected = LORAS[case]
    for claim in ("sd_v1", "sdxl_base_v1-0", "flux1", "sd3"):
        assert detect_lora(lora(sizes), {"ss_base_model_version": claim}) is expected


CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    "tensors",
    [
        {"hada_w1_a": (320, 4), "hada_w1_b": (4, 768), "hada_w2_a": (320, 4), "hada_w2_b": (4, 768)},
        {"lokr_w1": (4, 16), "lokr_w2": (80, 48)},
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 16), "lokr_w2_a": (80, 2), "lokr_w2_b": (2, 48), "alpha": ()},
        {"diff": (320, 768)},
    ],
    ids=["loha", "lokr", "lokr factors", "diff"],
)
def test_the_width_is_read_from_every_kind(tensors):
    assert detect_lora({f"{CROSS}.{name}": shape for name, shape in tensors.items()}) is A.SD1


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"ss_base_model_version": "sd_v1"}, A.SD1),
        ({"ss_base_model_version": "sd_v2_768_v"}, A.SD2),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, A.SD1),
        ({"modelspec.architecture": "flux-1-dev/lora"}, None),
    ],
)
def test_metadata_breaks_a_tie(metadata, expected):
    file = lora({f"lora_unet_down_blocks_0_attentions_0_{ATTN1}": (320, 320)})
    assert detect_lora(file, metadata) is expected


@pytest.mark.parametrize(
    ("block", "name", "is_open"),
    [(0, "attn.to_q", True), (31, "attn.to_v", True), (32, "attn.to_q", False), (0, "proj_mlp", False)],
)
def test_queries_of_a_single_block_may_be_auraflows(block, name, is_open):
    """It has 32 single blocks, Flux 38, of the same width; their queries, keys and values have the same names."""
    rows = 12288 if name == "proj_mlp" else 3072
    file = lora({f"transformer.single_transformer_blocks.{block}.{name}": (rows, 3072)})
    assert (A.AURAFLOW in may_be_for(file)) is is_open
    assert {A.FLUX, A.CHROMA, A.HUNYUAN_VIDEO} <= set(may_be_for(file))
    claimed = may_be_for(file, {"modelspec.architecture": "auraflow-v0.3/lora"})
    assert (claimed == (A.AURAFLOW,)) is is_open


def test_metadata_tells_chroma_from_flux():
    file = lora({"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072)})
    assert detect_lora(file, {"modelspec.architecture": "chroma/lora"}) is A.CHROMA
    assert detect_lora(file, {"ss_network_module": "networks.lora_flux"}) is A.FLUX
    assert detect_lora(lora({"lora_te1_" + TE: (768, 768)}), {"ss_network_module": "networks.lora_flux"}) is A.FLUX


BFL = {"double_blocks.0.img_attn.qkv.weight": (48, 16), "single_blocks.0.linear1.weight": (112, 16)}
MODELS = {
    "sd1": ({f"input_blocks.1.1.{ATTN2.replace('_attn2_', '.attn2.')}.weight": (320, 768)}, A.SD1),
    "flux of any size": (BFL, A.FLUX),
    "chroma": ({**BFL, "distilled_guidance_layer.norms.0.scale": (16,)}, A.CHROMA),
    "flux 2": ({**BFL, "double_stream_modulation_img.lin.weight": (96, 16)}, A.FLUX2),
    "hunyuan video": ({**BFL, "txt_in.individual_token_refiner.blocks.0.norm1.weight": (16,)}, A.HUNYUAN_VIDEO),
    "sd3 of any size": ({"joint_blocks.0.x_block.attn.qkv.weight": (48, 16)}, A.SD3),
    "z-image": ({"layers.0.attention.qkv.weight": (11520, 3840)}, A.Z_IMAGE),
    "wan": ({"blocks.0.self_attn.q.weight": (1536, 1536)}, A.WAN),
    "anima of Neo": ({"blocks.0.self_attn.q_proj.weight": (2048, 2048)}, A.ANIMA),
    "krea 2": ({"blocks.0.attn.wq.weight": (64, 64), "blocks.0.mod.lin": (384,)}, A.KREA2),
    "ernie-image": ({"layers.0.self_attention.to_q.weight": (64, 64)}, A.ERNIE_IMAGE),
    "hunyuan image": (
        {
            "double_blocks.0.img_attn.qkv.weight": (10752, 3584),
            "txt_in.individual_token_refiner.x.weight": (3584, 3584),
        },
        A.HUNYUAN_IMAGE,
    ),
    "a vae": ({"decoder.up_blocks.0.resnets.0.conv1.weight": (512, 512, 3, 3)}, None),
    "a qwen3": ({"qwen3_06b.model.layers.0.self_attn.q_proj.weight": (2048, 1024)}, None),
    "a clip": ({"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_models(case, prefix):
    shapes, expected = MODELS[case]
    others = {
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "alphas_cumprod": (1000,),
    }
    assert detect_model({**{prefix + name: shape for name, shape in shapes.items()}, **others}) is expected


def test_a_lora_is_accepted_by_its_own_architecture_and_its_twin():
    assert accepts(A.FLUX, A.FLUX)
    assert accepts(A.CHROMA, A.FLUX)
    assert accepts(A.ANIMA, A.COSMOS)
    assert accepts(None, A.SD1)
    assert accepts(A.SD1, None)
    assert not accepts(A.SD1, A.SD2)
    assert not accepts(A.SDXL, A.SDXL_REFINER)
    assert not accepts(A.FLUX, A.FLUX2)


@pytest.mark.parametrize(
    ("architecture", "found", "missing"),
    [
        (Architecture.FLUX, ["t5"], ["clip_l"]),
        (Architecture.SDXL, ["clip_l"], ["clip_g"]),
        (Architecture.SDXL, ["clip"], []),
        (Architecture.FLUX, ["clip"], ["t5"]),
        (Architecture.SD3, ["clip_l", "clip_g"], ["t5"]),
        (Architecture.Z_IMAGE, ["llm"], []),
        (Architecture.Z_IMAGE, ["clip_l"], ["llm"]),
        (Architecture.WAN, [], ["t5"]),
        (Architecture.KOLORS, ["llm"], []),
        (None, [], ["any"]),
    ],
)
def test_the_text_encoders_that_a_model_runs_with(architecture, found, missing):
    assert text.missing_encoders(architecture, found) == missing
