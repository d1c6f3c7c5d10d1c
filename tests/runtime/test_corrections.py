"""Corrections by measured peaks, without a host."""

import pytest
import torch

from lib_lora_guard.memory.calibration import REMEMBERED, Key, Kind
from lib_lora_guard.memory.calibration_file import CalibrationFile
from lib_lora_guard.planning.activations import Activations
from lib_lora_guard.runtime import corrections
from lib_lora_guard.runtime.corrections import Corrections, keep_calibration

CARD = torch.device("cuda", 0)
KEY = Key(Kind.STEP, "Flux", "nf4", "1024x1024", 1)
MB = 1 << 20


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Opened for a card that is at work."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 3060")
    found = Corrections(tmp_path)
    assert found.open_for(CARD)
    return found


def test_without_a_folder_or_a_card_nothing_is_corrected(tmp_path):
    for found, device in ((Corrections(), CARD), (Corrections(tmp_path), torch.device("cpu")), (Corrections(), None)):
        assert not found.open_for(device)
        found.note(KEY, 100 * MB, 200 * MB)
        found.settle()
        assert found.bytes(KEY, 100 * MB) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_peak_corrects_the_next_prediction_once_it_is_recorded(kept):
    kept.note(KEY, 100 * MB, 120 * MB)
    assert kept.bytes(KEY, 100 * MB) == 0
    kept.settle()
    assert kept.bytes(KEY, 100 * MB) == 20 * MB


def test_what_torch_holds_grows_with_what_is_used(kept):
    predicted = Activations(used_bytes=100 * MB, held_bytes=150 * MB)
    assert kept.held(KEY, predicted) == 150 * MB
    kept.note(KEY, 100 * MB, 120 * MB)
    kept.settle()
    assert kept.held(KEY, predicted) == 180 * MB
    assert kept.held(KEY, Activations(0, 7)) == 7, "nothing is used, so nothing is corrected"


def test_the_largest_peak_of_a_picture_is_recorded_once(kept, monkeypatch):
    writes, change = [], CalibrationFile.change
    monkeypatch.setattr(CalibrationFile, "change", lambda *args: writes.append(1) or change(*args))
    for peak in (110, 130, 120, None):
        kept.note(KEY, 100 * MB, None if peak is None else peak * MB)
    kept.settle()
    assert kept.bytes(KEY, 100 * MB) == 30 * MB
    kept.note(KEY, 100 * MB, 125 * MB)
    kept.settle()
    assert len(writes) == 1, "smaller than what this picture has taken already"
    kept.settle(is_new_picture=True)
    kept.note(KEY, 100 * MB, 125 * MB)
    kept.settle()
    assert len(writes) == 2


def test_a_peak_that_repeats_is_recorded_until_all_remembered_ones_are_the_same(kept, monkeypatch):
    writes, change = [], CalibrationFile.change
    monkeypatch.setattr(CalibrationFile, "change", lambda *args: writes.append(1) or change(*args))
    for _ in range(REMEMBERED + 4):
        kept.note(KEY, 100 * MB, 120 * MB)
        kept.settle()
        kept.settle(is_new_picture=True)
    assert len(writes) == REMEMBERED


def test_the_folder_is_given_to_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(corrections, "OF_PROCESS", Corrections())
    keep_calibration(tmp_path / "data")
    assert corrections.OF_PROCESS.folder == tmp_path / "data"
    assert not (tmp_path / "data").exists()
