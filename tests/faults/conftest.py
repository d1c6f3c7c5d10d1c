import pytest
import torch

from faults.models import DEVICE, FaultHost
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.memory import take_snapshot
from lib_lora_guard.runtime.machine import Machine


@pytest.fixture(autouse=True)
def _whole_fp32(monkeypatch):
    """A card's convolutions take 10 of the 23 bits of a number if they may (TF32); these tests look at all of them."""
    if DEVICE.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="package", autouse=True)
def _one_look_at_the_memory():
    """A sweep asks for the machine's memory some ten thousand times, and what is planted decides here, not what is free."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            snapshot = take_snapshot(DEVICE)
            patch.setattr(Machine, "snapshot", lambda machine, nvml=None: snapshot)
        yield


@pytest.fixture
def guarded():
    """The double with the guard in place; taken out again at the end, whatever happened."""
    host = FaultHost()
    host.guard = forge.install()
    yield host
    host.memory.current_loaded_models.clear()
    forge.uninstall()
    host.guard.settings.options, host.guard.settings.as_trained = {}, False
    host.close()
