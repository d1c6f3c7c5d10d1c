import pytest

from lib_lora_guard.patching.transaction import Step, Transaction


def steps_into(done, count=3):
    return [Step(lambda n=n: done.append(n), lambda n=n: done.append(-n)) for n in range(1, count + 1)]


def test_an_undo_runs_all_steps_last_first_whether_they_were_made_or_not():
    """A step that was interrupted, and one that was never made, are undone too: no note says how far it came."""
    done = []
    change = Transaction(steps_into(done))
    for step in change.steps[:2]:
        step.do()
    assert change.undo() == (None, None)
    assert done == [1, 2, -3, -2, -1]


def test_an_undo_that_fails_does_not_stop_the_others_and_stays(caplog):
    done, error = [], ValueError("planted")

    def fail():
        raise error

    first, _, third = steps_into(done)
    rest, last = Transaction([first, Step(lambda: None, fail), third]).undo()
    assert done == [-3, -1]
    assert last is error
    assert [step.undo for step in rest.steps] == [fail]
    assert "undo step failed" in caplog.text


def test_an_interrupt_leaves_the_transaction_as_it_was():
    done, over = [], False

    def interrupted():
        if not over:
            raise KeyboardInterrupt
        done.append(-2)

    first, _, third = steps_into(done)
    change = Transaction([first, Step(lambda: None, interrupted), third])
    with pytest.raises(KeyboardInterrupt):
        change.undo()
    assert done == [-3]
    over = True
    assert change.undo() == (None, None)
    assert done == [-3, -3, -2, -1]
