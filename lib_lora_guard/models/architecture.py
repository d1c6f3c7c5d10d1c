"""Detects the architecture of a model, and the one that a LoRA was trained for, from names and sizes.

Names decide first, then the width of a layer's input. Where several architectures are left, a file's metadata decides
between them, and else it stays open: None. Sources: the parameter names and default sizes in diffusers (models/transformers,
loaders/single_file_utils.py, loaders/lora_conversion_utils.py) and Forge (backend/nn, loader.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from ..adapters.base import Shape
from . import double_stream
from .evidence import Evidence


class Architecture(str, Enum):
    """A model architecture. The value is its name for users."""

    SD1 = "SD 1.x"
    SD2 = "SD 2.x"
    SDXL = "SDXL"
    SDXL_REFINER = "SDXL refiner"
    SD3 = "SD 3"
    FLUX = "Flux"
    CHROMA = "Chroma"
    FLUX2 = "Flux 2"
    ANIMA = "Anima"
    KOLORS = "Kolors"
    SVD = "Stable Video Diffusion"
    CASCADE = "Stable Cascade"
    AURAFLOW = "AuraFlow"
    COSMOS = "Cosmos"
    ERNIE_IMAGE = "ERNIE-Image"
    HIDREAM = "HiDream"
    HUNYUAN_DIT = "Hunyuan-DiT"
    HUNYUAN_IMAGE = "HunyuanImage"
    HUNYUAN_VIDEO = "Hunyuan Video"
    KREA2 = "Krea 2"
    LTX = "LTX-Video"
    LUMINA2 = "Lumina 2"
    PIXART = "PixArt"
    QWEN_IMAGE = "Qwen-Image"
    SANA = "Sana"
    WAN = "Wan"
    Z_IMAGE = "Z-Image"


A = Architecture


@dataclass(frozen=True)
class _Rule:
    """`names` is a pattern for the modules' flat names. If `inputs` is given, a matching module must have one of these
    input widths; if `sizes` is given, one of these `(outputs, inputs)`.
    """

    architecture: Architecture
    names: str
    inputs: frozenset[int] = frozenset()
    sizes: frozenset[tuple[int, int]] = frozenset()

    def fits(self, evidence: Evidence) -> bool:
        if self.sizes:
            return bool(self.sizes & evidence.sizes(self.names))
        return bool(self.inputs & evidence.inputs(self.names)) if self.inputs else evidence.has(self.names)


def _rule(architecture: Architecture, names: str, *inputs: int) -> _Rule:
    return _Rule(architecture, names, frozenset(inputs))


def _sized(architecture: Architecture, names: str, *sizes: tuple[int, int]) -> _Rule:
    return _Rule(architecture, names, sizes=frozenset(sizes))


_DIT = r"^blocks_\d+_"
_TOP = r"^transformer_blocks_\d+_"
_BFL = r"^(double|single)_blocks_\d+_"
_BOTH = r"^((double|single)_blocks|(single_)?transformer_blocks)_\d+_"
_NEXT_DIT = r"^(layers|noise_refiner|context_refiner)_\d+_"
_COSMOS = (
    _DIT + r"((self|cross)_attn_([qkv]|output)_proj|mlp_layer[12]|adaln_modulation_(self_attn|cross_attn|mlp)_[12])$"
)

_RULES = (
    _rule(A.SD3, r"^joint_blocks_\d+_(x|context)_block_"),
    _rule(A.HIDREAM, r"^(double|single)_stream_blocks_\d+_"),
    _rule(A.AURAFLOW, r"^joint_transformer_blocks_\d+_|^(double|single)_layers_\d+_(attn|mlp|mod)"),
    # Flux's single blocks have neither of these, and Flux 2's no number behind `to_out`.
    _rule(A.AURAFLOW, r"^single_transformer_blocks_\d+_(ff_|norm1_|attn_to_out_0$)"),
    _rule(A.CASCADE, r"^(down|up)_blocks_\d+_\d+_(attention|mapper|channelwise|kv_mapper|depthwise)|^clip_txt_mapper"),
    _rule(A.CHROMA, r"^distilled_guidance_layer_"),
    # The only ones of this family whose blocks are 3584 wide (the refiner's: 3328).
    _rule(
        A.HUNYUAN_IMAGE,
        _BOTH + r".*(qkv|proj|(to|add)_[qkv](_proj)?|linear1|proj_mlp|mlp(_0|_fc1|_net_0_proj))$",
        3584,
        3328,
    ),
    _rule(
        A.HUNYUAN_IMAGE,
        _BOTH + r".*(mod_lin(ear)?|modulation_lin(ear)?|norm1?(_context)?_linear|to_out_0)$",
        3584,
        3328,
    ),
    _rule(A.HUNYUAN_IMAGE, _BOTH + r"((img|txt)_mlp_(2|fc2)|ff(_context)?_net_2)$", 14336),
    _rule(A.HUNYUAN_IMAGE, _BOTH + r"(linear2|proj_out)$", 17920),
    _rule(A.FLUX2, r"^(double|single)_stream_modulation"),
    _rule(
        A.FLUX2,
        r"^single_transformer_blocks_\d+_attn_to_(qkv_mlp_proj|out)$|" + _TOP + r"ff(_context)?_linear_(in|out)$",
    ),
    _rule(A.FLUX2, _BFL + r"((img|txt)_attn_(qkv|proj)|(img|txt)_mlp_0|linear1)$", 4096, 6144),
    _sized(
        A.HUNYUAN_IMAGE,
        r"individual_token_refiner|^context_embedder_token_refiner",
        *((3584 * out, 3584 * inner) for out, inner in ((1, 1), (2, 1), (3, 1), (4, 1), (1, 4))),
    ),
    _rule(A.HUNYUAN_VIDEO, r"individual_token_refiner|^context_embedder_token_refiner"),
    _rule(A.HUNYUAN_VIDEO, _BFL + r"((img|txt)_(mlp_fc\d|mod_linear)|modulation_linear)"),
    _rule(A.QWEN_IMAGE, _TOP + r"(img|txt)_(mod|mlp)_"),
    _rule(A.SANA, _TOP + r"ff_conv_(inverted|depth|point)|" + _DIT + r"mlp_(inverted|depth|point)_conv"),
    _rule(A.SANA, _TOP + r"attn1_to_[qkv]$|" + _DIT + r"cross_attn_(q|kv)_linear$", 2240),
    _rule(A.PIXART, _TOP + r"attn1_to_[qkv]$|" + _DIT + r"cross_attn_(q|kv)_linear$", 1152),
    _rule(A.LTX, r"^patchify_proj$"),
    _rule(A.LTX, _TOP + r"attn2_to_[kv]$", 2048, 4096),
    _rule(A.HUNYUAN_DIT, _DIT + r"attn[12]_(Wqkv|kv_proj|q_proj)$"),
    _rule(A.HUNYUAN_DIT, _DIT + r"attn[12]_to_q$", 1408),
    _rule(A.ANIMA, r"^(llm_adapter|text_conditioner)_|" + _DIT + r"(self|cross)_attn_o_proj$"),
    # Cosmos-Predict2 of 2 billion parameters has the same layers: Anima is made of it.
    _rule(A.ANIMA, _COSMOS, 2048, 8192),
    _sized(A.ANIMA, _COSMOS, (2048, 1024), (6144, 256)),
    _rule(A.COSMOS, _COSMOS),
    _sized(A.ANIMA, _TOP + r"(attn2_to_[kv]|norm[123]_linear_[12])$", (2048, 1024), (256, 2048), (6144, 256)),
    _rule(A.COSMOS, _TOP + r"norm[123]_linear_[12]$"),
    _sized(A.COSMOS, _TOP + r"attn[12]_to_[qkv]$", (4096, 1024), (5120, 1024), (5120, 5120)),
    _rule(A.KREA2, r"^(txtfusion|text_fusion)_|" + _TOP + r"(attn_to_gate|ff_(gate|up|down))$"),
    _rule(A.KREA2, _DIT + r"(attn_(w[qkvo]|gate)|mlp_(gate|up|down)|mod_lin)$"),
    # Flux 2 has queries of the same width, but 8 blocks of them; keys and values are narrower in Krea 2.
    _rule(A.KREA2, r"^transformer_blocks_([89]|[12]\d)_attn_to_(q|out(_0)?)$", 6144),
    _sized(A.KREA2, _TOP + r"attn_to_[kv]$", (1536, 6144)),
    _rule(A.ERNIE_IMAGE, r"^layers_\d+_(self_attention_|adaLN_(sa|mlp)_ln$|mlp_linear_fc2$)"),
    _rule(A.WAN, _DIT + r"((self|cross)_attn_[qkvo](_img)?|ffn_[02]|ffn_net_(0_proj|2)|modulation)$"),
    _rule(A.WAN, r"^(text_embedding_[02]|time_projection_1|head_head|condition_embedder_(time|text|image)_\w+)$"),
    _rule(A.WAN, _DIT + r"attn[12]_(to_[qkv]|to_out(_0)?|add_[kv]_proj)$", 1536, 3072, 5120),
    _rule(A.LUMINA2, _NEXT_DIT + r"(attention|attn|feed_forward|adaLN)", 2304),
    _rule(A.LUMINA2, _NEXT_DIT + r"(feed_forward_w2|adaLN_modulation_1)$", 9216, 1024),
    _rule(A.LUMINA2, _NEXT_DIT + r"(attn_(to_[qkv]|to_out|norm_[qk])|feed_forward_linear_[123]|norm1_linear)"),
    _rule(A.Z_IMAGE, _NEXT_DIT + r"(attention|feed_forward|adaLN)", 3840),
    _rule(A.Z_IMAGE, _NEXT_DIT + r"(feed_forward_w2|adaLN_modulation_0)$", 10240, 256),
    _rule(A.Z_IMAGE, r"^all_(x_embedder|final_layer)_|" + _NEXT_DIT + r"attention_(to_[qkv]|to_out|norm_[qk])"),
    _rule(A.SD3, _TOP + r"attn_(to|add)_[qkv]", 1536, 2432),
    _rule(A.SD3, _TOP + r"ff(_context)?_net_0_proj$|" + _TOP + r"norm1(_context)?_linear$", 1536, 2432),
)
"""Ordered: the first match decides."""

_UNET = r"^((in|out)put_blocks_\d+_\d+_|middle_block_\d+_|(down|up)_blocks_\d+_(attentions|resnets|(down|up)samplers)_|mid_block_(attentions|resnets)_)"
_CROSS = {768: A.SD1, 1024: A.SD2, 2048: A.SDXL, 1280: A.SDXL_REFINER}
"""The architecture by the width of the text embedding that a U-Net's cross attention receives."""

