"""A policy that is read again while callers are served: what counts from when on, and for whom."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hsmtoll.errors import TryAgainLater
from hsmtoll.host.peers import Peer
from hsmtoll.host.policy import Ask
from hsmtoll.host.service import Service
from hsmtoll.settings import load
from tests.hosting import ME, PROFILE, entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from tests.hosting import RunningHost

PATIENCE = 60.0
CHANGED = PROFILE + 'alg = "RS512"\n'


@pytest.fixture
def host(make_host: Callable[..., RunningHost], monkeypatch: pytest.MonkeyPatch) -> RunningHost:
    """Its files; the service is of this process."""
    one = make_host(entry(ME))
    for name, value in one.environ.items():
        monkeypatch.setenv(name, value)
    return one


@pytest.fixture
def service(host: RunningHost) -> Iterator[Service]:
    one = Service(load(), synchronised=lambda: True)
    one.prove()
    yield one
    host.faults.clear()
    one.close()


def asked(service: Service, mode: str = "grant") -> Future[dict[str, Any]]:
    """The road, for this account."""
    have = service.grant if mode == "grant" else service.token
    return have(Peer.local(os.geteuid(), os.getegid()), Ask("acme", "road"), gone=lambda: False)


@pytest.mark.parametrize("changed", [True, False])
def test_a_token_of_a_profile_that_was_changed_meanwhile_is_not_released(
    service: Service, host: RunningHost, monkeypatch: pytest.MonkeyPatch, *, changed: bool
) -> None:
    engine = service._rules[1]["acme"].engine
    real, reached, may = engine.exchanged, threading.Event(), threading.Event()

    def held(subject: Any) -> Any:
        reached.set()
        assert may.wait(PATIENCE)
        return real(subject)

    monkeypatch.setattr(engine, "exchanged", held)
    waiting = asked(service, "token")
    assert reached.wait(PATIENCE)
    host.write_policy(entry(ME, per_day=9), before=CHANGED if changed else PROFILE)
    assert service.reload() is None
    may.set()
    if changed:
        with pytest.raises(TryAgainLater, match="the policy is being changed"):
            waiting.result(PATIENCE)
        assert host.records("release") == []
    else:
        assert waiting.result(PATIENCE)["access_token"]
    service.prove()
    assert asked(service, "token").result(PATIENCE)["access_token"]
    released = {each["policy_sha256"] for each in host.records("release")}
    assert released == {host.records("policy")[-1]["policy_sha256"]}
