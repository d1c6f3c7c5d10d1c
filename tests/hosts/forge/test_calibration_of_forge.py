"""Peaks are measured while a Forge with a card that is not there makes pictures, and the next needs are corrected by them."""

import contextlib
import gc
import json
import logging
import sys
import threading
import types
from dataclasses import replace

import psutil
import pytest
import torch
from contract.host import Host
from support.fake_card import CARD, RAM, FakeMemory, IntegratedAutoencoderKL, JointTextEncoder, Machine, parameter
from support.fake_models import flux_shapes

from lib_lora_guard.hosts.forge.api import probe
from lib_lora_guard.hosts.forge.calibration import SETTLED_BYTES, load_key
from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.memory.calibration import FILE_NAME, HIGHEST, LOWEST, REMEMBERED, Calibration, Kind
from lib_lora_guard.memory.calibration_file import CalibrationFile
from lib_lora_guard.memory.calibration_peaks import Count, Peaks
from lib_lora_guard.planning import activations
from lib_lora_guard.planning.tokens import Picture, tokens_for
from lib_lora_guard.runtime import corrections as forge_corrections
from lib_lora_guard.runtime.corrections import Corrections, keep_calibration

MB, GB = 1 << 20, 1 << 30
LATENT = (1, 16, 128, 128)
"""A picture of 1024 x 1024."""
DECODE_ASKED = 2178 * 128 * 128 * 64 * 2
FORGES = {"cond_or_uncond": [0], "sigmas": 1, "cond_mark": 2, "cond_indices": [0], "uncond_indices": []}


def flux_step(rows=1):
    """What a step of Flux uses and holds at that size, by the formula alone."""
    tokens = replace(tokens_for("Flux", Picture(1024, 1024)), rows=rows)
    return activations.step(tokens, Picture(1024, 1024, rows), {"a": (3072, 3072)}, 2)


class Allocator:
    """Counts as torch's does, with the weights on the fake card."""

    def __init__(self, machine):
        self.machine = machine
        self.extra = self.top = 0

    def now(self):
        return self.machine.total - self.machine.free() + self.extra

    def pass_by(self, size):
        self.top = max(self.top, self.now() + size)

    def keep(self, size):
        self.extra += size
        self.pass_by(0)

    def read(self, device):
        peak = max(self.top, self.machine.peak + self.extra, self.now())
        return Count(self.now(), peak, peak, peak)

    def reset(self, device):
        self.top, self.machine.peak = self.now(), 0


class Latent(torch.Tensor):
    """A tensor of `shape` on the card, without one."""

    @staticmethod
    def __new__(cls, shape, device=CARD):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


class Holder(torch.nn.Module):
    pass


class KModel(torch.nn.Module):
    """Flux with two blocks of each kind in its own width; `takes` and `leaves` are bytes of one call."""

    def __init__(self, scene, shapes):
        super().__init__()
        self.scene, self.takes, self.leaves = [scene], 0, 0
        self.computation_dtype, self.storage_dtype = torch.bfloat16, "nf4"
        self.diffusion_model = Holder()
        self.parts = [self.diffusion_model]
        for number, (name, shape) in enumerate(shapes.items()):
            holder = self.diffusion_model
            *owners, leaf = name.split(".")
            for owner in owners:
                if not hasattr(holder, owner):
                    holder.add_module(owner, Holder())
                holder = getattr(holder, owner)
            holder.register_parameter(leaf, parameter(scene.machine, shape))
            self.parts += [holder] if number else []
        self.parts = list(dict.fromkeys(self.parts))
        scene.machine.models.add(self)

    def apply_model(self, x, t, **kwargs):
        allocator = self.scene[0].allocator
        allocator.pass_by(self.takes)
        allocator.keep(self.leaves)
        self.leaves = 0
        return x

    def memory_required(self, input_shape):
        rows, _, height, width = input_shape
        return 1.28 * rows * height * width * 2 * 16384


