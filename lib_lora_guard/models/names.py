"""Maps the module names in a LoRA file to the weights of one model.

A name has three layers. The trainer's prefix comes first (`lora_unet_`, `transformer.`, `base_model.model.`) and stands
for a component. The rest is the module's name inside it, in the original layout or that of diffusers. Sources of the
prefixes: kohya sd-scripts, LyCORIS (lycoris/kohya.py, wrapper.py), PEFT and diffusers, OneTrainer, ComfyUI, XLabs, as
the key maps of Forge and diffusers' lora_conversion_utils.py list them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..adapters.base import Shape
from ..errors import LoraMismatchError
from . import flux, mmdit, text, unet
from .routes import Route, Table, flatten

_ROLES = {"weight": "weight", "in_proj_weight": "weight", "bias": "bias", "in_proj_bias": "bias", "scale": "weight"}
"""Maps the last part of a parameter's name to its role; RMSNorm of the original layout has a `scale`."""

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "")
"""Possible prefixes of the denoiser, in the order tried."""
_OTHERS = (
    "first_stage_model.",
    "vae.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "control_model.",
    "model_ema.",
)
"""Other components of a whole checkpoint; a denoiser without a prefix does not include them."""

_TRAINER = ("base_model_model_", "lycoris_", "lora_")
_DENOISER = ("", "model_diffusion_model_", "diffusion_model_", "prior_unet_", "prior_", "unet_", "transformer_")
_OLD_ENDING = re.compile(r"[._]lora(?:_linear_layer)?$")
_PARAMETER = re.compile(r"[._](?:weight|bias|scale)$")


LONGEST_NAME = 1000
"""No real module has a longer name, and removing prefixes from longer ones would take minutes."""


class NameMap:
    """The module names of one model: a denoiser, text encoders, or both, in either layout."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        """Builds the tables of names.

        Args:
            shapes: Parameter names and real (dequantized) shapes. They may come from a Forge model, from
                `named_parameters()` of a diffusers or transformers module, or from a whole checkpoint's header.
        """
        self._parameters: dict[str, dict[str, str]] = {}
        modules: dict[str, Shape] = {}
        for name, shape in shapes.items():
            module, _, last = name.rpartition(".")
            role = _ROLES.get(last)
            if module and role and (last != "scale" or module + ".weight" not in shapes):
                self._parameters.setdefault(module, {})[role] = name
                if role == "weight":
                    modules[module] = tuple(shape)
        self._modules = modules
        self._encoders = text.find_encoders(shapes)
        self._text = {prefix: Table(prefix, own, text.spellings(own)) for prefix, own in self._owned_by_text()}
        self._denoiser = self._make_denoiser()

    def routes(self, module: str) -> tuple[Route, ...]:
        """Finds the weights of the model that a module of a LoRA file addresses; () if the model has none.

        Args:
            module: The name as written in the file, without the tensor's ending (`.lora_up.weight`). The name of a raw
                parameter (`...query_norm.scale`, as in BFL's control LoRAs) returns the module that owns it; see
                `parameter`.
        """
        if module in self._modules:
            return (Route(module),)
        if len(module) > LONGEST_NAME:
            return ()
        plain = _OLD_ENDING.sub("", module.replace(".processor.", ".").replace("_processor_", "_"))
        return self._find(module) or self._find(plain) or self._find(_PARAMETER.sub("", plain))

    def parameter(self, module: str, role: str = "weight") -> str:
        """Returns the full name of the "weight" or "bias" of a route's module.

        It differs from `module.role` for RMSNorm of the original layout (`scale`) and open_clip's attention
        (`in_proj_weight`).

        Raises:
            LoraMismatchError: The module has no such parameter.
        """
        try:
            return self._parameters[module][role]
        except KeyError:
            raise LoraMismatchError.of("lora.no_parameter", module=module, parameter=role) from None

    def _find(self, written: str) -> tuple[Route, ...]:
        flat = flatten(written)
        while trainer := next((p for p in _TRAINER if flat.startswith(p)), None):
            flat, written = flat[len(trainer) :], written[len(trainer) :]
        for prefix in _DENOISER:
            if flat.startswith(prefix) and (routes := self._denoiser.routes(written[len(prefix) :])):
                return routes
        hint = next((begin for begin in text.HINTS if flat.startswith(begin)), "")
        prefixes = text.candidates(text.HINTS[hint], self._encoders) if hint else list(self._encoders)
        inner = written[len(hint) :]
        found = [routes for prefix in prefixes if (routes := self._in_text(prefix, inner))]
        # Without a hint, a name that several encoders have is ambiguous: none of them is chosen.
        return found[0] if len(found) == 1 or (found and hint) else ()

    def _in_text(self, prefix: str, inner: str) -> tuple[Route, ...]:
        # ComfyUI and Forge keep the encoder itself under "transformer."
        nested = inner[len("transformer_") :] if flatten(inner).startswith("transformer_") else ""
        return self._text[prefix].routes(inner) or self._text[prefix].routes(nested)

    def _owned_by_text(self) -> list[tuple[str, dict[str, Shape]]]:
        return [(prefix, _below(self._modules, prefix, self._encoders.keys() - {prefix})) for prefix in self._encoders]

    def _make_denoiser(self) -> Table:
        for prefix in DENOISER_PREFIXES:
            if prefix in self._encoders:
                continue
            own = _below(self._modules, prefix, {*self._encoders, *(() if prefix else _OTHERS)})
            if own:
                made = (*unet.spellings(own), *flux.spellings(own), *mmdit.spellings(own))
                return Table(prefix, own, made)
        return Table("", {}, ())


def _below(modules: Mapping[str, Shape], prefix: str, others: set[str]) -> dict[str, Shape]:
    """Returns the modules under `prefix`, without it, except those under a longer prefix of `others`."""
    foreign = tuple(other for other in others if other and len(other) > len(prefix))
    return {
        name[len(prefix) :]: shape
        for name, shape in modules.items()
        if name.startswith(prefix) and not name.startswith(foreign)
    }
