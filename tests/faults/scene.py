"""A scene for the failures: a model in the double with the guard at work, and an ear for what it says."""

import contextlib
import logging

import pytest
import torch
from support.measure import same_bits

from faults.models import TOKENS, loras
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.runtime.factor_copies import own
from lib_lora_guard.settings import LoraMode


class Scene:
    """One model in the double, and what should be true of it. `read_by_guard`: its LoRAs come out of files that the guard has
    read, as in Forge; what the host has read is copied for each stack."""

    def __init__(self, host, storage, read_by_guard=True):
        self.host, self.storage = host, storage
        self.patcher = host.make(storage)
        self.loader, self.guard = self.patcher.lora_loader, host.guard
        self.clone = self.patcher
        self.base = self.picture()
        self.bits = {k: p.data.clone() for k, p in self.patcher.model.named_parameters()}
        first, second, third = loras()
        if read_by_guard:
            for value in [*first.values(), *second.values(), *third.values()]:
                tensors = value[1] if isinstance(value[0], str) else value
                own(t for t in tensors if isinstance(t, torch.Tensor))
        self.stacks = {
            "none": (),
            "two": (("a", first, 0.8), ("b", second, 0.5)),
            "weaker": (("a", first, 0.3), ("b", second, 0.5)),
            "other": (("c", third, 0.7),),
        }
        self.modes, self.hashes = {}, {}
        self.pictures, self.hosts_pictures, self.unmerged_pictures = {}, {}, {}

    def picture(self):
        with torch.inference_mode():
            return self.patcher.model(TOKENS).clone()

    def lies_elsewhere(self):
        """True where a part of the model, or all of it, is not where it is to run."""
        return any(p.device != TOKENS.device for p in self.patcher.model.parameters())

    def clone_of(self, name):
        clone = self.patcher.clone()
        for filename, patches, strength in self.stacks[name]:
            clone.add_patches(filename=filename, patches=patches, strength_patch=strength)
        return clone

    def load(self, name):
        mode = self.modes.get(name, LoraMode.AUTOMATIC)
        self.guard.settings.options = {"lora_guard_mode": mode.value}
        self.clone = self.clone_of(name)
        self.host.load(self.clone)

    def settle(self, name):
        """The undisturbed way to a stack; its picture is what the others are compared with."""
        self.load(name)
        self.hashes[name] = str(list(self.clone.lora_patches))
        assert self.loader.loaded_hash == self.hashes[name]
        picture = self.picture()
        known = self.pictures.setdefault(name, picture)
        return same_bits(picture, known)

    def hosts_picture(self, name):
        """What comes out where the guard gives up and the host's own fp16-LoRA path takes over."""
        if name not in self.hosts_pictures:
            self.load("none")
            # Unheard, for pytest keeps what it hears, and with it the copies of all factors.
            with listening(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(Engine, "commit", lambda *args: 1 / 0)
                self.load(name)
            self.hosts_pictures[name] = self.picture()
        return self.hosts_pictures[name]

    def unmerged_picture(self, name):
        """What comes out where the guard does not merge."""
        if name not in self.unmerged_pictures:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(self.modes, name, LoraMode.FP16)
                self.load("none")
                self.load(name)
            self.unmerged_pictures[name] = self.picture()
        return self.unmerged_pictures[name]

    def restored(self):
        """Takes everything off; returns what did not come back."""
        self.load("none")
        now = dict(self.patcher.model.named_parameters())
        wrong = [k for k, bits in self.bits.items() if not same_bits(now[k].data, bits)]
        # What else can lie on a layer; looked at, because a picture for every run would take too long.
        for name, layer in self.patcher.model.named_modules():
            if layer._forward_hooks or layer._forward_pre_hooks or getattr(layer, "forge_online_loras", None):
                wrong.append(f"{name}: something is left on the layer, which")
        return wrong


class Said(logging.Handler):
    """What the guard has said; no records, which would hold on to everything that was alive."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        error = record.exc_info and record.exc_info[1]
        self.lines.append(f"{record.levelname} {record.getMessage()}" + (f" [{error!r}]" if error else ""))


@contextlib.contextmanager
def listening():
    said, log = Said(), logging.getLogger("lib_lora_guard")
    before = log.level, log.propagate
    log.addHandler(said)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield said.lines
    finally:
        log.removeHandler(said)
        log.level, log.propagate = before
