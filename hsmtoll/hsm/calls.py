"""
One call to a device in this process: circuit breaker, lock, handles, and recovery after an error.

    run ── admit ── lock ── handles ── work ──► result
                      ▲                  │ error
                      └── recovery step ◄┘      none left: the error
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Final, TypeVar

from hsmtoll.errors import HsmTollError, PinNotTried, sanitized
from hsmtoll.hsm.codes import recoverable, translate_pkcs11_errors
from hsmtoll.hsm.login import pin_state_after
from hsmtoll.hsm.module import PKCS11_LOCK, find_open, is_current, restart, restart_if_unused
from hsmtoll.hsm.recovery import MIN_RESTART_INTERVAL, should_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pkcs11 import Session, Token

    from hsmtoll.hsm.connection import Connection, Handles
    from hsmtoll.hsm.device import DeviceSettings
    from hsmtoll.hsm.login import PinLogin
    from hsmtoll.hsm.module import Module
    from hsmtoll.hsm.recovery import CircuitBreaker

__all__ = ["Calls"]

_T = TypeVar("_T")
#: Processes that were forked together must not wait equally long.
_JITTER: Final = random.SystemRandom()

#: Ranges of seconds before the module is initialised again because it found no device at first.
#: In total longer than the concurrent logins of a server's workers take on a busy machine.
_START_DELAYS: Final = ((0.1, 0.5), (0.2, 1.0), (0.4, 2.0))


class Calls:
    """
    Makes the calls of one device. *breaker* is None in a worker, whose parent has one. *boot* is a
    monotonic clock in seconds.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        connection: Connection,
        pin_login: PinLogin,
        *,
        breaker: CircuitBreaker | None,
        boot: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.module_path = settings.module_path
        self._name = sanitized(settings.uri)
        self._deadline = settings.deadline
        self._connection = connection
        self._pin_login = pin_login
        self._breaker = breaker
        self._boot = boot
        self._sleep = sleep

    def run(self, doing: str, work: Callable[[Handles], _T]) -> _T:
        """
        Return the result of *work*, with automatic recovery; *doing* begins the text of errors.
        DeviceError (``device-down``) while the circuit breaker is open, which also counts the
        result.
        """
        with self._breaker_guard(doing), PKCS11_LOCK.held(self._deadline):
            if self._breaker:
                # The breaker may have opened while this call waited for the lock.
                self._breaker.admit()
            self._pin_login.begin_call()
            recovery = _Recovery(
                self.module_path,
                self._connection,
                self._pin_login,
                boot=self._boot,
                sleep=self._sleep,
            )
            steps = recovery.steps()
            while True:
                try:
                    with translate_pkcs11_errors(f"{doing} ({self._name})"):
                        handles = self._connection.handles()
                        result = work(handles)
                        self._connection.remember_token(handles.token)
                        return result
                except HsmTollError as exc:
                    self._connection.discard()
                    if not should_retry(exc, steps):
                        state = pin_state_after(exc)
                        self._pin_login.pin_state = state or self._pin_login.pin_state
                        raise
                except BaseException:
                    self._connection.discard()
                    raise

    def _breaker_guard(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return self._breaker.guard(doing) if self._breaker else contextlib.nullcontext()

    @contextlib.contextmanager
    def writing(self, doing: str, *, rw: bool = True) -> Iterator[tuple[Module, Token, Session]]:
        """
        A session after login, read-write if *rw*. Afterwards the key is looked up again, as it may
        have changed.
        """
        # Recover from failures now: a write is never repeated.
        self.run(doing, self._pin_login.log_in)
        with self._breaker_guard(doing), PKCS11_LOCK.held(self._deadline):
            try:
                with translate_pkcs11_errors(f"{doing} ({self._name})"):
                    handles = self._connection.handles()
                    self._pin_login.log_in(handles)
                    session = self._pin_login.read_write_session(handles) if rw else handles.session
                    try:
                        yield handles.module, handles.token, session
                    finally:
                        handles.key = handles.facts = None
                        if session is not handles.session:
                            handles.module.close(session)
                        elif rw:
                            self._connection.discard()
                            handles.login.end()
            except BaseException:
                self._connection.discard()
                raise

    def reinitialize_module(self) -> None:
        """
        Discard the module's caches, so that the next read comes from the device. Does nothing if
        another device would lose its login, or if the user would have to enter the PIN again.
        """
        with PKCS11_LOCK.held(self._deadline):
            login, module = self._connection.login, find_open(self.module_path)
            if login is None or module is None or len(login.users) > 1:
                return
            if login.logged_in_by_others or (
                login.is_logged_in and (login.pin is None or login.pin.on_pinpad)
            ):
                return
            login.end()
            restart_if_unused(module, now=self._boot(), pause=0)

    def close(self) -> None:
        """Close the session; the last device on a token logs out."""
        with PKCS11_LOCK.held(self._deadline):
            self._connection.close()


class _Recovery:
    """
    The recovery steps of one call. Each gets the error, and returns whether it has changed
    something, so that the call should be made again.
    """

    def __init__(
        self,
        module_path: Path,
        connection: Connection,
        pin_login: PinLogin,
        *,
        boot: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._module_path = module_path
        self._connection = connection
        self._pin_login = pin_login
        self._boot = boot
        self._sleep = sleep
        # As they were before the call.
        self._module = find_open(module_path)
        self._had_session = connection.is_open
        self._delays = list(_START_DELAYS)

    def steps(self) -> Iterator[Callable[[HsmTollError], bool]]:
        """The steps, in the order in which they are tried; each is tried once."""
        yield from (self.started_once_more for _ in _START_DELAYS)
        yield from (self.new_session, self.new_login, self.module_started_again)

    def started_once_more(self, exc: HsmTollError) -> bool:
        # SoftHSM rewrites a token's file at each login, so a process that starts at that moment
        # reads half of it. Not after a login: that would have to be made again.
        login = self._connection.login
        logged_in = login is not None and login.is_logged_in and is_current(login.module)
        tried = self._pin_login.pin_outcome_unknown or logged_in
        if self._module is not None or tried or not recoverable(exc) or not self._delays:
            return False
        if isinstance(exc, PinNotTried):
            # The PIN was sent, although not checked: repeat only once.
            del self._delays[1:]
        self._sleep(_JITTER.uniform(*self._delays.pop(0)))
        restart(self._module_path)
        return True

    def new_session(self, exc: HsmTollError) -> bool:
        # A missing key or permission needs a new login instead.
        needs_login = exc.code in ("key-missing", "not-logged-in")
        return self._had_session and self._may_help(exc) and not needs_login

    def new_login(self, exc: HsmTollError) -> bool:
        login = self._connection.login
        if login is None or not self._may_help(exc):
            return False
        if exc.code == "not-logged-in":
            # The device has ended the login, or requires one without CKF_LOGIN_REQUIRED.
            login.wanted = self._pin_login.relogged_in = True
        elif not login.is_logged_in:
            return False
        login.end()
        return True

    def module_started_again(self, exc: HsmTollError) -> bool:
        # Useless if the module was loaded for this very call.
        if self._module is None or not recoverable(exc):
            return False
        if self._connection.login is not None:
            self._connection.login.end()
        done = restart_if_unused(self._module, now=self._boot(), pause=MIN_RESTART_INTERVAL)
        # With an unknown login outcome this call must not log in again; the next one may.
        return done and not self._pin_login.pin_outcome_unknown

    def _may_help(self, exc: HsmTollError) -> bool:
        # A PIN with an unknown outcome is not tried again by the same call.
        if self._pin_login.pin_outcome_unknown:
            return False
        login = self._connection.login
        # After a lost login, private keys seem to be missing.
        lost = exc.code == "key-missing" and self._connection.was_used
        others = login is not None and len(login.users) > 0
        ended = exc.code == "not-logged-in" and self._pin_login.pin is not None
        return recoverable(exc) or (lost and not others) or ended
