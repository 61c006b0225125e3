"""
Automatic recovery: a sequence of recovery steps after an error, and a circuit breaker.

    call ── error ──► new session ──► new login ──► module started again ──► error
      ▲                   │                │                  │                │
      └───────────────────┴────────────────┴──────────────────┘        breaker: device-down

The steps are the caller's: there are no calls to a module here, and no PINs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Final

from hsmtoll.backoff import Backoff
from hsmtoll.errors import DeviceError, HsmTollError, sanitized
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.hsm.codes import recoverable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["MIN_RESTART_INTERVAL", "SIGNING", "CircuitBreaker", "should_retry"]

_log = logging.getLogger(__name__)

#: The name of the operation *doing* for a signature; its success closes the breaker.
SIGNING: Final = "signing"
#: Seconds between two restarts of a module.
MIN_RESTART_INTERVAL: Final = 30.0
_MIN_BACKOFF: Final = 1.0
_MAX_BACKOFF: Final = 10.0
# Errors of one worker process, after which one new process is tried.
_WORKER_ERRORS: Final = frozenset({"device-hung", "module-crashed"})


def should_retry(exc: HsmTollError, steps: Iterable[Callable[[HsmTollError], bool]]) -> bool:
    """
    Run the remaining recovery *steps*, in order and each at most once, until one returns True:
    it has changed something, and the call that raised *exc* should be made again.

    Each step gets the error and decides whether it can help. Errors about a PIN run no step,
    unless they are retryable because the PIN was not checked.
    """
    if exc.exit_code != DeviceError.exit_code and not exc.retryable:
        return False
    taken = next((step.__name__.strip("_") for step in steps if step(exc)), None)
    if taken is not None:
        _log.info("%s after: %s", taken.replace("_", " "), exc)
    return taken is not None


class CircuitBreaker:
    """
    Circuit breaker: while open, calls fail at once with ``device-down`` instead of queueing.

    It opens if recovery has failed, or if two worker processes in a row died or hung. Half-open,
    it admits one caller after 1 s, then 2, 4, … 10 s. It closes when the failed operation, or a
    signature, succeeds. *boot* is a monotonic clock in seconds. Use it by `guard`.
    """

    def __init__(self, name: object, *, boot: Callable[[], float]) -> None:
        self._name = name
        self._boot = boot
        # No failure: closed.
        self._backoff = Backoff(_MIN_BACKOFF, _MAX_BACKOFF)
        # One process died or hung: the next that does opens it.
        self._warned = False
        self._failed_at = ""
        self._why = ""
        self._start_afresh()
        after_fork(self._start_afresh)

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        # The thread that probes the device: none after a fork.
        self._probing: int | None = None

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Admit a call to the device, named *doing*, and record its result."""
        self.admit()
        try:
            yield
        except BaseException as exc:
            self.record_error(exc, doing)
            raise
        self.worked(doing)

    @property
    def open(self) -> bool:
        """Whether the breaker is open: the device counts as down."""
        return self._backoff.failures > 0

    def admit(self) -> None:
        """DeviceError (``device-down``) while open, except for one caller when a probe is due."""
        notice_fork()
        if not self.open:
            return
        me = threading.get_ident()
        with self._lock:
            left = self._backoff.until - self._boot()
            if self._probing == me or (self._probing is None and left <= 0):
                self._probing = me
                return
        raise DeviceError(
            f"{sanitized(self._name)} is down: {self._why}",
            hint="It is tried again automatically; unexpired tokens are used meanwhile.",
            code="device-down",
            signed=False,
            retry_after=max(left, _MIN_BACKOFF),
        )

    def worked(self, doing: str = SIGNING) -> None:
        """
        Record a success. It closes the breaker only for a signature or the operation that had
        failed: reading a certificate says nothing about signing.
        """
        if not (self.open or self._warned):
            return
        if doing not in (self._failed_at, SIGNING):
            self.record_inconclusive()
            return
        with self._lock:
            was_open, self._warned, self._probing = self.open, False, None
            self._backoff.worked()
        if was_open:
            _log.warning("device-back: %s works again", sanitized(self._name))

    def record_inconclusive(self) -> None:
        """Record an inconclusive result: the next caller may probe the device."""
        self._probing = None

    def failed(self, exc: HsmTollError, doing: str = SIGNING) -> None:
        """Record that the device failed and recovery did not help."""
        with self._lock:
            was_open, self._probing = self.open, None
            if was_open or self._warned or exc.code not in _WORKER_ERRORS:
                self._backoff.failed(self._boot())
            self._warned = True
            self._failed_at = doing
            self._why = str(exc)
            opened = self.open and not was_open
        if opened:
            # The reason is in the error itself, which the caller gets.
            name = sanitized(self._name)
            _log.warning("device-down: %s (%s); it is tried again automatically", name, exc.code)

    def record_error(self, exc: BaseException, doing: str = SIGNING) -> None:
        """
        Classify *exc*: the device is down, or it has answered with an error, or inconclusive (an
        error of the attempt, such as Ctrl-C). Only a success closes an open breaker.
        """
        if not isinstance(exc, HsmTollError) or exc.scope == "attempt":
            self.record_inconclusive()
        elif exc.code in _WORKER_ERRORS or (
            exc.exit_code == DeviceError.exit_code and recoverable(exc)
        ):
            self.failed(exc, doing)
        elif self.open:
            self.record_inconclusive()
        else:
            self._warned = False
