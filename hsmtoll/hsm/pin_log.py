"""
The log of PIN attempts: a write-ahead record on disk, so that a refused PIN is never tried twice,
by later processes, by concurrent ones, or after a crash.

Only a salted hash of a PIN is stored, and only after the device has accepted or refused it; before
the login nothing derived from the PIN is written.

    held (flock) ── intend ──► C_Login ──┬─► accept        only a salted hash is kept
                      │                  ├─► refuse        a salted hash is added
                      │                  ├─► withdraw      the device did not check the PIN
                      │                  ├─► mark_unknown  it is unknown whether it did
                      │                  └─► (crash)       the intent stays: outcome unknown
                      ├─► PinNotTried    refused before, or the outcome is unknown
                      └─► DeviceError    accepted before, but the device failed a moment ago
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import files
from hsmtoll.errors import DeviceError, PinNotTried, sanitized
from hsmtoll.fork import after_fork, notice_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.hsm.pin import Pin

__all__ = ["PinLog", "PinRecord", "TokenUser"]

_log = logging.getLogger(__name__)

#: Limits of tries without a result: of one unchanged source, and in total. A TPM locks after three
#: failed tries and has no flags.
_MAX_UNRESOLVED_SAME_SOURCE: Final = 2
_MAX_UNRESOLVED: Final = 3
_LOCK_SECONDS: Final = 60.0
#: Seconds between two tries of a PIN that is not the cause of the failure: minimum and maximum.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 120.0
#: Seconds between two tries of a PIN that may be wrong, at a device without PIN flags.
_UNKNOWN_PIN_INTERVAL: Final = 3600.0
#: Different values that may be refused within an hour; then only a typed PIN is tried. It limits a
#: PIN command that prints a different error message (with a time stamp) on each run.
_MAX_REFUSED_PER_HOUR: Final = 5
#: Number of answers with an unknown outcome that are kept.
_MAX_UNKNOWN_KEPT: Final = 16
_CLEAR: Final = "If the device was unblocked to the same PIN, run `hsmtoll pin clear`."


@dataclass(frozen=True, slots=True)
class TokenUser:
    """A PKCS#11 token and a user of it (``user``, or ``signing`` for a context-specific PIN)."""

    manufacturer: str
    model: str
    serial: str
    label: str
    user: str = "user"

    @property
    def name(self) -> str:
        """The file name of the record: a hash, as labels may contain any character."""
        words = [self.manufacturer, self.model, self.serial, self.label, self.user]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class PinLog:
    """
    The records of all tokens and users: files of mode 0600 in *directory* (mode 0700).

    If *directory* is None or cannot be written, no PIN is tried (PinNotTried), unless *optional*
    is set (for the sandbox with its temporary devices).
    """

    directory: Path | None
    optional: bool = False
    #: Wall time, in seconds.
    now: Callable[[], float] = field(default=time.time, repr=False, compare=False)

    @contextlib.contextmanager
    def held(self, owner: TokenUser) -> Iterator[PinRecord]:
        """
        The record of *owner*, locked until the block ends. Other users of the same device share
        the lock, because their logins interfere with each other.

        Raises PinNotTried (``ledger``) where nothing can be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(self._locked(owner))
                pin_record = PinRecord(owner=owner, path=path, record=_read(path), now=self.now)
            except OSError as exc:
                if not self.optional:
                    raise _unusable(self.directory, exc) from exc
                pin_record = PinRecord(owner=owner, path=None, record={})
            yield pin_record

    def refusals(self, owner: TokenUser) -> tuple[int, int]:
        """The number of refused values, and of tries with an unknown outcome."""
        try:
            record = _read(self._folder() / owner.name)
        except OSError:
            return 0, 0
        tries = [*record.get("intents", ()), *record.get("doubts", ())]
        return len(record.get("refused", ())), len(tries)

    def clear(self, *owners: TokenUser) -> int:
        """Forget what is known about *owners*. Returns how many had refused or unresolved PINs."""
        cleared = 0
        for owner in owners:
            with self.held(owner) as pin_record:
                cleared += any(
                    pin_record.record.get(name) for name in ("refused", "intents", "doubts")
                )
                pin_record.reset()
        return cleared

    def _folder(self) -> Path:
        if self.directory is None:
            raise FileNotFoundError(2, "no state directory")
        return self.directory / "pin"

    @contextlib.contextmanager
    def _locked(self, owner: TokenUser) -> Iterator[Path]:
        notice_fork()
        folder = self._folder()
        files.make_directory(folder)
        files.reclaim(folder.parent)
        # An account that can remove a record can cause a refused PIN to be tried again.
        files.make_private_directory(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(folder / f"{replace(owner, user='user').name}.lock", flags, 0o600)
        _locks.add(lock)
        try:
            _wait_for(lock, owner)
            yield folder / owner.name
        finally:
            if lock in _locks:
                _locks.remove(lock)
                os.close(lock)


# A forked child closes its copies, which would keep the lock after the parent's release. If it was
# forked inside `held`, it must not close them again: the descriptor may be another file by then.
_locks: set[int] = set()


def _close_inherited_locks() -> None:
    while _locks:
        os.close(_locks.pop())


after_fork(_close_inherited_locks)


@dataclass(slots=True)
class PinRecord:
    """A record while it is locked. *path* is None if nothing is stored (sandbox)."""

    owner: TokenUser
    path: Path | None
    record: dict[str, Any] = field(repr=False)
    #: Wall time, in seconds.
    now: Callable[[], float] = time.time
    #: Whether the device accepted the PIN of `intend` before, and has not refused it since.
    accepted_before: bool = False
    _before: dict[str, Any] = field(default_factory=dict, repr=False)

    def intend(
        self, pin: Pin, *, count_low: bool, keeps_flags: bool = False, user_confirmed: bool = False
    ) -> None:
        """
        Record that *pin* is about to be tried; synced to disk on return.

        *count_low*: the device reports a wrong PIN since the last login; *keeps_flags*: it is of
        a kind that reports it; *user_confirmed*: the user has requested this try. Raises
        PinNotTried: ``pin-refused`` for a refused value, ``pin-unresolved`` if the last try has
        no result, ``pin-count-low`` if another program gave a wrong PIN; DeviceError
        (``device-down``) for a PIN accepted before, shortly after the device has failed.
        """
        keeps_flags = keeps_flags or count_low or bool(self.record.get("flags"))
        judged = bool(self.record.get("refused") or self.record.get("accepted"))
        pin_hash = _hash(pin, self.record) if judged else ""
        if judged and pin_hash in self.record.get("refused", ()):
            raise self._not_tried(
                f"the PIN from {pin.source} was refused before", code="pin-refused"
            )
        self.accepted_before = accepted = judged and pin_hash == self.record.get("accepted")
        if not (accepted or user_confirmed or pin.typed):
            self._check_refusals(pin)
        self._check_open_tries(pin, accepted=accepted, count_low=count_low, flags=keeps_flags)
        tried_here = any(
            self.record.get(name) for name in ("refused", "intents", "doubts", "cleared")
        )
        known = accepted or tried_here or user_confirmed or pin.typed
        if count_low and not known and self.path is not None:
            raise PinNotTried(
                f"the PIN of '{sanitized(self.owner.label)}' was not tried: the device reports that"
                " another program gave a wrong one",
                hint="Log in once with the device's own tool, or type the PIN"
                " (HSMTOLL_HSM__PIN_PROMPT=terminal). If it is known to be right, run"
                " `hsmtoll pin clear`.",
                code="pin-count-low",
            )
        self._before = dict(self.record)
        if keeps_flags:
            self._before["flags"] = True
        try:
            intents = [*self.record.get("intents", ()), pin.origin]
            self._write({**self._before, "intents": intents})
        except OSError as exc:
            raise _unusable(self.path, exc) from exc

    def _check_refusals(self, pin: Pin) -> None:
        """PinNotTried if too many different values were refused within an hour."""
        recent = [
            at
            for at in self.record.get("times", ())
            if 0 <= self.now() - at < _UNKNOWN_PIN_INTERVAL
        ]
        if len(recent) < _MAX_REFUSED_PER_HOUR:
            return
        raise PinNotTried(
            f"the PIN of '{sanitized(self.owner.label)}' was not tried: {len(recent)} others"
            f" were refused within an hour, and {pin.source} has yet another one",
            hint="check the content of the file or the output of the command; a typed PIN is tried"
            f" at once (HSMTOLL_HSM__PIN_PROMPT=terminal), others after an hour. {_CLEAR}",
            code="pin-refused",
            retry_after=recent[0] + _UNKNOWN_PIN_INTERVAL - self.now(),
        )

    def _check_open_tries(self, pin: Pin, *, accepted: bool, count_low: bool, flags: bool) -> None:
        """Raise if earlier tries of *pin* have no result and another one could lock the device."""
        intents: list[str] = self.record.get("intents", [])
        doubts: list[tuple[str, float]] = self.record.get("doubts", [])
        same = intents.count(pin.origin)
        own = [at for origin, at in doubts if origin == pin.origin]
        # By the device's count the try was made, with a wrong PIN.
        tries_used_up = (same or own) and count_low
        if not accepted:
            tries_used_up = (
                tries_used_up
                or same >= _MAX_UNRESOLVED_SAME_SOURCE
                or len(intents) >= _MAX_UNRESOLVED
            )
        if tries_used_up:
            raise self._not_tried(
                f"the result of the last try with the PIN from {pin.source} is unknown",
                code="pin-unresolved",
            )
        last = own if len(doubts) < _MAX_UNRESOLVED else [at for _, at in doubts]
        if not last:
            return
        pause = min(_FIRST_PAUSE * 2 ** (len(last) - 1), _LONGEST_PAUSE)
        pin_trusted = accepted or flags
        left = max(last) + (pause if pin_trusted else _UNKNOWN_PIN_INTERVAL) - self.now()
        # Outside of this range the clock was changed: do not wait.
        if not 0 < left <= _UNKNOWN_PIN_INTERVAL:
            return
        if pin_trusted:
            raise DeviceError(
                f"the device '{sanitized(self.owner.label)}' failed at the last login",
                hint="It is tried again automatically: after seconds at first, then after minutes.",
                code="device-down",
                signed=False,
                retry_after=left,
            )
        error = self._not_tried(
            f"the result of the last try with the PIN from {pin.source} is unknown, and this"
            " device does not count wrong PINs: one try an hour",
            code="pin-unresolved",
        )
        error.retry_after = left
        raise error

    def accept(self, pin: Pin) -> None:
        """The device accepted *pin*: store its hash, and drop everything before it."""
        if self.path is None:
            return
        record: dict[str, Any] = {"flags": True} if self._before.get("flags") else {}
        if not pin.on_pinpad:
            record["salt"] = self._before.get("salt") or _salt()
            record["accepted"] = _hash(pin, record)
        with self._log_if_unwritten("accepted"):
            if record:
                self._write(record)
            else:
                self.forget()

    def reset(self) -> None:
        """Drop the record at the user's request, and permit the next try."""
        self._write({"cleared": True})

    def forget(self) -> None:
        """Delete the record."""
        self.record = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            files.sync_directory(self.path.parent)

    def refuse(self, pin: Pin) -> None:
        """The device refused *pin*: store its hash, so that it is not tried again."""
        record = {"salt": _salt(), **self._without_tries_of(pin)}
        pin_hash = _hash(pin, record)
        record["refused"] = [*record.get("refused", ()), pin_hash]
        record["times"] = [*record.get("times", ()), self.now()][-_MAX_REFUSED_PER_HOUR:]
        if record.get("accepted") == pin_hash:
            del record["accepted"]
        with self._log_if_unwritten("refused"):
            self._write(record)

    def withdraw(self) -> None:
        """The device did not check the PIN: restore the record before `intend`."""
        with self._log_if_unwritten("not checked"):
            if self._before:
                self._write(self._before)
            else:
                self.forget()

    def mark_unknown(self, pin: Pin) -> None:
        """The device's answer does not say whether it has checked the PIN."""
        doubts = [*self._before.get("doubts", ()), [pin.origin, self.now()]]
        with self._log_if_unwritten("perhaps checked"):
            self._write({**self._before, "doubts": doubts[-_MAX_UNKNOWN_KEPT:]})

    @contextlib.contextmanager
    def _log_if_unwritten(self, outcome: str) -> Iterator[None]:
        """Log write errors instead of raising them; the intent then stays on disk."""
        try:
            yield
        except OSError as exc:
            _log.warning(
                "the PIN of '%s' was %s, which cannot be recorded (%s): this try counts as one with"
                " an unknown outcome",
                sanitized(self.owner.label), outcome, exc.strerror,
            )  # fmt: skip

    def _without_tries_of(self, pin: Pin) -> dict[str, Any]:
        # The result of this source is known: its old tries must not count for a corrected PIN.
        record = {name: value for name, value in self._before.items() if name != "cleared"}
        record["intents"] = [each for each in record.get("intents", ()) if each != pin.origin]
        record["doubts"] = [each for each in record.get("doubts", ()) if each[0] != pin.origin]
        return record

    def _not_tried(self, why: str, *, code: str) -> PinNotTried:
        return PinNotTried(
            f"the PIN of '{sanitized(self.owner.label)}' was not tried: {why}",
            hint=f"A corrected PIN is tried at once. {_CLEAR}",
            code=code,
        )

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record = {name: value for name, value in record.items() if value}
        if self.path is None:
            return
        owner = self.owner
        words = {
            "schema": 1,
            "device": owner.label,
            "serial": owner.serial,
            "user": owner.user,
        }
        files.replace(self.path, json.dumps({**words, **record}).encode("ascii"))


