import gc
import sys

import pytest
import torch
from support.still_ram import keep_ram_still

from contract.host import REAL, Host

_real_host = None


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # The real backend reads sys.argv at import; pytest's own arguments are not Forge's.
    monkeypatch.setattr(sys, "argv", ["contract", "--always-cpu"])


@pytest.fixture(scope="module", autouse=True)
def _still_ram():
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            keep_ram_still(patch)
        yield


@pytest.fixture
def host():
    """The host without the guard."""
    global _real_host
    if REAL:
        _real_host = _real_host or Host()
        fresh = _real_host
    else:
        fresh = Host()
    yield fresh
    fresh.close()
    gc.collect()


@pytest.fixture
def guarded(host):
    """The host with the guard in place; taken out again at the end, whatever happened."""
    from lib_lora_guard.hosts.forge import takeover as forge

    takeover = forge.install()
    host.guard = takeover
    yield host
    host.memory.current_loaded_models.clear()
    forge.uninstall()
    host.guard.settings.options, host.guard.settings.as_trained = {}, False


@pytest.fixture
def x():
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def saving(host):
    """Turns the guard on, with saving; what was built before it is stock's."""
    from contract.savers import engine_class
    from lib_lora_guard.hosts.forge import takeover as forge
    from lib_lora_guard.hosts.webui import saving as forge_saving

    host.engine_class = engine_class()

    def start():
        takeover = forge.install()
        forge_saving.install(takeover.hooks, takeover.stacks.engines)
        return takeover

    yield start
    host.memory.current_loaded_models.clear()
    forge.uninstall()
