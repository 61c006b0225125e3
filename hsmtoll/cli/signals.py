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

from hsmtoll.cli.streams import ReaderLeft, say
from hsmtoll.errors import HsmTollError

__all__ = ["INTERRUPTED", "Terminated", "ended_by_signal", "leave", "obey_signals"]

INTERRUPTED: Final = 130
_TERMINATED: Final = 143

#: Seconds after SIGTERM.
_TO_PUT_AWAY: Final = 10.0


class Terminated(BaseException):
    """SIGTERM has come."""


def ended_by_signal(exc: BaseException | None) -> int:
    """
    The code where *exc* came of being told to end, said once; 0 where it did not. What goes wrong
    while things are put away does not change why that was.
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


def obey_signals() -> None:
    """
    From now on SIGTERM ends the command as Ctrl-C does: what was begun is put away first, in 10
    seconds at most. Neither waits for a PIN that is being typed.
    """

    def interrupt(*_: object) -> None:
        _restore_terminal()
        raise KeyboardInterrupt

    def end(*_: object) -> None:
        # `timeout` sends it twice; what is being put away is not cut off by the second.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _restore_terminal()
        raise Terminated

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    # Whoever started us may have said that it is to be ignored.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
        _end_in_time()


def _end_in_time() -> None:
    # A handler of Python's runs between two of its steps, and a module that hangs, or a reader
    # that takes nothing more, lets none come. A thread hears of the signal all the same.
    hears, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(hears, True)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGTERM not in os.read(hears, 64):
            pass
        time.sleep(_TO_PUT_AWAY)
        _restore_terminal()
        os._exit(_TERMINATED)

    # Without it a command can do all else.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=watch, name="hsmtoll-end", daemon=True).start()


def _restore_terminal() -> None:
    # Where no PIN was asked for, this is not loaded.
    pins = sys.modules.get("hsmtoll.hsm.pin")
    if pins is not None and hasattr(pins, "hang_up"):
        pins.hang_up()


def leave(code: int) -> NoReturn:
    """
    End the process with *code*, at once.

    Modules of vendors are known to crash in their own clean-up at exit, and one that hangs
    would keep the process: what had to be written is written.
    """
    _restore_terminal()
    if callable(signal.getsignal(signal.SIGTERM)):
        # There is nothing left to put away.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # What could not be written was told before, or there was nobody to tell.
        with contextlib.suppress(OSError, HsmTollError, ReaderLeft):
            stream.flush()
    os._exit(code)
