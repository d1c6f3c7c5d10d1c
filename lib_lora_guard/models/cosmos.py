"""Module names of Cosmos-Predict2 and Anima, in the original layout (`blocks`) and that of diffusers.

Anima is a Cosmos-Predict2 of 2 billion parameters with an adapter between its text encoder and the transformer. Files
name the adapter as a part of the transformer (`llm_adapter`), of the text encoder, or as a component of its own
(diffusers' `text_conditioner`); Forge Neo keeps it in the text encoder. Sources: the parameter names of NVIDIA's and
Circlestone's checkpoints as Forge Neo (backend/nn/anima.py, loader.py) and diffusers
(convert_cosmos_transformer_checkpoint_to_diffusers, _convert_non_diffusers_anima_lora_to_diffusers) load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapters.base import Shape
from .routes import Spelling, both_ways, numbers

_ADAPTER = "llm_adapter."
_CONDITIONER = "text_conditioner."

_TOP = (
    ("x_embedder.proj.1", "patch_embed.proj"),
    ("t_embedder.1.linear_1", "time_embed.t_embedder.linear_1"),
    ("t_embedder.1.linear_2", "time_embed.t_embedder.linear_2"),
    ("t_embedding_norm", "time_embed.norm"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
)
_ATTENTION = (
    ("q_proj", "to_q"),
    ("k_proj", "to_k"),
    ("v_proj", "to_v"),
    ("output_proj", "to_out.0"),
    ("q_norm", "norm_q"),
    ("k_norm", "norm_k"),
)
_BLOCK = (
    *((f"self_attn.{theirs}", f"attn1.{ours}") for theirs, ours in _ATTENTION),
    *((f"cross_attn.{theirs}", f"attn2.{ours}") for theirs, ours in _ATTENTION),
    ("mlp.layer1", "ff.net.0.proj"),
    ("mlp.layer2", "ff.net.2"),
    *(
        (f"adaln_modulation_{part}.{n}", f"norm{number}.linear_{n}")
        for number, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for n in (1, 2)
    ),
)


def spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields all module names of a Cosmos-Predict2 or Anima transformer; none for other models."""
    yield from adapter_spellings(modules)
    blocks = numbers(modules, "blocks") or numbers(modules, "transformer_blocks")
    if not blocks or not _is_block(modules, blocks[0]):
        return
    for original, atom in _TOP:
        yield from both_ways(original, atom)
    for n in blocks:
        for original, atom in _BLOCK:
            yield from both_ways(f"blocks.{n}.{original}", f"transformer_blocks.{n}.{atom}")


def _is_block(modules: Mapping[str, Shape], n: int) -> bool:
    ours = f"transformer_blocks.{n}."
    return f"blocks.{n}.self_attn.q_proj" in modules or {ours + "norm1.linear_1", ours + "attn1.to_q"} <= modules.keys()


def adapter_name(flat: str) -> str:
    """The flat name of a module of the adapter, without all that stands before it in a file."""
    at = max(flat.find(name) for name in (_flat(_ADAPTER), _flat(_CONDITIONER)))
    return flat[at:].replace(_flat(_CONDITIONER), _flat(_ADAPTER), 1)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def adapter_spellings(modules: Mapping[str, Shape]) -> Iterator[Spelling]:
    """Yields the names of Anima's adapter, where it is a part of this component or all of it."""
    alone = any(f"blocks.{n}.self_attn.o_proj" in modules for n in numbers(modules, "blocks")[:1])
    if not alone and not any(numbers(modules, component + "blocks") for component in (_ADAPTER, _CONDITIONER)):
        return
    for module in modules:
        inner = module.removeprefix(_ADAPTER).removeprefix(_CONDITIONER)
        if alone or inner != module:
            yield Spelling(_ADAPTER + inner, (module,))
            yield Spelling(module, (module,))
