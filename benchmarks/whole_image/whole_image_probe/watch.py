"""What a step waits for: its own processor, other threads, the machine's other tenants, copies, or the card.

Two steps of the same image may differ by a tenth and more. Of each step: the seconds until all its work was handed to the card
("launch"), what the thread computed of them ("thread"), what other threads of the process did ("others"), what the machine's host took
away ("steal", of all processors), how often the thread lost its processor; on a CUDA card how long the products waited for copies that
were begun ahead ("exposed") and for those that were not ("direct"), how many of each there were, and the card's clocks and power at the end.
"""

import functools
import resource
import sys
import time
from pathlib import Path

TICKS_PER_SECOND = 100
"""Of `/proc/stat`."""
GUARD = "lib_lora_guard.patching.swapped_ahead"


class Watch:
    """Of one process. `begin()`, `launched()` before anything waits for the card, `facts()` after it has."""

    def __init__(self, torch):
        self.torch, self.card, self.spans, self.is_wrapped = torch, None, [], False
        self.at = self.end = None
        if torch.cuda.is_available():
            try:
                import pynvml

                pynvml.nvmlInit()
                self.card = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
            except Exception:
                pass  # no package: the clocks are left out

    def begin(self):
        """Begins a step."""
        if not self.is_wrapped and (module := sys.modules.get(GUARD)) is not None:
            self.is_wrapped = True
            self._wrap(module.AHEAD._link)
        self.spans.clear()
        self.at = self._now()

    def launched(self):
        """Notes that all of a step is with the card."""
        self.end = self._now()

    def facts(self):
        """Returns the numbers of the step, in seconds, MHz and watts; empty if none has begun."""
        if self.at is None or self.end is None:
            return {}
        wall, thread, process, steal, switches = (end - at for end, at in zip(self.end, self.at, strict=True))
        self.at = self.end = None
        found = {
            "launch": wall, "thread": thread, "others": process - thread, "steal": steal, "switches": switches,
        }  # fmt: skip
        if self.is_wrapped and self.torch.cuda.is_available():
            for kind in ("exposed", "direct"):
                mine = [begin.elapsed_time(end) / 1e3 for one, begin, end in self.spans if one == kind]
                found |= {kind: sum(mine), f"{kind}_count": len(mine)}
        if self.card is not None:
            nvml, handle = self.card
            found["sm_mhz"] = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            found["watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        return {name: round(value, 5) for name, value in found.items()}

    def _now(self):
        usage = resource.getrusage(resource.RUSAGE_THREAD)
        return time.perf_counter(), time.thread_time(), time.process_time(), steal_seconds(), usage.ru_nivcsw

    def _wrap(self, link):
        for name, kind in (("copy", "direct"), ("wait", "exposed")):
            setattr(link, name, self._timed(getattr(link, name), kind))

    def _timed(self, original, kind):
        @functools.wraps(original)
        def timed(*arguments):
            device = arguments[-1]
            if device.type != "cuda":
                return original(*arguments)
            stream = self.torch.cuda.current_stream(device)
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            result = original(*arguments)
            end.record(stream)
            self.spans.append((kind, begin, end))
            return result

        return timed


def steal_seconds(path=Path("/proc/stat")):
    """Returns the seconds in which the machine's host gave this machine's processors to others, since it started; 0 where none says."""
    try:
        words = path.read_text(encoding="ascii").splitlines()[0].split()
        return int(words[8]) / TICKS_PER_SECOND
    except (OSError, IndexError, ValueError):
        return 0.0
