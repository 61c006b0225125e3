"""Protects the memory of a process that has a PIN or a login from other processes."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from typing import Final

__all__ = ["keep_secrets_in_memory"]

_PR_SET_DUMPABLE: Final = 4


def keep_secrets_in_memory() -> None:
    """
    Disable core files, and the access of debuggers and of /proc/PID/mem by the same account.

    It uses prctl(2), PR_SET_DUMPABLE, which execve(2) resets: each program must call it itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
