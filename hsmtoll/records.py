"""
What lies in a store, as bytes: an issued token, or a refusal that is remembered.

Every record names its version and its key. What is torn, foreign, of another version or of
another key reads as nothing, so that an older program never misreads a newer one.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Final

from hsmtoll import errors
from hsmtoll.tokens import AccessToken, Moment

if TYPE_CHECKING:
    from hsmtoll.errors import HsmTollError

__all__ = ["VERSION", "again", "read_refusal", "read_token", "refusal", "token"]

#: The form of a record. A reader that does not know it treats it as a miss.
VERSION: Final = 1

#: Seconds that the wall clocks of two machines may differ, where the store counts the time.
_APART: Final = 300.0

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
}
_REFUSAL: Final[dict[str, Any]] = {"class": str, "message": str, "until": _NUMBER}
_REMEMBERED: Final = (
    "GrantRefused", "ScopeNotGranted", "ExchangeRefused", "ClockError", "TryAgainLater",
)  # fmt: skip


def token(key: str, held: AccessToken) -> bytes:
    """*held* as it lies under *key*."""
    return _written(
        key,
        access_token=held.value,
        scope=held.scope,
        wall=held.asked.wall,
        boot=held.asked.boot,
        boot_id=held.asked.boot_id,
        lifetime=held.lifetime,
    )


def read_token(key: str, raw: bytes, *, now: Moment, left: float | None) -> AccessToken | None:
    """
    The token under *key*, or ``None`` if there is none to be read.

    *left*: seconds that the store itself still gives it, where the store counts time. The
    token may be another machine's then, whose clocks mean nothing here: its age is what the
    store says, as far as the two wall clocks do not contradict it outright.
    """
    value = _read(key, raw, _TOKEN)
    if value is None:
        return None
    lifetime = value["lifetime"]
    if not 0 < lifetime <= _LONGEST:
        return None
    asked = Moment(value["wall"], value["boot"], value["boot_id"])
    if left is not None and asked.boot_id != now.boot_id:
        if not -_APART <= now.wall - asked.wall <= lifetime + _APART:
            return None
        # Whoever can write to the store can prolong what it says; the wall clocks bound it.
        age = max(0.0, lifetime - left, now.wall - asked.wall - _APART)
        asked = Moment(now.wall - age, now.boot - age, now.boot_id)
    return AccessToken(value["access_token"], value["scope"], asked, lifetime)


def refusal(key: str, exc: HsmTollError, *, until: float) -> bytes:
    """*exc* as it lies under *key*, good *until* (seconds since the epoch)."""
    return _written(key, **errors.to_data(exc), until=until)


def read_refusal(key: str, raw: bytes, *, now: Moment, longest: float) -> HsmTollError | None:
    """The refusal under *key* if it still stands; *longest* seconds bound what a clock did."""
    value = _read(key, raw, _REFUSAL)
    if value is None or not 0 < value["until"] - now.wall <= longest:
        return None
    if value["class"] not in _REMEMBERED:
        return None
    wait = value["until"] - now.wall
    hint = f"this answer is remembered: Maskinporten will be asked again in {wait:.0f} s"
    if isinstance(value.get("hint"), str):
        hint = f"{value['hint']}\n{hint}"
    said = value | {"hint": hint, "signed": False, "retryable": False, "retry_after": wait}
    return errors.from_data(said)


def again(exc: BaseException) -> BaseException:
    """The same error for another caller: a traceback belongs to one raise."""
    try:
        same = copy.copy(exc)
    except Exception:  # noqa: BLE001 - somebody's own, and not every one can be copied
        return exc
    # What one caller adds is not the others'.
    same.__dict__.update({"__notes__": [*exc.__notes__]} if hasattr(exc, "__notes__") else {})
    return same if isinstance(exc, errors.HsmTollError) else same.with_traceback(exc.__traceback__)


def _written(key: str, **values: Any) -> bytes:
    return json.dumps({"version": VERSION, "key": key, **values}).encode()


def _read(key: str, raw: bytes, shape: dict[str, Any]) -> dict[str, Any] | None:
    try:
        # NaN is younger than every age: no number of ours.
        value = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or (value.get("version"), value.get("key")) != (VERSION, key):
        return None
    for name, kind in shape.items():
        if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
            return None
        if isinstance(value[name], int | float) and not abs(value[name]) < _FAR:
            return None
    return value


def _no_number(name: str) -> float:
    raise ValueError(name)
