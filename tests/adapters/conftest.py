"""Fixtures of the tests of hostile LoRAs."""

import pytest
import torch
from support.hostile_loras import Model, lora, save
from support.live_memory import LiveMemory


@pytest.fixture
def good(tmp_path):
    """A LoRA that does no harm, to be applied beside a hostile one."""
    return save(tmp_path / "good.safetensors", lora("sq", 16, 16))


@pytest.fixture(scope="module")
def warm():
    """Loads and sets up what torch does at its first use: that is no cost of a file."""
    with LiveMemory(), torch.no_grad():
        Model()()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
