import pytest

from faults.models import FaultHost


@pytest.fixture
def guarded():
    """The double with the guard in place; taken out again at the end, whatever happened."""
    from lib_lora_guard.hosts import forge

    host = FaultHost()
    host.guard = forge.install()
    yield host
    host.memory.current_loaded_models.clear()
    forge.uninstall()
    host.close()
