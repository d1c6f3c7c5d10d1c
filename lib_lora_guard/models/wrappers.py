"""Takes wrappers out of a model's own names: those of PEFT, `torch.compile`, `DataParallel`, FSDP and activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
"""Wrappers of single layers: they stand anywhere in a model's names."""
_AROUND = re.compile(r"(?:base_model\.model|module|model|dit|pipe)\.")
"""Wrappers around a whole model."""
_LANGUAGE_MODEL = re.compile(r"model\.(?:layers\.\d+\.(?:self_attn|mlp)|embed_tokens|language_model)\.")
"""Names that begin with `model.` by themselves: language models of transformers."""
_ROLES = frozenset(("weight", "bias"))


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
