"""Tensors whose values are computed at their first use, for code that passes a whole state dict on and reads it later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class DeferredTensor(torch.Tensor):
    """A tensor with dtype, shape and device, and no memory.

    A clone of it is deferred too, so copying a state dict costs nothing; it is no snapshot. Every other operation of
    torch works on a copy of the values: no view and no in-place operation reaches the memory that `read` returns.
    Writing into the deferred tensor raises RuntimeError; writing into a view of it changes the view alone. Access to its
    memory (numpy, a storage) ends in an error of torch's. Pickled or deep-copied it is a plain tensor.

    Args:
        read: Returns the values: a new tensor each time, or always the memory they lie in.
        dtype: The dtype of the values.
        shape: Their shape.
        device: Their device.
    """

    # All operations arrive at `__torch_dispatch__`, below torch's functions in Python.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own value for this

    @staticmethod
    def __new__(
        cls, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int], device: torch.device
    ) -> DeferredTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        deferred: DeferredTensor = made
        return deferred

    def __init__(
        self, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int], device: torch.device
    ) -> None:
        self.read = read

    @classmethod
    def of(cls, tensor: torch.Tensor) -> DeferredTensor:
        """Defers a tensor that exists: the values are those it has when it is read."""
        return cls(lambda: tensor, tensor.dtype, tuple(tensor.size()), tensor.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without types
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.clone.default and isinstance(args[0], cls):
            source = args[0]
            return cls(source.read, source.dtype, tuple(source.shape), source.device)
        for place, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(_argument(args, kwargs or {}, place, argument.name), cls):
                raise RuntimeError(f"{func}: a deferred tensor cannot be written into; clone its values first")
        # In inference mode a view must be one of an inference tensor, and the values are none.
        with torch.inference_mode(False), torch.no_grad():
            real_args, real_kwargs = tree_map_only(cls, cls._copy, (args, dict(kwargs or {})))
            return func(*real_args, **real_kwargs)

    def _copy(self) -> torch.Tensor:
        return self.read().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self._copy())  # type: ignore[no-any-return]  # the memo holds what was put there

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copy().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's has no types

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument for its own use
        return f"DeferredTensor({list(self.shape)}, {self.dtype}, {self.device})"


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)
