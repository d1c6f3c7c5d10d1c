"""Corrections by measured peaks, without a host."""

from lib_lora_guard.runtime import corrections
from lib_lora_guard.runtime.corrections import Corrections, keep_calibration


def test_the_folder_is_given_to_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(corrections, "OF_PROCESS", Corrections())
    keep_calibration(tmp_path / "data")
    assert corrections.OF_PROCESS.folder == tmp_path / "data"
    assert not (tmp_path / "data").exists()
