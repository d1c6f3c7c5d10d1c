import pytest
import torch
from support.calibration_scene import scene_of


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 3060")


@pytest.fixture
def scene(parts, card, tmp_path):
    with scene_of(parts, tmp_path / "data") as found:
        yield found
