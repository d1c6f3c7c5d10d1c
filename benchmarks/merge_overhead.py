"""The processor's own time of merges whose backup is the checkpoint, on a CPU: what is left when the card and the disk take nothing.

    python benchmarks/merge_overhead.py

- A piece of the file, of the thread that asks for it: pieces and ring a thousandth of their size, in a file that lies in memory.
- A merge of a LoRA of rank 4 into 8 x 8 numbers.
- The pace: milliseconds of a fixed loop of Python, by which machines can be compared.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lib_lora_guard.adapters import LoraAdapter, Term
from lib_lora_guard.patching import file_reader, merging

CPU = torch.device("cpu")
SCALE = 1024
PIECES, TOGETHER, ROUNDS, CALLS = 5632, 8, 7, 2000


def of_a_piece():
    """Microseconds of the asking thread for a piece."""
    for name in ("PIECE_BYTES", "RING_BYTES", "COPY_BYTES"):
        if hasattr(file_reader, name):
            setattr(file_reader, name, getattr(file_reader, name) // SCALE)
    size, found = file_reader.PIECE_BYTES, []
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
        file.write(os.urandom(size * PIECES))
        file.flush()
        parts = [file_reader.Piece(start * size * TOGETHER, size * TOGETHER) for start in range(PIECES // TOGETHER)]
        for _ in range(ROUNDS):
            reader = file_reader.FileReader(Path(file.name), None)
            reader.reserve(CPU)
            into = torch.empty(size * TOGETHER, dtype=torch.uint8)
            begin = time.thread_time()
            reader.expect([part] for part in parts)
            for part in parts:
                reader.read([part], into)
            found.append((time.thread_time() - begin) / PIECES * 1e6)
            reader.close()
    return min(found)


def of_a_merge():
    """Microseconds of a merge."""
    data = torch.randn(8, 8).half()
    term = Term(LoraAdapter(torch.randn(8, 4).half(), torch.randn(4, 8).half(), alpha=2.0), 0.7)
    found = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            merging.merge(data, [term], device=CPU, out_dtype=torch.float16)
        found.append((time.perf_counter() - begin) / CALLS * 1e6)
    return min(found)


def pace():
    found = []
    for _ in range(3):
        begin, total = time.perf_counter(), 0
        for number in range(10_000_000):
            total += number
        found.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(found)


def main():
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, pace {pace():.0f} ms")
    print(f"a merge: {of_a_merge():.0f} us")
    print(f"a piece of the file: {of_a_piece():.0f} us")


if __name__ == "__main__":
    main()