class VAE:
    """`takes`: bytes that decoding one picture takes."""

    def __init__(self, scene):
        self.scene, self.device, self.vae_dtype, self.takes = scene, CARD, torch.bfloat16, 0
        self.first_stage_model = IntegratedAutoencoderKL(scene.machine, [20 * MB] * 8)
        self.patcher = scene.patcher(self.first_stage_model)
        self.fails = False

    def memory_used_decode(self, shape, dtype):
        return 2178 * shape[2] * shape[3] * 64 * 2

    def decode_inner(self, samples_in):
        asked = self.memory_used_decode(samples_in.shape, self.vae_dtype)
        self.scene.memory.load_models_gpu([self.patcher], memory_required=asked)
        self.free = self.scene.machine.free()
        self.scene.allocator.pass_by(self.takes)
        return self.decode_tiled_(samples_in) if self.fails else "picture"

    def decode_tiled_(self, samples):
        return "tiled"


class MemUsageMonitor:
    def __init__(self, allocator):
        self.run_flag, self.allocator, self.data = threading.Event(), allocator, {}

    def monitor(self):
        self.run_flag.set()

    def read(self):
        count = self.allocator.read(CARD)
        self.data.update(active_peak=count.active_peak, reserved_peak=count.reserved_peak, free=1)
        return self.data


@pytest.fixture(scope="module")
def parts():
    double = Host()
    gc.collect()
    gc.freeze()
    yield probe()
    gc.unfreeze()
    double.close()


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 3060")


def modules():
    """Forge's modules of which classes are hooked, as fresh classes."""
    made = {}
    for module, kind in (
        ("backend.modules.k_model", KModel),
        ("backend.patcher.vae", VAE),
        ("modules.memmon", MemUsageMonitor),
    ):
        made[module] = types.ModuleType(module)
        setattr(made[module], kind.__name__, type(kind.__name__, (kind,), dict(kind.__dict__)))
    return made


class Scene:
    def __init__(self, parts, monkeypatch, folder, total=24 * GB, device=CARD, shapes=None):
        self.machine = Machine(total)
        self.memory = FakeMemory(self.machine, 1 * GB)
        self.device, self.parts_of_host = device, parts
        self.allocator = Allocator(self.machine)
        guard = self.guard = ForgeTakeover(replace(parts, memory=self.memory), corrections=Corrections(folder))
        guard.calibration.peaks = Peaks(self.allocator)
        guard.memory.total_bytes = lambda device: self.machine.total
        guard.preflight.room_bytes = lambda: None
        guard.control.refresh = self.refresh
        self.factor_bytes, self.applied = 0, lambda: None
        guard.loras.factor_bytes = lambda patcher: self.factor_bytes if patcher is self.unet else 0
        self.modules = modules()
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        guard.install()
        guard.install_loaded(sys.modules)
        self.model = self.modules["backend.modules.k_model"].KModel(
            self, shapes or flux_shapes(hidden=3072, double=2, single=2)
        )
        self.unet = self.patcher(self.model)
        self.text = self.patcher(JointTextEncoder(self.machine, [100 * MB] * 10))
        self.vae = self.modules["backend.patcher.vae"].VAE(self)
        self.vae.device = device
        self.model.takes, self.vae.takes = flux_step().used_bytes, used_by_decode()

    def patcher(self, model):
        return self.parts_of_host.base.ModelPatcher(model, load_device=self.device, offload_device=RAM)

    def refresh(self, original, loader, *args, **kwargs):
        loader.loaded_hash = "as wished"
        self.applied()

    def needs(self, rows=1):
        """Of a step, as Forge asks in each."""
        return self.model.memory_required([rows, *LATENT[1:]])

    def sample(self, steps=4, rows=1, **kwargs):
        required = self.unet.memory_required([2, *LATENT[1:]])
        self.memory.load_models_gpu([self.unet], memory_required=required)
        for _ in range(steps):
            x = Latent((rows, *LATENT[1:]), self.device)
            self.model.apply_model(x, 1, **{"transformer_options": dict(FORGES), **kwargs})

    def decode(self, pictures=1):
        return self.vae.decode_inner(Latent((pictures, *LATENT[1:]), self.device))

    def picture(self, **kwargs):
        self.memory.load_models_gpu([self.text])
        self.sample(**kwargs)
        self.decode()

    def close(self):
        self.memory.current_loaded_models.clear()
        self.guard.uninstall()


