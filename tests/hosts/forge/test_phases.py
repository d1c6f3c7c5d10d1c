"""Tests of the phases written down of a Forge at work, with the bytes it is about to take; and of the ends that are no
death."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contract.host import Host
from support import warm
from support.fake_card import CARD, RAM, Denoiser, FakeMemory, JointTextEncoder, Machine

from lib_lora_guard.hosts.forge.api import probe
from lib_lora_guard.hosts.forge.phases import (
    decoding_plan,
    encoding_plan,
)
from lib_lora_guard.hosts.forge.takeover import ForgeTakeover
from lib_lora_guard.hosts.webui.checkpoint_reading import reading_plan, text_encoder_plan
from lib_lora_guard.recorder.crash import last_crash
from lib_lora_guard.recorder.crash_report import crash_report
from lib_lora_guard.recorder.flight_recorder import FlightRecorder, Phase
from lib_lora_guard.runtime.hooks import HookSet
from lib_lora_guard.runtime.journal import Journal

ROOT = Path(__file__).parents[3]
DOUBLE = ROOT / "tests" / "forge_double"


class Notes(FlightRecorder):
    """Writes nothing, and remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def enter(self, phase, **facts):
        self.told.append((phase, facts["plan"]))
        return super().enter(phase, **facts)


def no_look():
    raise OSError("no numbers")


@pytest.fixture
def journal():
    return Journal(no_look, Notes())


