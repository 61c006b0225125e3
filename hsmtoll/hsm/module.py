"""
PKCS#11 modules: initialised once per process, used under one lock, reinitialised after a fork.

python-pkcs11 initialises modules without CKF_OS_LOCKING_OK and releases the GIL: two threads with
two sessions crash some modules within a second. So every call to a module is made with
`PKCS11_LOCK` held, which is also held during a fork.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pkcs11
from pkcs11.exceptions import PKCS11Error

from hsmtoll.errors import ConfigurationError, DeviceError, sanitized
from hsmtoll.files import first_untrusted_component
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import describe, translate_pkcs11_errors
from hsmtoll.hsm.makers import maker_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pkcs11 import Session, Slot, Token

__all__ = [
    "PKCS11_LOCK",
    "Module",
    "check_path",
    "find_open",
    "is_current",
    "open_module",
    "restart",
    "restart_if_unused",
]

# Modules that a forked child can initialise again without effect on its parent (measured). With a
# TPM or a smartcard the child's C_Finalize ends the parent's sessions; others are not tested.
_FORK_HARMLESS: Final = frozenset({"SoftHSM", "IBM", "Mozilla Foundation"})
# p11-kit-client reports the remote module's manufacturer, so match it by file name.
_FORK_HARMLESS_FILES: Final = frozenset({"p11-kit-client.so"})


#: Seconds: enough for another thread to wake up and take a lock.
_LET_FORK_GO_FIRST: Final = 0.002


class Pkcs11Lock:
    """The lock of this process around all PKCS#11 calls, with a timeout for waiters."""

    def __init__(self) -> None:
        self._start_afresh()
        after_fork(self._start_afresh)
        os.register_at_fork(before=self._before_fork, after_in_parent=self._in_parent)

    def _start_afresh(self) -> None:
        self.lock = threading.RLock()
        #: Whether a fork waits for the lock. Locks of Python are not fair: threads that sign
        #: repeatedly would take it again before the forking thread wakes up.
        self.fork_waits = False
        self._over_fork = False

    def held(self, timeout: float) -> _HeldLock:
        """Acquire it for a block. DeviceError (``device-busy``) after *timeout* seconds."""
        notice_fork()
        return _HeldLock(self, timeout)

    def end(self, seconds: float) -> None:
        """
        At interpreter exit: acquire it for good, after *seconds* at most, so that no call is cut
        off or begun. An interrupted login would leave a PIN attempt without a result.
        """
        self.lock.acquire(timeout=seconds)

    def _before_fork(self) -> None:
        # A fork during a call would give the child a module in an inconsistent state. But a call
        # that hangs must not block the fork forever.
        self.fork_waits = True
        self._over_fork = self.lock.acquire(timeout=10)
        self.fork_waits = False

    def _in_parent(self) -> None:
        if self._over_fork:
            self.lock.release()


class _HeldLock:
    """The context manager of `held`; a class, because it is faster than a generator."""

    __slots__ = ("_lock", "_owner", "_timeout")

    def __init__(self, owner: Pkcs11Lock, timeout: float) -> None:
        self._owner = owner
        self._lock = owner.lock
        self._timeout = timeout

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout):
            raise DeviceError(
                f"the device was not free within {self._timeout:g} s: another call is still"
                " running",
                hint="With HSMTOLL_HSM__ISOLATION=process a module that hangs is killed.",
                code="device-busy",
                signed=False,
                scope="attempt",
                retryable=True,
            )

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        if self._owner.fork_waits:
            time.sleep(_LET_FORK_GO_FIRST)


PKCS11_LOCK: Final = Pkcs11Lock()


@dataclass(slots=True)
class Module:
    """
    One loaded and initialised module. *logins*: the logins of this process, by token. If
    `open_module` returns another Module than before, all handles are stale.
    """

    path: str
    lib: Any
    logins: dict[object, Any] = field(default_factory=dict)

    def slots(self) -> Iterator[tuple[Slot, Token | PKCS11Error]]:
        """
        Every slot with its token, or with its error: a broken slot does not hide the others.
        Empty slots are omitted.
        """
        with translate_pkcs11_errors(f"asking {sanitized(self.path)} for its slots"):
            seen = cryptoki.list_slots(self.lib, self.path)
        for slot, problem in seen:
            if problem is not None:
                yield slot, problem
                continue
            try:
                yield slot, slot.get_token()
            except (pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised):
                continue
            except PKCS11Error as exc:
                yield slot, exc

    def close(self, session: Session | None) -> None:
        """Close *session*, unless a fork or a restart has made its handle stale."""
        if session is not None and is_current(self):
            cryptoki.close_session(session, self.path)


_opened: dict[str, Module] = {}
# Given path → real path, while that module is open.
_real: dict[Path, str] = {}
_inherited: dict[str, Module] = {}
# Modules whose C_Finalize failed: they may still be initialised.
_not_finalized: dict[str, Module] = {}
# When each module was last restarted by `restart_if_unused`.
_restarted_at: dict[str, float] = {}


