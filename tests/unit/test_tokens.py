"""When a token is fresh, stale, expired; what a wish asks of it; and that it hides its value."""

from __future__ import annotations

import pickle

import pytest

from hsmtoll.token import (
    NO_REQUIREMENTS,
    AccessToken,
    ClockReading,
    Freshness,
    TokenRequest,
    TokenRequirements,
)

ASKED = ClockReading(1_800_000_000.0, 1000.0, "boot-1")


def token(lifetime: int = 600, asked: ClockReading = ASKED) -> AccessToken:
    return AccessToken("the-secret-value", "toll:eu/movement/road/v2", asked, lifetime)


def later(wall: float, boot: float | None = None, boot_id: str = "boot-1") -> ClockReading:
    return ClockReading(ASKED.wall + wall, ASKED.boot + (wall if boot is None else boot), boot_id)


@pytest.mark.parametrize(
    ("lifetime", "seconds", "freshness"),
    [
        (600, 0, Freshness.FRESH),
        (600, 539, Freshness.FRESH),
        (600, 540, Freshness.STALE),
        (600, 599.9, Freshness.STALE),
        (600, 600, Freshness.EXPIRED),
        (120, 59, Freshness.FRESH),
        (120, 60, Freshness.STALE),
        (120, 120, Freshness.EXPIRED),
        (20, 9, Freshness.FRESH),
        (20, 10, Freshness.STALE),
        (1, 0.4, Freshness.FRESH),
        (1, 1, Freshness.EXPIRED),
    ],
)
def test_the_margin_is_a_minute_or_half_the_life(
    lifetime: int, seconds: float, freshness: Freshness
) -> None:
    assert token(lifetime).freshness(later(seconds)) is freshness


@pytest.mark.parametrize(
    ("case", "now", "left"),
    [
        ("both clocks went on", later(100), 500),
        ("the machine slept: both saw it", later(700), -100),
        ("the wall clock was set back an hour", later(-3600, 100), 500),
        ("the wall clock was set back to hide the end", later(10, 700), -100),
        ("the wall clock was set forward", later(5000, 100), -4400),
        ("after another start the wall clock is left", later(100, -900, "boot-2"), 500),
        ("and if it went back meanwhile it proves nothing", later(-1, -900, "boot-2"), 0),
    ],
)
def test_both_clocks_must_agree_that_a_token_lives(
    case: str, now: ClockReading, left: float
) -> None:
    assert token().remaining(now) == pytest.approx(left), case


@pytest.mark.parametrize(
    ("requirements", "met"),
    [
        (NO_REQUIREMENTS, True),
        (TokenRequirements(min_life=500), True),
        (TokenRequirements(min_life=501), False),
        (TokenRequirements(avoid="the-secret-value"), False),
        (TokenRequirements(avoid="another"), True),
        (TokenRequirements(since=ASKED), True),
        (TokenRequirements(since=later(1)), False),
    ],
)
def test_a_token_meets_requirements_or_does_not(requirements: TokenRequirements, met: bool) -> None:
    assert requirements.satisfied_by(token(), later(100)) is met


def test_no_wish_is_met_by_an_expired_token() -> None:
    assert not NO_REQUIREMENTS.satisfied_by(token(), later(600))


def test_the_value_is_shown_nowhere() -> None:
    held = token()
    shown = f"{held} {held!r} {[held]} {held.expires_at}"
    assert "secret" not in shown
    assert "toll:eu/movement/road/v2" in shown
    assert held.expires_at.tzinfo is not None


def test_requests_are_values() -> None:
    assert TokenRequest("s", ("a",)) == TokenRequest("s", ("a",))
    assert len({TokenRequest("s"), TokenRequest("s"), TokenRequest("s", consumer_org="1")}) == 2
    assert pickle.loads(pickle.dumps(ASKED)) == ASKED  # noqa: S301 - ours
