"""Those who wait for the device: in order, not too long, and not for what is no more."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from typing import TYPE_CHECKING

import pytest

from hsmtoll.errors import TryAgainLater
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import GrantRequest
from tests.kit.own_device import workers
from tests.kit.signing_host import ME, PROFILE, RunningService, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.signing_host import RunningHost

PATIENCE = 60.0


def crowd(service: RunningService, size: int) -> list[concurrent.futures.Future[dict[str, object]]]:
    """As many grants, asked for at once."""
    me = Peer.local(os.geteuid(), os.getegid())
    return [
        service.grant(me, GrantRequest("acme", "road"), gone=lambda: False) for _ in range(size)
    ]


def test_first_come_first_served(service: RunningService) -> None:
    done: list[concurrent.futures.Future[dict[str, object]]] = []
    waiting = crowd(service, 20)
    for each in waiting:
        each.add_done_callback(done.append)
    concurrent.futures.wait(waiting, PATIENCE)
    assert done == waiting
    assert len({each.result()["jti"] for each in waiting}) == 20


def test_who_has_waited_too_long_is_told_and_asks_the_device_for_nothing(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME, per_day=100)).start(HSMTOLL_DEADLINE="3")
    assert host.ask().status == 200
    before = host.signatures()
    host.faults.set("slow", ms=2000, function="C_SignInit")
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        asked = [pool.submit(host.ask) for _ in range(7)]
        replies = [each.result(PATIENCE) for each in asked]
    host.faults.clear()
    granted = [each for each in replies if each.status == 200]
    late = [each for each in replies if each.status != 200]
    assert granted
    assert {(each.status, each.word) for each in late} == {(503, "busy")}
    assert {each.body["error_description"] for each in late} == {
        "busy: no device was free within 3 s"
    }
    # More have a place at the device than it can serve: they too, and their records say so.
    assert host.signatures() - before == len(granted)
    eventually(lambda: len(host.records("result")) == len(host.records("intent")))
    outcomes = [each["outcome"] for each in host.records("result")]
    assert outcomes.count("signed") == len(granted) + 1
    assert "busy" in outcomes
    # It is over as soon as the device is itself again.
    assert host.ask().status == 200


def test_who_waits_while_the_profile_changes_is_not_signed_for_with_the_old_key(
    service: RunningService, host: RunningHost
) -> None:
    host.faults.set("slow", ms=700, function="C_SignInit")
    waiting = crowd(service, 12)
    eventually(lambda: len(host.records("intent")) >= 4)
    host.write_policy(entry(ME), before=PROFILE + 'alg = "RS512"\n')
    assert service.reload() is None
    outcomes = [each.exception(PATIENCE) for each in waiting]
    # Those whose intent was written before are served; the others start again.
    served = len(host.records("intent"))
    assert 0 < served < 12
    assert outcomes[:served] == [None] * served
    assert {str(each) for each in outcomes[served:]} == {"busy: the policy is being changed"}
    host.faults.clear()
    service.prove()
    (again,) = crowd(service, 1)
    assert again.result(PATIENCE)["jti"]
    # The process of the old key's device ended with the last one who had it.
    eventually(lambda: len(workers()) == 1)


def test_who_leaves_takes_nobody_along_who_waits_for_the_same_renewal(
    service: RunningService, host: RunningHost
) -> None:
    cache = service.profile().cache
    me, road = Peer.local(os.geteuid(), os.getegid()), GrantRequest("acme", "road")

    def gone() -> bool:
        """It leaves when its turn at the device has come, and another one waits with it."""
        if not host.records("intent"):
            return False
        eventually(lambda: cache.waiting() >= 2)
        return True

    before = host.signatures()
    left = service.token(me, road, gone=gone)
    stays = service.token(me, road, gone=lambda: False)
    assert stays.result(PATIENCE)["access_token"]
    with pytest.raises(TryAgainLater, match="the caller has disconnected"):
        left.result(PATIENCE)
    assert host.signatures() == before + 1
    assert [each["outcome"] for each in host.records("result")] == ["busy", "signed"]


def test_at_the_end_nobody_is_left_waiting(service: RunningService, host: RunningHost) -> None:
    host.faults.set("slow", ms=1000, function="C_SignInit")
    waiting = crowd(service, 7)
    me = Peer.local(os.geteuid(), os.getegid())
    waiting.append(service.token(me, GrantRequest("acme", "road"), gone=lambda: False))
    eventually(lambda: len(host.records("intent")) >= 4)
    service.close()
    for each in waiting:
        error = each.exception(PATIENCE)
        assert error is None or isinstance(error, TryAgainLater), repr(error)
    # Nothing was signed of which nobody heard.
    signed = [each for each in host.records("result") if each["outcome"] == "signed"]
    assert len(signed) == sum(each.exception() is None for each in waiting)


def test_at_the_end_those_too_are_told_whose_records_were_being_written(
    service: RunningService, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.faults.set("slow", ms=1000, function="C_SignInit")
    writing, may = threading.Event(), threading.Event()

    def slow_disk(descriptor: int) -> None:
        writing.set()
        assert may.wait(PATIENCE)
        os.fsync(descriptor)

    # The grants are decided, and the end comes before the disk has their records.
    monkeypatch.setattr(service.audit, "_fsync", slow_disk)
    waiting = crowd(service, 4)
    assert writing.wait(PATIENCE)
    ending = threading.Thread(target=service.close)
    ending.start()
    eventually(lambda: service.parts.authorizer.ending)
    may.set()
    ending.join(PATIENCE)
    assert not ending.is_alive()
    errors = [each.exception(PATIENCE) for each in waiting]
    assert sum(isinstance(each, TryAgainLater) for each in errors) >= 3
