"""Threads that read a file, each through a handle of its own.

Python's own thread pools are Python code full of locks: an interrupt inside them may leave one locked for good, and the next
read waits for it for ever. Here all that an interrupt can hit is one call of C, or can be done again.
"""

from __future__ import annotations

import _thread
import time
from collections.abc import Callable, Sequence
from io import FileIO
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

POLL_SECONDS = 0.0002


class Task(Generic[T]):
    """Something that a thread does with its handle.

    Args:
        work: Gets the handle.
    """

    def __init__(self, work: Callable[[FileIO], T]) -> None:
        self._work = work
        self._answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run(self, file: FileIO) -> None:
        """Does it."""
        try:
            self._answer.put((self._work(file), None))
        except BaseException as error:
            self._answer.put((None, error))

    def drop(self) -> None:
        """Answers in its place: it will not be done."""
        self._answer.put((None, OSError("the read was interrupted")))

    @property
    def is_done(self) -> bool:
        """True when the answer is there."""
        return not self._answer.empty()

    def result(self) -> T:
        """Waits for the answer. To be called once.

        Raises:
            BaseException: What the work has raised.
        """
        value, error = self._answer.get()
        if error is not None:
            raise error
        return cast(T, value)


class ReadingThreads:
    """Does tasks in the order in which they come, until it is stopped.

    Args:
        files: A handle for each thread.
    """

    def __init__(self, files: Sequence[FileIO]) -> None:
        self._tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._is_stopping = False
        self._is_at_work = [False] * len(files)
        self._idents: set[int] = set()
        for place, file in enumerate(files):
            _thread.start_new_thread(self._run, (place, file))

    def submit(self, work: Callable[[FileIO], T]) -> Task[T]:
        """Hands work to the next thread that is free."""
        task = Task(work)
        self._tasks.put(task)
        return task

    def stop(self) -> None:
        """Ends the threads, waits for those that read, and drops what has not begun. May be interrupted and done again."""
        self._is_stopping = True
        for _ in self._is_at_work:
            self._tasks.put(None)
        # The collector may run this in one of the threads, which cannot wait for itself.
        if _thread.get_ident() in self._idents:
            return
        while any(self._is_at_work):
            time.sleep(POLL_SECONDS)
        waiting = []
        try:
            while True:
                waiting.append(self._tasks.get_nowait())
        except Empty:
            pass
        for task in waiting:
            if task is None:
                # For a thread that has not begun yet.
                self._tasks.put(None)
            else:
                task.drop()

    def _run(self, place: int, file: FileIO) -> None:
        self._idents.add(_thread.get_ident())
        while True:
            task = self._tasks.get()
            # Before the question: either `stop` waits for this thread, or the thread finds that it is to stop.
            self._is_at_work[place] = True
            is_last = task is None or self._is_stopping
            if task is not None:
                if is_last:
                    task.drop()
                else:
                    task.run(file)
            # Not held while the thread waits: with it goes the memory that it was to fill.
            del task
            self._is_at_work[place] = False
            if is_last:
                return