def _unusable(where: Path | None, exc: OSError) -> PinNotTried:
    shown = sanitized(where) if where else "nowhere"
    why = exc.strerror or type(exc).__name__
    hint = (
        "set HSMTOLL_STATE to a persistent directory of this user, whose parent directories nobody"
        " else can change; in a volume, to one below its root, which is created with mode 0700"
        " (Kubernetes: the pod has a fsGroup)"
    )
    with contextlib.suppress(OSError):
        owner = where.stat().st_uid if where else 0
        if owner not in (0, os.geteuid()):
            # In a directory of its own, this account would not know which PINs were refused.
            hint = f"run this as the account that owns the directory (uid {owner})"
    return PinNotTried(
        f"the PIN was not tried: refused PINs cannot be remembered in {shown} ({why})",
        hint=hint,
        code="ledger",
    )


#: The members of a record, and what each is.
_MEMBERS: Final = {
    "salt": str, "refused": list, "accepted": str, "intents": list, "doubts": list, "flags": bool,
    "cleared": bool, "times": list,
}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        members = _checked(json.loads(path.read_bytes()), dict)
        record = {
            name: _checked(members[name], kind)
            for name, kind in _MEMBERS.items()
            if name in members
        }
        record["doubts"] = [[str(origin), float(at)] for origin, at in record.get("doubts", ())]
        record["times"] = [float(at) for at in record.get("times", ())]
        bytes.fromhex(record.get("salt", ""))
        for each in (*record.get("refused", ()), *record.get("intents", ())):
            _checked(each, str)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError) as exc:
        # It may contain a refusal: do not try a PIN without knowing.
        raise OSError(5, f"{path.name} cannot be read") from exc
    return {name: value for name, value in record.items() if value}


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError("a member of another type")
    return value


def _salt() -> str:
    return os.urandom(16).hex()


def _hash(pin: Pin, record: dict[str, Any]) -> str:
    # The value of a PIN from a pinpad is unknown: a refusal counts for every later entry.
    if "salt" not in record:
        return ""
    value = (pin.reveal() or "").encode()
    salt = bytes.fromhex(record["salt"])
    return hashlib.scrypt(value, salt=salt, n=2**12, r=8, p=1, dklen=32).hex()


def _wait_for(lock: int, owner: TokenUser) -> None:
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise DeviceError(
                    f"another process has been logging in to '{sanitized(owner.label)}' "
                    "for a minute",
                    hint="Its module may hang: end that process.",
                    code="login-busy",
                    signed=False,
                    retryable=True,
                ) from None
            time.sleep(0.02)
        else:
            return
