"""Maps the module names in a LoRA file to the weights of one model.

A name has three layers. Prefixes come first (`lora_unet_`, `transformer.`, `base_model.model.`; `adapters.module_names`) and stand
for a component. The rest is the module's name inside it, in the original layout or that of diffusers. A name is looked
up as it is written, then with one prefix taken off, then with two: a name that is the model's own counts first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ..adapters.base import Shape
from ..adapters.module_names import starts
from ..errors import LoraMismatchError
from . import cosmos, flux, flux2, krea2, lumina, mmdit, text, unet, wan
from .routes import Modules, Route, Spelling, Table, flatten
from .wrappers import unwrapped

LAYOUTS: tuple[Callable[[Mapping[str, Shape]], Iterator[Spelling]], ...] = (
    unet.spellings,
    flux.spellings,
    flux2.spellings,
    mmdit.spellings,
    lumina.spellings,
    krea2.spellings,
    cosmos.spellings,
    wan.spellings,
)
"""Give the names of a denoiser's modules in all layouts, from its own names and shapes; none for other models."""

_ROLES = {"weight": "weight", "in_proj_weight": "weight", "bias": "bias", "in_proj_bias": "bias", "scale": "weight"}
"""Maps the last part of a parameter's name to its role; RMSNorm of the original layout has a `scale`."""

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "dit.", "net.", "")
"""Possible prefixes of the denoiser, in the order tried; Cosmos' and Anima's own files say `net.`."""
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

_OLD_ENDING = re.compile(r"[._]lora(?:_linear_layer)?$")
_PARAMETER = re.compile(r"[._](?:in_proj_)?(weight|bias|scale)$")

LONGEST_NAME = 1000
"""No real module has a longer name, and removing prefixes from longer ones would take minutes."""
_MOST_REMEMBERED = 20_000
"""Names of files that are remembered with what they lead to: those of some ten files."""


class Place(NamedTuple):
    """One parameter of the model that a tensor of a file changes."""

    key: str
    """Its full name in the model."""
    route: Route


