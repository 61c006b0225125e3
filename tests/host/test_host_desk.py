"""The desk: one section and one sync for all who came, and nothing before it is on disk."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hsmtoll.errors import AuditBroken, HsmTollError, TryAgainLater
from hsmtoll.host.audit import Audit
from hsmtoll.host.desk import Desk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENCE = 30.0


class Disk:
    """A disk that waits until it may, counts, and can fail."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()
        self.syncs = 0
        self.broken = False
        self.at_once = False

    def __call__(self, descriptor: int) -> None:
        assert self.may.wait(PATIENCE)
        self.syncs += 1
        if self.broken:
            raise OSError(28, "No space left on device")
        if not self.at_once:
            os.fsync(descriptor)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def audit(tmp_path: Path, disk: Disk) -> Iterator[Audit]:
    raw = Ed25519PrivateKey.generate().private_bytes(
        s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
    )
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_bytes(raw)
    one = Audit(
        tmp_path / "log", tmp_path / "key", now=lambda: 0.0, noted=tmp_path / "noted", fsync=disk
    )
    yield one
    one.close()


@pytest.fixture
def desk(audit: Audit) -> Iterator[Desk]:
    one = Desk(audit)
    yield one
    one.close()


def noted(desk: Desk, audit: Audit, number: int = 0) -> Future[int]:
    """A record that is asked for: its seq once it is on disk."""
    told: Future[int] = Future()

    def step() -> Callable[[], None]:
        seq, _ = audit.append("intent", caller="uid:1", profile="acme", jti=str(number))
        return lambda: told.set_result(seq)

    desk.put(step, told.set_exception)
    return told


def test_nothing_follows_before_its_record_is_on_disk(desk: Desk, audit: Audit, disk: Disk) -> None:
    disk.may.clear()
    told = noted(desk, audit)
    with pytest.raises(TimeoutError):
        told.result(0.3)
    # It was appended all the same: only the disk is waited for.
    assert audit.seq == 1
    disk.may.set()
    assert told.result(PATIENCE) == 1


def test_those_who_come_while_the_disk_is_at_it_share_the_next_sync(
    desk: Desk, audit: Audit, disk: Disk
) -> None:
    disk.may.clear()
    first = noted(desk, audit)
    with pytest.raises(TimeoutError):
        first.result(0.3)
    crowd = [noted(desk, audit, number) for number in range(50)]
    disk.may.set()
    # In the order in which they came.
    assert [each.result(PATIENCE) for each in crowd] == list(range(2, 52))
    assert disk.syncs == 2


def test_a_step_that_fails_is_told_to_its_own_caller_alone(desk: Desk, audit: Audit) -> None:
    failed: Future[int] = Future()

    def wrong() -> None:
        raise ZeroDivisionError

    before = noted(desk, audit)
    desk.put(wrong, failed.set_exception)
    after = noted(desk, audit)
    assert isinstance(failed.exception(PATIENCE), ZeroDivisionError)
    assert (before.result(PATIENCE), after.result(PATIENCE)) == (1, 2)


def test_what_goes_wrong_afterwards_harms_nobody_else(
    desk: Desk, audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    told: Future[int] = Future()

    def wrong() -> None:
        raise ZeroDivisionError

    def worse(exc: Exception) -> None:
        raise exc

    desk.put(lambda: wrong, told.set_exception)
    desk.put(lambda: wrong, worse)
    after = noted(desk, audit)
    assert isinstance(told.exception(PATIENCE), ZeroDivisionError)
    assert after.result(PATIENCE) == 1
    assert "a mistake in hsmtoll, please report it (ZeroDivisionError)" in caplog.text
    assert desk.alive


def test_where_the_disk_fails_nobody_is_told_yes(desk: Desk, audit: Audit, disk: Disk) -> None:
    disk.may.clear()
    disk.broken = True
    crowd = [noted(desk, audit, number) for number in range(5)]
    disk.may.set()
    for each in crowd:
        assert isinstance(each.exception(PATIENCE), AuditBroken)
    # And from then on not even an append is.
    assert isinstance(noted(desk, audit).exception(PATIENCE), AuditBroken)


def test_a_step_from_which_nothing_follows_waits_for_no_disk(desk: Desk, disk: Disk) -> None:
    taken: Future[None] = Future()
    disk.may.clear()
    desk.put(lambda: taken.set_result(None), taken.set_exception)
    taken.result(PATIENCE)
    assert disk.syncs == 0
    disk.may.set()


def test_at_the_end_what_came_is_taken_and_who_comes_later_is_told(
    desk: Desk, audit: Audit
) -> None:
    crowd = [noted(desk, audit, number) for number in range(20)]
    desk.close()
    assert [each.result(0) for each in crowd] == list(range(1, 21))
    late: HsmTollError | BaseException | None = noted(desk, audit).exception(0)
    assert isinstance(late, TryAgainLater)
    assert "ending" in str(late)
    assert not desk.alive
    desk.close()


def test_company_is_waited_for_where_there_is_much_of_it(audit: Audit, disk: Disk) -> None:
    callers, disk.at_once = 0, True
    one = Desk(audit, company=lambda: callers)

    def syncs_of(crowd: int) -> int:
        """A crowd that does not come at once, but one just after the other."""
        before = disk.syncs
        told = []
        for number in range(crowd):
            told += [noted(one, audit, number)]
            time.sleep(0.0005)
        assert all(each.result(PATIENCE) for each in told)
        return disk.syncs - before

    few = syncs_of(100)
    callers = 32
    many = syncs_of(100)
    one.close()
    # The control: few callers are served at once, each for itself.
    assert many < few / 2


def test_a_step_that_another_one_puts_comes_after_it(desk: Desk) -> None:
    order: list[str] = []
    done: Future[None] = Future()

    def outer() -> None:
        desk.put(inner, done.set_exception)
        order.append("outer")

    def inner() -> Callable[[], None]:
        order.append("inner")
        return lambda: done.set_result(None)

    desk.put(outer, done.set_exception)
    assert done.result(PATIENCE) is None
    assert order == ["outer", "inner"]
    # However many fail one after the other, none stands on the shoulders of the one before.
    failed: list[Exception] = []

    def falling() -> None:
        raise ZeroDivisionError

    def again(exc: Exception) -> None:
        failed.append(exc)
        if len(failed) < 5000:
            desk.put(falling, again)

    desk.put(falling, again)
    assert len(failed) == 5000
