"""torch on first use: what a process without it has loaded, and that the stand-in is torch in everything else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib_lora_guard import lazy_torch
from lib_lora_guard.memory import torch_build

ROOT = Path(lazy_torch.__file__).parent.parent

IN_A_FRESH_PROCESS = """
import sys, threading
from lib_lora_guard import lazy_torch
from lib_lora_guard.memory.torch_build import torch_build
from lib_lora_guard.memory.out_of_memory import is_out_of_memory
from lib_lora_guard.weights.dtype_names import dtype_name

stand_in, before = lazy_torch.torch, torch_build()
assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError())
assert dtype_name("float8_e5m2") == "fp8_e5m2"
try: stand_in.float32 = 1
except AttributeError: pass
else: raise AssertionError("what is set on the stand-in would be lost")
assert not lazy_torch.is_loaded() and not any(name.split(".")[0] == "torch" for name in sys.modules)

found = []
threads = [threading.Thread(target=lambda: found.append(stand_in.nn.Linear)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import torch
assert found == [torch.nn.Linear] * 8
assert lazy_torch.is_loaded() and sys.modules["torch"] is torch and type(torch) is type(sys)
assert stand_in.float32 is torch.float32 and isinstance(stand_in.zeros(1), torch.Tensor)
assert torch_build() == before, (torch_build(), before)
try: stand_in.nonsense
except AttributeError as error: assert "nonsense" in str(error)
torch.later = 3
assert stand_in.later == 3, "a patch of torch is seen"
from lib_lora_guard.memory.out_of_memory import OutOfMemory
assert OutOfMemory == (torch.cuda.OutOfMemoryError, MemoryError) and is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
"""


def test_the_stand_in_is_torch_and_loads_it_once():
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], cwd=ROOT, check=True)


def test_where_torch_is_loaded_there_is_no_stand_in():
    assert lazy_torch.is_loaded()
    assert lazy_torch.torch is torch


@pytest.mark.parametrize(
    ("cuda", "rocm", "driver", "may"),
    [
        (False, False, True, False),
        (True, False, False, False),
        (True, False, True, True),
        (False, True, False, True),
    ],
)
def test_who_may_have_a_card(monkeypatch, cuda, rocm, driver, may):
    monkeypatch.setattr(torch_build, "cuda_driver", lambda: object() if driver else None)
    assert torch_build.TorchBuild("2.9.0", cuda, rocm).may_have_card() is may


def test_a_torch_that_keeps_its_facts_elsewhere_is_asked_itself(monkeypatch):
    monkeypatch.setattr(torch_build, "is_loaded", lambda: False)
    there = torch_build.torch_build()
    monkeypatch.setattr(torch_build.util, "find_spec", lambda name: None)
    assert torch_build.torch_build() == there
    assert there.version == torch.__version__
