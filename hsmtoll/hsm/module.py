"""
The PKCS#11 library: opened once per process, used under one lock, and what a fork does to it.

python-pkcs11 initialises modules without asking them for locking and releases the GIL: two
threads on two sessions crash some of them within a second. So every call in this room is made
with `GATE` held, and it is held over a fork as well.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pkcs11
from pkcs11.exceptions import PKCS11Error

from hsmtoll.errors import ConfigurationError, DeviceError, foreign
from hsmtoll.files import first_untrusted_component
from hsmtoll.hsm import cryptoki
from hsmtoll.hsm.codes import said, speaking
from hsmtoll.hsm.makers import maker_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pkcs11 import Session, Slot, Token

__all__ = ["GATE", "Module", "check_path", "current", "loaded", "opened", "restart", "restarted"]

# A forked child can start these afresh without harm to its parent (measured). With a TPM or a
# smartcard the child's C_Finalize ends the parent's device; of others nothing is known.
_FORK_HARMLESS: Final = frozenset({"SoftHSM", "IBM", "Mozilla Foundation"})
# Its manufacturer is the one of what it reaches; the client itself reconnects in a child.
_FORK_HARMLESS_FILES: Final = frozenset({"p11-kit-client.so"})


class Gate:
    """The one lock of the process around PKCS#11, with a deadline for those who wait."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._over_fork = False
        #: Called in a forked child, before anything else runs there.
        self.after_fork: list[Callable[[], None]] = []
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._in_parent, after_in_child=self._in_child
        )

    def held(self, timeout: float) -> _Turn:
        """Hold it. Raises DeviceError (``device-busy``) after *timeout* seconds of waiting."""
        return _Turn(self._lock, timeout)

    def end(self, seconds: float) -> None:
        """
        Wait so long for the call of a thread, and let no further one begin, in a program that
        ends: a login that is cut off is a try of which nobody knows what became.
        """
        self._lock.acquire(timeout=seconds)

    def _before_fork(self) -> None:
        # Forked in the middle of a call, the child would inherit a module in pieces. A call
        # that hangs must not stop the fork for ever, though.
        self._over_fork = self._lock.acquire(timeout=10)

    def _in_parent(self) -> None:
        if self._over_fork:
            self._lock.release()

    def _in_child(self) -> None:
        self._lock = threading.RLock()
        for forget in self.after_fork:
            forget()


class _Turn:
    """One time inside; a class, because every signature passes here."""

    __slots__ = ("_lock", "_timeout")

    def __init__(self, lock: threading.RLock, timeout: float) -> None:
        self._lock = lock
        self._timeout = timeout

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout):
            raise DeviceError(
                f"the device was not free within {self._timeout:g} s: another call to it has not"
                " ended",
                hint="A module that hangs is cut off with HSMTOLL_HSM__ISOLATION=process.",
                code="device-busy",
                signed=False,
                scope="attempt",
                retryable=True,
            )

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


GATE: Final = Gate()


@dataclass(slots=True)
class Module:
    """
    One loaded and initialised library. *logins* holds what this process has opened on each of
    its p11_tokens; whoever kept another Module than `opened` returns has stale handles.
    """

    path: str
    lib: Any
    logins: dict[object, Any] = field(default_factory=dict)

    def slots(self) -> Iterator[tuple[Slot, Token | PKCS11Error]]:
        """
        Every slot with its p11_token, or with the error it answers with: a slot that is
        broken does not hide the others. Empty slots are left out.
        """
        with speaking(f"asking {foreign(self.path)} for its slots"):
            seen = cryptoki.slots(self.lib, self.path)
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
        """Close *session*, unless it was void after a fork or a restart: it is not ours then."""
        if session is not None and current(self):
            cryptoki.closed(session, self.path)


_opened: dict[str, Module] = {}
# The real file behind a path that was given, as long as that module is open.
_real: dict[Path, str] = {}
_inherited: dict[str, Module] = {}
# What answered with an error when it was to end, and may be initialised still.
_unended: dict[str, Module] = {}
# When each was ended because nothing else helped.
_ended: dict[str, float] = {}