def used_by_decode():
    return int(DECODE_ASKED * activations.DECODE_WHERE_FORGE_HAS)


@contextlib.contextmanager
def scene_of(parts, folder, **settings):
    with pytest.MonkeyPatch.context() as patch:
        scene = Scene(parts, patch, folder, **settings)
        try:
            yield scene
        finally:
            scene.close()


@pytest.fixture
def scene(parts, card, tmp_path):
    with scene_of(parts, tmp_path / "data") as found:
        yield found


def kinds_in(folder):
    """How often each kind was measured, from the file."""
    found = {}
    for name, entry in CalibrationFile(folder / FILE_NAME).read().items():
        found[name[2]] = found.get(name[2], 0) + entry.count
    return found


def folder_of(scene):
    return scene.guard.calibration.corrections.folder


def corrected(predicted, error_bytes):
    """What `Calibration` makes of it, in what is held."""
    used = predicted.used_bytes
    bounded = min(max(error_bytes, -int(-LOWEST * used)), int(HIGHEST * used))
    return predicted.held_bytes + bounded * predicted.held_bytes // used


# -- a step


def test_a_right_prediction_changes_nothing(scene):
    before = scene.needs()
    assert before == flux_step().held_bytes
    for _ in range(REMEMBERED + 1):
        scene.picture()
    assert scene.needs() == before


@pytest.mark.parametrize(("share", "expected"), [(0.2, 0.2), (0.5, 0.5), (0.51, 0.5), (3.0, 0.5)])
def test_too_little_predicted_is_corrected_at_once_within_bounds(scene, share, expected):
    step = flux_step()
    scene.model.takes = step.used_bytes + int(share * step.used_bytes)
    scene.picture()
    error = int(share * step.used_bytes)
    assert scene.needs() == corrected(step, error)
    assert scene.needs() == pytest.approx((1 + expected) * step.held_bytes, rel=1e-6)
    # What was predicted stays apart: the next error is not that of the corrected number.
    scene.picture()
    assert scene.needs() == corrected(step, error)


def test_the_next_load_makes_that_room(scene):
    """`memory_required` goes into `Needs`, and the room is there when the step begins."""
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.picture()
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.sample(steps=1)
    assert asked[0].estimate_bytes == scene.needs() > flux_step().held_bytes
    assert asked[0].estimate_correction_bytes == 0, "the step is corrected where it is estimated"


