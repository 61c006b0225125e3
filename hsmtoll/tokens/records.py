"""
What lies in a store under one key, as bytes: a token, a refusal that is remembered, or both.

Every record names its version and its key. What is torn, foreign, of another version or of
another key reads as nothing, so that an older program never misreads a newer one.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hsmtoll import errors
from hsmtoll.jsonio import read_strict
from hsmtoll.token import AccessToken, ClockReading

if TYPE_CHECKING:
    from hsmtoll.errors import HsmTollError
    from hsmtoll.tokens.stores import StoredValue

__all__ = ["VERSION", "Record", "Refusal", "copy_exception", "read", "written"]

#: The form of a record. A reader that does not know it treats it as a miss.
VERSION: Final = 2

#: Seconds that the wall clocks of two machines may differ, where the store counts the time.
_MAX_CLOCK_DIFFERENCE: Final = 300.0

#: Seconds that a token may live at most.
_LONGEST: Final = 86_400

#: Seconds. No clock of ours is as far from its epoch.
_FAR: Final = 1e11

_NUMBER: Final = (int, float)
_TOKEN: Final[dict[str, Any]] = {
    "access_token": str,
    "scope": str,
    "wall": _NUMBER,
    "boot": _NUMBER,
    "boot_id": str,
    "lifetime": int,
    "left": _NUMBER,
}

#: What is remembered for others: who refused will refuse again.
_REFUSALS: Final = (
    errors.GrantRefused,
    errors.ExchangeRefused,
    errors.ClockError,
    errors.TryAgainLater,
)


class Refusal(NamedTuple):
    """*error* stands until *until* (epoch seconds)."""

    error: HsmTollError
    until: float


class Record(NamedTuple):
    """What lies under a key."""

    token: AccessToken | None = None
    refusal: Refusal | None = None


def written(
    key: str, token: AccessToken | None, refusal: Refusal | None, *, now: ClockReading
) -> tuple[bytes, float]:
    """A record as it lies under *key*, and the seconds for which a store has to keep it."""
    record: dict[str, Any] = {"version": VERSION, "key": key}
    left = 0.0
    if token is not None:
        left = token.remaining(now)
        record["token"] = {
            "access_token": token.value,
            "scope": token.scope,
            "wall": token.asked.wall,
            "boot": token.asked.boot,
            "boot_id": token.asked.boot_id,
            "lifetime": token.lifetime,
            "left": left,
        }
    stands = 0.0
    if refusal is not None:
        stands = refusal.until - now.wall
        record["refusal"] = {"until": refusal.until, **errors.to_data(refusal.error)}
    record["ttl"] = ttl = max(left, stands)
    return json.dumps(record).encode(), ttl


def read(key: str, kept: StoredValue | None, *, now: ClockReading, longest: float) -> Record:
    """What lies under *key*. *longest*: seconds that a refusal may stand, whatever a clock did."""
    try:
        # NaN is younger than every age: no number of ours.
        record = read_strict(kept.value) if kept else None
    except ValueError:
        return Record()
    if not isinstance(record, dict) or kept is None:
        return Record()
    if (record.get("version"), record.get("key")) != (VERSION, key):
        return Record()
    # Seconds that it has lain there, by the store's clock, where that counts.
    ttl: Any = record.get("ttl")
    stored_seconds = ttl - kept.left if kept.left is not None and _is_number(ttl) else None
    token = _token(record.get("token"), now=now, stored_seconds=stored_seconds)
    return Record(token, _refusal(record.get("refusal"), now=now, longest=longest))


def _token(value: object, *, now: ClockReading, stored_seconds: float | None) -> AccessToken | None:
    """
    The token, or ``None`` if there is none or it cannot be read.

    *stored_seconds*: time in the store, as counted by the store. Another machine may have written
    the token, and its boot clock means nothing here: then the store gives the token's age, unless
    the two wall clocks contradict it.
    """
    if not isinstance(value, dict):
        return None
    for name, kind in _TOKEN.items():
        found = value.get(name)
        if not isinstance(found, kind) or (kind is not str and not _is_number(found)):
            return None
    lifetime = value["lifetime"]
    if not 0 < lifetime <= _LONGEST:
        return None
    asked = ClockReading(value["wall"], value["boot"], value["boot_id"])
    if stored_seconds is not None and asked.boot_id != now.boot_id:
        if not -_MAX_CLOCK_DIFFERENCE <= now.wall - asked.wall <= lifetime + _MAX_CLOCK_DIFFERENCE:
            return None
        # Whoever can write to the store can prolong what it says; the wall clocks bound it.
        age = max(
            0.0,
            lifetime - value["left"] + stored_seconds,
            now.wall - asked.wall - _MAX_CLOCK_DIFFERENCE,
        )
        asked = ClockReading(now.wall - age, now.boot - age, now.boot_id)
    return AccessToken(value["access_token"], value["scope"], asked, lifetime)


def _refusal(value: object, *, now: ClockReading, longest: float) -> Refusal | None:
    """The refusal if it still stands; its hint says how long."""
    if not isinstance(value, dict):
        return None
    until: Any = value.get("until")
    if not _is_number(until) or not 0 < until - now.wall <= longest:
        return None
    wait = until - now.wall
    hint = f"this answer is remembered: Maskinporten will be asked again in {wait:.0f} s"
    if isinstance(value.get("hint"), str):
        hint = f"{value['hint']}\n{hint}"
    said = {**value, "hint": hint, "signed": False, "retryable": False, "retry_after": wait}
    error = errors.from_data(said)
    return Refusal(error, until) if isinstance(error, _REFUSALS) else None


def copy_exception(exc: BaseException) -> BaseException:
    """The same error for another caller: a traceback belongs to one raise."""
    try:
        same = copy.copy(exc)
    except Exception:  # noqa: BLE001 - somebody's own, and not every one can be copied
        return exc
    # What one caller adds is not the others'.
    same.__dict__.update({"__notes__": [*exc.__notes__]} if hasattr(exc, "__notes__") else {})
    return same if isinstance(exc, errors.HsmTollError) else same.with_traceback(exc.__traceback__)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FAR
