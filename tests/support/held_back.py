"""LoRA files whose values are read no sooner than a test lets them be, and files with a value that is of no use."""

import contextlib
import threading
import types

from safetensors.torch import load_file, save_file

from lib_lora_guard.adapters import files
from lib_lora_guard.files import reading


@contextlib.contextmanager
def values_held_back(monkeypatch):
    """Inside, every file is large, and nothing of a factor is read before `open()`. `waited` has an entry for each piece that was."""
    opened, read, waited = threading.Event(), reading.ComingInOnePiece._read_piece, []

    def wait(coming, piece, file):
        waited.append(opened.wait(10))
        read(coming, piece, file)

    for module in (files, reading):
        monkeypatch.setattr(module, "LARGE_FILE_BYTES", 1)
    monkeypatch.setattr(reading.ComingInOnePiece, "_read_piece", wait)
    try:
        yield types.SimpleNamespace(open=opened.set, close=opened.clear, waited=waited)
    finally:
        opened.set()


def spoil(path):
    """Writes NaN into the file that `write_kohya` has written for the contract's modules."""
    tensors = load_file(path)
    tensors["lora_unet_blocks_0_proj.lora_up.weight"][3, 1] = float("nan")
    save_file(tensors, path)
