"""Limits in seconds that hold on a slower machine too: machines differ by two and more, and so does one with the hour."""

import functools
import gc
import json
import statistics
import time

FACTS = {"phase": "sampling_step", "loras": [f"lora-{n}.safetensors" for n in range(10)], "free_bytes": 1 << 33}
MEASURED_SECONDS = 0.19e-3
"""What `_work` took where the limits were measured."""


def _work():
    for _ in range(30):
        json.loads(json.dumps(FACTS))


def _seconds(rounds, clock):
    begun = clock()
    for _ in range(rounds):
        _work()
    return (clock() - begun) / rounds


@functools.cache
def times_slower():
    """How many times slower this machine is than the one where the limits were measured; 1 if it is not.

    The least of many: the others measure what else the machine does. For the least of many measurements too.
    """
    return max(1.0, min(_seconds(1, time.perf_counter) for _ in range(100)) / MEASURED_SECONDS)


def times_slower_now():
    """The same for a piece of work that was measured once, just before: the median of nine, of the processor's time."""
    with CpuTime():
        found = [_seconds(100, time.thread_time) for _ in range(9)]
    return max(1.0, statistics.median(found) / MEASURED_SECONDS)


def assert_within(seconds, limit, what="it"):
    """Compares the processor's seconds with a limit; only where they are more it asks how slow this machine is."""
    if seconds > limit:
        allowed = limit * times_slower_now()
        assert seconds <= allowed, (
            f"{what} took {seconds:.3f} s of the processor, at this machine's pace at most {allowed:.3f} s"
        )


class CpuTime:
    """Measures the processors' time for its block, of all threads. With a limit in seconds it fails where that is more.

    Python's collector does not run: how long it takes depends on all the objects that earlier tests have left.
    """

    def __init__(self, limit=None, what="it"):
        self.limit, self.what, self.seconds = limit, what, None

    def __enter__(self):
        self._collects = gc.isenabled()
        gc.disable()
        self._begun = time.process_time()
        return self

    def __exit__(self, kind, error, trace):
        self.seconds = time.process_time() - self._begun
        if self._collects:
            gc.enable()
        if kind is None and self.limit is not None:
            assert_within(self.seconds, self.limit, self.what)
