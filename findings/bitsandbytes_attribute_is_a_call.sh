#!/usr/bin/env bash
# Guess:    To read a weight's `device`, `dtype` or `shape` is to read an attribute, in bitsandbytes' 4-bit layers as in any
#           other: some tenths of a microsecond. Whoever patches LoRAs may look at each weight in each step.
# Versions: torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2, any build of torch
# Seen:     Params4bit has a `__torch_function__`, made for torch.chunk and torch.split. torch asks it about every attribute
#           and method of the tensor: device, dtype, shape, data, requires_grad, numel() and data_ptr() are each a call of
#           Python, some twenty times as slow as on a plain parameter. Int8Params and a plain parameter have none. Inside
#           torch._C.DisableTorchFunctionSubclass() they are attributes again, with the same values.
# Matters:  A 4-bit Flux has 500 such weights. Device, dtype and bytes of each, looked at in each step, are 1,500 calls and
#           some milliseconds of the thread that feeds the card: 4 us a look on a slow CPU instead of 0.2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import statistics
import sys
import timeit

import torch
from bitsandbytes.nn import Int8Params, Params4bit

LOOKS = {
    "device": lambda weight: weight.device,
    "dtype": lambda weight: weight.dtype,
    "shape": lambda weight: weight.shape,
    "data": lambda weight: weight.data,
    "requires_grad": lambda weight: weight.requires_grad,
    "numel()": lambda weight: weight.numel(),
    "data_ptr()": lambda weight: weight.data_ptr(),
}


def calls_of(look, weight):
    """How often a look enters a `__torch_function__` of Python."""
    found = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name == "__torch_function__":
            found.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        look(weight)
    finally:
        sys.setprofile(None)
    return len(found)


def check(what, found, expected):
    print(f"{what}: {found}, expected {expected}")
    if found != expected:
        raise SystemExit(f"CHANGED: {what}")


values = torch.randn(64, 64)
four = Params4bit(values.clone(), requires_grad=False)
eight = Int8Params(values.clone(), requires_grad=False)
plain = torch.nn.Parameter(values.clone(), requires_grad=False)
for name, look in LOOKS.items():
    found = [calls_of(look, weight) for weight in (four, eight, plain)]
    check(f"calls of Python for {name} of a 4-bit weight, an 8-bit one, a plain one", found, [1, 0, 0])
    with torch._C.DisableTorchFunctionSubclass():
        check(f"the same for a 4-bit weight with functions of subclasses off, {name}", calls_of(look, four), 0)
check("shape as it is", tuple(four.shape), (64, 64))


def nanoseconds(weight):
    return statistics.median(timeit.repeat(lambda: weight.device, number=20_000, repeat=7)) / 20_000 * 1e9


ratio = nanoseconds(four) / nanoseconds(plain)
print(f"the time of a look at `device`, 4-bit over plain: {ratio:.0f}")
check("it is more than three times as long", ratio > 3, True)
PY
