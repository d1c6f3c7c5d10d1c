"""What a model at work lacks of its LoRAs stands under the image: after a change, after none, and after one that failed."""

import logging

import pytest
import torch
from contract.host import Host
from support.make import host_value
from support.webui import Lines

from lib_lora_guard.hosts.forge import takeover as forge
from lib_lora_guard.hosts.forge.fallback import HostRefresh
from lib_lora_guard.patching.engine import Engine

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
    logger, handler = logging.getLogger("lib_lora_guard"), Lines()
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


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
    (comment,) = image(host, stack(patcher, good=GOOD, bad=BAD))
    assert "bad.safetensors NOT applied to Net" in comment
    monkeypatch.setattr(HostRefresh, "attempt", lambda *a: False)
    comments = image(host, stack(patcher, good=GOOD))
    assert comments == [
        "LoRA Guard: Net: this image is made WITHOUT the LoRAs good.safetensors: RuntimeError: planted (LG-L05)"
    ]
    assert torch.is_grad_enabled()
