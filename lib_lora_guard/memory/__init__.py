"""Measures memory; other packages decide what to do with the numbers. Needs only torch and psutil, no adapter and no
host.
"""

from .nvml import Nvml
from .out_of_memory import give_back_cached_memory, is_out_of_memory
from .probe import BackupBudget, disk_spare_bytes, measure_budget
from .readings import MemorySnapshot, Reading
from .snapshot import HostMemory, take_snapshot

__all__ = [
    "BackupBudget",
    "HostMemory",
    "MemorySnapshot",
    "Nvml",
    "Reading",
    "disk_spare_bytes",
    "give_back_cached_memory",
    "is_out_of_memory",
    "measure_budget",
    "take_snapshot",
]
