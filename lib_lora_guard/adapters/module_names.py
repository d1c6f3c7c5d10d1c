"""Takes a module's name in a LoRA file apart: the prefixes before it, and the spellings that are one module.

Prefixes come in any order and number (`transformer.base_model.model.`, `lora_unet_model_diffusion_model_`). Sources: kohya
sd-scripts, LyCORIS (lycoris/kohya.py, wrapper.py), PEFT and diffusers, OneTrainer, SimpleTuner, ComfyUI, DiffSynth,
musubi-tuner; `torch.compile` (`_orig_mod.`), `DataParallel` (`module.`).

Trainers flatten some dots of a name and not others (OneTrainer keeps those of a LoHa's factors and not that of its alpha),
and converters give some tensors of a module another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TRAINER = r"(?:base_model|_orig_mod|module|model|pipe|lycoris|lora|oft)[._]|_+"
# diffusers and PixArt call their blocks `transformer_blocks`. Behind `lora_` OneTrainer names the component.
_TRANSFORMER = r"transformer(?:\.|_(?!blocks[._])|(?<=lora_transformer)_)"
_COMPONENT = r"(?:diffusion_model|prior_unet|prior(?!_te)|unet|dit|net)[._]|" + _TRANSFORMER

_ONE = re.compile(f"{_TRAINER}|{_COMPONENT}")
_ONE_OF_TRAINER = re.compile(_TRAINER)
_ALL = re.compile(f"(?:{_TRAINER}|{_COMPONENT})*")
_MOST_PREFIXES = 12
"""More than any file has; a hostile name has hundreds."""

_ENCODERS = re.compile(r"te1?_|te2_|te3_|text_encoder_(?:[23]_)?")
_SAME_ENCODER = {"te_": "te1_", "text_encoder_": "te1_", "text_encoder_2_": "te2_", "text_encoder_3_": "te3_"}


def without_prefixes(written: str) -> str:
    """Takes every prefix off a name in a file."""
    return written[_ALL.match(written).end() :]  # type: ignore[union-attr]  # it matches nothing at the least


def starts(written: str, *, of_text: bool = False) -> Iterator[int]:
    """Yields where the name itself may begin: at 0, then behind one prefix, behind two, and so on.

    Args:
        written: a name in a file.
        of_text: only prefixes that say nothing on the component, for names of text encoders.
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


def plain_name(module: str) -> str:
    """The module's name without dots and prefixes: the same for every spelling of it in one file."""
    # Before the dots go: `transformer.blocks` has a prefix, and `transformer_blocks` has none.
    flat = (without_prefixes(module) or module).replace(".", "_")
    encoder = _ENCODERS.match(flat)
    if encoder is None:
        return flat
    return _SAME_ENCODER.get(encoder[0], encoder[0]) + flat[encoder.end() :]