_FLUX_LIKE = _BFL + r"((img|txt)_(attn|mlp|mod)|linear[12]|modulation|norm|qkv|proj)|^single_transformer_blocks_\d+_"
_MODULATED = r"(_mod|_modulation)_lin$|_norm(1|1_context)?_linear$|^(vector|time|guidance)_in_|^time_text_embed_"

_METADATA_PATTERNS = {
    A.SD1: r"\bsd_v1|stable-diffusion-v1",
    A.SD2: r"\bsd_v2|stable-diffusion-v2",
    A.SDXL_REFINER: r"xl-v1-refiner|sdxl_refiner",
    A.SDXL: r"\bsdxl|stable-diffusion-xl",
    A.SD3: r"\bsd3|stable-diffusion-3|lora_sd3",
    A.CHROMA: r"chroma",
    A.FLUX2: r"flux[-_.]?2",
    A.FLUX: r"flux(?![-_.]?2)",
    A.KOLORS: r"kolors",
    A.AURAFLOW: r"aura[-_. ]?flow|pony[-_. ]?v7",
    A.QWEN_IMAGE: r"qwen[-_]?image",
    A.HUNYUAN_VIDEO: r"hunyuan[-_]?video|lora_framepack",
    A.HUNYUAN_IMAGE: r"hunyuan[-_]?image",
    A.Z_IMAGE: r"z[-_]?image",
    A.LUMINA2: r"lumina",
    A.KREA2: r"krea[-_. ]?2",
    A.ANIMA: r"\banima\b|lora_anima",
    A.COSMOS: r"cosmos",
    A.WAN: r"\bwan|lora_wan",
    A.ERNIE_IMAGE: r"ernie[-_]?image",
}
_METADATA = ("ss_base_model_version", "modelspec.architecture", "ss_network_module")


