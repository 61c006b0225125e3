"""
A hundred callers at once, while the device goes away and comes back.

TOLL_CROWD_SECONDS says how long; the room takes a few, an acceptance run sixty.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hsmtoll import jws
from hsmtoll.host.audit_log import verify
from tests.kit.signing_host import ROAD_SCOPE, entry, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kit.signing_host import Identity, RunningHost

SECONDS: Final = float(os.environ.get("TOLL_CROWD_SECONDS", "8"))
ACCOUNTS: Final = 25
CALLERS: Final = 100


@dataclass
class Crowd:
    """What a hundred callers got."""

    host: RunningHost
    ending: threading.Event = field(default_factory=threading.Event)
    granted: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, int, str]] = field(default_factory=list)

    def call(self, number: int, identity: Identity) -> None:
        """Ask until the end: for what is allowed, and each fifth time for what is not."""
        name = f"san:dns:app{number % ACCOUNTS}.example"
        turn = number
        while not self.ending.is_set():
            turn += 1
            scope = "road" if turn % 5 else "air"
            try:
                reply = self.host.ask_tls(identity, scope=scope)
            except OSError:
                # Turned away before it could be told so: over TLS there is no other way.
                time.sleep(0.1)
                continue
            if reply.status == 200:
                self.granted.append((name, reply.body["assertion"]))
            else:
                self.refused.append((scope, reply.status, reply.word))
            time.sleep(0.05)


def test_a_crowd_and_a_device_that_goes_and_comes_leave_no_grant_unaccounted_for(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(*(entry(f"san:dns:app{n}.example") for n in range(ACCOUNTS)))
    host.start()
    identities = [host.authority.issue(f"app{n}.example") for n in range(ACCOUNTS)]
    crowd = Crowd(host)
    with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(crowd.call, n, identities[n % ACCOUNTS]) for n in range(CALLERS)]
        try:
            eventually(lambda: crowd.granted)
            time.sleep(SECONDS / 3)
            host.faults.set("crash", function="C_SignInit")
            eventually(lambda: any(word == "device_down" for _, _, word in crowd.refused))
            time.sleep(SECONDS / 3)
            host.faults.clear()
            before = len(crowd.granted)
            eventually(lambda: len(crowd.granted) > before)
            time.sleep(SECONDS / 3)
        finally:
            crowd.ending.set()
        # Nobody hangs: each call ends, with an answer or without.
        for each in calls:
            each.result(120)
    assert host.end() == 0

    report = verify(host.audit, host.public_key)
    assert report.bad is None
    intents = {each["jti"]: each for each in host.records("intent")}
    signed = {each["jti"] for each in host.records("result") if each["outcome"] == "signed"}
    jtis = set()
    for name, assertion in crowd.granted:
        claims = jws.read_unverified(assertion)[1]
        assert claims["scope"] == ROAD_SCOPE
        assert intents[claims["jti"]]["caller"] == name
        assert claims["jti"] in signed
        jtis.add(claims["jti"])
    assert len(jtis) == len(crowd.granted)
    assert {each["scope"] for each in intents.values()} == {ROAD_SCOPE}
    words = {(status, word) for _, status, word in crowd.refused}
    assert words <= {(403, "policy_denied"), (503, "device_down"), (503, "busy")}
    assert (403, "policy_denied") in words
    # No storm at the door of a device that is down: that a new process logs in is no sign of life
    # of one that dies of each signature.
    assert host.faults.count("C_Login") <= 12
