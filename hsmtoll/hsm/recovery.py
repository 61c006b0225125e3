"""
Back by itself: which steps may cure a device that failed, and when it is left in peace.

    call ── error ──► new session ──► new login ──► module started again ──► error
      ▲                   │                │                  │                │
      └───────────────────┴────────────────┴──────────────────┘        breaker: device-down

No module is touched here, and no PIN is seen: the steps belong to the caller.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Final

from hsmtoll.backoff import Backoff
from hsmtoll.errors import DeviceError, HsmTollError, foreign
from hsmtoll.hsm.codes import recoverable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["RESTART_PAUSE", "SIGNING", "CircuitBreaker", "should_retry"]

_log = logging.getLogger(__name__)

#: What a signature is called here: a device that makes one is up.
SIGNING: Final = "signing"
#: Seconds. A module is not started again more often.
RESTART_PAUSE: Final = 30.0
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 10.0
# What the next caller's new process may do better, once.
_OF_THE_PROCESS: Final = frozenset({"device-hung", "module-crashed"})


def should_retry(exc: HsmTollError, steps: Iterable[Callable[[HsmTollError], bool]]) -> bool:
    """
    Whether the call that ended in *exc* is worth making again: as soon as one of the *steps* that
    are left, in their order and each at most once, says that it changed something.

    A step is given the error and decides for itself whether it can help. Errors about a PIN
    never reach one, unless nobody looked at it and they say that another try is worth it.
    """
    if exc.exit_code != DeviceError.exit_code and not exc.retryable:
        return False
    taken = next((step.__name__.strip("_") for step in steps if step(exc)), None)
    if taken is not None:
        _log.info("%s after: %s", taken.replace("_", " "), exc)
    return taken is not None


class CircuitBreaker:
    """
    Says ``device-down`` at once instead of letting callers queue at a device that is.

    It opens when nothing helped, or the second process in a row died or hung; lets one caller
    try after 1 s, then 2, 4, … 10 s, and closes when what failed worked, or a signature was made.
    *boot* is a clock in seconds that never goes back. `trying` admits, and judges what the call
    inside came to.
    """

    def __init__(self, name: object, *, boot: Callable[[], float]) -> None:
        self._name = name
        self._boot = boot
        self._lock = threading.Lock()
        # No failure: closed.
        self._rest = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        # One process died or hung: the next that does opens it.
        self._warned = False
        self._trying: tuple[int, int] | None = None
        self._failed_at = ""
        self._why = ""

    @contextlib.contextmanager
    def trying(self, doing: str) -> Iterator[None]:
        """Around a call, which is *doing* something to the device."""
        self.admit()
        try:
            yield
        except BaseException as exc:
            self.judge(exc, doing)
            raise
        self.worked(doing)

    @property
    def open(self) -> bool:
        """Whether the device counts as down."""
        return self._rest.failures > 0

    def admit(self) -> None:
        """Raises DeviceError (``device-down``) while the device is left in peace."""
        if not self.open:
            return
        me = (os.getpid(), threading.get_ident())
        with self._lock:
            left = self._rest.until - self._boot()
            # After a fork nobody of the parent's tries here.
            free = self._trying is None or self._trying[0] != me[0]
            if self._trying == me or (free and left <= 0):
                self._trying = me
                return
        raise DeviceError(
            f"{foreign(self._name)} is down: {self._why}",
            hint="It is asked again by itself; living tokens are served meanwhile.",
            code="device-down",
            signed=False,
            retry_after=max(left, _FIRST_PAUSE),
        )

    def worked(self, doing: str = SIGNING) -> None:
        """
        The device did what it was asked. That it shows a certificate, or takes a login, says
        nothing about what it failed at.
        """
        if not (self.open or self._warned):
            return
        if doing not in (self._failed_at, SIGNING):
            self.undecided()
            return
        with self._lock:
            was_open, self._warned, self._trying = self.open, False, None
            self._rest.worked()
        if was_open:
            _log.warning("device-back: %s works again", foreign(self._name))

    def undecided(self) -> None:
        """What was learned says nothing about it: the next caller may try."""
        self._trying = None

    def failed(self, exc: HsmTollError, doing: str = SIGNING) -> None:
        """The device did not answer, and nothing helped."""
        with self._lock:
            was_open, self._trying = self.open, None
            if was_open or self._warned or exc.code not in _OF_THE_PROCESS:
                self._rest.failed(self._boot())
            self._warned = True
            self._failed_at = doing
            self._why = str(exc)
            tell = self.open and not was_open
        if tell:
            # Why is in the error itself, which the caller sees.
            name = foreign(self._name)
            _log.warning("device-down: %s (%s); it is asked again by itself", name, exc.code)

    def judge(self, exc: BaseException, doing: str = SIGNING) -> None:
        """
        Count *exc* if it says that the device is down; one about the attempt alone, such as Ctrl-C,
        says nothing. Only a success says that it is back.
        """
        if not isinstance(exc, HsmTollError) or exc.scope == "attempt":
            self.undecided()
        elif exc.code in _OF_THE_PROCESS or (
            exc.exit_code == DeviceError.exit_code and recoverable(exc)
        ):
            self.failed(exc, doing)
        elif self.open:
            self.undecided()
        else:
            self._warned = False
