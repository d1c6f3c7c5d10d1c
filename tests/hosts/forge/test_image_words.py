"""What a model at work lacks of its LoRAs, and what is applied otherwise than asked, stands under the image: after a change,
after none, and after one that failed."""

import logging

import pytest
import torch
from contract.host import Host
from support.make import host_value
from support.webui import Lines

from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.forge.fallback import HostRefresh
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.recorder.crash_report import Precaution
from lib_lora_guard.runtime.model_stack import MERGE_ATTEMPTS

GOOD = {"blocks.0.proj.weight": host_value("lora", (32, 32), 5)}
BAD = {"blocks.0.proj.weight": host_value("lora", (32, 48), 5)}


@pytest.fixture
def host():
    """The double of Forge with the guard in place, and images made on it."""
    host = Host()
    host.guard = forge.install()
    yield host
    host.memory.current_loaded_models.clear()
    forge.uninstall()
    host.close()


def stack(patcher, **loras):
    changed = patcher.clone()
    for name, patches in loras.items():
        changed.add_patches(filename=f"/loras/{name}.safetensors", patches=patches)
    return changed


def image(host, patcher, loads=3):
    """The comments of an image that loads its model several times."""
    comments = []
    with host.guard.words.image(id(comments), comments.append):
        for _ in range(loads):
            host.load(patcher)
    return comments


@pytest.fixture
def lines():
    handler = Lines()
    logging.getLogger("lib_lora_guard").addHandler(handler)
    return handler.lines


def test_a_refused_lora_is_said_once_in_each_image(host, lines):
    patcher, _ = host.build("bf16")
    changed = stack(patcher, good=GOOD, bad=BAD)
    for n in range(2):
        lines.clear()
        (comment,) = image(host, changed)
        assert comment.startswith("LoRA Guard: bad.safetensors NOT applied to Net: made for another model: ")
        assert sum("bad.safetensors" in line for _, line in lines) == 1, n


def test_what_a_fallback_leaves_out_is_said_too(host, monkeypatch):
    patcher, _ = host.build("fp32")
    monkeypatch.setattr(Engine, "commit", lambda *a: (_ for _ in ()).throw(RuntimeError("planted")))
    changed = stack(patcher, good=GOOD, bad=BAD)
    for n in range(2):
        left_out, instead = image(host, changed)
        assert "bad.safetensors NOT applied to Net" in left_out, n
        assert instead == (
            "LoRA Guard: Net: RuntimeError: planted; applied by Forge's fp16-LoRA path instead: good.safetensors"
        ), n
    monkeypatch.setattr(HostRefresh, "attempt", lambda *a: False)
    comments = image(host, stack(patcher, good=GOOD))
    assert comments == [
        "LoRA Guard: Net: this image is made WITHOUT the LoRAs good.safetensors: RuntimeError: planted (LG-L05)"
    ]
    assert torch.is_grad_enabled()


@pytest.fixture
def merging(host):
    host.guard.settings.options = {"lora_guard_mode": "Merge"}
    yield host
    host.guard.settings.options = {}


def memory_ends(engine, access, requests, wish):
    raise torch.cuda.OutOfMemoryError("planted")


def test_what_is_merged_less_than_asked_is_said_in_each_image_and_logged_once(merging, lines, monkeypatch):
    host, change = merging, Engine.change
    monkeypatch.setattr(Engine, "change", lambda *a: (memory_ends if a[3] is Wish.PREFER_MERGE else change)(*a))
    changed = stack(host.build("bf16")[0], good=GOOD)
    for n in range(3):
        (comment,) = image(host, changed)
        assert comment.startswith(
            "LoRA Guard: Net: memory ended while LoRAs were merged (OutOfMemoryError: planted)"
        ), n
    assert sum("memory ended" in line for _, line in lines) == MERGE_ATTEMPTS
    host.guard.settings.options = {}
    assert image(host, changed) == [], "nothing else was asked for"


def test_a_precaution_against_merging_is_said_in_each_image_with_loras(merging):
    host = merging
    host.guard.stacks.precautions = lambda model: {Precaution.NO_MERGE}
    patcher = host.build("bf16")[0]
    changed = stack(patcher, good=GOOD)
    assert [image(host, one) for one in (changed, changed, patcher)] == [
        [f"LoRA Guard: {Precaution.NO_MERGE.message}"],
        [f"LoRA Guard: {Precaution.NO_MERGE.message}"],
        [],
    ]


def test_weights_that_a_merge_would_round_away_are_said_in_the_first_image(merging):
    changed = stack(merging.build("fp8")[0], good=GOOD)
    (comment,) = image(merging, changed)
    assert comment.startswith("LoRA Guard: Net: merging was asked for, but its 1 weights stored as fp8_e4m3fn ")
    assert image(merging, changed) == []


def test_a_lora_that_was_calculated_on_the_cpu_is_said_once(host):
    changed, comments = stack(host.build("bf16")[0], good=GOOD), []
    host.load(changed)
    (bypass,) = host.guard.stacks.engines()[0].attached.values()
    for n in range(2):
        with host.guard.words.image(n, comments.append):
            host.guard.tell_of_slow_layers()
            bypass.hook._said.add("memory.on_the_cpu")
            host.guard.tell_of_slow_layers()
    (comment,) = comments
    assert comment.startswith("LoRA Guard: Net: no VRAM left for the LoRAs of 1 layers")
