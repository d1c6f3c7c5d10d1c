"""Names in LoRA files against small models written down by hand: what each one must mean."""

import pytest

from lib_lora_guard.adapters import Slice
from lib_lora_guard.errors import LoraMismatchError
from lib_lora_guard.models import NameMap, Route

H = 16


def rows(start, length):
    return Slice(0, start, length)


def weights(prefix, modules):
    return {f"{prefix}{module}.weight": shape for module, shape in modules.items()}


SQUARE, NORM = (H, H), (H,)
CLIP_LAYER = {
    "self_attn.q_proj": SQUARE,
    "self_attn.k_proj": SQUARE,
    "self_attn.v_proj": SQUARE,
    "self_attn.out_proj": SQUARE,
    "mlp.fc1": (4 * H, H),
    "mlp.fc2": (H, 4 * H),
    "layer_norm1": NORM,
}


def clip(prefix, *, nested="text_model."):
    return {
        **weights(f"{prefix}{nested}encoder.layers.0.", CLIP_LAYER),
        **weights(prefix + nested, {"final_layer_norm": NORM, "embeddings.token_embedding": (50, H)}),
        f"{prefix}text_projection.weight": SQUARE,
    }


def t5(prefix):
    return weights(
        prefix + "encoder.block.0.layer.", {"0.SelfAttention.q": SQUARE, "1.DenseReluDense.wi_0": (2 * H, H)}
    )


BFL = {
    **weights(
        "double_blocks.0.",
        {"img_attn.qkv": (3 * H, H), "img_attn.proj": SQUARE, "txt_attn.qkv": (3 * H, H), "img_mod.lin": (6 * H, H)},
    ),
    "double_blocks.0.img_attn.qkv.bias": (3 * H,),
    "double_blocks.0.img_attn.norm.query_norm.scale": (8,),
    **weights("single_blocks.0.", {"linear1": (7 * H, H), "linear2": (H, 5 * H)}),
    **weights("", {"img_in": (H, 64), "final_layer.adaLN_modulation.1": (2 * H, H)}),
}
FLUX_DIFFUSERS = {
    **weights("transformer_blocks.0.attn.", dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0", "add_q_proj"), SQUARE)),
    "transformer_blocks.0.attn.norm_q.weight": (8,),
    **weights("single_transformer_blocks.0.attn.", dict.fromkeys(("to_q", "to_k", "to_v"), SQUARE)),
    **weights("single_transformer_blocks.0.", {"proj_mlp": (4 * H, H), "proj_out": (H, 5 * H)}),
    **weights("", {"x_embedder": (H, 64), "norm_out.linear": (2 * H, H)}),
}


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "base_model.model.double_blocks.0.img_attn.qkv",
        "model.diffusion_model.double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora1",
        "diffusion_model.double_blocks.0.processor.qkv_lora1",
    ],
)
def test_original_flux_names_on_a_forge_model(name):
    names = NameMap({"diffusion_model." + key: shape for key, shape in BFL.items()})
    assert names.routes(name) == (Route("diffusion_model.double_blocks.0.img_attn.qkv"),)


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", rows(0, H)),
        ("lora_transformer_transformer_blocks_0_attn_to_k", "double_blocks.0.img_attn.qkv", rows(H, H)),
        ("lycoris_transformer_blocks_0_attn_to_v", "double_blocks.0.img_attn.qkv", rows(2 * H, H)),
        ("transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn.qkv", rows(2 * H, H)),
        ("transformer.single_transformer_blocks.0.attn.to_v", "single_blocks.0.linear1", rows(2 * H, H)),
        ("lora_unet_single_transformer_blocks_0_proj_mlp", "single_blocks.0.linear1", rows(3 * H, 4 * H)),
        ("single_blocks.0.processor.qkv_lora", "single_blocks.0.linear1", rows(0, 3 * H)),
        ("single_blocks.0.processor.proj_lora", "single_blocks.0.linear2", None),
        ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", None),
        ("transformer.transformer_blocks.0.attn.to_out", "double_blocks.0.img_attn.proj", None),
        ("transformer.x_embedder", "img_in", None),
    ],
)
def test_diffusers_flux_names_on_the_original_layout(name, module, part):
    assert NameMap(BFL).routes(name) == (Route(module, part),)


def test_original_flux_names_on_a_diffusers_model():
    names = NameMap(FLUX_DIFFUSERS)
    block = "transformer_blocks.0.attn."
    assert names.routes("lora_unet_double_blocks_0_img_attn_qkv") == (
        Route(block + "to_q", source=rows(0, H)),
        Route(block + "to_k", source=rows(H, H)),
        Route(block + "to_v", source=rows(2 * H, H)),
    )
    single = "single_transformer_blocks.0."
    assert names.routes("diffusion_model.single_blocks.0.linear1")[-1] == Route(
        single + "proj_mlp", source=rows(3 * H, 4 * H)
    )
    assert len(names.routes("single_blocks.0.processor.qkv_lora")) == 3
    assert (
        names.routes("lora_unet_double_blocks_0_txt_attn_qkv") == ()
    )  # add_k_proj is missing: no half of a fused weight


