"""What a signing host replies, and what its client makes of it, are one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hsmtoll import errors
from hsmtoll.signing.replies import REPLIES, read, reply_to

if TYPE_CHECKING:
    from hsmtoll.errors import HsmTollError


def test_each_word_stands_once_and_is_read_as_its_own_row() -> None:
    assert len({each.word for each in REPLIES}) == len(REPLIES)
    for each in REPLIES:
        assert read(each.status, each.word) is each


@pytest.mark.parametrize(
    ("exc", "status", "word"),
    [
        (errors.PolicyDenied("no", code="policy"), 403, "policy_denied"),
        (errors.PolicyDenied("no", code="stopped"), 403, "stopped"),
        (errors.TryAgainLater("no", code="quota"), 429, "quota_exceeded"),
        (errors.TryAgainLater("no", code="busy"), 503, "busy"),
        (errors.TryAgainLater("no", code="throttled"), 503, "busy"),
        (errors.AuditBroken("no"), 503, "audit_broken"),
        (errors.ClockError("no"), 503, "clock"),
        (errors.ScopeNotGranted("no"), 502, "grant_refused"),
        (errors.ExchangeRefused("no"), 502, "exchange_refused"),
        (errors.NetworkError("no"), 503, "network"),
        (errors.DeviceError("no"), 503, "device_down"),
        (errors.PinIncorrect("no"), 503, "device_down"),
        (errors.CertificateError("no"), 503, "device_down"),
        (errors.ConfigurationError("no"), 503, "device_down"),
    ],
)
def test_an_error_of_the_host_gets_its_reply(exc: HsmTollError, status: int, word: str) -> None:
    reply = reply_to(exc)
    assert (reply.status, reply.word) == (status, word)


def test_what_was_refused_before_the_device_spends_nothing_and_what_came_after_does() -> None:
    spent = {each.word for each in REPLIES if each.signed}
    assert spent == {"grant_refused", "exchange_refused", "network"}


@pytest.mark.parametrize("word", ["a_word_of_tomorrow", None, ["busy"], {}, 1])
def test_a_word_that_is_not_known_is_read_by_its_status(word: object) -> None:
    kinds = {status: read(status, word) for status in (204, 302, 400, 418, 429, 500, 503, 599)}
    assert [each.error.exit_code for each in kinds.values()] == [80, 80, 90, 90, 75, 80, 75, 80]
    # Turned away, nothing was signed; what else happened nobody knows.
    assert [status for status, each in kinds.items() if each.signed] == [204, 302, 500, 599]
