import pytest
from patching.kept_parameters import DISK_ONLY

from lib_lora_guard.patching import backup
from lib_lora_guard.patching.backup import BackupStore


@pytest.fixture
def on_gpu(monkeypatch):
    """Parameters count as lying on a GPU, so that their backups need a place."""
    monkeypatch.setattr(backup, "lies_in_ram", lambda parameter: False)


@pytest.fixture
def spooling(on_gpu, tmp_path):
    """A store that keeps every backup on the disk."""
    return BackupStore(lambda: DISK_ONLY, tmp_path / "spool")
