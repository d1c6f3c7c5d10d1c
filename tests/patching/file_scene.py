"""A small model that was loaded from a checkpoint file, which is the backup of its merges.

CPU tensors that count as lying on a card go through the ring; pieces are 256 bytes, the ring holds three.
"""

import os

import torch
from safetensors.torch import save_file
from support.make import Net, host_value
from support.measure import same_bits

from lib_lora_guard.adapters import parse_term
from lib_lora_guard.hosts.plain.access import PlainAccess
from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.patching import backup, file_backup, file_reader, file_sums, merge_attachment
from lib_lora_guard.patching.engine import Engine
from lib_lora_guard.patching.lora_request import LoraRequest
from lib_lora_guard.planning.mode import Wish
from lib_lora_guard.units import GB

SIZE = 24


def lay_on_card(monkeypatch):
    """Parameters count as lying on a card, and everything is small enough for tensors of this size."""
    for module in (merge_attachment, backup, file_backup):
        monkeypatch.setattr(module, "lies_in_ram", lambda tensor: False)
    monkeypatch.setattr(merge_attachment, "KEPT_BYTES", 64)
    monkeypatch.setattr(file_reader, "PIECE_BYTES", 256)
    monkeypatch.setattr(file_reader, "RING_BYTES", 768)
    monkeypatch.setattr(file_reader, "COPY_BYTES", 512)
    monkeypatch.setattr(file_sums, "ROW_WORDS", 4)
    for module in (file_sums, file_backup):
        monkeypatch.setattr(module, "BLOCK_BYTES", 512)
    monkeypatch.setattr(file_backup, "LEAST_BYTES", 0)
    monkeypatch.setattr(file_backup, "SMALLEST_BYTES", 64)


class Scene:
    """A small bf16 model that was loaded from `path`, whose names have the prefix of whole checkpoints."""

    def __init__(self, folder, prefix="model.diffusion_model.", dtype=torch.bfloat16, device="cpu", depth=2):
        torch.manual_seed(0)
        self.model = torch.nn.Module()
        self.model.diffusion_model = Net(SIZE, depth=depth).to(device, dtype).requires_grad_(False)
        self.path = folder / "model.safetensors"
        inner = dict(self.model.diffusion_model.state_dict())
        self.tensors = {prefix + name: value.clone() for name, value in inner.items()}
        save_file({"first_stage_model.x": torch.ones(3), **self.tensors}, self.path)
        self.originals = {name: p.data.clone() for name, p in self.model.named_parameters()}
        self.keys = [name for name, p in self.model.named_parameters() if p.dim() > 1]
        self.engine = Engine(weight_files=lambda: [self.path])
        self.access = PlainAccess(self.model)
        self.access.backup_budget = lambda: BackupBudget(0, GB, 0)

    def stack(self, strength=0.7):
        terms = {}
        for n, key in enumerate(self.keys):
            value = host_value("lora", tuple(self.originals[key].shape), n)
            terms[key] = [parse_term([strength, value, 1.0, None, None], {}, 0)]
        return [LoraRequest("a", strength, terms)]

    def change(self, strength=0.7):
        return self.engine.change(self.access, self.stack(strength), Wish.PREFER_MERGE)

    def remove(self):
        self.engine.change(self.access, [])

    def places(self):
        return {one.backup.place.where for one in self.engine.attached.values()}

    def values(self):
        return {name: p.data.clone() for name, p in self.model.named_parameters()}

    def is_original(self):
        return all(same_bits(p.data, self.originals[name]) for name, p in self.model.named_parameters())

    def damage(self, key, byte=0, value=None):
        """Overwrites a byte of a weight in the file, in place; the times of the file stay as they are."""
        start = file_backup.open_header(self.path).tensors["model." + key].start
        facts = self.path.stat()
        with self.path.open("r+b") as file:
            file.seek(start + byte)
            old = file.read(1)
            file.seek(start + byte)
            file.write(bytes([old[0] ^ 0x80]) if value is None else value)
        os.utime(self.path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
