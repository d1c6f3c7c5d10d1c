"""Locks and kept properties that no interrupt leaves locked."""

import contextlib
import gc
import random
import signal
import sys
import threading
from dataclasses import dataclass
from functools import cached_property as of_functools

import pytest

from lib_lora_guard import locks
from lib_lora_guard.cached_property import cached_property
from lib_lora_guard.locks import is_held, while_locked


class Left:
    """A lock as Python 3.10 leaves it behind where a second interrupt comes before the handler that releases it."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self.count += 1

    def __exit__(self, kind, error, trace):
        if kind is not None:
            raise KeyboardInterrupt("the second one")
        self.count -= 1

    def release(self):
        self.count -= 1

    def _is_owned(self):
        return self.count > 0


def interrupted():
    raise KeyboardInterrupt("the first one")


def test_a_lock_that_an_interrupt_has_left_behind_is_released():
    lock = Left()
    with pytest.raises(KeyboardInterrupt, match="the second one"):
        while_locked(lock, interrupted)
    assert lock.count == 0


def test_an_error_and_two_interrupts_leave_it_free_too(monkeypatch):
    lock, again = threading.RLock(), locks._release_again

    def interrupted_once(*given):
        monkeypatch.setattr(locks, "_release_again", again)
        raise KeyboardInterrupt("the second one")

    class Skipped:
        """Of this lock the `with` releases nothing."""

        __enter__, release, _is_owned = lock.acquire, lock.release, lock._is_owned

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(locks, "_release_again", interrupted_once)
    with pytest.raises(KeyboardInterrupt, match="the second one"):
        while_locked(Skipped(), interrupted)
    assert not is_held(lock)


def test_a_lock_that_was_held_before_stays_held():
    lock = threading.RLock()
    with lock:
        with pytest.raises(KeyboardInterrupt, match="the first one"):
            while_locked(lock, interrupted)
        assert is_held(lock)
        assert while_locked(lock, lambda: is_held(lock))
        assert is_held(lock)
    assert not is_held(lock)


def test_no_other_thread_gets_in_meanwhile():
    lock, seen = threading.RLock(), []
    work = threading.Thread(target=lambda: while_locked(lock, lambda: seen.append("second")))

    def first():
        work.start()
        work.join(0.05)
        seen.append("first")
        return len(seen)

    assert while_locked(lock, first) == 1
    work.join(10)
    assert seen == ["first", "second"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals at a given time are POSIX")
def test_real_signals_where_an_exception_leaves_the_lock():
    """Python 3.10 leaves a lock of a plain `with` behind in 6 of 100 of these."""
    lock, rng, active, hits = threading.RLock(), random.Random(0), False, 0

    def ring(number, frame):
        if active:
            raise KeyboardInterrupt

    def work():
        sum(abs(number) for number in range(20))
        raise ValueError

    before = signal.signal(signal.SIGALRM, ring)
    # An interrupt in a callback of the collector's would be no error of this.
    gc.disable()
    try:
        for _ in range(20_000):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-5))
                active = True
                for _ in range(10):
                    with contextlib.suppress(ValueError):
                        while_locked(lock, work)
                active = False
            except KeyboardInterrupt:
                active = False
                hits += 1
            assert not is_held(lock), f"after {hits} interrupts"
            if hits == 300:
                return
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError(f"{hits} interrupts only")


@dataclass(frozen=True)
class Counted:
    calls: list

    @cached_property
    def value(self):
        """What it is."""
        self.calls.append(1)
        return len(self.calls)


def test_a_property_is_worked_out_once_and_kept_with_the_object():
    one, other = Counted([]), Counted([])
    assert (one.value, one.value, other.value) == (1, 1, 1)
    assert one.calls == [1]
    assert vars(one)["value"] == 1
    assert isinstance(Counted.value, cached_property)
    assert Counted.value.__doc__ == "What it is."


def test_a_property_that_another_thread_works_out_is_not_waited_for():
    """functools' own of Python 3.10 and 3.11 waits, for any object of the class."""
    begun, end = threading.Event(), threading.Event()

    class Slow:
        def __init__(self, waits):
            self.waits = waits

        @cached_property
        def value(self):
            if self.waits:
                begun.set()
                assert end.wait(20)
            return self.waits

    thread = threading.Thread(target=lambda: Slow(True).value, daemon=True)
    thread.start()
    assert begun.wait(20)
    asked, found = Slow(False), []
    other = threading.Thread(target=lambda: found.append(asked.value), daemon=True)
    other.start()
    other.join(15)
    end.set()
    thread.join(20)
    assert found == [False]


def test_both_of_two_threads_get_a_value_and_one_is_kept():
    both = threading.Barrier(2)

    class Raced:
        @cached_property
        def value(self):
            both.wait(20)
            return object()

    raced, found = Raced(), []
    threads = [threading.Thread(target=lambda: found.append(raced.value), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2
    assert any(raced.value is one for one in found)


def test_a_property_of_a_subclass_may_ask_for_the_one_below():
    class More(Counted):
        @cached_property
        def value(self):
            return super().value + 10

    more = More([])
    assert (more.value, more.value, more.calls) == (11, 11, [1])


def test_newer_pythons_have_their_own():
    assert (cached_property is of_functools) is (sys.version_info >= (3, 12))