def detect_model(shapes: Mapping[str, Shape]) -> Architecture | None:
    """Detects the architecture of a U-Net or transformer, or of a whole checkpoint.

    Args:
        shapes: Parameter names and shapes, in the original layout or that of diffusers. The prefixes
            "model.diffusion_model.", "diffusion_model.", "unet.", "transformer." are optional.

    Returns:
        The architecture; None if it is unknown or ambiguous.
    """
    evidence = Evidence.of_model(shapes)
    if evidence.has(r"^single_transformer_blocks_") or evidence.has(_BFL):
        return _only(_decide(evidence) or _flux_like(evidence, model=True))
    if evidence.has(_TOP + r"attn_add_[qkv]_proj$") and evidence.has(r"^pos_embed_proj$"):
        return A.SD3
    return _only(_decide(evidence) or _unet(evidence))


def detect_lora(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Architecture | None:
    """Detects the architecture that a LoRA file was trained for.

    A Flux file without modulations looks like one for Chroma, one for a few blocks like one for several more: FLUX,
    unless the metadata names another; `may_be_for` returns all. A file with text encoders only is often None, as several
    architectures share them.

    Args:
        shapes: Names and shapes of the file's tensors.
        metadata: The file's metadata.
    """
    return likeliest(may_be_for(shapes, metadata))


def may_be_for(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> tuple[Architecture, ...]:
    """Returns all architectures that a LoRA file may be trained for, likeliest first; () if nothing is known.

    Args:
        shapes: Names and shapes of the file's tensors.
        metadata: The file's metadata. It counts where several are left.
    """
    evidence = Evidence.of_lora(shapes)
    found = _decide(evidence) or _unet(evidence) or _flux_like(evidence) or _text(evidence)
    if len(found) > 1:
        named = next((a for a in _from_metadata(metadata or {}) if a in found), None)
        return found if named is None else (named,)
    return found


def likeliest(found: tuple[Architecture, ...]) -> Architecture | None:
    """Returns the architecture to name for a file that `may_be_for` several; None if it stays open."""
    return found[0] if len(found) == 1 or found[:1] == (A.FLUX,) else None


_SHARED = ({A.FLUX, A.CHROMA}, {A.SDXL, A.KOLORS}, {A.ANIMA, A.COSMOS})
"""Pairs of which a LoRA for one has a place in the other."""


def accepts(model: Architecture | None, lora: Architecture | None) -> bool:
    """True if a LoRA may be applied to a model: same architecture, one of them unknown, or a pair that shares its
    layers.
    """
    return model is None or lora is None or model == lora or {model, lora} in _SHARED


def _decide(evidence: Evidence) -> tuple[Architecture, ...]:
    return next(((rule.architecture,) for rule in _RULES if rule.fits(evidence)), ())


def _only(found: tuple[Architecture, ...]) -> Architecture | None:
    return found[0] if len(found) == 1 else None


_KREA_QUERY = re.compile(r"transformer_blocks_\d+_attn_to_(q|out(_0)?)$").match
_DOUBLE_STREAM = {
    double_stream.FLUX: A.FLUX,
    double_stream.CHROMA: A.CHROMA,
    double_stream.FLUX2: A.FLUX2,
    double_stream.QWEN_IMAGE: A.QWEN_IMAGE,
    double_stream.HUNYUAN_VIDEO: A.HUNYUAN_VIDEO,
    double_stream.AURAFLOW: A.AURAFLOW,
}


def _flux_like(evidence: Evidence, *, model: bool = False) -> tuple[Architecture, ...]:
    """Decides between Flux, Flux 2, Chroma, Qwen-Image, Hunyuan Video and AuraFlow: their blocks have the same names,
    most have the same width.
    """
    if not model and (found := double_stream.possible(evidence)):
        named = tuple(_DOUBLE_STREAM[name] for name in found)
        # Queries and outputs alone are the same in both.
        return (A.FLUX2, A.KREA2) if named == (A.FLUX2,) and all(map(_KREA_QUERY, evidence.names)) else named
    if not evidence.has(_FLUX_LIKE):
        return ()
    if evidence.has(r"^(double_|transformer_)blocks_(19|[2-9]\d)_") or evidence.has(
        r"^single_(transformer_)?blocks_(3[89]|[4-9]\d)_"
    ):
        return (A.HUNYUAN_VIDEO,)
    for layer, width in ((r"single_blocks_\d+_linear1$", 9), (r"double_blocks_\d+_(img|txt)_mlp_0$", 6)):
        if any(rows == width * columns for rows, columns in evidence.sizes(layer)):
            return (A.FLUX2,)
    return (A.FLUX,) if model or evidence.has(_MODULATED) else (A.FLUX, A.CHROMA)


def _unet(evidence: Evidence) -> tuple[Architecture, ...]:
    if not evidence.has(_UNET):
        return ()
    if evidence.has(r"_(time_stack|temporal_transformer_blocks|temporal_res_block)_"):
        return (A.SVD,)
    if evidence.has(r"^encoder_hid_proj$") or 5632 in evidence.inputs(r"^(add_embedding_linear_1|label_emb_0_0)$"):
        return (A.KOLORS,)
    widths = evidence.inputs(_UNET + r".*attn2_to_[kv]$")
    if known := {_CROSS[width] for width in widths if width in _CROSS}:
        return tuple(known) if len(known) == 1 else ()
    if evidence.has(r"_\d+_transformer_blocks_[1-9]_"):
        return (A.SDXL,) if evidence.has(r"_\d+_transformer_blocks_[4-9]_") else (A.SDXL, A.SDXL_REFINER)
    by_text = _text(evidence)
    if len(by_text) == 1 and by_text[0] in _CROSS.values():
        return by_text
    if evidence.has(r"^(down_blocks_0|up_blocks_3)_attentions_|^input_blocks_[12]_1_|^output_blocks_(9|10|11)_1_"):
        return (A.SD1, A.SD2)
    return (A.SD1, A.SD2, A.SDXL)


def _text(evidence: Evidence) -> tuple[Architecture, ...]:
    """Returns the candidates that the text encoders in a LoRA file allow."""
    t5 = r"encoder_block_\d+_layer_"
    if evidence.text(r"^text_encoder_3_"):
        return (A.SD3,)
    if evidence.text(r"^te3_"):  # kohya's T5, for both
        return (A.SD3, A.FLUX)
    if evidence.text(r"^(te2|text_encoder_2)_" + t5):
        return (A.FLUX,)
    # Language models have `layers` without `encoder`; several architectures share each of them.
    widths = evidence.text_inputs(r"encoder_layers_\d+_(self_attn_([qkv]_proj|to_[qkv])|mlp_fc1)$")
    if 1024 in widths:
        return (A.SD2,)
    if 1280 in widths:
        return (A.SDXL, A.SD3)
    if 768 in widths and evidence.text(r"^te_") and evidence.names:
        return (A.SD1,)
    return (A.SD1, A.SDXL, A.SD3, A.FLUX) if 768 in widths else ()


def _from_metadata(metadata: Mapping[str, str]) -> Iterable[Architecture]:
    for key in _METADATA:
        value = metadata.get(key, "").lower()
        yield from (a for a, pattern in _METADATA_PATTERNS.items() if re.search(pattern, value))
