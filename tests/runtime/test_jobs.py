"""How many calls of the denoiser begin."""

import threading

import pytest

from lib_lora_guard.planning.job_cost import USUAL_CALLS
from lib_lora_guard.runtime.jobs import Jobs, Pass


def test_the_innermost_request_counts():
    """A detailer makes an image inside another's."""
    jobs = Jobs()
    assert jobs.next_pass() == (USUAL_CALLS, False)
    with jobs.job(lambda: Pass(30, is_last=True)):
        with jobs.job(lambda: Pass(8)):
            assert jobs.next_pass() == (8, False)
        assert jobs.next_pass() == (30, True)
    assert jobs.next_pass() == (USUAL_CALLS, False)


def test_a_request_of_another_thread_does_not_count():
    jobs, found = Jobs(), []
    with jobs.job(lambda: Pass(30, is_last=True)):
        thread = threading.Thread(target=lambda: found.append(jobs.next_pass()))
        thread.start()
        thread.join()
    assert found == [(USUAL_CALLS, False)]


@pytest.mark.parametrize("error", [AttributeError("steps"), TypeError("None")])
def test_a_request_that_does_not_say_has_the_usual_number(error):
    def next_pass():
        raise error

    with Jobs().job(next_pass) as _:
        pass
    jobs = Jobs()
    with jobs.job(next_pass):
        assert jobs.next_pass() == (USUAL_CALLS, False)
    with jobs.job(lambda: Pass(0)):
        assert jobs.next_pass() == (1, False)
