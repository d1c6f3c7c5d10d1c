"""Peaks of a process's memory and of the card's, sampled while an image is made."""

import threading
import time
from pathlib import Path

PERIOD_SECONDS = 0.05


def own_ram_bytes(status):
    """Returns the bytes of RAM that no file backs, by `/proc/PID/status`: anonymous memory and shared memory.

    Mapped pages of a checkpoint are left out: the system drops them when it needs the room.
    """
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words and words[0] in ("RssAnon:", "RssShmem:"))


def resident_bytes(status):
    """Returns all resident bytes by `/proc/PID/status`."""
    lines = (line.split() for line in status.splitlines())
    return sum(int(words[1]) * 1024 for words in lines if words and words[0] == "VmRSS:")


class Card:
    """The bytes in use on the first GPU, as its driver says; None where no driver answers."""

    def __init__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception:
            self.nvml = None  # no package or no driver: a run on the CPU

    def used_bytes(self):
        if self.nvml is None:
            return None
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used


class Peaks:
    """Samples in a thread of its own. `with Peaks(pid, card) as peaks: ...; peaks.as_row()`."""

    def __init__(self, pid, card):
        self.status, self.card = Path(f"/proc/{pid}/status"), card
        self.own = self.resident = self.vram = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def _run(self):
        while not self.ended.is_set():
            try:
                text = self.status.read_text()
            except OSError:
                return  # the process has ended
            self.own, self.resident = max(self.own, own_ram_bytes(text)), max(self.resident, resident_bytes(text))
            self.vram = max(self.vram, self.card.used_bytes() or 0)
            time.sleep(PERIOD_SECONDS)

    def as_row(self, vram_before):
        """Returns the peaks in MB; VRAM is what was used beyond `vram_before` bytes."""
        row = {"own_ram_mb": self.own / 1e6, "resident_mb": self.resident / 1e6}
        if self.vram:
            row["vram_mb"] = (self.vram - vram_before) / 1e6
        return {name: round(value) for name, value in row.items()}
