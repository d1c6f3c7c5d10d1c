"""Stands in for the tensors of a file of which only the header was read, so that judging a LoRA file needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..lazy_torch import is_loaded, torch
from .header import MAX_VALUES, FileHeader
from .safetensors_file import FORMATS, read_numbers

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Number = float
"""`float` is a method below."""

_SIZES = {name: max(1, bits // 8) for bits, name in FORMATS.values() if name is not None}
_COMPUTED = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that torch multiplies in, and whose arithmetic with a number keeps them."""


class HeaderTensor:
    """Acts as a tensor on torch's meta device: it has a shape and a dtype, and no values but that of a single number.

    The few questions that adapters ask of shapes are answered here. Everything else, errors included, is torch's own
    answer for a tensor on its meta device, and loads torch.
    """

    __slots__ = ("dtype_name", "number", "shape")

    def __init__(self, shape: tuple[int, ...], dtype_name: str, number: Number | None = None) -> None:
        """Keeps the facts as they are given.

        Args:
            shape: Sizes in torch's order, (out, in).
            dtype_name: torch's name without "torch.": "bfloat16".
            number: The value, if the tensor holds one number and it was read.
        """
        self.shape, self.dtype_name, self.number = shape, dtype_name, number

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype; uint8 if this torch does not have it. Loads torch, `dtype_name` does not."""
        dtype: torch.dtype = getattr(torch, self.dtype_name, torch.uint8)
        return dtype

    @property
    def is_meta(self) -> bool:
        """True if the tensor has no value."""
        return self.number is None

    def is_floating_point(self) -> bool:
        """Returns True for floats of any width."""
        return self.dtype_name.startswith(("float", "bfloat"))

    def is_complex(self) -> bool:
        """Returns True for complex numbers."""
        return self.dtype_name.startswith("complex")

    def element_size(self) -> int:
        """Returns the bytes of one value in memory."""
        return _SIZES[self.dtype_name]

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def float(self) -> HeaderTensor:
        """Returns the same tensor in fp32."""
        return HeaderTensor(self.shape, "float32")

    def to(self, *target: Any, **options: Any) -> Any:
        """Returns itself for the meta device, where it lies already."""
        return self if target == ("meta",) and not options else self._on_meta().to(*target, **options)

    def new_empty(self, size: tuple[int, ...]) -> HeaderTensor:
        """Returns one of this dtype and another shape."""
        return self._with(*size)

    def flatten(self, start_dim: int = 0) -> Any:
        """Joins all dimensions from `start_dim` on."""
        if start_dim == 0:
            return self._with(self.numel())
        if 0 < start_dim < self.dim():
            return self._with(*self.shape[:start_dim], math.prod(self.shape[start_dim:]))
        return self._on_meta().flatten(start_dim)

    def narrow(self, dim: int, start: int, length: int) -> Any:
        """Returns `length` entries from `start` along `dim`."""
        if 0 <= dim < self.dim() and start >= 0 and length >= 0 and start + length <= self.shape[dim]:
            return self._with(*self.shape[:dim], length, *self.shape[dim + 1 :])
        return self._on_meta().narrow(dim, start, length)

    def __getitem__(self, place: Any) -> Any:
        if self.shape and isinstance(place, int) and 0 <= place < self.shape[0]:
            return self._with(*self.shape[1:])
        if self.shape and isinstance(place, slice) and place.step is None:
            return self._with(len(range(*place.indices(self.shape[0]))), *self.shape[1:])
        return self._on_meta()[place]

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, HeaderTensor) and self._has_product_with(other):
            return self._with(self.shape[0], other.shape[1])
        return self._on_meta() @ other

    def __mul__(self, factor: Any) -> Any:
        return self._with(*self.shape) if self._keeps_dtype_with(factor) else self._on_meta() * factor

    def __sub__(self, number: Any) -> Any:
        return self._with(*self.shape) if self._keeps_dtype_with(number) else self._on_meta() - number

    def __float__(self) -> Number:
        return float(self._on_meta()) if self.number is None else self.number

    def __bool__(self) -> bool:
        return bool(self._on_meta() if self.number is None else self.number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in HeaderTensor.__slots__:
            raise AttributeError(name)
        return getattr(self._on_meta(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch with tensors on the meta device instead (torch's protocol for classes like this)."""
        return function(*_on_meta(args), **_on_meta(kwargs or {}))

    def _with(self, *shape: int) -> HeaderTensor:
        return HeaderTensor(shape, self.dtype_name)

    def _has_product_with(self, other: HeaderTensor) -> bool:
        if not self.dtype_name == other.dtype_name in _COMPUTED or not self.dim() == other.dim() == 2:
            return False
        # torch refuses what no memory could hold.
        size = self.shape[0] * other.shape[1] * self.element_size()
        return self.shape[1] == other.shape[0] and size <= MAX_VALUES

    def _keeps_dtype_with(self, number: Any) -> bool:
        return self.dtype_name in _COMPUTED and isinstance(number, (int, Number))

    def _on_meta(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def header_tensors(
    header: FileHeader, numbers: Iterable[str], *, only_numbers: bool = False
) -> dict[str, HeaderTensor]:
    """Returns every tensor of a safetensors file without its values, but for those that hold one number each.

    Args:
        header: The file's header.
        numbers: Names of the tensors whose number is read.
        only_numbers: Leave out the others.

    Raises:
        FileFormatError: The numbers cannot be read.
    """
    found = read_numbers(header, numbers)
    return {
        name: HeaderTensor(entry.shape, FORMATS[entry.format][1] or "uint8", found.get(name))
        for name, entry in header.tensors.items()
        if not only_numbers or name in found
    }


def is_tensor(value: object) -> TypeIs[torch.Tensor]:
    """Returns True for tensors of torch and for tensors of a header."""
    return isinstance(value, HeaderTensor) or (is_loaded() and isinstance(value, torch.Tensor))


def _on_meta(value: Any) -> Any:
    if isinstance(value, HeaderTensor):
        return value._on_meta()
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(item) for item in value)
    return {key: _on_meta(item) for key, item in value.items()} if isinstance(value, dict) else value
