"""The record of refused PINs: one try per value, whatever dies in between."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import DeviceError, PinNotTried
from hsmtoll.hsm.pin import Pin
from hsmtoll.hsm.pin_log import PinLog, TokenUser
from tests.kit.accounts import OTHER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.hsm.pin_log import PinRecord

PLACE = TokenUser("Maker", "X1", "0042", "lab")
WRONG = Pin("4711-canary", source="SETTING")
RIGHT = Pin("1234", source="SETTING")


def refuse(pin_log: PinLog, pin: Pin, owner: TokenUser = PLACE) -> None:
    with pin_log.held(owner) as pin_record:
        pin_record.intend(pin, count_low=False)
        pin_record.refuse(pin)


def die(pin_log: PinLog, pin: Pin, *, count_low: bool = False) -> None:
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(pin, count_low=count_low)


def written(state: Path) -> str:
    return "".join(path.read_text() for path in state.rglob("*") if path.is_file())


def test_a_refused_value_is_not_tried_again_and_another_is(tmp_path: Path) -> None:
    refuse(PinLog(tmp_path), WRONG)
    with pytest.raises(PinNotTried) as caught:
        die(PinLog(tmp_path), WRONG)
    assert caught.value.code == "pin-refused"
    assert "hsmtoll pin clear" in (caught.value.hint or "")
    assert "4711-canary" not in f"{caught.value}{caught.value.hint}"
    die(PinLog(tmp_path), RIGHT)


def test_the_same_value_from_another_source_is_refused_too(tmp_path: Path) -> None:
    refuse(PinLog(tmp_path), WRONG)
    with pytest.raises(PinNotTried, match="pin-source was refused before"):
        die(PinLog(tmp_path), Pin("4711-canary", source="pin-source", version="inode 1 mtime 1"))


def test_every_refused_value_is_remembered_not_only_the_last(tmp_path: Path) -> None:
    refuse(PinLog(tmp_path), WRONG)
    refuse(PinLog(tmp_path), Pin("0000", source="SETTING"))
    for value in ("4711-canary", "0000"):
        with pytest.raises(PinNotTried):
            die(PinLog(tmp_path), Pin(value, source="SETTING"))


def test_before_a_refusal_nothing_derived_from_the_pin_is_on_disk(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    die(pin_log, WRONG)
    one = written(tmp_path)
    assert json.loads(one)["intents"] == ["SETTING"]
    assert not {"salt", "refused"} & set(json.loads(one))
    # the same record whatever the PIN is: it cannot be derived from it
    other = PinLog(tmp_path / "other")
    die(other, Pin("something else", source="SETTING"))
    assert written(tmp_path / "other") == one


def test_a_refusal_is_salted(tmp_path: Path) -> None:
    refuse(PinLog(tmp_path / "a"), WRONG)
    refuse(PinLog(tmp_path / "b"), WRONG)
    a, b = (json.loads(written(tmp_path / name)) for name in "ab")
    assert a["refused"] != b["refused"]
    assert "4711-canary" not in written(tmp_path)


def test_acceptance_leaves_nothing_but_a_salted_hash_of_what_was_accepted(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    refuse(pin_log, WRONG)
    assert pin_log.refusals(PLACE) == (1, 0)
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(RIGHT, count_low=True)
        pin_record.accept(RIGHT)
    assert pin_log.refusals(PLACE) == (0, 0)
    record = json.loads(written(tmp_path))
    assert {"accepted", "salt"} <= set(record)
    assert not {"refused", "intents", "doubts"} & set(record)
    assert "1234" not in record["accepted"]
    # And nothing at all of a PIN that has no value here.
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(Pin(None, source="PINPAD"), count_low=False)
        pin_record.accept(Pin(None, source="PINPAD"))
    assert "accepted" not in written(tmp_path)


class Hours:
    """A clock, in seconds, that stands still until it is moved."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def hours() -> Hours:
    return Hours()


def mark_unknown(
    pin_log: PinLog, pin: Pin, *, count_low: bool = False, flags: bool = False
) -> None:
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(pin, count_low=count_low, keeps_flags=flags)
        pin_record.mark_unknown(pin)