def test_too_much_predicted_is_corrected_late_and_a_little(scene):
    step = flux_step()
    scene.model.takes = step.used_bytes // 2
    for _ in range(REMEMBERED - 1):
        scene.picture()
        assert scene.needs() == step.held_bytes
    scene.picture()
    assert scene.needs() == corrected(step, -step.used_bytes // 2)
    assert scene.needs() == pytest.approx(0.75 * step.held_bytes, rel=1e-6)
    # One under-prediction outweighs them all.
    scene.model.takes = int(1.1 * step.used_bytes)
    scene.picture()
    assert scene.needs() == pytest.approx(1.1 * step.held_bytes, rel=1e-6)


def test_prompt_and_negative_prompt_in_one_call_and_in_two_are_apart(scene):
    one, two = flux_step(1), flux_step(2)
    scene.model.takes = int(1.2 * two.used_bytes)
    scene.picture(rows=2)
    assert scene.needs(1) == one.held_bytes
    assert scene.needs(2) == pytest.approx(1.2 * two.held_bytes, rel=1e-6)


def test_the_largest_of_a_picture_counts(scene):
    step = flux_step()
    scene.memory.load_models_gpu([scene.text])
    scene.sample(steps=1)
    for share in (1.0, 1.3, 1.1):
        scene.model.takes = int(share * step.used_bytes)
        scene.model.apply_model(Latent(LATENT), 1)
    scene.decode()
    assert scene.needs() == pytest.approx(1.3 * step.held_bytes, rel=1e-6)
    assert kinds_in(folder_of(scene))["step"] == 1


@pytest.mark.parametrize(
    "given",
    [
        {"control": {"input": []}},
        {"transformer_options": {**FORGES, "patches_replace": {"attn2": {"middle": len}}}},
        {"transformer_options": {**FORGES, "patches": {"output_block_patch": [len]}}},
        {"transformer_options": {**FORGES, "block_modifiers": [len]}},
        {"transformer_options": {**FORGES, "reference": torch.zeros(2)}},
    ],
)
def test_a_call_that_others_work_in_is_left_out(scene, given):
    scene.model.takes = 3 * flux_step().used_bytes
    scene.picture(**given)
    assert scene.needs() == flux_step().held_bytes
    assert "step" not in kinds_in(folder_of(scene))


def test_what_says_nothing_is_nobody(scene):
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.picture(control=None, transformer_options={**FORGES, "patches": {}, "block_modifiers": [], "off": None})
    assert scene.needs() > flux_step().held_bytes


@pytest.mark.parametrize(
    ("stays", "counts"), [(SETTLED_BYTES, True), (SETTLED_BYTES + 8 * MB, False), (-100 * MB, False)]
)
def test_a_call_that_leaves_something_behind_is_left_out(scene, stays, counts):
    scene.model.takes, scene.model.leaves = int(1.2 * flux_step().used_bytes), stays
    scene.picture(steps=1)
    assert (scene.needs() > flux_step().held_bytes) is counts


def test_a_model_of_nobodys_is_corrected_from_forges_own_number(parts, card, tmp_path):
    with scene_of(parts, tmp_path, shapes={"stem.weight": (8, 8), "head.weight": (8, 8)}) as scene:
        forges = scene.needs()
        assert forges == int(1.28 * 128 * 128 * 2 * 16384)
        scene.model.takes = int(forges / 1.2 * 1.3)
        scene.picture()
        assert scene.needs() == pytest.approx(1.3 * forges, rel=1e-6)


def test_with_and_without_loras_are_apart(scene):
    scene.model.takes = int(1.2 * flux_step().used_bytes)
    scene.unet = scene.unet.clone()
    scene.unet.lora_patches = {("style.safetensors", 1.0, 1.0, False): {}}
    scene.picture()
    assert scene.needs() > flux_step().held_bytes
    scene.unet = scene.unet.clone()
    scene.unet.lora_patches = {}
    scene.unet.memory_required([2, *LATENT[1:]])
    assert scene.needs() == flux_step().held_bytes


def test_another_thread_at_work_on_the_card(scene):
    """A preview that the VAE decodes while a step runs: neither number is anybody's."""
    step = scene.modules["backend.modules.k_model"].KModel.apply_model
    entered, go_on = threading.Event(), threading.Event()

    def waits(size):
        entered.set()
        go_on.wait(10)

    scene.memory.load_models_gpu([scene.unet])
    scene.allocator.pass_by, kept = waits, scene.allocator.pass_by
    thread = threading.Thread(target=lambda: step(scene.model, Latent(LATENT), 1))
    thread.start()
    assert entered.wait(10)
    scene.allocator.pass_by = kept
    scene.vae.takes = 5 * used_by_decode()
    scene.decode()
    go_on.set()
    thread.join()
    scene.decode()
    found = kinds_in(folder_of(scene))
    assert "step" not in found
    assert found["decode"] == 1, "the one that was alone"


# -- loading, LoRAs, decoding


def test_loading_is_measured_and_counts_beside_the_weights(scene):
    size = scene.memory.module_size(scene.text.model)
    coming = scene.text.model.to

    def converts(device):
        if device == CARD:
            scene.allocator.pass_by(size + 120 * MB)
        return coming(device)

    scene.text.model.to = converts
    scene.memory.load_models_gpu([scene.text])
    scene.memory.free_memory(1e30, CARD, free_all=True)
    needs = scene.guard.reservations.needs([scene.text], CARD, 0, 0)
    assert needs.hard_bytes == 0
    assert needs.hard_correction_bytes == 0, "not recorded before the next load"
    scene.memory.load_models_gpu([scene.text])
    assert scene.guard.reservations.needs([scene.text], CARD, 0, 0).hard_correction_bytes == 0, "it is there already"
    scene.memory.free_memory(1e30, CARD, free_all=True)
    needs = scene.guard.reservations.needs([scene.text], CARD, 0, 7)
    assert (needs.hard_bytes, needs.hard_correction_bytes) == (7, 120 * MB)
    assert needs.free_bytes == needs.inference_bytes + 7 + 120 * MB


def test_a_model_that_is_loaded_in_part_is_no_measurement(parts, card, tmp_path):
    with scene_of(parts, tmp_path, total=1 * GB + 500 * MB) as scene:
        scene.memory.load_models_gpu([scene.text])
        scene.memory.load_models_gpu([scene.text])
        assert kinds_in(tmp_path) == {}


def test_factors_come_in_the_first_call(scene):
    """Predicted 100 MB; the refresh merges (40 MB pass by) and keeps 10, the first call brings 120."""
    scene.factor_bytes = 100 * MB
    loras = {("style.safetensors", 1.0, 1.0, False): {}}

    def applied():
        scene.allocator.pass_by(40 * MB)
        scene.allocator.keep(10 * MB)
        scene.model.leaves = 120 * MB

    scene.unet.lora_patches, scene.applied = loras, applied
    scene.picture()
    found = kinds_in(folder_of(scene))
    assert (found["apply"], found["step"]) == (1, 1)
    assert scene.needs() == flux_step().held_bytes, "and they are not the step's"
    # What LoadedModel.model_load took has not got the LoRA's part in it.
    assert scene.guard.calibration.load_bytes([scene.unet.model], CARD) == 0
    # Another patcher with that LoRA is asked for 100 MB and gets what they took, less the 1 MB that the step returned.
    other = scene.unet.clone()
    returned = 16 * 128 * 128 * 2
    assert scene.guard.calibration.factor_bytes(other, 100 * MB) == 130 * MB - returned
    assert scene.guard.calibration.factor_bytes(other, 20 * MB) == 30 * MB, "at most half as much again"
    other.lora_patches = {("other.safetensors", 1.0, 1.0, False): {}}
    assert scene.guard.calibration.factor_bytes(other, 100 * MB) == 100 * MB
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.unet = scene.unet.clone()
    scene.sample(steps=1)
    assert asked[0].hard_bytes == 130 * MB - returned


@pytest.mark.parametrize(("share", "expected"), [(0.2, 0.2), (3.0, 0.5)])
def test_a_decode_gets_the_room_it_took(scene, share, expected):
    held = int(DECODE_ASKED * activations.VAE_HOLDS_WHERE_FORGE_HAS)
    scene.vae.takes = used_by_decode() + int(share * used_by_decode())
    asked = []
    needs = scene.guard.reservations.needs
    scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
    scene.picture()
    scene.decode()
    first, second = asked[-2], asked[-1]
    assert (first.estimate_bytes, first.estimate_correction_bytes) == (held, 0)
    assert second.estimate_bytes == held
    assert second.estimate_correction_bytes == pytest.approx(expected * held, rel=1e-6)
    assert second.free_bytes == pytest.approx((1 + expected) * held, rel=1e-6)
    # Loading anything else gets none of it.
    assert scene.guard.reservations.needs([scene.text], CARD, 5, 0).estimate_correction_bytes == 0


def test_tiles_and_several_pictures_are_no_measurement(scene):
    scene.vae.takes = 3 * used_by_decode()
    scene.decode(pictures=4)
    scene.vae.fails = True
    assert scene.decode() == "tiled"
    assert "decode" not in kinds_in(folder_of(scene))
    scene.vae.fails = False
    scene.decode()
    assert kinds_in(folder_of(scene))["decode"] == 1


def test_a_decode_that_fails_is_no_measurement_and_raises(scene):
    def breaks(size):
        raise ZeroDivisionError

    scene.allocator.pass_by = breaks
    with pytest.raises(ZeroDivisionError):
        scene.decode()
    del scene.allocator.pass_by
    assert scene.guard.calibration.decode_bytes() == 0
    scene.picture()
    assert kinds_in(folder_of(scene))["decode"] == 1


def test_corrections_end_with_the_card(parts, card, tmp_path):
    with scene_of(parts, tmp_path, total=8 * GB) as scene:
        scene.vae.takes = 3 * used_by_decode()
        scene.decode()
        scene.machine.total = int(1.1 * DECODE_ASKED * activations.VAE_HOLDS_WHERE_FORGE_HAS)
        asked = []
        needs = scene.guard.reservations.needs
        scene.guard.reservations.needs = lambda *args: asked.append(needs(*args)) or asked[-1]
        scene.decode()
        assert asked[0].estimate_correction_bytes > 0
        assert asked[0].free_bytes == scene.machine.total


# -- what else reads the peaks


def test_forge_still_shows_the_peak_of_the_image(scene):
    monitor = scene.modules["modules.memmon"].MemUsageMonitor(scene.allocator)
    monitor.monitor()
    scene.allocator.pass_by(20 * GB)
    scene.picture()
    assert monitor.read()["active_peak"] == 20 * GB
    assert monitor.read()["free"] == 1
    monitor.monitor()
    assert monitor.read()["reserved_peak"] == 20 * GB, "it is still the same image"
    monitor.run_flag.clear()
    monitor.monitor()
    assert monitor.read()["active_peak"] < 10 * GB
    scene.picture()
    expected = scene.allocator.now() + used_by_decode()
    assert monitor.read()["active_peak"] >= expected


# -- the file


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
def test_a_broken_file_is_as_none(parts, card, tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with scene_of(parts, tmp_path) as scene:
        scene.model.takes = int(1.2 * flux_step().used_bytes)
        assert scene.needs() == flux_step().held_bytes
        scene.picture()
        assert scene.needs() == pytest.approx(1.2 * flux_step().held_bytes, rel=1e-6)


def test_a_folder_that_cannot_be_written_is_said_once(parts, card, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lib_lora_guard")
    (tmp_path / "file").write_text("in the way")
    with scene_of(parts, tmp_path / "file") as scene:
        scene.model.takes = int(1.2 * flux_step().used_bytes)
        for _ in range(3):
            scene.picture()
        assert scene.needs() == pytest.approx(1.2 * flux_step().held_bytes, rel=1e-6)
    said = [record for record in caplog.records if "what was measured cannot be written" in record.getMessage()]
    assert len(said) == 1


# -- where there is nothing to measure


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


def test_the_folder_is_given_to_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(forge_corrections, "OF_PROCESS", Corrections())
    keep_calibration(tmp_path / "data")
    assert forge_corrections.OF_PROCESS.folder == tmp_path / "data"
    assert not (tmp_path / "data").exists()


def test_calls_of_another_kind_pass_through(scene):
    calibration = scene.guard.calibration
    assert calibration.apply_model(lambda *args, **kwargs: (args, kwargs), 1) == ((1,), {})
    for x in (None, 3, torch.zeros(2), Latent((4,)), Latent(())):
        assert calibration.apply_model(lambda *args: args[1:], scene.model, x, 2) == (x, 2)
    odd = types.SimpleNamespace(device=CARD, vae_dtype=torch.bfloat16)
    for vae, samples in ((odd, Latent(LATENT)), (scene.vae, None), (scene.vae, Latent((4,)))):
        assert calibration.decode_inner(lambda *args: args, vae, samples) == (vae, samples)
    assert calibration.load_models_gpu(lambda models, extra: (models, extra), iter([]), extra=4) == ([], 4)


# -- installing


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


# -- found in a review


def unload(scene):
    """As after a restart: nothing is on the card, every layer as it was built."""
    scene.memory.current_loaded_models.clear()
    for model in (scene.model, scene.text.model, scene.vae.first_stage_model):
        model.to(RAM)
    for layer in scene.model.modules():
        if hasattr(layer, "prev_parameters_manual_cast"):
            layer.parameters_manual_cast = layer.prev_parameters_manual_cast
            del layer.prev_parameters_manual_cast


@pytest.mark.parametrize("copies_bytes", [0, 132 * MB, 300 * MB])
def test_once_swapped_is_not_always_swapped(scene, copies_bytes):
    """The copies of swapped layers are no part of the step: counted as one they would keep the model swapped."""
    step, weights = flux_step(), scene.memory.module_size(scene.model)

    def picture():
        scene.memory.load_models_gpu([scene.text])
        scene.sample(steps=0)
        swapped = scene.memory.module_size(scene.model, include_device=CARD) < weights
        scene.model.takes = step.used_bytes + (copies_bytes if swapped else 0)
        scene.sample()
        scene.decode()
        return swapped

    scene.machine.ballast = scene.machine.total - (weights + step.held_bytes + 256 * MB)
    assert picture() is False
    unload(scene)
    scene.machine.ballast += GB
    assert picture() is True
    scene.machine.ballast -= GB
    found = []
    for _ in range(3):
        unload(scene)
        found.append(picture())
    assert found == [False, False, False]


def test_the_load_is_noted_as_it_is_asked(scene, monkeypatch):
    """Weights that are packed on their way to the card are fewer values afterwards."""
    model, seen = scene.text.model, []
    before, note = load_key(model), scene.guard.calibration.corrections.note
    monkeypatch.setattr(
        scene.guard.calibration.corrections, "note", lambda key, *numbers: seen.append(key) or note(key, *numbers)
    )
    patch = scene.text.forge_patch_model

    def packs(device=None):
        found = patch(device)
        for layer in model.layers():
            layer.weight = parameter(scene.machine, (layer.weight.nelement() // 2,), torch.uint8, CARD)
        return found

    monkeypatch.setattr(scene.text, "forge_patch_model", packs, raising=False)
    scene.memory.load_models_gpu([scene.text])
    assert [key for key in seen if key.kind is Kind.LOAD] == [before]
    assert load_key(model) != before


class NoTruth:
    """An array, as far as asking for its truth or its equal goes."""

    def __bool__(self):
        raise ValueError("the truth value of an array with more than one element is ambiguous")

    def __eq__(self, other):
        raise ValueError("no equality either")

    __hash__ = None


@pytest.mark.parametrize("told", [NoTruth(), [NoTruth()], {"a": NoTruth()}])
def test_an_array_in_the_options_is_somebody_at_work(scene, told):
    scene.sample(steps=2, transformer_options={**FORGES, "mask": told})
    assert not [key for key in scene.guard.calibration.corrections._waiting if key.kind is Kind.STEP]


def test_a_model_of_unknown_parameters_is_forges_to_estimate(scene):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = torch.nn.Linear(2, 2)
            self.diffusion_model.weight.gguf_cls = type("Q4_0", (), {})  # and no real_shape

        def memory_required(self, input_shape):
            return 1.0

    assert scene.patcher(Odd()).memory_required([2, 4, 8, 8]) == 1.0


def test_a_look_at_the_memory_that_fails_costs_no_image(scene, monkeypatch):
    def refused():
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(scene.guard.journal, "_snapshot", refused)
    scene.picture()


def test_factors_that_are_still_to_come_are_in_the_panels_plan(scene):
    scene.factor_bytes, scene.unet = 300 * MB, scene.unet.clone()
    scene.unet.lora_patches = {("style.safetensors", 1.0, 1.0, False): {}}
    scene.sample(steps=0)
    assert scene.guard.loading.plans.last.factor_bytes == 300 * MB


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