def test_scale_and_shift_change_places_between_the_layouts():
    original, diffusers = "final_layer.adaLN_modulation.1", "norm_out.linear"
    assert NameMap(BFL).routes(diffusers) == (Route(original, swap_halves=True),)
    assert NameMap(BFL).routes("lora_unet_final_layer_adaLN_modulation_1") == (Route(original),)
    assert NameMap(FLUX_DIFFUSERS).routes("diffusion_model." + original) == (Route(diffusers, swap_halves=True),)
    assert NameMap(FLUX_DIFFUSERS).routes("transformer." + diffusers) == (Route(diffusers),)


def test_only_the_last_context_block_of_sd3_is_swapped():
    last, first = "joint_blocks.1.context_block.adaLN_modulation.1", "joint_blocks.0.context_block.adaLN_modulation.1"
    names = NameMap({f"{first}.weight": (6 * H, H), f"{last}.weight": (2 * H, H)})
    assert names.routes("transformer.transformer_blocks.1.norm1_context.linear") == (Route(last, swap_halves=True),)
    assert names.routes("transformer.transformer_blocks.0.norm1_context.linear") == (Route(first),)


def test_raw_parameters_come_back_as_their_module():
    names = NameMap(BFL)
    norm = "double_blocks.0.img_attn.norm.query_norm"
    for written in (
        norm + ".scale",
        norm,
        "diffusion_model." + norm + ".scale",
        "transformer_blocks.0.attn.norm_q.weight",
    ):
        assert names.routes(written) == (Route(norm),)
    assert names.parameter(norm) == norm + ".scale"
    assert names.parameter("img_in") == "img_in.weight"
    assert names.parameter("double_blocks.0.img_attn.qkv", "bias") == "double_blocks.0.img_attn.qkv.bias"
    with pytest.raises(LoraMismatchError, match=r"^img_in: the LoRA changes its bias, this model has none there; use"):
        names.parameter("img_in", "bias")


LDM = weights(
    "diffusion_model.",
    {
        "input_blocks.0.0": (H, 4, 3, 3),
        "input_blocks.1.0.in_layers.2": (H, H, 3, 3),
        "input_blocks.2.0.op": (H, H, 3, 3),
        "input_blocks.3.0.emb_layers.1": (H, H),
        "input_blocks.3.1.proj_in": (H, H, 1, 1),
        "input_blocks.3.1.transformer_blocks.0.attn1.to_q": SQUARE,
        "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0": SQUARE,
        "middle_block.2.out_layers.3": (H, H, 3, 3),
        "output_blocks.0.0.skip_connection": (H, H, 1, 1),
        "output_blocks.0.1.transformer_blocks.0.ff.net.0.proj": (8 * H, H),
        "output_blocks.1.1.conv": (H, H, 3, 3),
        "output_blocks.1.0.in_layers.0": NORM,
        "output_blocks.2.0.in_layers.2": (H, H, 3, 3),
        "label_emb.0.0": (H, 30),
        "time_embed.2": SQUARE,
        "out.2": (4, H, 3, 3),
    },
)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_unet_conv_in", "input_blocks.0.0"),
        ("lora_unet_down_blocks_0_resnets_0_conv1", "input_blocks.1.0.in_layers.2"),
        ("unet.down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("unet.down_blocks.1.resnets.0.time_emb_proj", "input_blocks.3.0.emb_layers.1"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "input_blocks.3.1.proj_in"),
        ("lora_unet_input_blocks_3_1_proj_in", "input_blocks.3.1.proj_in"),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
            "input_blocks.3.1.transformer_blocks.0.attn1.to_q",
        ),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora",
            "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_out",
            "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
            "input_blocks.3.1.transformer_blocks.0.attn2.to_out.0",
        ),
        ("base_model.model.mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("lora_unet_up_blocks_0_resnets_0_conv_shortcut", "output_blocks.0.0.skip_connection"),
        (
            "unet.up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
            "output_blocks.0.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("unet.up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
        ("unet.up_blocks.0.resnets.1.norm1", "output_blocks.1.0.in_layers.0"),
        ("unet.up_blocks.1.resnets.0.conv1", "output_blocks.2.0.in_layers.2"),
        ("unet.add_embedding.linear_1", "label_emb.0.0"),
        ("lora_unet_label_emb_0_0", "label_emb.0.0"),
        ("unet.time_embedding.linear_2", "time_embed.2"),
        ("lora_unet_out_2", "out.2"),
    ],
)
def test_unet_names_on_a_forge_model(name, module):
    assert NameMap(LDM).routes(name) == (Route("diffusion_model." + module),)


@pytest.mark.parametrize(
    "name",
    [
        "bundle_emb.token.string_to_params",
        "lora_unet_nothing",
        "unet.down_blocks.7.resnets.0.conv1",
        "",
        "alpha",
        "weight",
    ],
)
def test_names_that_a_model_lacks_have_no_route(name):
    assert NameMap(LDM).routes(name) == ()
    assert NameMap({}).routes(name) == ()