def accept(pin_log: PinLog, pin: Pin) -> None:
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(pin, count_low=False)
        pin_record.accept(pin)


def test_a_pin_that_was_accepted_before_outlives_any_number_of_outages(
    tmp_path: Path, hours: Hours
) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    accept(pin_log, RIGHT)
    waited = []
    for _ in range(12):
        mark_unknown(pin_log, RIGHT)
        with pytest.raises(DeviceError) as caught:
            mark_unknown(pin_log, RIGHT)
        assert caught.value.code == "device-down"
        waited.append(caught.value.retry_after)
        hours.at += caught.value.retry_after or 0
    assert waited == [1, 2, 4, 8, 16, 32, 64, 120, 120, 120, 120, 120]
    accept(pin_log, RIGHT)
    assert pin_log.refusals(PLACE) == (0, 0)


def test_another_pin_than_the_accepted_one_has_one_try_an_hour_where_no_flags_are_kept(
    tmp_path: Path, hours: Hours
) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    accept(pin_log, RIGHT)
    other = Pin("4321", source="SETTING")
    mark_unknown(pin_log, other)
    for minutes in (0, 1, 58):
        hours.at += 60 * minutes
        with pytest.raises(PinNotTried, match="one try an hour") as caught:
            mark_unknown(pin_log, other)
        assert caught.value.code == "pin-unresolved"
    hours.at += 61
    mark_unknown(pin_log, other)


def test_where_flags_are_kept_they_say_whether_a_try_was_spent(
    tmp_path: Path, hours: Hours
) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    for _ in range(5):
        mark_unknown(pin_log, RIGHT, flags=True)
        hours.at += 120
    with pytest.raises(PinNotTried) as caught:
        mark_unknown(pin_log, RIGHT, flags=True, count_low=True)
    assert caught.value.code == "pin-unresolved"


def test_a_device_that_showed_a_flag_once_is_known_to_keep_them(
    tmp_path: Path, hours: Hours
) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(Pin("1234", source="SETTING", typed=True), count_low=True)
        pin_record.accept(RIGHT)
    other = Pin("4321", source="SETTING")
    mark_unknown(pin_log, other)
    hours.at += 2
    mark_unknown(pin_log, other)


def test_an_accepted_pin_that_the_device_counts_as_wrong_is_not_tried_again(
    tmp_path: Path, hours: Hours
) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    accept(pin_log, RIGHT)
    mark_unknown(pin_log, RIGHT)
    hours.at += 3600
    with pytest.raises(PinNotTried):
        mark_unknown(pin_log, RIGHT, count_low=True)


def test_an_accepted_pin_that_is_refused_is_accepted_no_more(tmp_path: Path, hours: Hours) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    accept(pin_log, RIGHT)
    refuse(pin_log, RIGHT)
    assert "accepted" not in json.loads(written(tmp_path))
    with pytest.raises(PinNotTried):
        mark_unknown(pin_log, RIGHT)


def test_a_clock_that_was_set_back_does_not_lock_a_pin_out(tmp_path: Path, hours: Hours) -> None:
    pin_log = PinLog(tmp_path, now=hours)
    mark_unknown(pin_log, RIGHT)
    hours.at -= 86_400
    mark_unknown(pin_log, RIGHT)


