"""The machine's clocks, and what a Date header teaches."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from hsmtoll.clock import MAX_SKEW, Skew, SystemClock, offset_of, retry_after
from hsmtoll.errors import ClockError
from hsmtoll.token import ClockReading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATE = "Tue, 01 Dec 2026 12:00:00 GMT"
AT = 1_796_126_400.0


def moment(wall: float) -> ClockReading:
    return ClockReading(wall, 0.0, "b")


def test_the_system_clock_tells_both_times_and_the_boot() -> None:
    clock = SystemClock()
    first, second = clock.now(), clock.now()
    assert second.boot >= first.boot > 0
    assert first.boot_id == second.boot_id == SystemClock().now().boot_id
    assert len(first.boot_id) == 36


@pytest.mark.parametrize(
    ("headers", "sent", "received", "offset"),
    [
        ({"date": DATE}, AT, AT + 1, 0.0),
        ({"date": DATE}, AT - 45, AT - 45, 45.5),
        ({"date": DATE}, AT + 40, AT + 50, -44.5),
        ({"date": DATE, "age": "3"}, AT, AT, None),
        ({}, AT, AT, None),
        ({"date": "yesterday"}, AT, AT, None),
        ({"date": "Tue, 99 Dec 99999999999 12:00:00 GMT"}, AT, AT, None),
    ],
)
def test_the_offset_is_taken_at_the_midpoint(
    headers: dict[str, str], sent: float, received: float, offset: float | None
) -> None:
    assert offset_of(headers, sent=moment(sent), received=moment(received)) == offset


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("-5", None),
        ("9" * 40, None),
        ("\u0661\u0662", None),
    ],
)
def test_retry_after_is_read_as_seconds_and_as_date(value: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": value}, now=10.0) == seconds


@pytest.fixture
def _east_of_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is not UTC."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "CET-1")
        time.tzset()
        assert time.localtime(AT).tm_hour == 13
        yield
    time.tzset()


@pytest.mark.usefixtures("_east_of_utc")
@pytest.mark.parametrize(
    "date", [DATE, "Tuesday, 01-Dec-26 12:00:00 GMT", "Tue Dec  1 12:00:00 2026"]
)
def test_each_of_the_three_forms_of_a_date_is_utc_wherever_the_machine_stands(date: str) -> None:
    assert offset_of({"date": date}, sent=moment(AT), received=moment(AT)) == 0.5
    assert retry_after({"retry-after": date}, now=AT - 120) == 120


def test_noise_is_not_learned_and_neither_is_what_is_too_far() -> None:
    skew = Skew()
    assert not skew.learn(4.9)
    assert not skew.learn(MAX_SKEW + 1)
    assert skew.seconds == 0
    assert skew.learn(-45)
    assert not skew.learn(-47), "the same again, as far as a header can tell"
    assert skew.learn(0.4)
    assert skew.seconds == 0


def test_what_was_learned_lies_in_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "state" / "skew-1.json"
    Skew(path).learn(-45)
    assert Skew(path).seconds == -45
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 - names alone


@pytest.mark.parametrize("content", ["", "soon", "NaN", "inf", "-3600", "{}", "\x00"])
def test_a_file_that_is_torn_or_foreign_corrects_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "skew"
    path.write_text(content)
    assert Skew(path).seconds == 0


def test_a_directory_that_cannot_be_written_costs_nothing_now(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    skew = Skew(tmp_path / "file" / "skew")
    assert skew.learn(30)
    assert skew.seconds == 30


def test_beyond_the_bound_is_an_error_that_names_the_side() -> None:
    Skew().check(MAX_SKEW)
    with pytest.raises(ClockError, match="3600 s ahead of"):
        Skew().check(-3600)
