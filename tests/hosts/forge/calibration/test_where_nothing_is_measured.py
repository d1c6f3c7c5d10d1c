"""Without a card, a folder or the guard nothing is measured, and every call reaches Forge."""

import sys
import types
from dataclasses import replace

import psutil
import pytest
import torch
from support.calibration_scene import (
    GB,
    LATENT,
    MB,
    Latent,
    flux_step,
    modules,
    scene_of,
)
from support.fake_card import CARD, RAM

from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.memory.calibration_peaks import Peaks


def test_on_the_cpu_torchs_cuda_is_not_touched(parts, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.cuda was asked")

    with scene_of(parts, tmp_path / "data", device=RAM) as scene:
        for name in [n for n in dir(torch.cuda) if callable(getattr(torch.cuda, n)) and n[0].islower()]:
            monkeypatch.setattr(torch.cuda, name, refuse)
        scene.unet.memory_required([2, *LATENT[1:]])
        scene.model.takes = 3 * flux_step().used_bytes
        calibration = scene.guard.calibration
        calibration.peaks = None
        for hook in (calibration.load_models_gpu, calibration.model_load):
            loaded = types.SimpleNamespace(device=RAM, model=scene.unet)
            models = [scene.unet] if hook == calibration.load_models_gpu else loaded
            assert hook(lambda *args: "loaded", models) == "loaded"
        assert calibration.apply_model(lambda *args: "step", scene.model, Latent(LATENT, RAM), 1) == "step"
        assert calibration.decode_inner(lambda *args: "picture", scene.vae, Latent(LATENT, RAM)) == "picture"
        assert calibration.factor_bytes(scene.unet, 5) == 5
        assert calibration.load_bytes([scene.unet.model], RAM) == calibration.decode_bytes() == 0
        assert scene.needs() == flux_step().held_bytes
        monkeypatch.undo()
    assert not (tmp_path / "data").exists()


def test_cuda_is_not_started(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: pytest.fail("asked for the card"))
    with scene_of(parts, tmp_path / "data") as scene:
        scene.model.takes = 3 * flux_step().used_bytes
        scene.picture()
        assert scene.needs() == flux_step().held_bytes
    assert not (tmp_path / "data").exists()


def test_without_a_folder_nothing_is_measured(parts, card):
    with scene_of(parts, None) as scene:
        scene.model.takes = 3 * flux_step().used_bytes
        scene.guard.calibration.peaks = None
        scene.picture()
        assert scene.needs() == flux_step().held_bytes


def test_calls_of_another_kind_pass_through(scene):
    calibration = scene.guard.calibration
    assert calibration.apply_model(lambda *args, **kwargs: (args, kwargs), 1) == ((1,), {})
    for x in (None, 3, torch.zeros(2), Latent((4,)), Latent(())):
        assert calibration.apply_model(lambda *args: args[1:], scene.model, x, 2) == (x, 2)
    odd = types.SimpleNamespace(device=CARD, vae_dtype=torch.bfloat16)
    for vae, samples in ((odd, Latent(LATENT)), (scene.vae, None), (scene.vae, Latent((4,)))):
        assert calibration.decode_inner(lambda *args: args, vae, samples) == (vae, samples)
    assert calibration.load_models_gpu(lambda models, extra: (models, extra), iter([]), extra=4) == ([], 4)


def test_a_look_at_the_memory_that_fails_costs_no_image(scene, monkeypatch):
    def refused():
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(scene.guard.journal, "_snapshot", refused)
    scene.picture()


def test_a_second_install_keeps_measuring_and_going_gives_all_back(parts, card, tmp_path):
    with scene_of(parts, tmp_path) as scene:
        k_model = scene.modules["backend.modules.k_model"].KModel
        vae = scene.modules["backend.patcher.vae"].VAE
        monitor = scene.modules["modules.memmon"].MemUsageMonitor
        places = [
            (k_model, "apply_model"),
            (k_model, "memory_required"),
            (vae, "decode_inner"),
            (vae, "decode_tiled_"),
            (monitor, "monitor"),
            (monitor, "read"),
            (scene.memory, "load_models_gpu"),
            (scene.memory.LoadedModel, "model_load"),
        ]
        inside = [getattr(owner, name) for owner, name in places]
        count = len(scene.guard.hooks.hooks)
        # "Reload UI" runs the scripts again.
        scene.guard.install_loaded(sys.modules)
        assert [getattr(owner, name) for owner, name in places] == inside
        assert len(scene.guard.hooks.hooks) == count
        # A module that was loaded again has a fresh class, which is hooked too.
        fresh = modules()["backend.modules.k_model"]
        sys.modules["backend.modules.k_model"] = fresh
        scene.guard.install_loaded(sys.modules)
        assert fresh.KModel.apply_model.lora_guard_hook.active
        scene.guard.hooks.restore()
        for (owner, name), hooked in zip(places, inside, strict=True):
            found = getattr(owner, name)
            assert found is not hooked, name
            assert not hasattr(found, "lora_guard_hook"), name
        assert not hasattr(fresh.KModel.apply_model, "lora_guard_hook")
        # Switched on again, it measures as before.
        scene.guard.install()
        sys.modules["backend.modules.k_model"] = scene.modules["backend.modules.k_model"]
        scene.guard.install_loaded(sys.modules)
        scene.model.takes = int(1.2 * flux_step().used_bytes)
        scene.picture()
        assert scene.needs() == pytest.approx(1.2 * flux_step().held_bytes, rel=1e-6)


@pytest.mark.parametrize("name", ["load_models_gpu", "free_memory"])
def test_off_and_on_after_another_extension_has_wrapped(scene, name):
    """Its wrapper has no parameters of the host's names."""
    ours = getattr(scene.memory, name)
    setattr(scene.memory, name, lambda *args, **kwargs: ours(*args, **kwargs))
    scene.guard.uninstall()
    again = scene.guard = ForgeTakeover(
        replace(scene.parts_of_host, memory=scene.memory), corrections=scene.guard.calibration.corrections
    )
    again.memory.total_bytes = lambda device: scene.machine.total
    again.preflight.room_bytes = lambda: None
    again.calibration.peaks, again.control.refresh = Peaks(scene.allocator), scene.refresh
    again.install()
    scene.memory.load_models_gpu([scene.text], memory_required=GB)
    assert scene.memory.module_size(scene.text.model, include_device=CARD) == 1000 * MB
    scene.memory.free_memory(scene.machine.total - 500 * MB, CARD)
    assert scene.machine.free() >= scene.machine.total - 500 * MB