def test_a_count_that_is_low_and_not_by_us_is_for_a_person_to_judge(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    with pytest.raises(PinNotTried) as caught:
        die(pin_log, RIGHT, count_low=True)
    assert caught.value.code == "pin-count-low"
    # Typed just now, vouched for, or accepted here before: that is known, or a person's risk.
    die(pin_log, Pin("1234", source="PROMPT", typed=True), count_low=True)
    PinLog(tmp_path).clear(PLACE)
    die(pin_log, RIGHT, count_low=True)
    other = PinLog(tmp_path / "other")
    accept(other, RIGHT)
    die(other, RIGHT, count_low=True)


def test_a_pin_that_was_not_looked_at_leaves_everything_as_it_was(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    for _ in range(5):
        with pin_log.held(PLACE) as pin_record:
            pin_record.intend(RIGHT, count_low=False)
            pin_record.withdraw()
    refuse(pin_log, WRONG)
    before = written(tmp_path)
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(RIGHT, count_low=False)
        pin_record.withdraw()
    assert written(tmp_path) == before


def test_an_unknown_result_allows_one_more_try_and_then_none(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    die(pin_log, RIGHT)
    die(pin_log, RIGHT)
    with pytest.raises(PinNotTried) as caught:
        die(pin_log, RIGHT)
    assert caught.value.code == "pin-unresolved"
    assert caught.value.exit_code == 21


def test_an_unknown_result_allows_none_where_the_device_says_count_low(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    die(pin_log, RIGHT)
    with pytest.raises(PinNotTried, match="is unknown"):
        die(pin_log, RIGHT, count_low=True)
    die(pin_log, RIGHT)  # the control: without the flag there is one more


def test_a_changed_file_is_tried_but_a_third_unknown_result_is_the_last(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    for time in (1, 1, 2):
        die(pin_log, Pin("1234", source="FILE", version=f"inode 1 mtime {time}"))
    with pytest.raises(PinNotTried):
        die(pin_log, Pin("1234", source="FILE", version="inode 1 mtime 3"))


def test_a_corrected_setting_works_after_a_crash_and_a_refusal(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    die(pin_log, WRONG)
    refuse(pin_log, WRONG)
    die(pin_log, RIGHT, count_low=True)


def test_a_pinpad_refusal_counts_for_whatever_is_typed_next(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    refuse(pin_log, Pin(None, source="PINPAD"))
    with pytest.raises(PinNotTried):
        die(pin_log, Pin(None, source="PINPAD"))
    pin_log.clear(PLACE)
    die(pin_log, Pin(None, source="PINPAD"))


def test_devices_and_users_are_told_apart_and_clear_forgets_only_what_is_named(
    tmp_path: Path,
) -> None:
    pin_log = PinLog(tmp_path)
    others = [
        TokenUser("Maker", "X1", "0043", "lab"),
        TokenUser("Maker", "X1", "0042", "lab", "signing"),
        TokenUser("Maker", "X10", "042", "lab"),
    ]
    refuse(pin_log, WRONG)
    for owner in others:
        assert pin_log.refusals(owner) == (0, 0)
        refuse(pin_log, WRONG, owner)
    assert pin_log.clear(PLACE) == 1
    assert pin_log.clear(PLACE) == 0
    die(pin_log, WRONG)
    assert pin_log.refusals(others[0]) == (1, 0)
    assert pin_log.clear(PLACE) == 1  # a try whose fate is not known


def test_clear_counts_no_device_whose_pin_was_accepted_and_none_refused(tmp_path: Path) -> None:
    pin_log = PinLog(tmp_path)
    accept(pin_log, RIGHT)
    assert pin_log.clear(PLACE) == 0
    refuse(pin_log, WRONG)
    assert pin_log.clear(PLACE) == 1


def test_files_are_0600_in_a_directory_of_0700(tmp_path: Path) -> None:
    os.umask(before := os.umask(0))
    os.umask(0)
    try:
        refuse(PinLog(tmp_path), WRONG)
    finally:
        os.umask(before)
    assert (tmp_path / "pin").stat().st_mode & 0o777 == 0o700
    files = [path for path in (tmp_path / "pin").iterdir() if path.is_file()]
    assert files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_without_a_place_to_write_no_pin_is_tried_outside_the_sandbox(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for directory in (None, blocked):
        with pytest.raises(PinNotTried) as caught, PinLog(directory).held(PLACE):
            pass
        assert "HSMTOLL_STATE" in (caught.value.hint or "")
        assert caught.value.code == "ledger"
        with PinLog(directory, optional=True).held(PLACE) as pin_record:
            pin_record.intend(RIGHT, count_low=False)
            pin_record.accept(RIGHT)


@pytest.mark.parametrize(
    ("mode", "words"), [(0o770, "change"), (0o707, "change"), (0o755, "read"), (0o750, "read")]
)
def test_a_directory_that_others_can_enter_is_not_trusted(
    tmp_path: Path, mode: int, words: str
) -> None:
    (tmp_path / "pin").mkdir(mode=0o700)
    die(PinLog(tmp_path), RIGHT)
    (tmp_path / "pin").chmod(mode)
    with pytest.raises(PinNotTried, match=f"others can {words}"):
        die(PinLog(tmp_path), RIGHT)


@pytest.mark.needs_root
def test_the_directory_of_another_account_is_left_to_that_account(tmp_path: Path) -> None:
    die(PinLog(tmp_path), RIGHT)
    for each in (tmp_path, tmp_path / "pin"):
        os.chown(each, OTHER, OTHER)
    with pytest.raises(PinNotTried, match="belongs to another account") as caught:
        die(PinLog(tmp_path), RIGHT)
    # One of its own would not know which PINs were refused.
    assert caught.value.hint == f"run this as the account that owns the directory (uid {OTHER})"


def test_a_record_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    refuse(PinLog(tmp_path), WRONG)
    (record,) = [path for path in (tmp_path / "pin").iterdir() if path.suffix != ".lock"]
    record.write_text("{")
    with pytest.raises(PinNotTried):
        die(PinLog(tmp_path), RIGHT)


@pytest.mark.parametrize(
    "odd",
    [
        "[]", "5", "null", '"refused"', '{"refused": 5}', '{"refused": [5]}', '{"salt": "zz"}',
        '{"intents": [[]]}', '{"doubts": [5]}', '{"accepted": []}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_record_of_an_odd_shape_may_have_held_a_refusal(tmp_path: Path, odd: str) -> None:
    pin_log = PinLog(tmp_path)
    refuse(pin_log, WRONG)
    (record,) = [path for path in (tmp_path / "pin").iterdir() if path.suffix != ".lock"]
    record.write_text(odd)
    with pytest.raises(PinNotTried) as caught:
        die(pin_log, RIGHT)
    assert caught.value.code == "ledger"
    assert pin_log.refusals(PLACE) == (0, 0)
    record.write_text("{}")
    die(pin_log, RIGHT)


def test_what_the_device_said_counts_though_the_disk_is_full_and_the_intent_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pin_log = PinLog(tmp_path)
    ends: tuple[Callable[[PinRecord], None], ...] = (
        lambda pin_record: pin_record.refuse(WRONG),
        lambda pin_record: pin_record.mark_unknown(WRONG),
        lambda pin_record: pin_record.withdraw(),
        lambda pin_record: pin_record.accept(WRONG),
    )
    for end in ends:
        pin_log.clear(PLACE)
        with pin_log.held(PLACE) as pin_record:
            pin_record.intend(WRONG, count_low=False)
            with monkeypatch.context() as full:
                full.setattr(os, "fsync", _no_space)
                end(pin_record)
        assert pin_log.refusals(PLACE) == (0, 1)
    assert caplog.text.count("cannot be recorded (No space left on device)") == len(ends)


def _no_space(descriptor: int) -> None:
    raise OSError(28, os.strerror(28), descriptor)


def test_a_source_that_gives_another_wrong_value_each_time_ends(tmp_path: Path) -> None:
    time = 1_800_000_000.0
    pin_log = PinLog(tmp_path, now=lambda: time)

    def value(number: int, *, typed: bool = False) -> Pin:
        return Pin(f"9{number:04}", source="HSMTOLL_HSM__PIN_COMMAND", typed=typed)

    for number in range(5):
        refuse(pin_log, value(number))
        time += 60
    for number in range(5, 9):
        with pytest.raises(PinNotTried, match="5 others were refused") as caught:
            refuse(pin_log, value(number))
    assert caught.value.retry_after == 3600 - 300
    assert pin_log.refusals(PLACE) == (5, 0)
    # A person may, and so may who comes an hour after.
    refuse(pin_log, value(10, typed=True))
    time += 3600
    refuse(pin_log, value(11))
    # One that was right before is tried, and ends the count.
    with pin_log.held(PLACE) as pin_record:
        pin_record.intend(RIGHT, count_low=False)
        pin_record.accept(RIGHT)
    refuse(pin_log, value(12))
    assert pin_log.refusals(PLACE) == (1, 0)
