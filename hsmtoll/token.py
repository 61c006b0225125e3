"""
Token requests, access tokens, and whether a token is fresh, stale or expired.

Values and arithmetic only. No clock is read here: callers pass the time as a ClockReading.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypedDict

from hsmtoll.errors import UsageError

__all__ = [
    "MARGIN",
    "NO_REQUIREMENTS",
    "AccessToken",
    "ClockReading",
    "Details",
    "ForWhom",
    "Freshness",
    "TokenRequest",
    "TokenRequirements",
    "details_text",
]

#: Seconds before expiry at which a token becomes stale, at most: Customs recommends a minute (C11).
MARGIN: Final = 60.0


class ClockReading(NamedTuple):
    """
    One reading of both clocks.

    *wall* is seconds since the epoch, UTC; it can be set. *boot* is seconds since the
    machine started, suspend included; it cannot. *boot_id* identifies the start of the machine.
    """

    wall: float
    boot: float
    boot_id: str


class Freshness(enum.Enum):
    """The state of a token at a given time."""

    FRESH = "fresh"  # use it
    STALE = "stale"  # use it, while one caller renews it
    EXPIRED = "expired"  # never return it


class TokenRequest(NamedTuple):
    """
    A request to Maskinporten: one scope and the documented options.

    *consumer_org*: organisation number (nine digits) of the organisation on whose behalf the client
    acts. *authorization_details*: JSON text of a list of objects (RFC 9396 section 2), as
    `details_text` writes it, so that equal lists are equal texts; ``""`` means none.
    """

    scope: str
    resource: tuple[str, ...] = ()
    consumer_org: str | None = None
    authorization_details: str = ""

    @property
    def details(self) -> list[dict[str, Any]]:
        """*authorization_details* as objects."""
        listed: list[dict[str, Any]] = json.loads(self.authorization_details or "[]")
        return listed


#: authorization_details as callers give them: one object, or several.
Details = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class ForWhom(TypedDict, total=False):
    """
    Keyword arguments for the organisation and resource that a token is for. *consumer_org* (nine
    digits) and *resource* override the settings; ``""`` and ``()`` mean none.
    *authorization_details* is an object or a list of objects (RFC 9396), such as the system user of
    a customer.
    """

    consumer_org: str | None
    resource: Sequence[str] | str | None
    authorization_details: Details | None


#: The token type of RFC 6750.
BEARER: Final = "Bearer"
#: Characters. One object for a system user has about two hundred.
_LONGEST_DETAILS: Final = 4096


def details_text(given: object) -> str:
    """
    *given* as the text of a TokenRequest: an object or a list of objects, each with a ``type``
    (RFC 9396 section 2). UsageError for anything else.
    """
    listed = [given] if isinstance(given, Mapping) else given
    if not listed and (listed is None or isinstance(listed, list | tuple)):
        return ""
    fits = isinstance(listed, list | tuple) and all(
        isinstance(each, Mapping) and isinstance(each.get("type"), str) for each in listed
    )
    try:
        text = json.dumps(
            listed, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        text.encode()
    except (TypeError, ValueError, RecursionError):
        fits, text = False, ""
    if not fits or len(text) > _LONGEST_DETAILS:
        raise UsageError(
            "authorization_details: a list of JSON objects, each with its type, is expected",
            hint='such as [{"type": "urn:altinn:systemuser", "systemuser_org": {"authority": '
            '"iso6523-actorid-upis", "ID": "0192:987654321"}}]',
            code="authorization-details",
        )
    return text


@dataclass(frozen=True, slots=True, repr=False)
class AccessToken:
    """
    A Customs access token. It can be used for any number of calls until it expires.

    *value*: the bearer token. *scope*: the requested scope. *asked*: the time before the grant was
    sent. *lifetime*: seconds, counted from *asked*, so that network delay cannot make an expired
    token look valid.
    """

    value: str
    scope: str
    asked: ClockReading
    lifetime: int
    token_type: str = BEARER

    def __repr__(self) -> str:
        return f"<AccessToken for {self.scope} until {self.expires_at:%Y-%m-%dT%H:%M:%SZ}>"

    __str__ = __repr__

    @property
    def expires_at(self) -> datetime:
        """Expiry by the wall clock: an aware datetime in UTC."""
        return datetime.fromtimestamp(self.asked.wall + self.lifetime, UTC)

    def remaining(self, now: ClockReading) -> float:
        """
        Seconds left at *now*; zero or less means expired.

        Both clocks give an age, and the larger one counts, so a wall clock that is set back does
        not prolong a token. After a reboot only the wall clock can be compared; if it went back,
        the token counts as expired.
        """
        age = now.wall - self.asked.wall
        if now.boot_id == self.asked.boot_id:
            age = max(age, now.boot - self.asked.boot)
        elif age < 0:
            return 0.0
        return self.lifetime - age

    @property
    def margin(self) -> float:
        """Seconds before expiry at which the token becomes stale: at most half its lifetime."""
        return min(MARGIN, self.lifetime / 2)

    def freshness(self, now: ClockReading) -> Freshness:
        """FRESH, STALE or EXPIRED at *now*."""
        left = self.remaining(now)
        if left <= 0:
            return Freshness.EXPIRED
        return Freshness.STALE if left <= self.margin else Freshness.FRESH


class TokenRequirements(NamedTuple):
    """
    Requirements on a token beyond being unexpired.

    *min_life*: minimum remaining lifetime in seconds. *avoid*: value of a token that an API has
    rejected. *since*: the token must not have been requested earlier than this.
    """

    min_life: float = 0.0
    avoid: str | None = None
    since: ClockReading | None = None

    def satisfied_by(self, token: AccessToken, now: ClockReading) -> bool:
        """Whether *token* meets the requirements at *now*; an expired token never does."""
        left = token.remaining(now)
        return (
            left > 0
            and left >= self.min_life
            and token.value != self.avoid
            and (self.since is None or _as_late(token.asked, self.since))
        )


def _as_late(asked: ClockReading, since: ClockReading) -> bool:
    """Compare by the boot clock, which cannot be set; after a reboot, by the wall clock."""
    if asked.boot_id == since.boot_id:
        return asked.boot >= since.boot
    return asked.wall >= since.wall


#: Any unexpired token.
NO_REQUIREMENTS: Final = TokenRequirements()
