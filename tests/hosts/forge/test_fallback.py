"""Forge's own ways after a failure: taken only where they reach the whole stack, and undone where they fail."""

import types

import torch

from lib_lora_guard.hosts.forge import fallback
from lib_lora_guard.hosts.forge.fallback import HostRefresh, apply_whole
from lib_lora_guard.hosts.forge.lora_loader_state import RETRY
from lib_lora_guard.patching.access import Site
from lib_lora_guard.planning.limits import RAM_FLOOR_BYTES
from lib_lora_guard.weights.storage import storage_of

CPU = torch.device("cpu")
STACK = {("style", 0.8, 1.0, False): {"weight": [], "not.there": []}, "key of another extension": {"bias": []}}


class Forge:
    """A loader, and Forge's refresh of it, which fails for the ways in `fails`."""

    def __init__(self, *fails, dtype=torch.float32, device="cpu"):
        self.fails, self.calls = fails, []
        self.model = torch.nn.Linear(4, 4).to(dtype=dtype, device=device)
        self.loader = types.SimpleNamespace(model=self.model, loaded_hash=str(["believed to be there"]))
        self.host = HostRefresh(self.refresh, self.loader, CPU)

    def refresh(self, loader, patches, offload):
        assert loader.loaded_hash == RETRY, "at work whatever it believes"
        online = [identifier[3] for identifier in patches]
        self.calls.append(online)
        for way in self.fails:
            if way in online:
                # After a failed merge Forge leaves the model on the CPU.
                self.model.weight = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
                raise RuntimeError("planted")

    def site(self, key):
        if not hasattr(self.model, key):
            return None
        return Site(key, self.model, key, storage_of(getattr(self.model, key)), True, True)


def way(forge, stack=STACK, classes=(torch.nn.Linear,)):
    found = apply_whole(forge.host, forge, stack, classes)
    return None if found is None else found.key


def test_the_path_that_rounds_nothing_comes_first():
    forge = Forge()
    assert way(forge) == "host.fp16_path"
    assert forge.calls == [[True, True]]


def test_then_the_merge():
    forge = Forge(True)
    assert way(forge) == "host.merge_path"
    assert forge.calls == [[True, True], [], [False, False]], "what the first way left is taken off"


def test_then_none_and_the_model_is_without_loras():
    forge = Forge(True, False)
    assert way(forge) is None
    assert forge.calls[-1] == []


def test_layers_that_do_not_ask_the_path_are_merged(monkeypatch):
    assert way(Forge(), classes=(torch.nn.Conv2d,)) == "host.merge_path"
    forge = Forge()
    forge.model.parameters_manual_cast = True
    assert way(forge, classes=(torch.nn.Conv2d,)) == "host.fp16_path"


def test_no_merge_into_weights_that_would_round_the_lora_away_nor_into_the_last_ram(monkeypatch):
    assert way(Forge(dtype=torch.float8_e4m3fn), classes=()) is None
    needed = sum(parameter.nbytes for parameter in Forge().model.parameters())
    for available, found in ((needed + RAM_FLOOR_BYTES, None), (needed + RAM_FLOOR_BYTES + 1, "host.merge_path")):
        monkeypatch.setattr(fallback, "available_ram_bytes", lambda available=available: available)
        assert way(Forge(), classes=()) == found


def test_an_empty_stack_needs_no_way():
    forge = Forge()
    assert way(forge, {}) is None
    assert forge.calls == []


def test_a_failed_attempt_brings_parameters_back_to_their_devices():
    forge = Forge(False, device="meta")
    assert not forge.host.attempt({("style", 0.8, 1.0, False): {}})
    assert {parameter.device.type for parameter in forge.model.parameters()} == {"meta"}
    assert isinstance(forge.model.weight, torch.nn.Parameter)
