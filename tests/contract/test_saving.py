"""Saved checkpoints and U-Nets have the LoRAs in them, as Forge's own merge would."""

import importlib
import inspect
import logging
import shutil
import sys
import threading
import types

import pytest
import torch
from safetensors.torch import load_file
from support.make import host_value, rand
from support.measure import contribution_error, same_bits
from support.waiting import wait_until

from contract.savers import (
    DTYPES,
    LORAS,
    UNET,
    WIDTH,
    LiveTensors,
    Setup,
    Whole,
    close_to,
    engine_of,
    patcher_of,
    truth,
)
from lib_lora_guard.patching import merging


@pytest.mark.parametrize("storage", DTYPES)
def test_a_saved_checkpoint_is_stocks(host, saving, storage, tmp_path, caplog):
    stock = Setup(host, storage).apply()
    stock.engine.save_checkpoint(str(tmp_path / "stock.safetensors"))
    stock.engine.save_unet(str(tmp_path / "stock_unet.safetensors"))
    host.memory.current_loaded_models.clear()
    saving()
    guard = Setup(host, storage)
    guard.engine.save_unet(str(tmp_path / "plain.safetensors"))
    guard.apply()
    before = {k: p.detach().clone() for k, p in guard.net.named_parameters() if p.dim() > 1}
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        assert guard.engine.save_checkpoint(str(tmp_path / "guard.safetensors")) == str(tmp_path / "guard.safetensors")
    guard.engine.save_unet(tmp_path / "guard_unet.safetensors")
    assert all(same_bits(guard.net.get_parameter(k), v) for k, v in before.items()), "saving changed the model"

    ours, theirs = load_file(tmp_path / "guard.safetensors"), load_file(tmp_path / "stock.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {k: (v.dtype, v.shape) for k, v in theirs.items()}
    assert {v.dtype for k, v in ours.items() if not k.startswith("first_stage")} == {guard.dtype}
    for key, value in ours.items():
        # Both are within half a step of the true value.
        assert close_to(value, theirs[key], value.dtype) <= 1.01, key
    unet = load_file(tmp_path / "guard_unet.safetensors")
    assert {UNET + k: v.dtype for k, v in unet.items()} == {k: v.dtype for k, v in ours.items() if k.startswith(UNET)}
    assert all(same_bits(value, ours[UNET + key]) for key, value in unet.items())

    wanted, plain = truth(guard.states[0], guard.net), load_file(tmp_path / "plain.safetensors")
    dropped = truth(guard.states[0], guard.net, names=LORAS[:1])
    for key, value in unet.items():
        assert same_bits(plain[key], guard.states[0][key])
        assert close_to(value, wanted[key], guard.dtype) <= (2 if storage == "fp32" else 0.51), key
        assert contribution_error(value, wanted[key], plain[key]) < contribution_error(
            dropped[key], wanted[key], plain[key]
        ), key
    said = [r.getMessage() for r in caplog.records if "guard.safetensors" in r.getMessage()]
    if storage == "fp8":
        assert "weights are stored as fp8_e4m3fn, and rounding to that loses most of a LoRA" in said[0]
        assert "lora-guard bake" in said[0]
    else:
        assert len(said) == 1
    assert "guard.safetensors saved" in said[-1]
    assert f"with LoRAs in {len(guard.states[0]) + len(guard.states[1])} of its weights" in said[-1]


@pytest.mark.parametrize("storage", ["scaled_fp8", "Q8_0"])
def test_what_cannot_take_a_lora_is_saved_as_stored_and_said(host, saving, storage, tmp_path, caplog):
    saving()
    patcher, _ = host.build(storage)
    net = patcher.model
    whole = host.load(patcher_of(host, Whole(net)))
    engine = engine_of(host, whole)
    engine.save_unet(str(tmp_path / "plain.safetensors"))
    keys = {k: (WIDTH * (3 if "qkv" in k else 1), WIDTH) for k in net.state_dict() if k.endswith(("qkv.weight", "proj.weight"))}  # fmt: skip
    clone = whole.clone()
    lora = {f"diffusion_model.{k}": host_value("lora", shape, n) for n, (k, shape) in enumerate(keys.items())}
    lora["diffusion_model.blocks.0.norm.weight"] = (rand(WIDTH, seed=3, scale=0.5),)
    clone.add_patches(filename="a", patches=lora, online_mode=True)
    engine.forge_objects.unet = host.load(clone)
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        engine.save_unet(str(tmp_path / "lora.safetensors"))
    plain, saved = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "lora.safetensors")
    assert plain.keys() == saved.keys()
    assert {k for k in plain if not same_bits(plain[k], saved[k])} == {"blocks.0.norm.weight"}
    name = "Q8_0" if storage == "Q8_0" else "fp8_e4m3fn"
    said = [r.getMessage() for r in caplog.records if "WITHOUT their LoRAs" in r.getMessage()]
    assert len(said) == 1
    assert f"lora.safetensors: {len(keys)} weights stored as {name} are saved as they are" in said[0]


def test_other_readers_get_merged_copies(host, saving):
    saving()
    setup = Setup(host).apply()
    utils = importlib.import_module("backend.utils")
    wanted = truth(setup.states[0], setup.net)
    state = utils.get_state_dict_after_quant(setup.net, "p.")
    assert {f"p.{k}" for k in wanted} == set(state)
    for key, value in wanted.items():
        copy = state[f"p.{key}"]
        assert type(copy) is torch.Tensor
        assert close_to(copy, value, setup.dtype) <= 0.51
        assert copy.data_ptr() != setup.net.get_parameter(key).data_ptr()
    assert set(utils.get_state_dict_after_quant(setup.net.blocks[1])) == set(setup.net.blocks[1].state_dict())


