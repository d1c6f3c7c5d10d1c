"""Plays the driver that locks pages of RAM."""

import torch

from lib_lora_guard.runtime.ram_copies import RamCopies, _Pinned


class Driver:
    """Locks `most` tensors."""

    def __init__(self, most=99):
        self.most, self.locked, self.released = most, {}, 0

    def register(self, tensor):
        if len(self.locked) >= self.most:
            return False
        self.locked[tensor.data_ptr()] = tensor.nbytes
        return True

    def release(self, tensor):
        del self.locked[tensor.data_ptr()]
        self.released += 1


def pinned_by(copies: RamCopies, layer: torch.nn.Module) -> Driver:
    """Lets `copies` pin a few bytes for a layer, on a machine of any size; returns the driver that has locked them."""
    driver = Driver()
    pinned = copies._pinned[layer] = _Pinned(layer, driver)
    assert pinned.add(torch.zeros(8))
    assert driver.locked
    return driver
