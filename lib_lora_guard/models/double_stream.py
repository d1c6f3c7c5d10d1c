"""Tells Flux.1, Chroma, Flux.2, Qwen-Image, Hunyuan Video and AuraFlow apart: many of their modules share a name and a width.

A LoRA for a few blocks, or for attentions alone, may fit several of them. Each model is written down as its modules and
the number of its blocks; what contradicts that rules it out. Sources: the classes and default sizes of diffusers
(models/transformers), the parameter names of black-forest-labs' and Tencent's own code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .evidence import Evidence

FLUX, CHROMA, FLUX2, HUNYUAN_VIDEO, QWEN_IMAGE = "flux", "chroma", "flux2", "hunyuan_video", "qwen_image"
AURAFLOW = "auraflow"

Widths = tuple[float, float]
"""Input and output width in units of the hidden width; 0 for any."""
_ANY = (0, 0)


@dataclass(frozen=True)
class _Model:
    """One model: hidden width, blocks by stack, and modules by `(stack, flat name inside it)`; "" for those outside."""

    name: str
    width: int
    blocks: Mapping[str, int]
    modules: Mapping[tuple[str, str], Widths]

    def allows(self, stack: str, module: str, inputs: int | None, outputs: int | None, *, any_width: bool) -> bool:
        """True if the model may have a module of this name and of these widths."""
        widths = self.modules.get((stack, module))
        if widths is None:
            return False
        if any_width:
            return not (inputs and outputs and all(widths)) or outputs * widths[0] == inputs * widths[1]
        return all(
            not units or not found or found == units * self.width
            for units, found in zip(widths, (inputs, outputs), strict=True)
        )


def possible(evidence: Evidence) -> tuple[str, ...]:
    """Returns the models of this family that a LoRA file may be made for, likeliest first; () if it is for none."""
    inside = []
    for name, (outputs, inputs) in evidence.names.items():
        stack, module = _split(name)
        if (stack, module) in _KNOWN:
            inside.append((stack, module, inputs, outputs))
    if not any(stack for stack, *_ in inside):
        return ()
    found = [model for model in _MODELS if all(model.allows(*each, any_width=False) for each in inside)]
    if not found and any(stack in _NAMED_BY_BFL for stack, *_ in inside):
        # Small models for tests, and those of the family that are not published yet.
        found = [model for model in _MODELS if all(model.allows(*each, any_width=True) for each in inside)]
    for stack in _STACKS:
        numbers = evidence.blocks(stack)
        found = [model for model in found if not numbers or max(numbers) < model.blocks.get(stack, 0)]
    return tuple(dict.fromkeys(model.name for model in found))


def _split(name: str) -> tuple[str, str]:
    """Splits `double_blocks_3_img_attn_qkv` into the stack and the rest; the stack is "" for modules outside."""
    stack, blocks, rest = name.partition("blocks_")
    number, _, module = rest.partition("_")
    return (stack + "blocks", module) if blocks and number.isdigit() else ("", name)


def _named(stack: str, **by_widths: tuple[Widths, str]) -> Iterable[tuple[tuple[str, str], Widths]]:
    for widths, names in by_widths.values():
        for name in names.split():
            yield (stack, name), widths


def _both(names: str) -> str:
    """Names of the image's modules and of the text's: `*_attn_proj`."""
    return " ".join(name.replace("*", x) for name in names.split() for x in ("img", "txt"))


_ATTENTION = {
    **dict(
        _named(
            "double_blocks",
            fused=((1, 3), _both("*_attn_qkv") + " qkv"),
            apart=((1, 1), _both("*_attn_qkv_0 *_attn_qkv_1 *_attn_qkv_2 *_attn_proj") + " proj"),
            norms=(_ANY, _both("*_attn_norm_query_norm *_attn_norm_key_norm")),
        )
    ),
    **dict(
        _named(
            "transformer_blocks",
            inputs=((1, 1), "attn_to_q attn_to_k attn_to_v attn_add_q_proj attn_add_k_proj attn_add_v_proj"),
            outputs=((1, 1), "attn_to_out attn_to_out_0 attn_to_add_out"),
            norms=(_ANY, "attn_norm_q attn_norm_k attn_norm_added_q attn_norm_added_k"),
        )
    ),
    **dict(
        _named(
            "single_blocks",
            fused=((1, 3), "qkv linear1_qkv"),
            apart=((1, 1), "linear1_0 linear1_1 linear1_2"),
            norms=(_ANY, "norm_query_norm norm_key_norm"),
        )
    ),
    **dict(_named("single_transformer_blocks", norms=(_ANY, "attn_norm_q attn_norm_k"))),
    **dict(_named("", top=(_ANY, "img_in img_in_proj txt_in x_embedder context_embedder final_layer_linear proj_out"))),
}
_OF_CHROMA = {
    **_ATTENTION,
    **dict(
        _named("double_blocks", up=((1, 4), _both("*_mlp_0")), down=((4, 1), _both("*_mlp_2"))),
    ),
    **dict(
        _named(
            "transformer_blocks",
            up=((1, 4), "ff_net_0_proj ff_context_net_0_proj"),
            down=((4, 1), "ff_net_2 ff_context_net_2"),
        )
    ),
    **dict(_named("single_blocks", up=((1, 7), "linear1"), mlp=((1, 4), "linear1_3"), down=((5, 1), "linear2 proj"))),
    **dict(
        _named(
            "single_transformer_blocks",
            inputs=((1, 1), "attn_to_q attn_to_k attn_to_v"),
            up=((1, 4), "proj_mlp"),
            down=((5, 1), "proj_out"),
        )
    ),
}
_EMBEDDERS = tuple(f"time_text_embed_{x}_embedder_linear_{n}" for x in ("timestep", "text", "guidance") for n in (1, 2))
_FINAL = "final_layer_adaLN_modulation_1 norm_out_linear"
_OF_FLUX = {
    **_OF_CHROMA,
    **dict(_named("double_blocks", modulation=((1, 6), _both("*_mod_lin")))),
    **dict(_named("transformer_blocks", modulation=((1, 6), "norm1_linear norm1_context_linear"))),
    **dict(_named("single_blocks", modulation=((1, 3), "modulation_lin"))),
    **dict(_named("single_transformer_blocks", modulation=((1, 3), "norm_linear"))),
    **dict(
        _named(
            "",
            embedders=(_ANY, " ".join(_EMBEDDERS)),
            layers=(_ANY, " ".join(f"{x}_in_{y}_layer" for x in ("time", "vector", "guidance") for y in ("in", "out"))),
            final=(_ANY, _FINAL),
        )
    ),
}
_OF_FLUX2 = {
    **_ATTENTION,
    **dict(_named("double_blocks", up=((1, 6), _both("*_mlp_0")), down=((3, 1), _both("*_mlp_2")))),
    **dict(
        _named(
            "transformer_blocks",
            up=((1, 6), "ff_linear_in ff_context_linear_in"),
            down=((3, 1), "ff_linear_out ff_context_linear_out"),
        )
    ),
    **dict(_named("single_blocks", up=((1, 9), "linear1"), mlp=((1, 6), "linear1_3"), down=((4, 1), "linear2"))),
    **dict(_named("single_transformer_blocks", up=((1, 9), "attn_to_qkv_mlp_proj"), down=((4, 1), "attn_to_out"))),
    **dict(
        _named(
            "",
            layers=(_ANY, " ".join(f"{x}_in_{y}_layer" for x in ("time", "guidance") for y in ("in", "out"))),
            embedders=(_ANY, " ".join(name.replace("text_embed", "guidance_embed", 1) for name in _EMBEDDERS)),
            final=(_ANY, _FINAL),
        )
    ),
}
_OF_QWEN = {
    **{key: widths for key, widths in _ATTENTION.items() if key[0] in ("", "transformer_blocks")},
    **dict(
        _named(
            "transformer_blocks",
            modulation=((1, 6), _both("*_mod_1")),
            up=((1, 4), _both("*_mlp_net_0_proj")),
            down=((4, 1), _both("*_mlp_net_2")),
        )
    ),
    **dict(_named("", embedders=(_ANY, " ".join(_EMBEDDERS[:2])), final=(_ANY, "norm_out_linear"))),
}
_OF_AURAFLOW = {
    **{key: widths for key, widths in _OF_CHROMA.items() if key[0] == "single_transformer_blocks" and "attn" in key[1]},
    **dict(_named("", top=(_ANY, "context_embedder proj_out norm_out_linear"))),
}
"""Its other layers have names of their own, which `architecture` knows."""


def _blocks(double: int, single: int) -> dict[str, int]:
    return {
        "double_blocks": double,
        "transformer_blocks": double,
        "single_blocks": single,
        "single_transformer_blocks": single,
    }


_MODELS = (
    _Model(FLUX, 3072, _blocks(19, 38), _OF_FLUX),
    _Model(CHROMA, 3072, _blocks(19, 38), _OF_CHROMA),
    _Model(FLUX2, 3072, _blocks(5, 20), _OF_FLUX2),  # Klein 4B
    _Model(FLUX2, 4096, _blocks(8, 24), _OF_FLUX2),  # Klein 9B
    _Model(FLUX2, 6144, _blocks(8, 48), _OF_FLUX2),  # dev
    _Model(QWEN_IMAGE, 3072, {"transformer_blocks": 60}, _OF_QWEN),
    _Model(HUNYUAN_VIDEO, 3072, _blocks(20, 40), _OF_FLUX),
    _Model(AURAFLOW, 3072, {"single_transformer_blocks": 32}, _OF_AURAFLOW),
)
_STACKS = ("double_blocks", "transformer_blocks", "single_blocks", "single_transformer_blocks")
_NAMED_BY_BFL = ("double_blocks", "single_blocks", "single_transformer_blocks")
_KNOWN = frozenset(module for model in _MODELS for module in model.modules)
