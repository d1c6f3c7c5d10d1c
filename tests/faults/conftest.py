import pytest
import torch

from faults.models import DEVICE, FaultHost


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch):
    """A card's convolutions take 10 of the 23 bits of a number if they may (TF32); these tests look at all of them."""
    if DEVICE.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def guarded():
    """The double with the guard in place; taken out again at the end, whatever happened."""
    from lib_lora_guard.hosts.forge import takeover as forge

    host = FaultHost()
    host.guard = forge.install()
    yield host
    host.memory.current_loaded_models.clear()
    forge.uninstall()
    host.close()
