"""
Forks of this process: what a child must not share with its parent is made afresh in the child.

A lock that another thread held at the fork has no owner in the child; connections, handles and
processes stay the parent's. Whoever has such state registers with `after_fork` how it starts
afresh, and calls `notice_fork` before it is used: Python's hooks alone do not suffice, because the
workers of a server that forks in C run none of them (uWSGI with ``--master``).
"""

from __future__ import annotations

import os
import threading
import weakref
from types import MethodType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["after_fork", "notice_fork"]

_lock = threading.Lock()
#: The one process whose state this is.
_noticed = {os.getpid()}
_callbacks: list[weakref.ref[Callable[[], None]]] = []


def after_fork(callback: Callable[[], None]) -> None:
    """
    Call *callback* once in each forked child. It is a method, which is called as long as its owner
    lives, or a function of a module. It must not call `notice_fork`.
    """
    kind = weakref.WeakMethod if isinstance(callback, MethodType) else weakref.ref
    _callbacks.append(kind(callback, _callbacks.remove))


def notice_fork() -> None:
    """In a forked child, call what was registered with `after_fork`, unless that is done."""
    if os.getpid() in _noticed:
        return
    with _lock:
        if os.getpid() not in _noticed:
            # A copy: an owner that ends meanwhile leaves the list.
            for reference in tuple(_callbacks):
                if (callback := reference()) is not None:
                    callback()
            _noticed.clear()
            _noticed.add(os.getpid())


os.register_at_fork(after_in_child=notice_fork)