class NameMap:
    """The module names of one model: a denoiser, text encoders, or both, in either layout."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        """Builds the tables of names.

        Args:
            shapes: Parameter names and real (dequantized) shapes. They may come from a Forge model, from
                `named_parameters()` of a diffusers or transformers module (compiled or wrapped too), or from a whole
                checkpoint's header.
        """
        self._parameters: dict[str, dict[str, str]] = {}
        own = unwrapped(shapes)
        modules: dict[str, Shape] = {}
        self._real: dict[str, str] = {}
        """The model's own name of every module, by its name without wrappers."""
        for name, real in own.items():
            module, _, last = name.rpartition(".")
            role = _ROLES.get(last)
            if role is None or (last == "scale" and module + ".weight" in own):
                # A parameter that no layer owns (`modulation`, `text_projection`) counts as a module by itself.
                module, real_module, role = name, real, "weight"
            elif module:
                real_module = real[: -len(last) - 1]
            else:
                continue
            self._parameters.setdefault(real_module, {})[role] = real
            if role == "weight":
                modules[module], self._real[module] = tuple(shapes[real]), real_module
        self._modules = modules
        # open_clip multiplies by it from the right, and has no layer for it.
        self._transposed = {name for name in self._parameters if name.endswith("text_projection") and name in shapes}
        outside = {name: shapes[real] for name, real in own.items() if not name.startswith(DENOISER_PREFIXES[:2])}
        self._encoders = text.find_encoders(outside)
        self._text = {
            prefix: self._table(prefix, own, text.spellings(own, self._encoders[prefix]))
            for prefix, own in self._owned_by_text()
        }
        self._denoiser = self._make_denoiser()
        self._known: dict[tuple[str, str], tuple[Place, ...]] = {}

    def routes(self, module: str) -> tuple[Route, ...]:
        """Finds the weights of the model that a module of a LoRA file addresses; () if the model has none.

        Args:
            module: The name as written in the file, without the tensor's ending (`.lora_up.weight`). The name of a raw
                parameter (`...query_norm.scale`, as in BFL's control LoRAs) returns the module that owns it; see
                `parameter`.
        """
        return self._look_up(module)[0]

    def places(self, module: str, parameter: str = "weight") -> tuple[Place, ...]:
        """Finds the parameters of the model that an adapter of a file changes; () if the model has none.

        Args:
            module: The name as written in the file. A name that ends in `bias` means the bias of the module before.
            parameter: What the adapter changes, "weight" or "bias".
        """
        known = self._known.get((module, parameter))
        if known is None:
            routes, named = self._look_up(module)
            role, parameters = named or parameter, self._parameters
            if len(self._known) > _MOST_REMEMBERED:
                self._known.clear()
            known = self._known[module, parameter] = tuple(
                [Place(key, route) for route in routes if (key := parameters[route.module].get(role)) is not None]
            )
        return known

    def parameter(self, module: str, role: str = "weight") -> str:
        """Returns the full name of the "weight" or "bias" of a route's module.

        It differs from `module.role` for RMSNorm of the original layout (`scale`), open_clip's attention
        (`in_proj_weight`) and parameters that no layer owns.

        Raises:
            LoraMismatchError: The module has no such parameter.
        """
        try:
            return self._parameters[module][role]
        except KeyError:
            raise LoraMismatchError.of("lora.no_parameter", module=module, parameter=role) from None

    def _look_up(self, written: str) -> tuple[tuple[Route, ...], str | None]:
        """Returns the routes of a name, and "bias" where it is that of a bias."""
        routes, role = self._search(written)
        if self._transposed and any(route.module in self._transposed for route in routes):
            routes = tuple(route._replace(transposed=True) for route in routes)
        return routes, role

    def _search(self, written: str) -> tuple[tuple[Route, ...], str | None]:
        if written in self._parameters:
            return (Route(written),), None
        if len(written) > LONGEST_NAME:
            return (), None
        plain = _plain(written)
        if found := self._find(plain):
            return found, None
        shorter = _OLD_ENDING.sub("", plain)
        if shorter != plain and (found := self._find(shorter)):
            return found, None
        if (last := _PARAMETER.search(shorter)) and (found := self._find(shorter[: last.start()])):
            return found, "bias" if last[1] == "bias" else None
        # Some trainers leave the separator of the tensor's ending there.
        if (shorter := plain.rstrip("_")) != plain:
            return self._find(shorter), None
        return (), None

    def _find(self, written: str) -> tuple[Route, ...]:
        flat = flatten(written)
        for at in starts(written):
            if routes := self._denoiser.routes(written[at:], flat[at:]):
                return routes
        if "llm_adapter" in flat or "text_conditioner" in flat:
            return self._in_adapter(cosmos.adapter_name(flat))
        if not self._text:
            return ()
        for at in starts(written, of_text=True):
            inner, flat_inner = written[at:], flat[at:]
            hint = text.hint_of(flat_inner)
            prefixes = text.candidates(text.HINTS[hint], self._encoders) if hint else list(self._encoders)
            found = [routes for prefix in prefixes if (routes := self._in_text(prefix, inner[len(hint) :]))]
            # Without a hint, a name that several encoders have is ambiguous: none of them is chosen.
            if len(found) == 1 or (found and hint):
                return found[0]
            if hint:
                return ()
        return ()

    def _in_text(self, prefix: str, inner: str) -> tuple[Route, ...]:
        table, flat = self._text[prefix], flatten(inner)
        if routes := table.routes(inner, flat):
            return routes
        start = text.inside_containers(flat)
        return table.routes(inner[start:], flat[start:]) if start else ()

    def _in_adapter(self, name: str) -> tuple[Route, ...]:
        """The routes of a module of Anima's adapter: in the transformer, in a text encoder, or the whole model."""
        tables = (self._denoiser, *self._text.values())
        return next((routes for table in tables if (routes := table.routes(name, name))), ())

    def _owned_by_text(self) -> list[tuple[str, dict[str, Shape]]]:
        return [(prefix, _below(self._modules, prefix, self._encoders.keys() - {prefix})) for prefix in self._encoders]

    def _make_denoiser(self) -> Table:
        for prefix in DENOISER_PREFIXES:
            if prefix in self._encoders:
                continue
            own = _below(self._modules, prefix, {*self._encoders, *(() if prefix else _OTHERS)})
            if own:
                inner = unwrapped(own) if prefix else dict(zip(own, own, strict=True))
                shapes = Modules({name: own[real] for name, real in inner.items()})
                made = [spelling for spellings in LAYOUTS for spelling in spellings(shapes)]
                paths = {name: self._real[prefix + real] for name, real in inner.items()}
                return Table(shapes, made, paths)
        return Table({}, (), {})

    def _table(self, prefix: str, own: Mapping[str, Shape], made: Iterator[Spelling]) -> Table:
        return Table(own, made, {name: self._real[prefix + name] for name in own})


def _plain(written: str) -> str:
    """Takes out of a name what wrappers and old versions of diffusers have put in."""
    if "processor" in written:
        written = written.replace(".processor.", ".").replace("_processor_", "_")
    if "_orig_mod" in written:
        written = written.replace("_orig_mod.", "").replace("_orig_mod_", "")
    if "sformer_blocks" in written and "transformer_blocks" not in written:
        # Some exports for Flux.2 have lost the begin of it, as diffusers' lora_conversion_utils.py knows.
        written = written.replace("sformer_blocks", "transformer_blocks")
    return written


def _below(modules: Mapping[str, Shape], prefix: str, others: set[str]) -> dict[str, Shape]:
    """Returns the modules under `prefix`, without it, except those under a longer prefix of `others`."""
    foreign = tuple(other for other in others if other and len(other) > len(prefix))
    return {
        name[len(prefix) :]: shape
        for name, shape in modules.items()
        if name.startswith(prefix) and not name.startswith(foreign)
    }
