"""Forks of this process: Python's own, and one in C, after which no hook of Python runs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FORKS", "fork_in_c", "in_a_fork"]


def fork_in_c() -> int:
    """As os.fork, without the hooks of os.register_at_fork: so are uWSGI's workers forked."""
    interval = sys.getswitchinterval()
    # No other thread may be asking for the GIL: the child would hand it over and wait for ever.
    sys.setswitchinterval(3600)
    try:
        time.sleep(0.05)
        # PyDLL keeps the GIL, which has no other owner in the child.
        pid: int = ctypes.PyDLL(None).fork()
    finally:
        sys.setswitchinterval(interval)
    return pid


FORKS: Final[tuple[Callable[[], int], ...]] = (os.fork, fork_in_c)


def in_a_fork(work: Callable[[], bool], fork: Callable[[], int] = os.fork) -> bool:
    """What *work* comes to in a forked child, where it may take 30 s."""
    child = fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
