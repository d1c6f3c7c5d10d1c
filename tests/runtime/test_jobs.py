"""How many calls of the denoiser begin."""

import threading

import pytest

from lib_lora_guard.planning.job_cost import USUAL_CALLS
from lib_lora_guard.runtime.jobs import Jobs


def test_the_innermost_request_counts():
    """A detailer makes an image inside another's."""
    jobs = Jobs()
    assert jobs.calls() == USUAL_CALLS
    with jobs.job(lambda: 30):
        with jobs.job(lambda: 8):
            assert jobs.calls() == 8
        assert jobs.calls() == 30
    assert jobs.calls() == USUAL_CALLS


def test_a_request_of_another_thread_does_not_count():
    jobs, found = Jobs(), []
    with jobs.job(lambda: 30):
        thread = threading.Thread(target=lambda: found.append(jobs.calls()))
        thread.start()
        thread.join()
    assert found == [USUAL_CALLS]


@pytest.mark.parametrize("error", [AttributeError("steps"), TypeError("None")])
def test_a_request_that_does_not_say_has_the_usual_number(error):
    def calls():
        raise error

    with Jobs().job(calls) as _:
        pass
    jobs = Jobs()
    with jobs.job(calls):
        assert jobs.calls() == USUAL_CALLS
    with jobs.job(lambda: 0):
        assert jobs.calls() == 1
