"""A torch whose allocator can be told, and what it is told: for the tests of its options."""

import torch
from hypothesis import strategies as st

from lib_lora_guard.memory.allocator import Standing, apply
from lib_lora_guard.memory.allocator_machine import Machine
from lib_lora_guard.memory.allocator_text import COLLECT, EXPANDABLE, OPTIONS, SPLIT, AllocatorWish, parse

CUDA = torch.device("cuda", 0)
CUDA_NAME = "PYTORCH_CUDA_ALLOC_CONF"
LINUX = Machine("cuda", (2, 12))
WINDOWS = Machine("cuda", (2, 3), system="Windows")
ON = AllocatorWish(expandable_segments=True)
OFF, ACTIVE, MISSING, LATER = Standing.OFF, Standing.ACTIVE, Standing.NOT_AVAILABLE, Standing.NEXT_START


class FakeTorch:
    """An allocator with the rules that torch 2.12.1 showed: numbers are reset by a string without them, expandable
    segments stay as they were, the string is recorded even where it is refused."""

    def __init__(self, start="", has_expandable=True, probe=True, tells=True, refuses=(), splits_mb=None):
        self.settings = {"PYTORCH_CUDA_ALLOC_CONF": "", EXPANDABLE: False, "max_split_size": -1, COLLECT: 0.0}
        self.wants_expandable = False
        self.has_expandable, self.probe, self.tells = has_expandable, probe, tells
        self.refuses, self.splits_mb = refuses, splits_mb
        self.writes, self.probes, self.caps, self.share = [], 0, [], 1.0
        self._take(start)

    def write(self, text):
        self.writes.append(text)
        self._take(text)

    def _take(self, text):
        self.settings |= {"PYTORCH_CUDA_ALLOC_CONF": text, "max_split_size": -1, COLLECT: 0.0}
        for key, value in parse(text).items():
            if key in self.refuses:
                raise ValueError(f"Unrecognized key '{key}' in CUDA allocator config.\nC++ CapturedTraceback: ...")
            if key == EXPANDABLE:
                self.wants_expandable = value == "True"
            elif key == SPLIT:
                self.settings["max_split_size"] = (self.splits_mb or int(value)) << 20
            elif key == COLLECT:
                self.settings[COLLECT] = float(value)
        self.settings[EXPANDABLE] = self.wants_expandable and self.has_expandable

    def read(self):
        return dict(self.settings) if self.tells else {}

    def takes_expandable(self, device):
        self.probes += 1
        if isinstance(self.probe, Exception):
            raise self.probe
        return self.probe

    def cap_near_whole_card(self, device):
        self.caps.append(device)
        before, self.share = self.share, 0.99
        return before if before > 0.99 else None

    def lift_cap(self, fraction, device):
        self.share = fraction


def tell(fake, wish, environment=None, before=None, machine=LINUX):
    return apply(wish, environment or {}, CUDA, before, machine=machine, allocator=fake)


def standings(state):
    return [state.options()[name].standing for name in OPTIONS]


OWN_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        EXPANDABLE: st.sampled_from(["True", "False"]),
        SPLIT: st.integers(21, 1 << 20).map(str),
        COLLECT: st.floats(0, 1, exclude_min=True, exclude_max=True).map(repr),
    },
)
"""Entries of the three options that the guard sets."""
