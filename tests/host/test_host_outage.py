"""A signing host whose device is away for a while: it signs again by itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.signing_host import Reply, RunningHost

#: Seconds; far more than the longest pause before the next try.
PATIENCE = 120.0


def until(host: RunningHost, wanted: int) -> Reply:
    """The first reply with that status."""
    end = time.monotonic() + PATIENCE
    while (reply := host.ask()).status != wanted:
        assert time.monotonic() < end, reply
        time.sleep(0.3)
    return reply


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_login_that_is_answered_vaguely_during_an_outage_does_not_lock_the_pin_out(
    make_host: Callable[..., RunningHost], isolation: str
) -> None:
    host = make_host()
    host.start(HSMTOLL_HSM__ISOLATION=isolation)
    assert host.ask().status == 200
    for function in ("C_Login", "C_Sign"):
        host.faults.set("session-lost")
        host.faults.set("call-fails", function=function, rv=0x30)
        until(host, 503)
        host.faults.clear()
        until(host, 200)


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_login_that_the_device_ended_is_made_anew_for_the_caller(
    make_host: Callable[..., RunningHost], isolation: str
) -> None:
    host = make_host()
    host.start(HSMTOLL_HSM__ISOLATION=isolation)
    host.faults.set("login-ended", n=2)
    assert [host.ask().status for _ in range(6)] == [200] * 6
