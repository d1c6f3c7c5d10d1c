"""What memory there is: measured here, decided elsewhere. Pure torch and psutil; knows neither adapters nor hosts."""

from .out_of_memory import give_back_cached_memory, is_out_of_memory
from .probe import BackupBudget, disk_spare_bytes, measure_budget

__all__ = ["BackupBudget", "disk_spare_bytes", "give_back_cached_memory", "is_out_of_memory", "measure_budget"]
