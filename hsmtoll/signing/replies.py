"""
Error responses of a signing host: HTTP status and error code ↔ HsmTollError. Data.

The host looks up the response to an error of its own, the client the error for a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hsmtoll.errors import (
    AuditBroken,
    ClockError,
    DeviceError,
    ExchangeRefused,
    GrantRefused,
    HsmTollError,
    NetworkError,
    PolicyDenied,
    TryAgainLater,
)

if TYPE_CHECKING:
    from hsmtoll.errors import Scope

__all__ = ["REPLIES", "Reply", "read", "reply_to"]


@dataclass(frozen=True, slots=True)
class Reply:
    """
    The *status* and *word* (the member ``error``) of a response, and the client's *error* for it,
    with its *code* and attributes. *only*: the row is only for the host's errors with this code;
    None: for all of the class *error* that have no row of their own.
    """

    status: int
    word: str
    error: type[HsmTollError]
    code: str
    retryable: bool = False
    signed: bool = False
    scope: Scope | None = None
    only: str | None = None

    @property
    def waits(self) -> bool:
        """Whether Retry-After applies to it."""
        later = TryAgainLater | DeviceError | AuditBroken | ClockError | NetworkError
        return issubclass(self.error, later)


#: The host's response is the first row that matches.
REPLIES: Final = (
    Reply(403, "stopped", PolicyDenied, "stopped", only="stopped"),
    Reply(403, "policy_denied", PolicyDenied, "policy-denied"),
    Reply(400, "bad_request", PolicyDenied, "bad-request"),
    Reply(413, "too_large", PolicyDenied, "bad-request"),
    Reply(415, "unsupported_media_type", PolicyDenied, "bad-request"),
    Reply(429, "quota_exceeded", TryAgainLater, "quota-exceeded", only="quota"),
    Reply(503, "busy", TryAgainLater, "busy", retryable=True, scope="attempt"),
    Reply(503, "audit_broken", AuditBroken, "audit-broken"),
    Reply(503, "clock", ClockError, "host-clock"),
    Reply(502, "grant_refused", GrantRefused, "grant-refused", signed=True),
    Reply(502, "exchange_refused", ExchangeRefused, "exchange-refused", signed=True),
    Reply(503, "network", NetworkError, "host-network", retryable=True, signed=True),
    Reply(404, "not_found", NetworkError, "host-version"),
    # Errors of the device, its PIN or its certificates, and wrong settings for them.
    Reply(503, "device_down", DeviceError, "device-down", retryable=True),
)
_BY_WORD: Final = {each.word: each for each in REPLIES}


def reply_to(exc: HsmTollError) -> Reply:
    """The host's response to *exc*; ``device_down`` if no other row matches."""
    fitting = (
        each for each in REPLIES if isinstance(exc, each.error) and each.only in (None, exc.code)
    )
    return next(fitting, _BY_WORD["device_down"])


def read(status: int, word: object) -> Reply:
    """
    The row for *status* and *word*. For an unknown word, which a newer host may send, the status
    decides: a signature counts as made, unless the status means that the request was refused.
    """
    known = _BY_WORD.get(word) if isinstance(word, str) else None
    if known is not None:
        return known
    if status in (429, 503):
        return _BY_WORD["quota_exceeded" if status == 429 else "busy"]
    if 400 <= status < 500:
        return _BY_WORD["policy_denied"]
    if status >= 500:
        return Reply(status, "", NetworkError, "host-error", retryable=True, signed=True)
    return Reply(status, "", NetworkError, "redirect", signed=True)
