import sys

from support.forge_memory import MemoryManagement

sys.modules[__name__] = MemoryManagement()
