"""Prefixes before a module's name: those that trainers write in files, and those that wrappers put before a model.

They come in any order and number (`transformer.base_model.model.`, `lora_unet_model_diffusion_model_`). Sources: kohya
sd-scripts, LyCORIS (lycoris/kohya.py, wrapper.py), PEFT and diffusers, OneTrainer, SimpleTuner, ComfyUI, DiffSynth,
musubi-tuner; `torch.compile` (`_orig_mod.`), `DataParallel` (`module.`), FSDP and activation checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_TRAINER = r"(?:base_model|_orig_mod|module|model|pipe|lycoris|lora|oft)[._]|_+"
# diffusers and PixArt call their blocks `transformer_blocks`. Behind `lora_` OneTrainer names the component.
_TRANSFORMER = r"transformer(?:\.|_(?!blocks[._])|(?<=lora_transformer)_)"
_COMPONENT = r"(?:diffusion_model|prior_unet|prior(?!_te)|unet|dit|net)[._]|" + _TRANSFORMER

_ONE = re.compile(f"{_TRAINER}|{_COMPONENT}")
_ONE_OF_TRAINER = re.compile(_TRAINER)
_ALL = re.compile(f"(?:{_TRAINER}|{_COMPONENT})*")

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
"""Wrappers of single layers: they stand anywhere in a model's names."""
_AROUND = re.compile(r"(?:base_model\.model|module|model|dit|pipe)\.")
"""Wrappers around a whole model."""
_LANGUAGE_MODEL = re.compile(r"model\.(?:layers\.\d+\.(?:self_attn|mlp)|embed_tokens|language_model)\.")
"""Names that begin with `model.` by themselves: language models of transformers."""
_ROLES = frozenset(("weight", "bias"))
_MOST_PREFIXES = 12
"""More than any file has; a hostile name has hundreds."""


def without_prefixes(written: str) -> str:
    """Takes every prefix off a name in a file."""
    return written[_ALL.match(written).end() :]  # type: ignore[union-attr]  # it matches nothing at the least


def starts(written: str, *, of_text: bool = False) -> Iterator[int]:
    """Yields where the name itself may begin: at 0, then behind one prefix, behind two, and so on.

    Args:
        written: A name in a file.
        of_text: Only prefixes that say nothing on the component, for names of text encoders.
    """
    pattern = _ONE_OF_TRAINER if of_text else _ONE
    at = 0
    yield at
    for _ in range(_MOST_PREFIXES):
        found = pattern.match(written, at)
        if found is None:
            return
        at = found.end()
        yield at


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Takes the names of wrappers out of a model's parameter names.

    Args:
        names: All parameters of the model.

    Returns:
        The names without wrappers, each with the model's own name.
    """
    own = {name: name for name in names}
    inside = [wrapper for wrapper in _INSIDE if wrapper in "\n".join(own)]
    if inside:
        own = {_without(inside, name): name for name in own}
    while (front := _common_wrapper(own)) is not None:
        own = {name[len(front) :]: real for name, real in own.items()}
    return own


def _without(wrappers: Iterable[str], name: str) -> str:
    for wrapper in wrappers:
        name = name.replace(wrapper, "")
    return name


def _common_wrapper(names: Iterable[str]) -> str | None:
    """Returns the wrapper that all names begin with; None if there is none."""
    front: str | None = None
    for name in names:
        if front is None:
            found = _AROUND.match(name)
            if found is None:
                return None
            front = found[0]
        if not name.startswith(front) or _LANGUAGE_MODEL.match(name) or name[len(front) :] in _ROLES:
            return None
    return front