FORGE_SDXL = {**LDM, **clip("clip_l.transformer."), **clip("clip_g.transformer.")}
FORGE_SD3 = {**clip("clip_l.transformer."), **clip("clip_g.transformer."), **t5("t5xxl.transformer.")}
FC1 = "text_model.encoder.layers.0.mlp.fc1"
FC1_FLAT = FC1.replace(".", "_")
T5_Q = "encoder.block.0.layer.0.SelfAttention.q"
T5_FLAT = T5_Q.replace(".", "_")


@pytest.mark.parametrize(
    ("prefix", "encoder"),
    [
        ("lora_te_", "clip_l"), ("lora_te1_", "clip_l"), ("lora_te2_", "clip_g"),
        ("text_encoder.", "clip_l"), ("text_encoder_2.", "clip_g"), ("text_encoders.clip_l.transformer.", "clip_l"),
        ("clip_l.", "clip_l"), ("clip_g.", "clip_g"), ("clip_g.transformer.", "clip_g"), ("lora_te3_", None), ("", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", [FORGE_SDXL, FORGE_SD3], ids=["sdxl", "sd3"])
def test_clip_names_lead_to_the_encoder_they_name(prefix, encoder, model):
    written = prefix + (FC1_FLAT if prefix.endswith("_") else FC1)
    found = NameMap(model).routes(written)
    assert found == (() if encoder is None else (Route(f"{encoder}.transformer.{FC1}"),))


@pytest.mark.parametrize(
    "prefix", ["lora_te2_", "lora_te3_", "t5.", "text_encoder_2.", "text_encoder_3.", "t5xxl.transformer."]
)
def test_t5_by_its_inner_names(prefix):
    written = prefix + (T5_FLAT if prefix.endswith("_") else T5_Q)
    for model in (FORGE_SD3, {**clip("clip_l.transformer."), **t5("t5xxl.transformer.")}):
        assert NameMap(model).routes(written) == (Route("t5xxl.transformer." + T5_Q),)
    assert NameMap(FORGE_SDXL).routes(written) == ()


@pytest.mark.parametrize(("encoder", "hints"), [("clip_l", "te te1"), ("clip_h", "te te1"), ("clip_g", "te te1 te2")])
def test_a_model_with_one_clip(encoder, hints):
    names = NameMap(clip(encoder + ".transformer."))
    for hint in ("te", "te1", "te2", "te3"):
        expected = (Route(f"{encoder}.transformer.{FC1}"),) if hint in hints.split() else ()
        assert names.routes(f"lora_{hint}_{FC1_FLAT}") == expected
    assert names.routes("text_encoder.text_projection") == (Route(f"{encoder}.transformer.text_projection"),)


@pytest.mark.parametrize(("width", "hints"), [(768, "te te1"), (1280, "te te2"), (1024, "te te1"), (H, "te te1")])
@pytest.mark.parametrize("nested", ["text_model.", ""])
def test_a_lone_clip_is_known_by_its_width(width, hints, nested):
    shapes = {**clip("", nested=nested), nested + "final_layer_norm.weight": (width,)}
    names = NameMap(shapes)
    for hint in ("te", "te1", "te2", "te3"):
        expected = (Route(nested + "encoder.layers.0.mlp.fc1"),) if hint in hints.split() else ()
        assert names.routes(f"lora_{hint}_{FC1_FLAT}") == expected
    attention = nested + "encoder.layers.0.self_attn."
    assert names.routes("text_encoder_2.text_model.encoder.layers.0.self_attn.to_q_lora") == (
        (Route(attention + "q_proj"),) if width == 1280 else ()
    )
    assert names.routes("text_model.encoder.layers.0.self_attn.out_proj.lora_linear_layer") == (
        Route(attention + "out_proj"),
    )


def test_a_whole_checkpoint_keeps_its_parts_apart():
    checkpoint = {
        **{"model." + key: shape for key, shape in LDM.items()},
        **clip("conditioner.embedders.0.transformer."),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3 * H, H),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (4 * H, H),
        "first_stage_model.encoder.conv_in.weight": (H, 3, 3, 3),
    }
    names = NameMap(checkpoint)
    assert names.routes("lora_unet_conv_in") == (Route("model.diffusion_model.input_blocks.0.0"),)
    assert names.routes("lora_unet_encoder_conv_in") == ()
    assert names.routes("lora_te1_" + FC1_FLAT) == (Route("conditioner.embedders.0.transformer." + FC1),)
    second = "conditioner.embedders.1.model.transformer.resblocks.0."
    assert names.routes("lora_te2_" + FC1_FLAT) == (Route(second + "mlp.c_fc"),)
    assert names.routes("text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj") == (
        Route(second + "attn", part=rows(H, H)),
    )
    assert names.parameter(second + "attn") == second + "attn.in_proj_weight"


def test_names_that_differ_in_dots_alone_are_not_guessed():
    names = NameMap(weights("", {"a.b_c": SQUARE, "a_b.c": SQUARE, "a.d": SQUARE}))
    assert names.routes("lora_unet_a_b_c") == ()
    assert names.routes("diffusion_model.a_b.c") == (Route("a_b.c"),)
    assert names.routes("lora_unet_a_d") == (Route("a.d"),)
