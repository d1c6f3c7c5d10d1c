import pytest

from lib_lora_guard.patching.transaction import Step, Transaction


class Part:
    """Notes what is done to it."""

    def __init__(self, name, done):
        self.name, self.done, self.error = name, done, None

    def note(self, what):
        if self.error is not None:
            raise self.error
        self.done.append(what)

    def attach(self):
        self.note(f"+{self.name}")

    def detach(self):
        self.note(f"-{self.name}")

    def replace(self, other):
        self.note(f"{other.name}>{self.name}")


@pytest.fixture
def done():
    return []


@pytest.fixture
def change(done):
    """`a` leaves, `b` is replaced by `c`, `d` comes; then a further step."""
    a, b, c, d = (Part(name, done) for name in "abcd")
    return Transaction(
        [(a, None), (b, c), (None, d)], [Step(lambda: done.append("also"), lambda: done.append("not also"))]
    )


def test_the_changes_are_made_in_order(change, done):
    change.do(0, 2)
    assert done == ["-a", "b>c"]
    change.do(2, 3)
    change.do_also()
    assert done == ["-a", "b>c", "+d", "also"]


def test_an_undo_undoes_everything_last_first_whether_it_was_made_or_not(change, done):
    """What was interrupted, and what was never made, is undone too: no note says how far it came."""
    change.do(0, 1)
    assert change.undo() == (None, None)
    assert done == ["-a", "not also", "-d", "c>b", "+a"]


def test_an_undo_that_fails_does_not_stop_the_others_and_stays(change, done, caplog):
    part, error = change.pairs[1][0], ValueError("planted")
    part.error = error
    rest, last = change.undo()
    assert done == ["not also", "-d", "+a"]
    assert last is error
    assert (list(rest.pairs), list(rest.also)) == ([change.pairs[1]], [])
    assert "undo step failed" in caplog.text
    part.error = None
    assert rest.undo() == (None, None)
    assert done[-1] == "c>b"


def test_a_further_step_whose_undo_fails_stays_too(change, done):
    def fail():
        raise ValueError("planted")

    rest, _ = Transaction(change.pairs, [Step(lambda: None, fail)]).undo()
    assert (list(rest.pairs), [step.undo for step in rest.also]) == ([], [fail])
    assert done == ["-d", "c>b", "+a"]


def test_an_interrupt_leaves_the_transaction_as_it_was(change, done):
    part = change.pairs[0][0]
    part.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        change.undo()
    part.error = None
    done.clear()
    assert change.undo() == (None, None)
    assert done == ["not also", "-d", "c>b", "+a"]
