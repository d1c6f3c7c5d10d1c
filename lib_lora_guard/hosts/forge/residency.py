"""Moves layers of a loaded model off the device for a while and back, where the whole model would be several times too much.

A layer that has left runs as Forge's own swapped layers do: its weight is copied to the device in each call, so the model
can go on working. What Forge placed in RAM itself is the same thing and can return too: a model placed beside a text encoder
or with another stack is not bound to that share for ever. So the layers carry the state, in Forge's own attributes, and
nothing beside them has to be kept right. Source of that form: Forge's `LoadedModel.model_load` and `model_unload`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from ...memory.out_of_memory import is_out_of_memory
from ...messages import say
from ...patching.parameters import modules, own_parameters
from ...runtime.host import Swapped
from ...runtime.ram_copies import WORTH_A_LINE_BYTES, RamCopies
from ...runtime.told_sizes import ToldSizes
from ...weights.storage import MB, scales_bytes
from .facts import is_denoiser, is_forges_text_encoder, loaded_module
from .types import LoadedModel

log = logging.getLogger(__name__)

CAST, CAST_BEFORE = "parameters_manual_cast", "prev_parameters_manual_cast"
"""Forge's attributes of a layer: whether its weight is copied to the device in each call, and the value before swapping."""


class Residency:
    """Knows which layers lie outside the device, and brings them back."""

    def __init__(
        self, merged_layers: Callable[[torch.nn.Module], Collection[torch.nn.Module]], copies: RamCopies
    ) -> None:
        """
        Args:
            merged_layers: returns the layers of a model that have a LoRA merged into them. These stay: their originals lie in
                RAM already, and the patched weights would be a second copy.
            copies: keeps copies of layers in RAM.
        """
        self._merged_layers, self._copies = merged_layers, copies
        self._told = ToldSizes()

    def swappable_bytes(self, loaded: LoadedModel) -> int:
        """Returns the bytes that `shrink` can take of a loaded model at most."""
        return sum(size for size, _ in self._candidates(loaded))

    def fixed_bytes(self, model: torch.nn.Module, outside: torch.device) -> int:
        """Returns the bytes of a model `outside` a device that Forge places whatever room there is: norms and other extensions'
        layers, of which none can be swapped."""
        return sum(size for size, one in _others(model, outside) if _has_weight(one))

    def loose_bytes(self, model: torch.nn.Module, outside: torch.device) -> int:
        """Returns the bytes of a model `outside` a device that Forge leaves where they are unless it places all of the model:
        raw parameters of modules that have no weight, as CLIP's scales, which the model's own code copies."""
        return sum(size for size, one in _others(model, outside) if not _has_weight(one))

    def away_bytes(self, model: torch.nn.Module) -> int:
        """Returns the bytes of a model that are copied to the device in each call and that `grow` can bring back."""
        return sum(size for size, _ in self._away(model))

    def swapped(self, model: torch.nn.Module) -> Swapped:
        """Returns what of a model is copied to the device in each call: merged layers' bytes too, which `grow` leaves."""
        layers = list(_swapped(model))
        away = self._that_return(model, layers)
        pinned = self._copies.pinned_bytes(layer for _, layer in away)
        return Swapped(sum(map(_bytes_in_ram, layers)), sum(size for size, _ in away), pinned)

    def shrink(self, loaded: LoadedModel, wanted_bytes: int) -> int:
        """Moves layers off the device until `wanted_bytes` have left it, or none is left that may go.

        Returns:
            The bytes moved.

        Raises:
            Exception: what moving raises; every layer has then moved whole or stayed.
        """
        model = loaded_module(loaded)
        if model is None:
            return 0
        moved, pinned_before = 0, self._copies.bytes
        kept, others = list[tuple[int, torch.nn.Module]](), list[tuple[int, torch.nn.Module]]()
        for one in self._candidates(loaded):
            (kept if self._copies.kept_bytes([one[1]]) else others).append(one)
        with self._copies.pinning() if is_denoiser(model) else contextlib.nullcontext():
            # Those with a copy in RAM leave for nothing.
            for group in (kept, others):
                for size, layer in _fewest(group, wanted_bytes - moved):
                    self._move_away(loaded, layer)
                    moved += size
        self.pin(model, pinned_before)
        return moved

    def pin(self, model: torch.nn.Module, before_bytes: int | None = None) -> None:
        """Brings the swapped layers of a denoiser to pinned RAM, as far as there is room.

        Args:
            model: any; nothing is done with one that is called a few times.
            before_bytes: what was pinned before the layers left, if some went there at once.
        """
        if not is_denoiser(model):
            return
        before_bytes = self._copies.bytes if before_bytes is None else before_bytes
        self._copies.pin(layer for _, layer in self._away(model))
        pinned = self._copies.bytes - before_bytes
        if pinned > 0:
            total_mb = self._copies.bytes / MB
            level = logging.INFO if pinned >= WORTH_A_LINE_BYTES else logging.DEBUG
            say(log, level, "memory.pinned", model=type(model).__name__, size_mb=pinned / MB, total_mb=total_mb)

    def copied_bytes(self, model: torch.nn.Module) -> int:
        """Returns the bytes of a model on the card that have their copy in RAM."""
        return self._copies.kept_bytes(_layers(model))

    @contextlib.contextmanager
    def placing(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Wraps Forge's own moves to the card: copies in RAM are kept, of a text encoder all."""
        with contextlib.ExitStack() as moves:
            for model in models:
                moves.enter_context(self._copies.moving(_layers(model), is_forges_text_encoder(model)))
            yield

    def to_ram(self, model: torch.nn.Module) -> None:
        """Takes layers off the card by the short way, before Forge moves all of the model."""
        merged = self._merged_layers(model)
        for layer in _layers(model):
            if layer not in merged:
                self._copies.to_ram(layer)

    def drop_unused(self) -> int:
        """Gives back copies of layers that are on the card; returns the bytes."""
        return self._copies.drop_unused()

    def grow(self, loaded: LoadedModel, room_bytes: int) -> int:
        """Brings swapped layers back, as far as `room_bytes` and the device itself go; returns the bytes moved."""
        model = loaded_module(loaded)
        if model is None:
            return 0
        moved, keeps = 0, self._copies.works
        # A text encoder's, or each part of it that has left for the denoiser once would be copied to RAM for each new prompt.
        returns = is_forges_text_encoder(model) and self._copies.keeps_all()
        for size, layer in _returning(self._away(model), room_bytes):
            before = self._copies.before_card(layer, returns) if keeps else {}
            try:
                layer.to(loaded.device)
            except BaseException as error:
                layer.to(loaded.model.offload_device)
                if not is_out_of_memory(error):
                    raise
                # Less is free than the driver said: the rest stays swapped.
                break
            self._copies.on_card(layer, before)
            _restore_cast(layer)
            moved += size
        if moved:
            loaded.model_accelerated = next(_swapped(model), None) is not None
            level = self._told.level(model, "memory.grown", moved)
            say(log, level, "memory.grown", model=type(model).__name__, size_mb=moved / MB)
        return moved

    def _away(self, model: torch.nn.Module) -> list[tuple[int, torch.nn.Module]]:
        """Returns the swapped layers that may come back."""
        return self._that_return(model, _swapped(model))

    def _that_return(
        self, model: torch.nn.Module, swapped: Iterable[torch.nn.Module]
    ) -> list[tuple[int, torch.nn.Module]]:
        """Returns which of the swapped layers may come back: a merged one moves with the whole model alone, which lifts the merges
        before."""
        merged = self._merged_layers(model)
        return [(size, layer) for layer in swapped if (size := _bytes_in_ram(layer)) and layer not in merged]

    def _candidates(self, loaded: LoadedModel) -> list[tuple[int, torch.nn.Module]]:
        model = loaded_module(loaded)
        if model is None:
            return []
        merged = self._merged_layers(model)
        return [
            (size, layer)
            for layer in _layers(model)
            if (size := _bytes_on(layer, loaded.device)) and layer not in merged
        ]

    def _move_away(self, loaded: LoadedModel, layer: torch.nn.Module) -> None:
        # Everything of a layer or nothing: `Module.to` goes parameter by parameter.
        try:
            if not self._copies.to_ram(layer):
                layer.to(loaded.model.offload_device)
        except BaseException:
            layer.to(loaded.device)
            raise
        if not hasattr(layer, CAST_BEFORE):
            setattr(layer, CAST_BEFORE, getattr(layer, CAST))
        setattr(layer, CAST, True)
        # If this is set, Forge gives the layers their own way of casting back when it unloads the model.
        loaded.model_accelerated = True


def _fewest(candidates: list[tuple[int, torch.nn.Module]], wanted_bytes: int) -> Iterator[tuple[int, torch.nn.Module]]:
    """Chooses large layers first, and last the smallest one that closes the gap: few copies, little too much."""
    left = wanted_bytes
    rest = sorted(_spread(candidates), key=lambda candidate: -candidate[0])
    while left > 0 and rest:
        enough = [candidate for candidate in rest if candidate[0] >= left]
        chosen = enough[-1] if enough else rest[0]
        rest.remove(chosen)
        left -= chosen[0]
        yield chosen


def _spread(candidates: list[tuple[int, torch.nn.Module]]) -> list[tuple[int, torch.nn.Module]]:
    """Orders layers so that the first few of them, however many, lie far from each other in the model: while the card calculates those
    between, the next one's copy has time. By their place with its bits reversed: 0, 4, 2, 6, 1, 5, 3, 7.
    """
    bits = max(0, len(candidates) - 1).bit_length()
    places = sorted(range(len(candidates)), key=lambda place: int(f"{place:0{bits}b}"[::-1], 2) if bits else 0)
    return [candidates[place] for place in places]


def _returning(candidates: list[tuple[int, torch.nn.Module]], room_bytes: int) -> list[tuple[int, torch.nn.Module]]:
    """Chooses what returns so that few large layers stay out: they calculate long enough to hide the next one's copy behind them
    (`patching/swapped_ahead.py`), and small ones, or those that see one token, do not. The room is used to the smallest layer.
    """
    if room_bytes <= 0:
        return []
    total = sum(size for size, _ in candidates)
    staying = list(_fewest(candidates, total - room_bytes))
    kept = {layer for _, layer in staying}
    returning = [one for one in candidates if one[1] not in kept]
    left = room_bytes - sum(size for size, _ in returning)
    for size, layer in sorted(staying, key=lambda candidate: -candidate[0]):
        if size <= left:
            left -= size
            returning.append((size, layer))
    return returning


def _swapped(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Returns the layers that Forge or `shrink` let run swapped."""
    for layer in modules(model):
        # Forge and `shrink` set it on the layer itself. Of a module without it, `hasattr` looks everywhere else too.
        if CAST_BEFORE in layer.__dict__:
            yield layer


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Returns the layers that Forge can run swapped."""
    for layer in modules(model):
        if not _has_children(layer) and _can_be_swapped(layer):
            yield layer


def _others(model: torch.nn.Module, outside: torch.device) -> Iterator[tuple[int, torch.nn.Module]]:
    """Returns the modules that Forge cannot run swapped, with what of each lies `outside` a device."""
    return (
        (size, one)
        for one in modules(model)
        if one._parameters and not _can_be_swapped(one) and (size := _bytes_outside(one, outside))
    )


def _can_be_swapped(module: torch.nn.Module) -> bool:
    return CAST in module.__dict__ or hasattr(module, CAST)


def _has_children(module: torch.nn.Module) -> bool:
    return bool(module._modules) and any(child is not None for child in module._modules.values())


def _has_weight(module: torch.nn.Module) -> bool:
    """True if Forge places a module for its `weight`. That is not asked for its value: a property may compute it, or raise."""
    places = (vars(module), module._parameters, module._buffers, module._modules)
    return any("weight" in names for names in places) or hasattr(type(module), "weight")


def _bytes_of(layer: torch.nn.Module) -> int:
    return sum(map(_size, own_parameters(layer)))


def _bytes_in_ram(layer: torch.nn.Module) -> int:
    return sum(_size(p) for p in own_parameters(layer) if p.device.type == "cpu")


def _bytes_outside(layer: torch.nn.Module, device: torch.device) -> int:
    return sum(_size(p) for p in own_parameters(layer) if p.device != device)


def _size(parameter: torch.nn.Parameter) -> int:
    data = parameter.data
    return data.numel() * data.element_size() + scales_bytes(parameter)


def _bytes_on(layer: torch.nn.Module, device: torch.device) -> int:
    """Returns 0 unless all of the layer lies on `device`: half-swapped layers stay as Forge placed them."""
    parameters = own_parameters(layer)
    return _bytes_of(layer) if parameters and all(p.device == device for p in parameters) else 0


def _restore_cast(layer: torch.nn.Module) -> None:
    if hasattr(layer, CAST_BEFORE):
        setattr(layer, CAST, getattr(layer, CAST_BEFORE))
        delattr(layer, CAST_BEFORE)
