"""SIGINT and SIGTERM, and the end of the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Final, NoReturn

import click

from hsmtoll.cli.log import say
from hsmtoll.cli.streams import StdoutClosed
from hsmtoll.errors import HsmTollError

__all__ = ["INTERRUPTED", "Terminated", "ended_by_signal", "hard_exit", "install_signal_handlers"]

INTERRUPTED: Final = 130
_TERMINATED: Final = 143

#: Seconds between SIGTERM and the forced exit.
_CLEANUP_TIMEOUT: Final = 10.0


class Terminated(BaseException):
    """SIGTERM was received."""


def ended_by_signal(exc: BaseException | None) -> int:
    """
    If a signal caused *exc*, report that on stderr and return the exit code, otherwise 0. The
    context of *exc* counts, too: errors during the cleanup do not hide the signal.
    """
    while exc is not None:
        if isinstance(exc, Terminated):
            say("terminated")
            return _TERMINATED
        if isinstance(exc, click.Abort | KeyboardInterrupt):
            say("interrupted")
            return INTERRUPTED
        exc = exc.__context__
    return 0


def install_signal_handlers() -> None:
    """
    Make SIGTERM end the command as Ctrl-C does: with cleanup, for 10 seconds at most. Both signals
    cancel a PIN prompt.
    """

    def interrupt(*_: object) -> None:
        _restore_terminal()
        raise KeyboardInterrupt

    def end(*_: object) -> None:
        # timeout(1) sends SIGTERM twice; the second must not interrupt the cleanup.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _restore_terminal()
        raise Terminated

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    # The parent process may have set SIGTERM to be ignored.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
        _start_exit_watchdog()


def _start_exit_watchdog() -> None:
    # Python runs signal handlers between bytecodes only: never while a PKCS#11 module or a blocked
    # write hangs. A thread that reads the wakeup descriptor gets the signal all the same.
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(read_end, True)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(read_end, 64):
            pass
        time.sleep(_CLEANUP_TIMEOUT)
        _restore_terminal()
        os._exit(_TERMINATED)

    # Without this thread (thread limit reached) only the forced exit is missing.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=watch, name="hsmtoll-end", daemon=True).start()


def _restore_terminal() -> None:
    # Only if the module is loaded can there be a PIN prompt.
    pins = sys.modules.get("hsmtoll.hsm.pin")
    if pins is not None and hasattr(pins, "cancel_prompt"):
        pins.cancel_prompt()


def hard_exit(code: int) -> NoReturn:
    """
    End the process with *code* at once, without atexit handlers.

    Vendors' PKCS#11 modules are known to crash or hang in their own cleanup at exit.
    """
    _restore_terminal()
    if callable(signal.getsignal(signal.SIGTERM)):
        # The cleanup is over: SIGTERM may end the process.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # A write error was reported before, or the reader has closed the stream.
        with contextlib.suppress(OSError, HsmTollError, StdoutClosed):
            stream.flush()
    os._exit(code)