def opened(path: Path) -> Module:
    """
    The module at *path*, loaded and initialised once per process. Call it with `GATE` held.

    Raises ConfigurationError (``module-path``) for a path that is not one, DeviceError
    (``module-load``, ``forked``) for what happens behind it.
    """
    name = _name(path)
    if name in _opened:
        return _opened[name]
    if name in _inherited:
        _start_afresh(_inherited[name])
        del _inherited[name]
    else:
        check_path(path)
    try:
        lib = pkcs11.lib(str(path))
    except PKCS11Error as exc:
        # python-pkcs11 takes what would not end for ended: it is gone on with as it is.
        if name not in _unended or "already initialized" not in str(exc):
            raise _not_loaded(path, exc) from exc
        lib = _unended[name].lib
    else:
        _unended.pop(name, None)
    _opened[name] = Module(name, lib)
    return _opened[name]


def _name(path: Path) -> str:
    # Two paths of one file are one library, which can be initialised only once.
    known = _real.get(path)
    if known is None or known not in _opened:
        known = _real[path] = os.path.realpath(path) if path.is_absolute() else str(path)
    return known


def current(module: Module) -> bool:
    """Whether *module* is still what this process uses: no fork, no restart since."""
    return _opened.get(module.path) is module


def restart(path: Path) -> None:
    """
    End the module, so that the next call initialises it again; every handle on it is void.
    Call it with `GATE` held.
    """
    module = _opened.pop(_name(path), None)
    if module is not None:
        # Some answer "not initialised" where the other side died; it is what was wanted.
        try:
            module.lib.finalize()
        except PKCS11Error:
            _unended[module.path] = module


def loaded(path: Path) -> Module | None:
    """The module at *path* if this process has it open."""
    return _opened.get(_name(path))


def restarted(module: Module, *, now: float, pause: float) -> bool:
    """
    End *module* as `restart` does, unless that was done less than *pause* seconds ago, or would
    take away a login that still serves another device. Whether it was done. Call it with `GATE`
    held.
    """
    if not current(module):
        return True
    if 0 <= now - _ended.get(module.path, now - pause) < pause:
        return False
    if any(login.alive() for login in module.logins.values()):
        return False
    _ended[module.path] = now
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
            problem = f"can be changed by others ({foreign(place)})"
            hint = f"It is code that sees the PIN: chown root, chmod go-w {foreign(place)}"
    except OSError as exc:
        problem = f"cannot be looked at ({exc.strerror})"
        hint = "This account must be able to read it and the directories above it."
    if problem:
        raise ConfigurationError(
            f"the PKCS#11 module '{foreign(path)}' {problem}", hint=hint, code="module-path"
        )


def _not_loaded(path: Path, exc: PKCS11Error) -> DeviceError:
    words = str(exc)
    if "C_GetFunctionList" in words:
        why, hint = "is a library, but not of PKCS#11", None
    elif "OS exception" in words:
        why, hint = f"cannot be loaded: {foreign(words.rpartition(f'{path}: ')[2])}", None
    elif "already initialized" in words:
        why = "is in use in this process already"
        hint = "other code opened it under another path, or through another module"
    else:
        why = f"cannot be started: the module answered {said(exc)}"
        hint = _how_it_starts(path)
    return DeviceError(
        f"the PKCS#11 module '{foreign(path)}' {why}",
        hint=hint or "set HSMTOLL_HSM__MODULE to the .so of the device's maker",
        code="module-load",
    )


def _how_it_starts(path: Path) -> str:
    maker = maker_of(path) or maker_of(Path(os.path.realpath(path)))
    if maker is None:
        return (
            "its own configuration may be missing or unreadable for this account, or what it"
            " reaches is away (makers' variables and files: hsmtoll/docs/devices.md)"
        )
    running = f"; check that {maker.service}" if maker.service else ""
    return f"for {maker.name} see {maker.needs}{running}"


def _start_afresh(module: Module) -> None:
    lib, path = module.lib, Path(module.path)
    if lib.manufacturer_id not in _FORK_HARMLESS and path.name not in _FORK_HARMLESS_FILES:
        raise DeviceError(
            f"the PKCS#11 module '{foreign(path)}' was opened before this process was forked, and"
            " starting it again here could take the device away from the parent",
            hint="Open it after the fork (gunicorn without --preload; multiprocessing with"
            " 'spawn'), or set HSMTOLL_HSM__ISOLATION=process.",
            code="forked",
        )
    # p11-kit and opencryptoki notice the fork themselves and answer "not initialised".
    with contextlib.suppress(PKCS11Error):
        lib.finalize()


def _forget_parents() -> None:
    _inherited.update(_unended | _opened)
    _opened.clear()


GATE.after_fork.append(_forget_parents)
