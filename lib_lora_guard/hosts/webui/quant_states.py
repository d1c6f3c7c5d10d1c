"""Takes the scales of 4-bit weights to the card without waiting for the card.

A weight of bitsandbytes has two to six small tensors beside its values. Forge and Neo copy each by a copy that first waits until the
card has done everything it was given, so with every swapped layer the processor stands still (measured on an H200, Neo: 34 ms a step
for 55 MB of layers). Here the copies are queued, and the table of values, the same for all layers, is on the card once.
Source: `copy_quant_state` in both hosts' `backend/operations_bnb.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ...runtime.ram_copies import QuantState

State = TypeVar("State", bound=QuantState)


class QuantStates:
    """Belongs to one takeover."""

    def __init__(self, is_on: Callable[[], bool]) -> None:
        """
        Args:
            is_on: False if the user has switched it off.
        """
        self._is_on = is_on
        self._tables: dict[tuple[tuple[float, ...], torch.dtype, torch.device], torch.Tensor] = {}

    def copy_quant_state(
        self,
        original: Callable[..., State | None],
        state: State | None,
        device: torch.device | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> State | None:
        """Stands in place of `copy_quant_state`: what the host copies lies on the card by then."""
        if state is not None and device is not None and self._is_on():
            target = torch.device(device)
            if target.type != "cpu" and state.absmax.device.type == "cpu":
                state = self._on(target, state)
        return original(state, device, *args, **kwargs)

    def _on(self, device: torch.device, state: State) -> State:
        there = copy.copy(state)
        there.absmax = state.absmax.to(device, non_blocking=True)
        there.code = self._table(device, state.code)
        if state.offset is not None:
            there.offset = state.offset.to(device, non_blocking=True)
        if state.nested:
            there.state2 = self._on(device, state.state2)
        return there

    def _table(self, device: torch.device, code: torch.Tensor) -> torch.Tensor:
        if code.device.type != "cpu":
            return code.to(device)
        key = (tuple(code.tolist()), code.dtype, device)
        if key not in self._tables:
            # Waits for the card, once for each table.
            self._tables[key] = code.to(device)
        return self._tables[key]

    def drop(self) -> None:
        """Frees the tables."""
        self._tables.clear()
