"""
Operating system interfaces of the daemon: sd_notify, socket activation, clock state, syslog.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.handlers
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import ConfigurationError, sanitized

if TYPE_CHECKING:
    from collections.abc import MutableMapping

__all__ = [
    "SYSTEM_LOG",
    "Given",
    "clock_is_synchronised",
    "given_sockets",
    "heads_to_system_log",
    "notify",
    "reloading",
    "watchdog_seconds",
]

#: Where syslog(3) writes.
SYSTEM_LOG: Final = Path("/dev/log")

#: The first descriptor that sd_listen_fds(3) hands over.
_FIRST: Final = 3
#: adjtimex(2): the return value and the status bit of an unsynchronised clock.
_TIME_ERROR: Final = 5
_STA_UNSYNC: Final = 0x40


class _Timex(ctypes.Structure):
    # The first members of struct timex; the kernel writes the rest behind them.
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 512),
    )


def clock_is_synchronised() -> bool:
    """Whether the kernel's clock is synchronised (NTP, PTP), by adjtimex(2)."""
    answer = _Timex()
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(answer))
    except (OSError, AttributeError):
        return False
    return state not in (-1, _TIME_ERROR) and not answer.status & _STA_UNSYNC


def notify(*lines: str) -> None:
    """Send *lines* to the service manager (sd_notify(3)), if there is one."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    # A service manager that does not respond must not stop the signing.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as one:
        one.settimeout(1.0)
        one.sendto("\n".join(lines).encode(), address)


def reloading() -> None:
    """Send RELOADING=1 with the time stamp that systemd requires; READY=1 ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def watchdog_seconds() -> float | None:
    """Interval for WATCHDOG=1: half of the manager's timeout; see sd_watchdog_enabled(3)."""
    given, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not _is_number(given) or int(given) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(given) / 2_000_000


@dataclass(frozen=True, slots=True)
class Given:
    """A listening socket passed by the service manager, and its name."""

    socket: socket.socket
    name: str


def given_sockets(environ: MutableMapping[str, str] | None = None) -> list[Given]:
    """
    The sockets of socket activation (sd_listen_fds(3)); empty if they are for another process,
    and on a second call. ConfigurationError for anything but a listening stream socket.
    """
    environ = os.environ if environ is None else environ
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not _is_number(count):
        return []
    given = []
    for at in range(int(count)):
        descriptor = _FIRST + at
        try:
            os.set_inheritable(descriptor, False)
            one = socket.socket(fileno=descriptor)
        except OSError as exc:
            raise _no_listener(descriptor) from exc
        listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if one.type != socket.SOCK_STREAM or not listens:
            raise _no_listener(descriptor)
        given.append(Given(one, names[at] if at < len(names) else ""))
    return given


def _no_listener(descriptor: int) -> ConfigurationError:
    return ConfigurationError(
        f"LISTEN_FDS: descriptor {descriptor} is not a listening stream socket",
        hint="in the .socket unit: ListenStream= and Accept=no",
    )


def heads_to_system_log(logger: logging.Logger, path: Path = SYSTEM_LOG) -> None:
    """
    Also send the records of *logger* to the system log, if there is one: an account that can
    change the audit cannot change the system log. They go to standard error in any case.
    """
    logger.setLevel(logging.INFO)
    if not path.exists():
        return
    try:
        handler = logging.handlers.SysLogHandler(
            str(path), facility=logging.handlers.SysLogHandler.LOG_AUTHPRIV
        )
    except OSError as exc:
        logger.warning("system log %s cannot be reached (%s)", sanitized(path), exc.strerror)
        return
    handler.setFormatter(logging.Formatter("hsmtoll[%(process)d]: %(message)s"))
    handler.ident = ""
    logger.addHandler(handler)
