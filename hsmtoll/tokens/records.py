"""
The stored record of one key, as JSON: a token, a cached refusal, or both.

Every record names its version and its key. Corrupt records, and those of another version or key,
are cache misses, so that an older program never misreads a newer record.
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

#: Seconds. Maximum lifetime of a token.
_LONGEST: Final = 86_400

#: Seconds. Larger clock values are invalid.
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

#: Errors that are cached for other processes: the same request would be refused again.
_REFUSALS: Final = (
    errors.GrantRefused,
    errors.ExchangeRefused,
    errors.ClockError,
    errors.TryAgainLater,
)


class Refusal(NamedTuple):
    """A cached *error*, valid until *until* (epoch seconds)."""

    error: HsmTollError
    until: float


class Record(NamedTuple):
    """The content of one stored record."""

    token: AccessToken | None = None
    refusal: Refusal | None = None


def written(
    key: str, token: AccessToken | None, refusal: Refusal | None, *, now: ClockReading
) -> tuple[bytes, float]:
    """A record for *key* as bytes, and the seconds for which the store must keep it."""
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
    """Parse the record of *key*. *longest*: maximum remaining validity of a refusal, in seconds."""
    try:
        # Strictly: NaN would pass every comparison of ages.
        record = read_strict(kept.value) if kept else None
    except ValueError:
        return Record()
    if not isinstance(record, dict) or kept is None:
        return Record()
    if (record.get("version"), record.get("key")) != (VERSION, key):
        return Record()
    # Seconds since it was stored, by the store's clock, if the store counts time.
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
        # Anybody who can write to the store can forge a longer lifetime; the wall clocks limit it.
        age = max(
            0.0,
            lifetime - value["left"] + stored_seconds,
            now.wall - asked.wall - _MAX_CLOCK_DIFFERENCE,
        )
        asked = ClockReading(now.wall - age, now.boot - age, now.boot_id)
    return AccessToken(value["access_token"], value["scope"], asked, lifetime)


def _refusal(value: object, *, now: ClockReading, longest: float) -> Refusal | None:
    """The refusal, if it is still valid; its hint says for how long."""
    if not isinstance(value, dict):
        return None
    until: Any = value.get("until")
    if not _is_number(until) or not 0 < until - now.wall <= longest:
        return None
    wait = until - now.wall
    hint = f"this answer is remembered: Maskinporten will be asked again in {wait:.0f} s"
    if isinstance(value.get("hint"), str):
        hint = f"{value['hint']}\n{hint}"
    data = {**value, "hint": hint, "signed": False, "retryable": False, "retry_after": wait}
    error = errors.from_data(data)
    return Refusal(error, until) if isinstance(error, _REFUSALS) else None


def copy_exception(exc: BaseException) -> BaseException:
    """A copy of the exception for another caller: each raise needs a traceback of its own."""
    try:
        same = copy.copy(exc)
    except Exception:  # noqa: BLE001 - exceptions of other libraries may not be copyable
        return exc
    # Notes that one caller adds must not appear on the other callers' exceptions.
    same.__dict__.update({"__notes__": [*exc.__notes__]} if hasattr(exc, "__notes__") else {})
    return same if isinstance(exc, errors.HsmTollError) else same.with_traceback(exc.__traceback__)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FAR
