"""For tests with threads, processes and browsers: waiting for what comes soon, without counting on how soon."""

import time

LONGEST_WAIT_SECONDS = 30
"""Tests wait so long for what comes at once on a free machine."""


def wait_until(condition, complaint, seconds=LONGEST_WAIT_SECONDS, step_seconds=0.02):
    """Asks for the condition again and again until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(step_seconds)
