"""Pauses after failures: each twice the one before, up to a limit, however long it goes on."""

from __future__ import annotations

import pytest

from hsmtoll.backoff import Backoff, delay, jitter


def pauses(backoff: Backoff, failures: int) -> list[float]:
    """How long each of so many failures is waited for."""
    found = []
    for _ in range(failures):
        now = 100.0 + backoff.until
        backoff.failed(now)
        found.append(backoff.until - now)
    return found


def test_each_pause_is_twice_the_one_before_up_to_the_longest() -> None:
    assert pauses(Backoff(1.0, 10.0), 6) == [1, 2, 4, 8, 10, 10]
    assert pauses(Backoff(5.0, 60.0), 6) == [5, 10, 20, 40, 60, 60]
    assert pauses(Backoff(5.0, 5.0), 3) == [5, 5, 5]


def test_what_worked_is_waited_for_no_more_and_begins_anew() -> None:
    backoff = Backoff(1.0, 10.0)
    pauses(backoff, 4)
    assert backoff.until > 0
    backoff.worked()
    assert (backoff.failures, backoff.until) == (0, 0)
    assert pauses(backoff, 2) == [1, 2]


def test_what_a_server_asks_for_is_waited_for_where_it_is_longer() -> None:
    backoff = Backoff(1.0, 10.0)
    backoff.failed(50.0, at_least=30.0)
    assert backoff.until == 80
    backoff.failed(80.0, at_least=1.0)
    assert backoff.until == 82


def test_a_factor_is_of_the_pause_and_not_of_what_was_asked_for() -> None:
    backoff = Backoff(10.0, 10.0)
    backoff.failed(0.0, factor=1.2)
    assert backoff.until == 12
    backoff.failed(0.0, factor=1.2, at_least=30.0)
    assert backoff.until == 30


@pytest.mark.parametrize("failures", [1_023, 1_024, 1_025, 1_000_000])
def test_failures_may_go_on_for_days(failures: int) -> None:
    assert delay(failures, first=0.5, longest=60.0) == 60
    backoff = Backoff(1.0, 10.0, failures=failures)
    backoff.failed(0.0)
    assert backoff.until == 10


def test_jitter_spreads_between_its_ends() -> None:
    drawn = {jitter(0.8, 1.2) for _ in range(1_000)}
    assert len(drawn) > 900
    assert 0.8 <= min(drawn) <= max(drawn) <= 1.2
