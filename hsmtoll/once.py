"""
Attributes that are made when they are first used, once for all threads.

functools.cached_property has no lock from Python 3.12 on, so two threads may make two of what there
must be one of; and up to 3.11 it has one that stays taken in a child forked while it was held.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from hsmtoll.fork import after_fork, notice_fork

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["made_once"]

_T = TypeVar("_T")

#: One for all attributes: making them opens nothing, and one may be made of others.
_making = threading.RLock()


class made_once(Generic[_T]):  # noqa: N801 - a decorator, as functools.cached_property
    """As functools.cached_property, safe for threads and forks."""

    def __init__(self, make: Callable[[Any], _T]) -> None:
        self._make = make
        self._name = ""
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...

    def __get__(self, instance: object | None, owner: type) -> Self | _T:
        if instance is None:
            return self
        notice_fork()
        with _making:
            made = vars(instance)
            if self._name not in made:
                made[self._name] = self._make(instance)
            value: _T = made[self._name]
            return value


def _after_fork() -> None:
    global _making  # noqa: PLW0603 - a child may not wait for a thread of its parent
    _making = threading.RLock()


after_fork(_after_fork)
