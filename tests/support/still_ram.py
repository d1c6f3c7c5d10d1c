"""This machine's RAM, read once: the guard looks at it around every phase of the host's, at six files of the system each time."""

from lib_lora_guard.memory.control_groups import ControlGroups
from lib_lora_guard.memory.snapshot import HostMemory


def keep_ram_still(patch):
    """For tests that load models thousands of times and are not about RAM. `patch`: a MonkeyPatch."""
    host = HostMemory()
    swap, rooms, peak = host.swap_bytes(), host.groups.rooms(), host.rss_peak_bytes()
    patch.setattr(HostMemory, "swap_bytes", lambda self: swap)
    patch.setattr(HostMemory, "rss_peak_bytes", lambda self: peak)
    patch.setattr(ControlGroups, "rooms", lambda self, swap_free_bytes=0: rooms)
