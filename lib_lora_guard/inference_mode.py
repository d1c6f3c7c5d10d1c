"""Runs functions outside inference mode and without gradients, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .lazy_torch import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference(function: Callable[P, T]) -> Callable[P, T]:
    """Makes `function` run outside inference mode and without gradients; both are as before when it has ended.

    Tensors made in inference mode could never be changed or differentiated outside it. torch's own context managers are
    Python code: an interrupt inside them leaves gradients off until its traceback is freed, or for good. The one below is
    not, and it restores both modes.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
            # Inside another one: hundreds of weights of one change.
            return function(*args, **kwargs)
        with torch._C._InferenceMode(False):
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)

    return wrapped