def test_a_phase_of_the_host_has_the_plan_of_its_arguments(journal):
    class Host:
        def work(self, size, name="x"):
            return journal.recorder._open[-1].phase if journal.recorder._open else None

    hooks = HookSet()

    def plan(host, size, name="x"):
        return None if name == "small" else {"ram": 10 // size}

    hooks.add(Host, "work", journal.around(Phase.RESTORE, plan))
    host = Host()
    assert host.work(5) is Phase.RESTORE
    assert host.work(5, name="small") is None, "None: this call is no such phase"
    assert host.work(0) is Phase.RESTORE, "a plan that fails is no plan"
    assert journal.recorder.told == [(Phase.RESTORE, {"ram": 2}), (Phase.RESTORE, None)]
    hooks.restore()
    assert host.work(5) is None


def test_steps_are_told_from_everything_else(journal):
    with journal.phase(Phase.SAMPLING_STEP):
        assert journal.others == 0
        with journal.phase(Phase.UNLOAD):
            assert journal.others == 1
        with pytest.raises(KeyError), journal.phase(Phase.MERGE):
            raise KeyError
    assert journal.others == 4


def test_a_checkpoint_takes_as_much_as_its_files(tmp_path):
    for name, size in (("flux.gguf", 100), ("t5.safetensors", 30), ("clip.safetensors", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    main, others = str(tmp_path / "flux.gguf"), [str(tmp_path / "t5.safetensors"), tmp_path / "clip.safetensors"]
    assert reading_plan(main, additional_state_dicts=others) == {"ram": 137}
    assert reading_plan(main) == {"ram": 100}
    assert reading_plan({"a": torch.zeros(1)}, [str(tmp_path / "not there")]) == {"ram": 0}


def test_a_text_encoder_takes_as_much_as_its_tensors():
    state = {"a": torch.zeros(10, dtype=torch.float16), "b": torch.zeros(3), "note": "no tensor"}
    rest = ("transformers", "T5EncoderModel", "folder")
    assert text_encoder_plan("guess", "text_encoder_2", *rest, state) == {"ram": 32}
    assert text_encoder_plan("guess", "text_encoder", *rest, None) == {"ram": 0}
    for other in ("transformer", "vae", "tokenizer", "scheduler"):
        assert text_encoder_plan("guess", other, *rest, state) is None


@pytest.mark.parametrize(
    ("device", "tiled", "plan"), [("cuda", False, "vram"), ("cpu", False, "ram"), ("cuda", True, None)]
)
def test_a_vae_takes_what_forge_estimates(device, tiled, plan):
    memory = SimpleNamespace(VAE_ALWAYS_TILED=tiled)
    vae = SimpleNamespace(
        device=torch.device(device),
        vae_dtype=torch.float16,
        memory_used_decode=lambda shape, dtype: 1.5 * shape[2] * shape[3] * dtype.itemsize,
        memory_used_encode=lambda shape, dtype: shape[2] * shape[3],
    )
    wanted = {} if plan is None else {plan: 3 * 64 * 96}
    assert decoding_plan(memory, vae, torch.zeros(2, 4, 64, 96)) == wanted
    wanted = {} if plan is None else {plan: 512 * 768}
    assert encoding_plan(memory, vae, torch.zeros(1, 512, 768, 3)) == wanted


@pytest.fixture
def scene():
    """The takeover on a card of 24 kB, of which 1 kB stays free."""
    double = Host()
    machine = Machine(24_000)
    memory = FakeMemory(machine, 1_000)
    parts = replace(probe(), memory=memory)
    guard = ForgeTakeover(parts, journal=Journal(no_look, Notes()))
    guard.memory.total_bytes = lambda device: machine.total
    guard.preflight.room_bytes = lambda: None
    guard.install()

    def patcher(kind, size):
        return parts.base.ModelPatcher(kind(machine, [size // 10] * 10), load_device=CARD, offload_device=RAM)

    yield SimpleNamespace(guard=guard, memory=memory, patcher=patcher, told=guard.journal.recorder.told)
    memory.current_loaded_models.clear()
    guard.uninstall()
    double.close()


def test_what_moves_is_told_with_what_it_takes(scene):
    flux, t5 = scene.patcher(Denoiser, 15_000), scene.patcher(JointTextEncoder, 10_000)
    scene.memory.load_models_gpu([flux], memory_required=2_000)
    assert (Phase.MOVE_TO_GPU, {"vram": 17_000, "kept_free": 2_000}) in scene.told
    scene.told.clear()
    scene.memory.load_models_gpu([flux], memory_required=3_000, hard_memory_preservation=500)
    assert (Phase.MOVE_TO_GPU, {"vram": 3_500, "kept_free": 3_500}) in scene.told, "the weights are there"
    scene.told.clear()
    scene.memory.free_memory(1e30, CARD, free_all=True)
    assert (Phase.UNLOAD, {"ram": 15_000}) in scene.told
    scene.told.clear()
    scene.memory.load_models_gpu([t5])
    assert (Phase.MOVE_TO_GPU, {"vram": 11_000, "kept_free": 1_000}) in scene.told


def test_steps_and_pictures_are_laid_around_with_their_plans(scene):
    class VAE:
        device, vae_dtype, first_stage_model = torch.device("cuda"), torch.float16, None
        decode_inner = encode_inner = lambda self, tensor: tensor

        def memory_used_decode(self, shape, dtype):
            return 7

        memory_used_encode = memory_used_decode

    class KModel:
        def apply_model(self, x, t):
            return x + t

        def memory_required(self, shape):
            return 1

    loader = SimpleNamespace(load_huggingface_component=lambda *arguments: arguments[1])
    models = SimpleNamespace(forge_loader=lambda sd, additional_state_dicts=None: loader)
    modules = {
        "backend.loader": loader,
        "backend.patcher.vae": SimpleNamespace(VAE=VAE),
        "backend.modules.k_model": SimpleNamespace(KModel=KModel),
        "modules.sd_models": models,
    }
    for _ in range(2):
        scene.guard.install_loaded(modules)
    VAE().decode_inner(torch.zeros(1, 4, 8, 8))
    VAE().encode_inner(torch.zeros(1, 64, 64, 3))
    assert KModel().apply_model(torch.ones(1), 1.0) == 2
    assert models.forge_loader("not there.safetensors") is loader
    assert [loader.load_huggingface_component(0, name, "", "", "", {}) for name in ("vae", "text_encoder")]
    assert scene.told == [
        (Phase.VAE_DECODE, {"vram": 7}),
        (Phase.VAE_ENCODE, {"vram": 7}),
        (Phase.SAMPLING_STEP, None),
        (Phase.LOAD_CHECKPOINT, {"ram": 0}),
        (Phase.LOAD_TEXT_ENCODER, {"ram": 0}),
    ]


CHILD = """
import os, signal, sys, time
from pathlib import Path
from lib_lora_guard.hosts import start
from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.recorder.flight_recorder import Phase
folder, end = Path(sys.argv[1]), sys.argv[2]
start.JOURNAL_FOLDER = folder
assert start.start([])
journal = forge.installed().journal

def at_once(*_):
    print("bye", flush=True)
    os._exit(3)  # as Forge's handler of Ctrl+C and its stop_program do

with journal.phase(Phase.SAMPLING_STEP):
    with journal.phase(Phase.MERGE, plan={"ram": 6 << 30}):
        if end == "ctrl c":
            signal.signal(signal.SIGINT, at_once)
            signal.raise_signal(signal.SIGINT)
        if end == "switched off":
            forge.uninstall()
            at_once()
        if end == "raised":
            raise SystemExit(3)
        if end == "forked":
            child = os.fork()
            if not child:
                with journal.phase(Phase.RESTORE):
                    os._exit(0)
            os.waitpid(child, 0)
        print("in it", flush=True)
        time.sleep(60)
"""

ORDERLY = ["ctrl c", "switched off", "raised"]
KILLED = ["killed", *(["forked"] if hasattr(os, "fork") else [])]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """One process for each end, all at the same time."""
    path = os.pathsep.join([str(ROOT), str(DOUBLE), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    started = {}
    for end in (*ORDERLY, *KILLED):
        folder = tmp_path_factory.mktemp("data")
        started[end] = folder, warm.start(CHILD, folder, end, env=env, cwd=folder, quiet=True)
    yield started
    for _, child in started.values():
        with child:
            child.kill()


@pytest.mark.parametrize("end", ORDERLY)
def test_who_ends_by_its_own_will_did_not_die(children, end):
    folder, child = children[end]
    shown = child.stdout.read()
    assert child.wait() == 3, "what Forge does is done"
    assert ("bye" in shown) is (end != "raised")
    assert list(folder.iterdir()) == []
    assert last_crash(folder) is None


@pytest.mark.parametrize("end", KILLED)
def test_who_is_killed_did(children, end):
    folder, child = children[end]
    while (line := child.stdout.readline()).strip() != "in it":
        assert line, "the child died by itself"
    child.kill()
    child.wait()
    crash = last_crash(folder)
    assert (crash.phases, crash.pid) == ((Phase.SAMPLING_STEP, Phase.MERGE), child.pid)
    lines = [str(line) for line in crash_report(crash)]
    assert "LoRAs were being merged into the model" in lines[0]
    assert "what it was doing was to take 6.0 GB of RAM" in lines
