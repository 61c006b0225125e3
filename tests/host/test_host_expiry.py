"""What ends soon is in the host's log once a day: certificates and registered keys."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from hsmtoll.settings import load
from hsmtoll.testing.clock import SettableClock
from tests.kit.signing_host import ME, PROFILE, RunningService, entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kit.signing_host import RunningHost

_DAY = 86_400.0
_REGISTERED = PROFILE.replace("eseal", "norwegian") + 'iss = "client"\nkid = "k-1"\n'


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock.at_real_time()


@pytest.fixture
def one(host: RunningHost, clock: SettableClock) -> Iterator[RunningService]:
    """A host without its sockets; its TLS certificates end two days from now."""
    host.say("\n".join([_REGISTERED, entry(ME)]))
    service = RunningService(load(), clock=clock)
    yield service
    service.close()


def logged(caplog: pytest.LogCaptureFixture, one: RunningService) -> list[str]:
    """The events of the notices that are due now."""
    caplog.clear()
    caplog.set_level(logging.WARNING, "hsmtoll.host")
    one.parts.expiry_log.log_due()
    return [getattr(each, "event", "") for each in caplog.records]


def test_each_notice_comes_once_a_day(
    one: RunningService, clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    both = ["tls-certificate-ends-soon", "tls-client-ca-ends-soon"]
    assert logged(caplog, one) == both
    assert "HSMTOLL_HOST__CERT: expires on " in caplog.text
    assert logged(caplog, one) == []
    clock.advance(_DAY - 1)
    assert logged(caplog, one) == []
    clock.advance(600)
    assert logged(caplog, one) == both
    # Also after its end.
    clock.advance(2 * _DAY)
    assert logged(caplog, one) == both
    assert "HSMTOLL_HOST__CERT: expired on " in caplog.text


@pytest.mark.parametrize(("days", "notices"), [(60.01, 0), (59.99, 1)])
def test_a_certificate_of_a_profile_is_told_60_days_before_its_end(
    one: RunningService,
    clock: SettableClock,
    caplog: pytest.LogCaptureFixture,
    days: float,
    notices: int,
) -> None:
    now = datetime.fromtimestamp(clock.now().wall, UTC)
    one.profile().not_after = now + timedelta(days=days)
    assert logged(caplog, one).count("certificate-ends-soon") == notices
    named = [getattr(each, "profile", None) for each in caplog.records]
    assert named.count("acme") == notices


@pytest.mark.parametrize(("days", "notices"), [(60.5, 0), (59.5, 2)])
def test_certificates_of_tls_are_told_60_days_before_their_end(
    one: RunningService,
    clock: SettableClock,
    caplog: pytest.LogCaptureFixture,
    days: float,
    notices: int,
) -> None:
    clock.set_wall(clock.now().wall + (2 - days) * _DAY)
    assert len(logged(caplog, one)) == notices


@pytest.mark.parametrize(("days", "notices"), [(329.99, 0), (330.01, 1), (400, 1)])
def test_a_registered_key_is_told_330_days_after_its_first_use(
    one: RunningService,
    clock: SettableClock,
    caplog: pytest.LogCaptureFixture,
    days: float,
    notices: int,
) -> None:
    one.profile().app.key_uses.used("k-1", clock.now().wall)
    clock.advance(days * _DAY)
    assert logged(caplog, one).count("key-ends-soon") == notices
    assert ("registered key k-1, first used on " in caplog.text) == bool(notices)


def test_a_key_that_was_never_used_is_not_told(
    one: RunningService, clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.advance(400 * _DAY)
    assert "key-ends-soon" not in logged(caplog, one)


def test_two_keys_of_one_profile_are_told_beside_each_other(
    one: RunningService, clock: SettableClock, caplog: pytest.LogCaptureFixture
) -> None:
    for kid in ("k-1", "k-2"):
        one.profile().app.key_uses.used(kid, clock.now().wall)
    clock.advance(340 * _DAY)
    assert logged(caplog, one).count("key-ends-soon") == 2
    # Each once a day, and after the year without days that are left.
    assert logged(caplog, one) == []
    clock.advance(60 * _DAY)
    assert logged(caplog, one).count("key-ends-soon") == 2
    assert " expired on " in caplog.text
    assert "days left" not in caplog.text