def open_module(path: Path) -> Module:
    """
    The module at *path*, loaded and initialised once per process. Call it with `PKCS11_LOCK` held.

    Raises ConfigurationError (``module-path``) for an invalid path, DeviceError (``module-load``,
    ``forked``) if the module cannot be loaded or initialised.
    """
    name = _name(path)
    if name in _opened:
        return _opened[name]
    if name in _inherited:
        _reinitialize_after_fork(_inherited[name])
        del _inherited[name]
    else:
        check_path(path)
    try:
        lib = pkcs11.lib(str(path))
    except PKCS11Error as exc:
        # C_Finalize had failed, but python-pkcs11 has dropped its state: use the module as it is.
        if name not in _not_finalized or "already initialized" not in str(exc):
            raise _not_loaded(path, exc) from exc
        lib = _not_finalized[name].lib
    else:
        _not_finalized.pop(name, None)
    _opened[name] = Module(name, lib)
    return _opened[name]


def _name(path: Path) -> str:
    # Two paths of one file are one module, which can be initialised only once.
    known = _real.get(path)
    if known is None or known not in _opened:
        known = _real[path] = os.path.realpath(path) if path.is_absolute() else str(path)
    return known


def is_current(module: Module) -> bool:
    """Whether *module* is still in use: there was no fork and no restart since."""
    return _opened.get(module.path) is module


def restart(path: Path) -> None:
    """
    Finalize the module, so that the next call initialises it again; all its handles are stale.
    Call it with `PKCS11_LOCK` held.
    """
    module = _opened.pop(_name(path), None)
    if module is not None:
        # Some answer "not initialised" if their service has ended, which is fine.
        try:
            module.lib.finalize()
        except PKCS11Error:
            _not_finalized[module.path] = module


def find_open(path: Path) -> Module | None:
    """The module at *path* if this process has it open."""
    return _opened.get(_name(path))


def restart_if_unused(module: Module, *, now: float, pause: float) -> bool:
    """
    Finalize *module* as `restart` does, unless that was done less than *pause* seconds ago, or
    would end a login that another device still uses. Returns whether it was done. Call it with
    `PKCS11_LOCK` held.
    """
    if not is_current(module):
        return True
    if 0 <= now - _restarted_at.get(module.path, now - pause) < pause:
        return False
    if any(login.alive() for login in module.logins.values()):
        return False
    _restarted_at[module.path] = now
    restart(Path(module.path))
    return True


def check_path(path: Path) -> None:
    """
    Raises ConfigurationError unless *path* is an absolute file that only root or this user can
    change, the directories above it included (a sticky one such as /tmp excepted).
    """
    hint = "Set HSMTOLL_HSM__MODULE to the .so of the device's maker."
    problem: str | None = None
    try:
        if not path.is_absolute():
            problem = "is not an absolute path"
        elif not path.exists():
            problem = "does not exist"
        elif not path.is_file():
            problem = "is not a file"
        elif place := first_untrusted_component(path):
            problem = f"can be changed by others ({sanitized(place)})"
            hint = f"It is code that sees the PIN: chown root, chmod go-w {sanitized(place)}"
    except OSError as exc:
        problem = f"cannot be looked at ({exc.strerror})"
        hint = "This account must be able to read it and the directories above it."
    if problem:
        raise ConfigurationError(
            f"the PKCS#11 module '{sanitized(path)}' {problem}", hint=hint, code="module-path"
        )


def _not_loaded(path: Path, exc: PKCS11Error) -> DeviceError:
    words = str(exc)
    if "C_GetFunctionList" in words:
        why, hint = "is a library, but not of PKCS#11", None
    elif "OS exception" in words:
        why, hint = f"cannot be loaded: {sanitized(words.rpartition(f'{path}: ')[2])}", None
    elif "already initialized" in words:
        why = "is in use in this process already"
        hint = "other code has opened it under another path, or through another module"
    else:
        why = f"cannot be started: the module answered {describe(exc)}"
        hint = _load_hint(path)
    return DeviceError(
        f"the PKCS#11 module '{sanitized(path)}' {why}",
        hint=hint or "set HSMTOLL_HSM__MODULE to the .so of the device's maker",
        code="module-load",
    )


def _load_hint(path: Path) -> str:
    maker = maker_of(path) or maker_of(Path(os.path.realpath(path)))
    if maker is None:
        return (
            "its own configuration may be missing or unreadable for this account, or the device"
            " cannot be reached (makers' variables and files: hsmtoll/docs/devices.md)"
        )
    running = f"; check that {maker.service}" if maker.service else ""
    return f"for {maker.name} see {maker.needs}{running}"


def _reinitialize_after_fork(module: Module) -> None:
    lib, path = module.lib, Path(module.path)
    if lib.manufacturer_id not in _FORK_HARMLESS and path.name not in _FORK_HARMLESS_FILES:
        raise DeviceError(
            f"the PKCS#11 module '{sanitized(path)}' was opened before this process was forked;"
            " initialising it again here could end the parent's sessions",
            hint="Open it after the fork (gunicorn without --preload; multiprocessing with"
            " 'spawn'), or set HSMTOLL_HSM__ISOLATION=process.",
            code="forked",
        )
    # p11-kit and opencryptoki detect the fork and answer "not initialised".
    with contextlib.suppress(PKCS11Error):
        lib.finalize()


def _invalidate_after_fork() -> None:
    _inherited.update(_not_finalized | _opened)
    _opened.clear()


after_fork(_invalidate_after_fork)
