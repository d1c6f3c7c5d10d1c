import gc
import logging
import sys

import pytest

from contract_neo.host import REAL, Host

_real_host = None


def pytest_collection_modifyitems(config, items):
    """A real Neo has LoRAs on the fly in its one way: the tests of the other are the double's."""
    if REAL:
        doubles = [item for item in items if "newer" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in doubles]
        config.hook.pytest_deselected(items=doubles)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # The real backend reads sys.argv at import; pytest's own arguments are not Neo's.
    monkeypatch.setattr(sys, "argv", ["contract", "--cpu"])


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
def newer(host):
    """The host with LoRAs on the fly as a Neo of September 2026 has them."""
    host.base.ONLINE_AS_FUNCTIONS = host.operations.FUNCTIONS_GET_COPIES = True
    return host


@pytest.fixture
def guarded(host):
    """The host with the guard in place; taken out again at the end, whatever happened."""
    from lib_lora_guard.hosts.neo import takeover as neo
    from lib_lora_guard.runtime import installed

    host.guard = neo.install()
    yield host
    host.memory.current_loaded_models.clear()
    installed.uninstall()
    host.guard.settings.options, host.guard.settings.as_trained = {}, False


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "lib_lora_guard")
    return caplog
