"""For limits in seconds that are less than three times what was measured: a slower machine is given more."""

import functools
import json
import time

FACTS = {"phase": "sampling_step", "loras": [f"lora-{n}.safetensors" for n in range(10)], "free_bytes": 1 << 33}
MEASURED_SECONDS = 0.19e-3
"""What `_work` took where the limits were measured."""


def _work():
    for _ in range(30):
        json.loads(json.dumps(FACTS))


@functools.cache
def times_slower():
    """How many times slower this machine is than the one where the limits were measured; 1 if it is not.

    The least of many: the others measure what else the machine does.
    """

    def seconds():
        begun = time.perf_counter()
        _work()
        return time.perf_counter() - begun

    return max(1.0, min(seconds() for _ in range(100)) / MEASURED_SECONDS)
