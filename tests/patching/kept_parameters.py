"""Parameters of any bits for the tests of backups, and the fixtures that make them look as if they lay on a GPU."""

import torch

from lib_lora_guard.memory.probe import BackupBudget
from lib_lora_guard.units import GB
from lib_lora_guard.weights.storage import FP8_DTYPES

CPU = torch.device("cpu")


DISK_ONLY = BackupBudget(0, 0, GB)


NOTHING = BackupBudget(0, 0, 0)


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    *FP8_DTYPES,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def parameter(shape=(3, 5), dtype=torch.bfloat16, seed=0):
    """Any bits, NaNs among them."""
    numel, size = torch.Size(shape).numel(), torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (numel * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        bits %= 2
    return torch.nn.Parameter(bits.view(dtype).reshape(shape), requires_grad=False)


def bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()


def assert_same(a, b):
    assert type(a) is torch.nn.Parameter
    assert (a.shape, a.dtype, a.device, a.requires_grad) == (b.shape, b.dtype, b.device, b.requires_grad)
    assert torch.equal(bits(a), bits(b))


def spooled_files(tmp_path):
    folder = tmp_path / "spool"
    return sorted(folder.iterdir()) if folder.exists() else []
