import pytest

from lib_lora_guard.patching.transaction import Transaction


def test_a_block_that_ends_well_keeps_its_changes():
    done = []
    with Transaction() as t:
        t.do(lambda: done.append(1), lambda: done.append(-1))
        t.do(lambda: done.append(2), lambda: done.append(-2))
    assert done == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_undoes_all_changes_last_first_the_failed_one_included(error):
    done = []

    def fail():
        done.append("half")
        raise error

    with pytest.raises(error), Transaction() as t:
        t.do(lambda: done.append(1), lambda: done.append(-1))
        t.do(lambda: done.append(2), lambda: done.append(-2))
        t.do(fail, lambda: done.append(-3))
    assert done == [1, 2, "half", -3, -2, -1]
    assert t.failed == []


def test_an_undo_that_fails_does_not_stop_the_others(caplog):
    done = []

    def fail():
        raise ValueError("planted")

    def stop():
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"), Transaction() as t:
        t.do(lambda: done.append(1), lambda: done.append(-1))
        t.do(lambda: None, fail)
        t.do(stop, lambda: None)
    assert done == [1, -1]
    assert t.failed == [fail]
    assert "undo step failed" in caplog.text
