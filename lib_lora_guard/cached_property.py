"""`cached_property` that takes no lock: that of Python 3.10 and 3.11 holds one for all objects of a class while it works.

Python 3.10 may leave it taken where two interrupts come at once (`locks.py`), and every other thread that asks an object for a value
that it does not have yet waits for good. Python 3.12 has left the lock out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["cached_property"]

T = TypeVar("T")

if sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property(Generic[T]):
        """The value of a method, kept in the object's `__dict__` under its name. Two threads may both work it out.

        Args:
            function: The method.
        """

        def __init__(self, function: Callable[[Any], T]) -> None:
            self._function = function
            self.__doc__ = function.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        @overload
        def __get__(self, instance: None, owner: type | None = None) -> cached_property[T]: ...

        @overload
        def __get__(self, instance: object, owner: type | None = None) -> T: ...

        def __get__(self, instance: object | None, owner: type | None = None) -> cached_property[T] | T:
            if instance is None:
                return self
            value = self._function(instance)
            # Last, as Python's own does: a property of a subclass may have asked for this one.
            instance.__dict__[self._name] = value
            return value
