"""
Which PINs a device has refused, on disk, so that no value is tried twice: not by the next
start, not by twenty processes at once, not by the process after a crash.

A PIN enters this room only to be hashed after the device has judged it; before a login nothing
derived from it is written.

    held (flock) ── intend ──► C_Login ──┬─► accept    a salted hash is all that is kept
                      │                  ├─► refuse    a salted hash is added
                      │                  ├─► withdraw  the device did not look at the PIN
                      │                  ├─► doubt     it answered, and nobody knows whether it did
                      │                  └─► (nothing) the process ended: the intent stays
                      ├─► PinNotTried    refused before, or its fate is unknown
                      └─► DeviceError    accepted before, and the device was away a moment ago
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import files
from hsmtoll.errors import DeviceError, PinNotTried, foreign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.hsm.pin import Pin

__all__ = ["Ledger", "Page", "Place"]

_log = logging.getLogger(__name__)

#: Unresolved tries: of one source as it was read, and in all, whatever was changed meanwhile.
#: A TPM locks after three and shows no flags.
_UNRESOLVED_SAME: Final = 2
_UNRESOLVED_ALL: Final = 3
_LOCK_SECONDS: Final = 60.0
#: Seconds between two tries of a PIN that is not at fault: the first pause, and the longest.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 120.0
#: Seconds between two tries of a PIN that may be at fault, at a device that keeps no flags.
_ONE_TRY: Final = 3600.0
#: Different values that may be refused within an hour, before nothing but a typed one is tried: a
#: command that prints something new each time, such as an error with the time in it, ends there.
_MOST_REFUSED: Final = 5
#: How many answers that leave the PIN's fate open are remembered.
_REMEMBERED: Final = 16
_CLEAR: Final = "If the device was unblocked to the same PIN, run `hsmtoll pin clear`."


@dataclass(frozen=True, slots=True)
class Place:
    """Whose PIN: one p11_token and one user of it (``user``, or ``signing`` for one key's own)."""

    manufacturer: str
    model: str
    serial: str
    label: str
    user: str = "user"

    @property
    def name(self) -> str:
        """The file's name: the same on every start, whatever the label is made of."""
        words = [self.manufacturer, self.model, self.serial, self.label, self.user]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Ledger:
    """
    One record per device and user, in files of mode 0600 in *directory* (mode 0700).

    *directory* None, or one that cannot be written, means that no PIN is tried: PinNotTried,
    except where *optional* is set (the sandbox, where devices are throw-away).
    """

    directory: Path | None
    optional: bool = False
    #: Wall time, in seconds.
    now: Callable[[], float] = field(default=time.time, repr=False, compare=False)

    @contextlib.contextmanager
    def held(self, place: Place) -> Iterator[Page]:
        """
        The record of *place*, held until the block ends against every other process that wants
        it or that of another user of the same device: logins of the two disturb each other.

        Raises PinNotTried (``ledger``) where nothing can be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(self._locked(place))
                page = Page(place=place, path=path, record=_read(path), now=self.now)
            except OSError as exc:
                if not self.optional:
                    raise _unusable(self.directory, exc) from exc
                page = Page(place=place, path=None, record={})
            yield page

    def refusals(self, place: Place) -> tuple[int, int]:
        """How many values were refused, and how many tries have an unknown fate: (n, n)."""
        try:
            record = _read(self._folder() / place.name)
        except OSError:
            return 0, 0
        tries = [*record.get("intents", ()), *record.get("doubts", ())]
        return len(record.get("refused", ())), len(tries)

    def clear(self, *places: Place) -> int:
        """Forget what is known about *places*. Returns how many had refused or unresolved PINs."""
        cleared = 0
        for place in places:
            with self.held(place) as page:
                cleared += any(page.record.get(name) for name in ("refused", "intents", "doubts"))
                page.vouch()
        return cleared

    def _folder(self) -> Path:
        if self.directory is None:
            raise FileNotFoundError(2, "no state directory")
        return self.directory / "pin"

    @contextlib.contextmanager
    def _locked(self, place: Place) -> Iterator[Path]:
        folder = self._folder()
        files.make_directory(folder)
        for each in (folder.parent, folder):
            files.reclaim(each)
        facts = folder.stat()
        if facts.st_uid != os.geteuid():
            raise PermissionError(1, "it belongs to another account")
        if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            may = "change" if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else "read"
            raise PermissionError(
                1, f"others can {may} this directory, mode {stat.S_IMODE(facts.st_mode):04o}"
            )
        # Whoever can move a record away can have a refused PIN tried again.
        if (place_of := files.first_untrusted_component(folder, own=True)) is not None:
            raise PermissionError(1, f"others can change {foreign(place_of)}")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(folder / f"{replace(place, user='user').name}.lock", flags, 0o600)
        _locks.add(lock)
        try:
            _wait_for(lock, place)
            yield folder / place.name
        finally:
            if lock in _locks:
                _locks.remove(lock)
                os.close(lock)


# A forked child closes its copies: they would hold what the parent has long released. One that was
# forked inside the block does not close them again: the number may be another file's by then.
_locks: set[int] = set()


def _let_go() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go)


@dataclass(slots=True)
class Page:
    """One record while it is held. *path* is None where nothing is remembered (sandbox)."""

    place: Place
    path: Path | None
    record: dict[str, Any] = field(repr=False)
    #: Wall time, in seconds.
    now: Callable[[], float] = time.time
    #: Whether the device took the PIN of `intend` before, and has not refused it since.
    accepted_before: bool = False
    _before: dict[str, Any] = field(default_factory=dict, repr=False)

    def intend(
        self, pin: Pin, *, count_low: bool, keeps_flags: bool = False, vouched: bool = False
    ) -> None:
        """
        Write down that *pin* is about to be tried; fsynced when this returns.

        *count_low* is what the device's flags say now; *keeps_flags* that it is of a kind that
        sets them; *vouched* that a person answers for this try. Raises PinNotTried:
        ``pin-refused`` for a value that was refused, ``pin-unresolved`` for one whose last try
        has no result, ``pin-count-low`` where somebody else gave a wrong one; DeviceError
        (``device-down``) where a PIN that was accepted before is to wait, because the device was
        away at the last try.
        """
        keeps_flags = keeps_flags or count_low or bool(self.record.get("flags"))
        judged = bool(self.record.get("refused") or self.record.get("accepted"))
        mine = _hash(pin, self.record) if judged else ""
        if judged and mine in self.record.get("refused", ()):
            raise self._spent(f"the PIN from {pin.source} was refused before", code="pin-refused")
        self.accepted_before = accepted = judged and mine == self.record.get("accepted")
        if not (accepted or vouched or pin.typed):
            self._check_refusals(pin)
        self._check_open_tries(pin, accepted=accepted, count_low=count_low, flags=keeps_flags)
        ours = any(self.record.get(name) for name in ("refused", "intents", "doubts", "cleared"))
        known = accepted or ours or vouched or pin.typed
        if count_low and not known and self.path is not None:
            raise PinNotTried(
                f"the PIN of '{foreign(self.place.label)}' was not tried: the device says that a"
                " wrong one was given, and not from here",
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
        """Refuse where many values were wrong lately: the next one will be as well."""
        recent = [at for at in self.record.get("times", ()) if 0 <= self.now() - at < _ONE_TRY]
        if len(recent) < _MOST_REFUSED:
            return
        raise PinNotTried(
            f"the PIN of '{foreign(self.place.label)}' was not tried: {len(recent)} others"
            f" were refused within an hour, and what {pin.source} gives is another one",
            hint="see what the file holds or the command prints; a typed PIN is tried at once"
            f" (HSMTOLL_HSM__PIN_PROMPT=terminal), others after an hour. {_CLEAR}",
            code="pin-refused",
            retry_after=recent[0] + _ONE_TRY - self.now(),
        )

    def _check_open_tries(self, pin: Pin, *, accepted: bool, count_low: bool, flags: bool) -> None:
        """Refuse where tries of *pin* have no result, and another could be one too many."""
        intents: list[str] = self.record.get("intents", [])
        doubts: list[tuple[str, float]] = self.record.get("doubts", [])
        same = intents.count(pin.origin)
        mine = [at for origin, at in doubts if origin == pin.origin]
        # A wrong PIN was given after all, as the device counts.
        spent = (same or mine) and count_low
        if not accepted:
            spent = spent or same >= _UNRESOLVED_SAME or len(intents) >= _UNRESOLVED_ALL
        if spent:
            raise self._spent(
                f"what became of the last try with the PIN from {pin.source} is not known",
                code="pin-unresolved",
            )
        last = mine if len(doubts) < _UNRESOLVED_ALL else [at for _, at in doubts]
        if not last:
            return
        pause = min(_FIRST_PAUSE * 2 ** (len(last) - 1), _LONGEST_PAUSE)
        innocent = accepted or flags
        left = max(last) + (pause if innocent else _ONE_TRY) - self.now()
        # A clock that was set back is no reason to wait longer.
        if not 0 < left <= _ONE_TRY:
            return
        if innocent:
            raise DeviceError(
                f"the device '{foreign(self.place.label)}' did not take the login a moment ago",
                hint="It is tried again by itself: seconds after the first time, minutes later on.",
                code="device-down",
                signed=False,
                retry_after=left,
            )
        error = self._spent(
            f"what became of the last try with the PIN from {pin.source} is not known, and this"
            " device keeps no count of wrong ones: one try an hour",
            code="pin-unresolved",
        )
        error.retry_after = left
        raise error

    def accept(self, pin: Pin) -> None:
        """The device took the PIN: everything before it is void, and it is known to be right."""
        if self.path is None:
            return
        record: dict[str, Any] = {"flags": True} if self._before.get("flags") else {}
        if not pin.on_pinpad:
            record["salt"] = self._before.get("salt") or _salt()
            record["accepted"] = _hash(pin, record)
        with self._noted("accepted"):
            if record:
                self._write(record)
            else:
                self.forget()

    def vouch(self) -> None:
        """A person says that the next PIN may be tried: nothing else is known any more."""
        self._write({"cleared": True})

    def forget(self) -> None:
        """Delete what is known."""
        self.record = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            files.sync_directory(self.path.parent)

    def refuse(self, pin: Pin) -> None:
        """The device refused *pin*: its value is not tried again."""
        record = {"salt": _salt(), **self._without(pin)}
        mine = _hash(pin, record)
        record["refused"] = [*record.get("refused", ()), mine]
        record["times"] = [*record.get("times", ()), self.now()][-_MOST_REFUSED:]
        if record.get("accepted") == mine:
            del record["accepted"]
        with self._noted("refused"):
            self._write(record)

    def withdraw(self) -> None:
        """The device did not look at the PIN: as before."""
        with self._noted("not looked at"):
            if self._before:
                self._write(self._before)
            else:
                self.forget()

    def doubt(self, pin: Pin) -> None:
        """The device answered, and the answer does not say whether it looked at the PIN."""
        doubts = [*self._before.get("doubts", ()), [pin.origin, self.now()]]
        with self._noted("perhaps looked at"):
            self._write({**self._before, "doubts": doubts[-_REMEMBERED:]})

    @contextlib.contextmanager
    def _noted(self, fate: str) -> Iterator[None]:
        """What the device said counts, also where the disk is full: the intent stays on it then."""
        try:
            yield
        except OSError as exc:
            _log.warning(
                "the PIN of '%s' was %s, which cannot be written down (%s): the next try counts as"
                " one whose fate is not known",
                foreign(self.place.label), fate, exc.strerror,
            )  # fmt: skip

    def _without(self, pin: Pin) -> dict[str, Any]:
        # What this source held is known now; a corrected value must not find its old tries.
        record = {name: value for name, value in self._before.items() if name != "cleared"}
        record["intents"] = [each for each in record.get("intents", ()) if each != pin.origin]
        record["doubts"] = [each for each in record.get("doubts", ()) if each[0] != pin.origin]
        return record

    def _spent(self, why: str, *, code: str) -> PinNotTried:
        return PinNotTried(
            f"the PIN of '{foreign(self.place.label)}' was not tried: {why}",
            hint=f"A corrected PIN is tried at once. {_CLEAR}",
            code=code,
        )

    def _write(self, record: dict[str, Any]) -> None:
        self.record = record = {name: value for name, value in record.items() if value}
        if self.path is None:
            return
        place = self.place
        words = {"schema": 1, "device": place.label, "serial": place.serial, "user": place.user}
        files.replace(self.path, json.dumps({**words, **record}).encode("ascii"))


def _unusable(where: Path | None, exc: OSError) -> PinNotTried:
    shown = foreign(where) if where else "nowhere"
    why = exc.strerror or type(exc).__name__
    hint = (
        "set HSMTOLL_STATE to a directory of this user that outlives restarts, where nobody else"
        " may write above it; in a volume, to one below its root, which is made with mode 0700"
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
        said = _checked(json.loads(path.read_bytes()), dict)
        record = {
            name: _checked(said[name], kind) for name, kind in _MEMBERS.items() if name in said
        }
        record["doubts"] = [[str(origin), float(at)] for origin, at in record.get("doubts", ())]
        record["times"] = [float(at) for at in record.get("times", ())]
        bytes.fromhex(record.get("salt", ""))
        for each in (*record.get("refused", ()), *record.get("intents", ())):
            _checked(each, str)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError) as exc:
        # A record that cannot be read may have held a refusal: guessing would burn a PIN.
        raise OSError(5, f"{path.name} cannot be read") from exc
    return {name: value for name, value in record.items() if value}


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError("a member of another type")
    return value


def _salt() -> str:
    return os.urandom(16).hex()


def _hash(pin: Pin, record: dict[str, Any]) -> str:
    # A pinpad's PIN has no value we know: a refusal there counts for whatever is typed next.
    if "salt" not in record:
        return ""
    value = (pin.reveal() or "").encode()
    salt = bytes.fromhex(record["salt"])
    return hashlib.scrypt(value, salt=salt, n=2**12, r=8, p=1, dklen=32).hex()


def _wait_for(lock: int, place: Place) -> None:
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise DeviceError(
                    f"another process has been logging in to '{foreign(place.label)}' for a minute",
                    hint="Its module may hang: end that process.",
                    code="login-busy",
                    signed=False,
                    retryable=True,
                ) from None
            time.sleep(0.02)
        else:
            return
