"""Corrections are kept in a file: written seldom, read by the next process, and never in the way of an image."""

import json
import logging

import pytest
import torch
from support.calibration_scene import (
    LATENT,
    Latent,
    flux_step,
    folder_of,
    kinds_in,
    scene_of,
)

from lib_lora_guard.memory.calibration import FILE_NAME, REMEMBERED, Calibration
from lib_lora_guard.memory.calibration_file import CalibrationFile


def test_a_picture_costs_few_writes_and_repetitions_none(scene, monkeypatch):
    writes = []
    change = CalibrationFile.change
    monkeypatch.setattr(CalibrationFile, "change", lambda *args: writes.append(1) or change(*args))
    counts = []
    for _ in range(REMEMBERED + 3):
        del writes[:]
        scene.picture(steps=20)
        counts.append(len(writes))
    assert max(counts) <= 3
    assert counts[-1] == 0, "nothing new is nothing to write"
    assert kinds_in(folder_of(scene))["step"] == REMEMBERED
    # Somebody resets the file: what is measured next is written again.
    (folder_of(scene) / FILE_NAME).unlink()
    scene.model.takes = int(1.1 * flux_step().used_bytes)
    scene.picture()
    scene.picture()
    assert kinds_in(folder_of(scene))["step"] == 2


def test_previews_do_not_multiply_the_writes(scene, monkeypatch):
    """The VAE decodes between steps, as with the preview method "Full"."""
    scene.memory.load_models_gpu([scene.text])
    scene.sample(steps=1)
    for _ in range(5):
        scene.decode()
        scene.model.apply_model(Latent(LATENT), 1)
    scene.decode()
    found = kinds_in(folder_of(scene))
    assert (found["step"], found["decode"]) == (1, 1)


def test_a_second_process_knows_what_the_first_has_measured(parts, card, tmp_path):
    with scene_of(parts, tmp_path) as first:
        first.model.takes = int(1.2 * flux_step().used_bytes)
        first.picture()
        expected = first.needs()
    with scene_of(parts, tmp_path) as second:
        second.unet.memory_required([2, *LATENT[1:]])
        assert second.needs() == expected > flux_step().held_bytes
        # And the other way round: what another wrote meanwhile is there after the next record.
        names = list(CalibrationFile(tmp_path / FILE_NAME).read())
        other = Calibration(tmp_path / FILE_NAME, "RTX 3060", torch.__version__)
        key = second.guard.calibration.estimates.step(second.model, (1, 128, 128))[0]
        other.record(key, flux_step().used_bytes, int(1.4 * flux_step().used_bytes))
        assert second.needs() == expected
        second.model.takes = int(1.2 * flux_step().used_bytes)
        second.picture()
        assert second.needs() == pytest.approx(1.4 * flux_step().held_bytes, rel=1e-6)
        assert all(name[:2] == ("RTX 3060", torch.__version__) for name in names)


@pytest.mark.parametrize("content", [b"", b"garbage", b"[1]", json.dumps({"version": 9}).encode()])
def test_a_broken_file_counts_as_none(parts, card, tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with scene_of(parts, tmp_path) as scene:
        scene.model.takes = int(1.2 * flux_step().used_bytes)
        assert scene.needs() == flux_step().held_bytes
        scene.picture()
        assert scene.needs() == pytest.approx(1.2 * flux_step().held_bytes, rel=1e-6)


def test_a_folder_that_cannot_be_written_is_logged_once(parts, card, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    (tmp_path / "file").write_text("in the way")
    with scene_of(parts, tmp_path / "file") as scene:
        scene.model.takes = int(1.2 * flux_step().used_bytes)
        for _ in range(3):
            scene.picture()
        assert scene.needs() == pytest.approx(1.2 * flux_step().held_bytes, rel=1e-6)
    said = [record for record in caplog.records if "what was measured cannot be written" in record.getMessage()]
    assert len(said) == 1
