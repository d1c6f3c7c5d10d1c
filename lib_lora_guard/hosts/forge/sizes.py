"""Counts quantised weights as what they take on the card.

GGUF: Forge places a model by the file's sizes and then bakes it, which can make it grow. NF4 and FP4: Forge counts a tenth of
the packed bytes for the scales, which take an eighth in blocks of 64: 150 MB of a Flux that were not reserved.

Source: Forge's `backend/memory_management.py` (`module_size`, which every decision of placement and eviction asks),
`backend/operations_gguf.py` (`ParameterGGUF`: `gguf_cls`, `baked`) and `backend/operations_bnb.py` (`ForgeParams4bit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Concatenate, TypeAlias

import torch

from ...patching.parameters import named_parameters
from ...planning.gguf_baked import growth_bytes
from ...runtime.hooks import P
from ...weights.storage import scales_bytes

_FOUR_BIT = ("nf4", "fp4")
FORGES_SCALES = 0.1
"""Bytes of scales for each packed byte, in Forge's count of a quantised weight."""
FORGES_VALUE_BYTES, VALUE_BYTES, SCALE_BYTES = 0.55, 0.5, 4
"""Bytes of a weight that is quantised on its way to the card: of a value in Forge's count, of a packed value, and of one
block's scale."""
USUAL_BLOCK = 64

Size: TypeAlias = float | tuple[float, float, float]
"""Bytes of a model; split: the whole, its own `weight`, and the rest."""


def module_size(
    original: Callable[Concatenate[torch.nn.Module, torch.device | None, torch.device | None, bool, P], Size],
    module: torch.nn.Module,
    exclude_device: torch.device | None = None,
    include_device: torch.device | None = None,
    return_split: bool = False,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Size:
    """Stands in place of `module_size`: Forge's own number, and by how much the weights take more or less.

    Args:
        original: Forge's.
        module: the model.
        exclude_device: leaves out what lies on this device.
        include_device: counts only what lies on this device.
        return_split: asks for the bytes of `weight` and of the rest, too.
        args: what a newer Forge passes.
        kwargs: the same.
    """
    parameters = named_parameters(module)
    asked = _Listed(parameters) if _lists_parameters(original) else module
    found = original(asked, exclude_device, include_device, return_split, *args, **kwargs)
    is_baked = bool(getattr(module, "gguf_baked", False))
    whole, weight = 0.0, 0.0
    for name, parameter in () if is_baked else parameters.items():
        more = _more_bytes(parameter)
        if more and parameter.device != exclude_device and include_device in (None, parameter.device):
            whole += more
            weight += more if name == "weight" else 0
    if not whole:
        return found
    if isinstance(found, tuple):
        return found[0] + whole, found[1] + weight, found[2] + whole - weight
    return found + whole


class _Listed(torch.nn.Module):
    """Stands for a model whose parameters are listed already: its own list would take as long as all the rest, and models are
    sized several times in each load."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self._list = parameters

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Returns the model's list. `_lists_parameters` lets only a function come here that passes nothing."""
        return iter(self._list.items())


_OF_FORGES_SIZE = frozenset({"named_parameters", "data", "device", "element_size", "getattr", "nelement"})
"""The names in the code of Forge's `module_size`, which asks a model for its list and nothing else."""


def _lists_parameters(size: Callable[..., Size]) -> bool:
    """True for Forge's own function. Another extension's, or a fork's that asks for more, gets the model."""
    if not isinstance(size, FunctionType) or size.__name__ != module_size.__name__:
        return False
    return set(size.__code__.co_names) == _OF_FORGES_SIZE


def _more_bytes(parameter: torch.nn.Parameter) -> float:
    """Returns how much a weight takes beyond Forge's count; negative for less."""
    if getattr(parameter, "quant_type", None) in _FOUR_BIT:
        return _more_than_packed(parameter)
    gguf_class = getattr(parameter, "gguf_cls", None)
    if gguf_class is None or getattr(parameter, "baked", False):
        return 0
    data = parameter.data
    return growth_bytes(gguf_class.__name__, data.numel() * data.element_size())


def _more_than_packed(parameter: torch.nn.Parameter) -> float:
    values: int = parameter.data.numel()
    if parameter.data.element_size() == 1:
        scales = scales_bytes(parameter)
        # Without its scales a packed weight cannot be read: then Forge's guess is as good as any.
        return scales - values * FORGES_SCALES if scales else 0
    block = getattr(parameter, "blocksize", None) or USUAL_BLOCK
    return float(values * (VALUE_BYTES + SCALE_BYTES / block - FORGES_VALUE_BYTES))