def test_a_save_needs_no_second_model_in_memory(host, saving, tmp_path):
    def peak_of(setup, name):
        with LiveTensors(*setup.net.parameters(), *setup.text.parameters()) as memory:
            setup.engine.save_unet(str(tmp_path / name))
        return memory.peak_bytes

    width, depth = 96, 6
    stock = peak_of(Setup(host, width=width, depth=depth).apply(()), "stock.safetensors")
    host.memory.current_loaded_models.clear()
    saving()
    setup = Setup(host, width=width, depth=depth)
    lora = {f"diffusion_model.blocks.{n}.{name}.weight": host_value("lora", shape, n) for n in range(depth) for name, shape in (("qkv", (3 * width, width)), ("conv", (width, width, 3, 3)))}  # fmt: skip
    clone = setup.unet.clone()
    clone.add_patches(filename="a", patches=lora)
    setup.engine.forge_objects.unet = host.load(clone)
    model = sum(p.numel() * p.element_size() for p in setup.net.parameters())
    largest = width * width * 9 * 4
    # The copy of the whole that stock makes before it makes the bytes; ours is one weight in fp32, its delta and result.
    assert stock >= model
    assert peak_of(setup, "guard.safetensors") <= 3 * largest < 0.8 * model


def sure_failure(kind, monkeypatch, tmp_path):
    if kind == "disk full":
        usage = shutil.disk_usage(tmp_path)._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return OSError, "needs"
    if kind == "no folder":
        return OSError, "no such folder"
    if kind == "interrupt":
        shared = types.ModuleType("modules.shared")

        class State:
            asked = 0

            @property
            def interrupted(self):
                self.asked += 1
                return self.asked > 3

        shared.state = State()
        monkeypatch.setitem(sys.modules, "modules.shared", shared)
        return Exception, "interrupted"
    original = merging.apply_terms

    def failing(*args, **kwargs):
        if any(f.function == "value" for f in inspect.stack()[:12]):
            raise MemoryError("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(merging, "apply_terms", failing)
    return MemoryError, "memory"


@pytest.mark.parametrize("kind", ["disk full", "no folder", "interrupt", "no memory"])
def test_a_save_that_fails_leaves_the_old_file_and_says_why(host, saving, kind, tmp_path, caplog, monkeypatch):
    saving()
    setup = Setup(host).apply()
    target = tmp_path / "model.safetensors"
    if kind == "no folder":
        target = tmp_path / "missing" / "model.safetensors"
    else:
        target.write_bytes(b"the old one")
    with monkeypatch.context() as patched:
        error, words = sure_failure(kind, patched, tmp_path)
        with pytest.raises(error):
            setup.engine.save_unet(str(target))
    if kind != "no folder":
        assert target.read_bytes() == b"the old one"
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        setup.engine.save_unet(str(target))
        assert load_file(target).keys() == setup.states[0].keys()
    assert "model.safetensors was not saved, and a file of that name is as it was: " in caplog.text
    assert words in caplog.text
    # This thread is in no save any more: copies are copies again.
    state = importlib.import_module("backend.utils").get_state_dict_after_quant(setup.net)
    assert all(type(value) is torch.Tensor for value in state.values())


class Lock:
    """With the host's interface: `acquire(blocking)`, no owner."""

    def __init__(self):
        self._lock = threading.Lock()
        self.taken = 0

    def acquire(self, blocking=True):
        got = self._lock.acquire(blocking)
        self.taken += got
        return got

    def release(self):
        self._lock.release()


@pytest.fixture
def queue_lock(monkeypatch):
    queue = types.ModuleType("modules.call_queue")
    queue.queue_lock = Lock()
    monkeypatch.setitem(sys.modules, "modules.call_queue", queue)
    return queue.queue_lock


def button(setup, path):
    """The save as the web page calls it."""
    names = {"__name__": "modules.ui_checkpoint_merger", "engine": setup.engine, "path": path}
    exec("def press():\n    return engine.save_unet(path)\n", names)
    return names["press"]


def test_the_button_waits_for_a_running_image(host, saving, queue_lock, tmp_path, caplog):
    saving()
    setup, path = Setup(host).apply(), tmp_path / "model.safetensors"
    queue_lock.acquire()
    thread = threading.Thread(target=button(setup, path))
    with caplog.at_level(logging.INFO, "lib_lora_guard"):
        thread.start()
        said = "model.safetensors is saved as soon as what is running now has finished"
        wait_until(lambda: said in caplog.text, "the user is not told")
        thread.join(0.5)
        assert thread.is_alive()
        assert not path.exists()
        queue_lock.release()
        thread.join(60)
    assert load_file(path).keys() == setup.states[0].keys()
    assert queue_lock.taken == 2
    assert queue_lock.acquire(False), "the lock was kept"


def test_whoever_holds_the_lock_himself_does_not_wait_for_it(host, saving, queue_lock, tmp_path):
    saving()
    setup = Setup(host).apply()
    queue_lock.acquire()
    setup.engine.save_unet(tmp_path / "held.safetensors")
    assert not queue_lock.acquire(False), "the lock of the caller was released"
    queue_lock.release()
    setup.engine.save_unet(tmp_path / "free.safetensors")
    assert queue_lock.taken == 2
    assert queue_lock.acquire(False)
