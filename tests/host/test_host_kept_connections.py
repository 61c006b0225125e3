"""A caller that keeps its connection: each request is authorized anew, and many wait their turn."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from hsmtoll import jws
from tests.kit.signing_host import APP, ME, ROAD, entry, eventually, exchange, raw_request

if TYPE_CHECKING:
    from tests.kit.signing_host import Identity, Reply, RunningHost

ROADS = [entry(ME), entry(f"san:dns:{APP}")]


class KeptConnection:
    """One caller with one connection that is never opened again."""

    def __init__(self, host: RunningHost, identity: Identity | None = None) -> None:
        self._connection = host.connect(identity)
        self._connection.connect()
        self._connection.auto_open = 0
        self.close = self._connection.close

    def ask(self, **members: str) -> Reply:
        return exchange(self._connection, "POST", "/v1/grant", json={**ROAD, **members})

    def is_closed(self) -> bool:
        """Whether a request finds it closed by the host."""
        try:
            self.ask()
        except TimeoutError:
            raise
        except (http.client.HTTPException, OSError):
            return True
        return False


Connect = Callable[..., KeptConnection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connections to a host that are closed after the test."""
    with contextlib.ExitStack() as stack:

        def made(host: RunningHost, identity: Identity | None = None) -> KeptConnection:
            return stack.enter_context(contextlib.closing(KeptConnection(host, identity)))

        yield made


@pytest.mark.parametrize("tls", [False, True], ids=["socket", "tls"])
def test_each_request_of_a_connection_gets_a_signature_of_its_own(
    running_host: RunningHost, connect: Connect, *, tls: bool
) -> None:
    mine = running_host.authority.issue(APP) if tls else None
    kept = connect(running_host, mine)
    replies = [kept.ask(), kept.ask(scope="air"), kept.ask(), kept.ask()]
    assert [each.status for each in replies] == [200, 403, 200, 200]
    assert {each.headers["keep-alive"] for each in replies} == {"timeout=60"}
    granted = [each.body for each in replies if each.status == 200]
    jtis = [jws.read_unverified(each["assertion"])[1]["jti"] for each in granted]
    assert len(set(jtis)) == 3
    assert jtis == [each["jti"] for each in running_host.records("intent")]
    caller = f"san:dns:{APP}" if tls else ME
    assert {each["caller"] for each in running_host.records("intent", "refused")} == {caller}
    # The control: this connection is one that a caller can close.
    assert not kept.is_closed()


def test_a_stop_and_a_new_policy_count_for_the_next_request_of_a_connection(
    running_host: RunningHost, connect: Connect
) -> None:
    local = connect(running_host)
    remote = connect(running_host, running_host.authority.issue(APP))
    assert [each.ask().status for each in (local, remote)] == [200, 200]
    assert running_host.run("stop").returncode == 0
    assert [each.ask().word for each in (local, remote)] == ["stopped"] * 2
    assert running_host.run("resume").returncode == 0
    assert [each.ask().status for each in (local, remote)] == [200, 200]

    before = running_host.signatures()
    running_host.write_policy(entry(ME, scopes=["air"]))
    running_host.reload()
    assert local.ask().word == "policy_denied"
    assert running_host.signatures() == before
    assert local.ask(scope="air").status == 200
    # The other one has to show its certificate again.
    assert remote.is_closed()


def test_a_revoked_certificate_ends_the_connections_that_it_has(
    make_host: Callable[..., RunningHost], connect: Connect
) -> None:
    host = make_host()
    stolen, twin = host.authority.issue(APP), host.authority.issue(APP)
    crl = host.authority.crl()
    host.start(HSMTOLL_HOST__CLIENT_CRL=str(crl))
    idle, serving, other = (connect(host, each) for each in (stolen, stolen, twin))
    assert [each.ask().status for each in (idle, serving, other)] == [200] * 3

    intents = len(host.records("intent"))
    host.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(serving.ask)
        eventually(lambda: len(host.records("intent")) > intents)
        host.authority.crl(stolen)
        host.reload()
        assert idle.is_closed()
        host.faults.clear()
        # What was asked for before is finished, and is the last.
        reply = asked.result(60)
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert serving.is_closed()
    before = host.signatures()
    with pytest.raises(OSError, match=r"(?i)revoked|reset|broken|eof|closed"):
        host.ask_tls(stolen)
    assert host.signatures() == before
    # Its twin has to connect again as well, and can.
    assert other.is_closed()
    assert host.ask_tls(twin).status == 200


@pytest.mark.parametrize("tls", [False, True], ids=["socket", "tls"])
def test_sixty_four_requests_of_one_caller_are_all_answered_in_their_turn(
    make_host: Callable[..., RunningHost], *, tls: bool
) -> None:
    host = make_host(*ROADS).start()
    mine = host.authority.issue(APP)
    start = threading.Barrier(32)

    def ask(_: int) -> list[int]:
        start.wait(60)
        return [(host.ask_tls(mine) if tls else host.ask()).status for _ in range(2)]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        codes = [code for both in pool.map(ask, range(32)) for code in both]
    assert codes == [200] * 64
    assert len({each["jti"] for each in host.records("result")}) == 64


def test_above_its_quota_a_caller_of_many_connections_gets_429_and_nothing_else(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME, per_day=20)).start()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        codes = [each.status for each in pool.map(lambda _: host.ask(), range(64))]
    assert (codes.count(200), codes.count(429)) == (20, 44)
    assert len(host.records("intent")) == 20


def test_requests_sent_before_their_turn_are_authorized_one_by_one(
    make_host: Callable[..., RunningHost],
) -> None:
    host = make_host(entry(ME, per_day=2)).start()
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(str(host.socket))
        # More than the host takes in before it has answered the first.
        one.sendall(raw_request(keep=True) * 39 + raw_request())
        reply = bytearray()
        while part := one.recv(65536):
            reply += part
    codes = [int(part[:3]) for part in bytes(reply).split(b"HTTP/1.1 ")[1:]]
    assert codes == [200, 200] + [429] * 38
    assert len(host.records("intent")) == 2


@pytest.mark.parametrize(("limit", "last"), [("1", "close"), ("8", "keep")])
def test_the_connections_of_a_caller_are_a_setting(
    make_host: Callable[..., RunningHost], connect: Connect, limit: str, last: str
) -> None:
    host = make_host().start(HSMTOLL_HOST__CONNECTIONS_PER_CALLER=limit)
    host.faults.set("hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(host.ask)
        eventually(lambda: host.records("intent"))
        waits = connect(host)
        # The host has accepted it once it has answered another one that came later.
        assert host.health("/live").status == 200
        host.faults.clear()
        # A reply ends its connection where another one waits for the place.
        assert asked.result(60).headers.get("connection", "keep") == last
        assert waits.ask().status == 200


def test_settings_of_connections_have_bounds(make_host: Callable[..., RunningHost]) -> None:
    for name in ("CONNECTIONS", "CONNECTIONS_PER_CALLER"):
        result = make_host().run("serve", **{f"HSMTOLL_HOST__{name}": "0"})
        assert (result.returncode, f"HSMTOLL_HOST__{name}" in result.stderr) == (10, True)
