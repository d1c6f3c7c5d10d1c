"""Device copies: made once for each device and dtype, never kept on the CPU, never inference tensors."""

import torch

from lib_lora_guard.patching.device_cache import DeviceCache

CARD = torch.device("meta")


class Maker:
    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return torch.ones(2)


def test_a_copy_is_made_once_for_each_dtype_and_again_after_it_was_dropped():
    cache, make = DeviceCache(), Maker()
    first = cache.get(CARD, torch.float16, make)
    assert cache.get(CARD, torch.float16, make) is first
    cache.get(CARD, torch.bfloat16, make)
    assert (make.made, len(cache)) == (2, 2)
    cache.drop()
    assert len(cache) == 0
    assert cache.get(CARD, torch.float16, make) is not first


def test_on_the_cpu_nothing_is_kept():
    cache, make = DeviceCache(), Maker()
    for _ in range(3):
        cache.get(torch.device("cpu"), torch.float32, make)
    assert (make.made, len(cache)) == (3, 0)


def test_copies_made_during_inference_can_be_changed_outside_it():
    for device in (CARD, torch.device("cpu")):
        with torch.inference_mode():
            made = DeviceCache().get(device, torch.float32, Maker())
        made.add_(1)
        assert not made.is_inference()


def test_a_copy_that_fails_is_tried_again():
    cache, tries = DeviceCache(), []

    def make():
        tries.append(None)
        if len(tries) == 1:
            raise MemoryError
        return torch.ones(2)

    for _ in range(2):
        try:
            cache.get(CARD, torch.float16, make)
        except MemoryError:
            assert len(cache) == 0
    assert (len(tries), len(cache)) == (2, 1)
