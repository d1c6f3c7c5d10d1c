"""Tensors that are calculated when somebody uses them, for code that passes a whole state dict on and reads it later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only


class DeferredTensor(torch.Tensor):
    """Has dtype, shape and device, and no memory. `read()` gives the values, new each time or the very memory they lie in.

    A clone of it is deferred too, so that copying a state dict costs nothing: it is no snapshot. Every other operation of
    torch works on a copy of the values, so that no view or in-place operation reaches what `read` reads; writing into the
    deferred tensor itself raises RuntimeError, writing into a view of it changes the view alone. Whoever asks for its memory
    (numpy, a storage) gets an error of torch's. Pickled and deep-copied it is a plain tensor.
    """

    # Operations come to `__torch_dispatch__` alone, below Python's functions.
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
        """What lies in `tensor` when it is read."""
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
        # Views made in inference mode would have to be views of an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            real_args, real_kwargs = tree_map_only(cls, cls._copy, (args, dict(kwargs or {})))
            return func(*real_args, **real_kwargs)

    def _copy(self) -> torch.Tensor:
        return self.read().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self._copy())  # type: ignore[no-any-return]  # what is kept there is what was put there

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copy().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's has no types

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument of its own use
        return f"DeferredTensor({list(self.shape)}, {self.dtype}, {self.device})"


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)
