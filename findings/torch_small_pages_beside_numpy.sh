#!/usr/bin/env bash
# Guess:    On Linux with transparent huge pages for programs that ask ("madvise", the usual setting), large tensors in RAM get
#           pages of 2 MB as large numpy arrays do: torch and numpy hold the same bytes, and share memory without a copy.
# Versions: torch==2.13.0 numpy==2.4.6, any build of torch, Linux
# Seen:     numpy asks for them under every array of 4 MB and more; torch asks for none, under no tensor of any size, unless the process was
#           started with THP_MEM_ALLOC_ENABLE=1. A numpy array that becomes a tensor keeps its pages, and a clone of it has small ones.
# Matters:  New RAM is filled a page at a time. LoRA files that are read, layers that are offloaded and backups of merged weights are
#           hundreds of MB of new RAM each: with small pages filling it takes two to four times as long, most of the time of reading a
#           file that the system has in its cache. Code that reads into numpy arrays first measures the one, models live in the other.
set -euo pipefail
[ -e /sys/kernel/mm/transparent_hugepage/enabled ] || { echo "needs a Linux with transparent huge pages"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > asks.py <<'PY'
import re
import sys
from pathlib import Path

import numpy as np
import torch

SIZE = 64 << 20


def asks(address):
    """Returns whether large pages were asked for under the middle of a block of SIZE bytes."""
    middle, is_there = address + SIZE // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(found[1], 16) <= middle < int(found[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise SystemExit("the memory is not listed")


def check(what, tensor, expected):
    seen = asks(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)
    print(f"{what}: asks for large pages: {seen}, expected {expected}")
    if seen is not expected:
        raise SystemExit(f"CHANGED: {what}")


is_on = sys.argv[1] == "on"
array = np.empty(SIZE, np.uint8)
check("numpy.empty", array, True)
check("torch.empty", torch.empty(SIZE, dtype=torch.uint8), is_on)
check("torch.zeros", torch.zeros(SIZE // 2, dtype=torch.float16), is_on)
shared = torch.from_numpy(array)
check("torch.from_numpy", shared, True)
check("its clone", shared.clone(), is_on)
check("a cast, as of an offloaded weight", torch.zeros(SIZE // 4).to(torch.bfloat16).repeat(2), is_on)
check("numpy.copy of a tensor", torch.zeros(SIZE, dtype=torch.uint8).numpy().copy(), True)
PY
OMP_NUM_THREADS=1 venv/bin/python asks.py off
echo "with THP_MEM_ALLOC_ENABLE=1:"
THP_MEM_ALLOC_ENABLE=1 OMP_NUM_THREADS=1 venv/bin/python asks.py on
