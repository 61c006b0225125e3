"""A process that holds a PIN or a login keeps its memory to itself."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from typing import Final

__all__ = ["keep_secrets_in_memory"]

_PR_SET_DUMPABLE: Final = 4


def keep_secrets_in_memory() -> None:
    """
    No core file of this process, and no debugger or reader of /proc/PID/mem of its own account.

    prctl(2), PR_SET_DUMPABLE; execve(2) resets it, so each program calls this for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
