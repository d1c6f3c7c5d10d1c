#!/usr/bin/env bash
# Guess:    A weak reference to a parameter only observes it. A model moves with one as it does without, and as it does
#           with ordinary parameters.
# Versions: torch==2.13.0 torchao==0.17.0 numpy==2.4.6, any build of torch, on a CPU
# Seen:     While any weak reference to the weight of a layer that torchao has quantised is alive, model.to() ends with
#           "_apply(): Couldn't swap Linear.weight"; layers before it have been moved by then. Once the reference is gone
#           it works again. torch exchanges the contents of such tensors, and that refuses objects with weak references.
# Matters:  What is kept of a weight beside a model, such as a LoRA's factors prepared for it, is usually kept in a weak
#           dictionary, so that it goes with the weight. On such a model that keeps the host from moving it to or from
#           the card, with an error that names neither. Refer weakly to the layer instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 torchao==0.17.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY' 2>/dev/null
import weakref

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def moved(model):
    """Returns the error of a move that changes nothing but the dtype of plain parameters, and the dtypes of the biases after it."""
    try:
        model.to(torch.float16)
        error = None
    except RuntimeError as failed:
        error = str(failed)
    return error, [layer.bias.dtype for layer in model]


def expect(what, found, wanted):
    print(f"{what}: {found}")
    if found != wanted:
        raise SystemExit(f"CHANGED: {what}: expected {wanted}")


HALF, BRAIN = torch.float16, torch.bfloat16
plain = torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=BRAIN) for _ in range(2)))
observer = weakref.ref(plain[1].weight)
expect("ordinary weights, one observed", moved(plain), (None, [HALF, HALF]))

quantised = torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=BRAIN) for _ in range(2)))
quantize_(quantised, Int8WeightOnlyConfig())
observer = weakref.ref(quantised[1].weight)
error, dtypes = moved(quantised)
expect("quantised, the second observed: refused", "Couldn't swap Linear.weight" in (error or ""), True)
expect("the first layer's bias is converted by then, the second's is not", dtypes, [HALF, BRAIN])
del observer
expect("no longer observed", moved(quantised), (None, [HALF, HALF]))
PY
