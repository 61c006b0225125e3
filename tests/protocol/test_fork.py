"""What a forked child makes afresh, whether Python's hooks ran at the fork or not."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import DeviceError
from hsmtoll.fork import after_fork, notice_fork
from hsmtoll.hsm.recovery import CircuitBreaker
from hsmtoll.remembered import PersistedText
from hsmtoll.testing.clock import SettableClock
from hsmtoll.token import AccessToken, TokenRequest
from hsmtoll.tokens.cache import Cache
from hsmtoll.tokens.rate_limit import RateLimit
from hsmtoll.tokens.stores import MemoryStore
from hsmtoll.tokens.token_service import Counts
from tests.kit.forks import FORKS, fork_in_c, in_a_fork

if TYPE_CHECKING:
    from collections.abc import Callable

    from hsmtoll.tokens.single_flight import PendingRenewal

REQUEST = TokenRequest("toll:eu/movement/road/v2")

pytestmark = pytest.mark.parametrize("fork", FORKS)


class Owner:
    def __init__(self, called: list[object]) -> None:
        self.called = called
        after_fork(self.afresh)

    def afresh(self) -> None:
        self.called.append(self)


def test_each_child_makes_a_living_owners_state_afresh_once_and_the_parent_never(
    fork: Callable[[], int],
) -> None:
    called: list[object] = []
    owner, gone = Owner(called), Owner(called)
    del gone

    def noticed() -> bool:
        notice_fork()
        notice_fork()
        return called == [owner]

    assert in_a_fork(noticed, fork)
    assert in_a_fork(lambda: noticed() and in_a_fork(lambda: not noticed(), fork), fork)
    notice_fork()
    assert called == []


def test_only_a_fork_of_python_is_noticed_by_itself(fork: Callable[[], int]) -> None:
    """The control: without `notice_fork` the other tests of a fork in C would prove nothing."""
    called: list[object] = []
    owner = Owner(called)
    assert in_a_fork(lambda: called == ([] if fork is fork_in_c else [owner]), fork)


def test_a_renewal_that_was_running_at_the_fork_is_not_waited_for_in_the_child(
    fork: Callable[[], int],
) -> None:
    clock, go, began, parent = SettableClock.at_real_time(), threading.Event(), [], os.getpid()
    started = threading.Event()

    class Renewer:
        def known_identity(self) -> str:
            return "a" * 64

        def renew(self, request: TokenRequest, pending: PendingRenewal) -> AccessToken:
            began.append(pending)
            started.set()
            if os.getpid() == parent:
                go.wait(60)
            return AccessToken("value", request.scope, clock.now(), 900)

    cache = Cache(
        MemoryStore(), clock, selector="settings", remembered=PersistedText(), deadline=60.0
    )
    first = threading.Thread(target=cache.get, args=(REQUEST, Renewer))
    first.start()
    try:
        assert started.wait(60)
        # The thread of the parent holds the store's lock, too.
        assert in_a_fork(lambda: cache.get(REQUEST, Renewer).value == "value", fork)
    finally:
        go.set()
        first.join()
    assert len(began) == 1


def test_counters_that_another_thread_was_updating_at_the_fork_are_free_in_the_child(
    fork: Callable[[], int],
) -> None:
    counts = Counts()

    def counted() -> bool:
        notice_fork()
        return counts.guard.acquire(timeout=0)

    with counts.guard:
        assert in_a_fork(counted, fork)
        # The control: in this process it is still held.
        assert not counts.guard.acquire(timeout=0)


def test_a_count_of_signatures_that_was_being_made_stops_no_child(fork: Callable[[], int]) -> None:
    limit = RateLimit(MemoryStore(), SettableClock(1_800_000_000.0), per_hour=2)

    def counted() -> bool:
        limit.acquire("me")
        return True

    with limit._guard:
        assert in_a_fork(counted, fork)


def test_the_parents_trial_of_a_device_does_not_keep_the_child_from_its_own(
    fork: Callable[[], int],
) -> None:
    now = 0.0
    breaker = CircuitBreaker("lab", boot=lambda: now)
    breaker.failed(DeviceError("signing: DeviceRemoved", code="device-gone"))
    now = 60.0

    def admitted() -> bool:
        breaker.admit()
        return True

    trial = threading.Thread(target=breaker.admit)
    trial.start()
    trial.join()
    with pytest.raises(DeviceError, match="down"):
        breaker.admit()
    with breaker._lock:
        assert in_a_fork(admitted, fork)
