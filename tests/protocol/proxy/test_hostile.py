"""`hsmtoll proxy` between hostile or broken callers and a hostile or broken Customs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kit.local_proxy import PATIENCE, TEST_AUTH, LocalProxy, socket_below
from tests.kit.raw_services import BEARER, RawServices, http_reply

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator


TRANSPORT = "/api/movement/road/v2/transport"
MIB = 1024 * 1024


@pytest.fixture
def proxy(raw: RawServices) -> Iterator[LocalProxy]:
    del raw
    with LocalProxy.started() as one:
        yield one


def lines(proxy: LocalProxy, *head: str, body: bytes = b"") -> bytes:
    """A request, the last one of its connection."""
    first, *others = head
    host = f"Host: {proxy.where}"
    text = "\r\n".join((f"{first} HTTP/1.1", host, *others, "Connection: close", "", ""))
    return text.encode("latin-1") + body


def bodies(proxy: LocalProxy, raw: RawServices) -> list[bytes]:
    del proxy
    return [each.partition(b"\r\n\r\n")[2] for each in raw.calls]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Content-Length: 5", "Transfer-Encoding: chunked"], b"0\r\n\r\nX"),
        (["Transfer-Encoding: xchunked"], b"0\r\n\r\n"),
        (["Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n"),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n"),
        (["Content-Length: 5", "Content-Length: 6"], b"abcdef"),
        (["Content-Length: +5"], b"abcde"),
        (["Transfer-Encoding: chunked"], b"5\r\nabcdeXX0\r\n\r\n"),
        (["X-A: a", " folded"], b""),
        (["X-A: a\x00b"], b""),
        (["X-A: a\rX-B: b"], b""),
        (["X-A : a"], b""),
        (["Host: evil.example"], b""),
        ([f"X-A: {'a' * 9000}"], b""),
        (["X-A: a"] * 200, b""),
        (["Hsmtoll-Consumer-Organisation: 314159265"], b""),
    ],
)
def test_a_request_that_can_be_read_in_two_ways_never_reaches_customs(
    proxy: LocalProxy, raw: RawServices, headers: list[str], body: bytes
) -> None:
    answer = proxy.raw(lines(proxy, f"POST {TRANSPORT}", *headers, body=body))
    assert answer.split()[1] == b"400"
    assert b"hsmtoll-error" in answer.lower()
    assert raw.calls == []
    # The proxy goes on, and Customs gets what is well formed.
    assert proxy.raw(lines(proxy, f"POST {TRANSPORT}")).split()[1] == b"200"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Content-Length: 5"], b"abcde"),
        (["Content-Length: 5", "Connection: content-length, authorization, host"], b"abcde"),
        (["Content-Length: 5", "Expect: 100-continue"], b"abcde"),
        # As clients offer HTTP/2 on a connection without TLS.
        (["Content-Length: 5", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"], b"abcde"),
        (["Transfer-Encoding: chunked"], b'5;a=b;c="d"\r\nabcde\r\n0\r\nX-Late: 1\r\n\r\n'),
    ],
)
def test_a_body_is_framed_anew_for_customs(
    proxy: LocalProxy, raw: RawServices, headers: list[str], body: bytes
) -> None:
    answer = proxy.raw(lines(proxy, f"POST {TRANSPORT}", *headers, body=body))
    assert b"200 OK" in answer
    sent = b"".join(raw.calls)
    head, _, got = sent.partition(b"\r\n\r\n")
    assert got in (b"abcde", b"5\r\nabcde\r\n0\r\n\r\n")
    assert head.lower().count(b"authorization: bearer") == head.lower().count(b"\r\nhost:") == 1
    for name in (b"upgrade", b"connection", b"expect", b"x-late"):
        assert name not in sent.lower()


def test_the_body_of_a_rejected_request_is_not_read_as_the_next_request(
    proxy: LocalProxy, raw: RawServices
) -> None:
    hidden = f"POST {TRANSPORT} HTTP/1.1\r\nHost: {proxy.where}\r\n\r\n".encode()
    first = f"POST /api/none HTTP/1.1\r\nHost: {proxy.where}\r\nContent-Length: {len(hidden)}"
    answer = proxy.raw(f"{first}\r\n\r\n".encode() + hidden + lines(proxy, "GET /live"))
    assert [each.split()[0] for each in answer.split(b"HTTP/1.1 ")[1:]] == [b"404", b"200"]
    assert raw.calls == []


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\nabc", b"204", b""),
        (b"HTTP/1.1 304 Not\r\nContent-Length: 3\r\nETag: x\r\n\r\n", b"304", b""),
        (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nabc", b"200", b"abc"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\nTransfer-Encoding: chunked\r\n\r\n%b"
            % b"3\r\nabc\r\n0\r\nX-Late: 1\r\n\r\n",
            b"200",
            b"abc",
        ),
        (b"HTTP/1.1 302 F\r\nLocation: https://[\r\nContent-Length: 0\r\n\r\n", b"302", b""),
        (b"HTTP/1.1 201 C\r\nLocation: https://[\r\nContent-Length: 0\r\n\r\n", b"201", b""),
        (b"HTTP/1.1 200 OK\r\nX: \x1b[31m\r\nContent-Length: 3\r\n\r\nabc", b"200", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nabc", b"200", b"abc"),
        (b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b"502", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"502", None),
        (b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n", b"502", None),
        (b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n", b"502", None),
        (b"HTTP/1.1 200 OK\r\nX: %b\r\n\r\n" % (b"a" * 2 * MIB), b"502", None),
        (b"HTTP/1.1 1000 Odd\r\nContent-Length: 0\r\n\r\n", b"502", None),
        (b"nonsense\r\n\r\n", b"502", None),
    ],
)
def test_an_answer_of_customs_is_one_answer_or_none(
    proxy: LocalProxy, raw: RawServices, answer: bytes, status: bytes, body: bytes | None
) -> None:
    raw.api = lambda connection, _: connection.sendall(answer)
    response, got = proxy.ask()
    assert str(response.status).encode() == status
    if body is not None:
        assert got == body
    assert (response.getheader("Hsmtoll-Error") is None) is (body is not None)
    assert response.getheader("X-Late") is response.getheader("Set-Cookie") is None
    # Nothing of it is left for the next one.
    raw.api = lambda *_: http_reply(b"next")
    assert proxy.ask()[1] == b"next"
    assert "internal" not in "".join(proxy.stderr)


def test_callers_that_leave_take_no_connection_along(proxy: LocalProxy, raw: RawServices) -> None:
    raw.api = lambda *_: http_reply(b"x" * MIB)
    for _ in range(60):
        connection = proxy.connection()
        with contextlib.closing(connection):
            connection.request("GET", TEST_AUTH)
            connection.getresponse().read(1000)
    # Three times as many as there are connections to Customs have left within an answer.
    raw.api = lambda *_: http_reply(b"{}")
    for _ in range(25):
        assert proxy.ask()[1] == b"{}"


def test_64_callers_at_once_are_all_answered(proxy: LocalProxy, raw: RawServices) -> None:
    raw.api = lambda _, asked: http_reply(asked.split(b" ")[1])
    wrong: list[object] = []

    def caller(number: int) -> None:
        for each in range(5):
            path = f"{TEST_AUTH}?n={number}.{each}"
            if proxy.ask("GET", path)[1] != path.encode():
                wrong.append(path)

    callers = [threading.Thread(target=caller, args=[at]) for at in range(64)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(PATIENCE)
    assert wrong == []
    assert len(raw.grants) == 1


def memory(proxy: LocalProxy) -> int:
    """Bytes of the process's largest resident set so far."""
    text = Path(f"/proc/{proxy.process.pid}/status").read_text(encoding="ascii")
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_large_bodies_are_not_held_in_memory(proxy: LocalProxy, raw: RawServices) -> None:
    size = 200 * MIB
    part = b"x" * MIB
    counted = []

    def api(connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        if asked.startswith(b"GET"):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            for _ in range(size // MIB):
                connection.sendall(part)
            return b""
        count, end = asked.partition(b"\r\n\r\n")[2].count(b"x"), asked[-5:]
        while end != b"0\r\n\r\n":
            more = connection.recv(MIB)
            count, end = count + more.count(b"x"), (end + more)[-5:]
        counted.append(count)
        return http_reply(b"{}")

    raw.api = api
    proxy.ask("GET", "/live")
    before = memory(proxy)
    connection = proxy.connection()
    with contextlib.closing(connection):
        connection.request("POST", TRANSPORT, (part for _ in range(size // MIB)))
        assert connection.getresponse().read() == b"{}"
        assert counted == [size]
        connection.request("GET", TEST_AUTH)
        response = connection.getresponse()
        assert sum(len(got) for got in iter(lambda: response.read(MIB), b"")) == size
    assert memory(proxy) - before < 50 * MIB


def test_no_query_token_or_assertion_is_in_any_output(proxy: LocalProxy, raw: RawServices) -> None:
    shown = b""
    for path in (TEST_AUTH, "/api/none", f"{TEST_AUTH}/../x", "/live", "/metrics"):
        response, body = proxy.ask("GET", f"{path}?s3cret={BEARER}")
        shown += body + str(response.headers).encode()
    raw.api = lambda *_: None
    shown += proxy.ask("GET", f"{TEST_AUTH}?s3cret=1")[1]
    shown += proxy.ask("GET", "/metrics")[1]
    shown += "".join(proxy.stderr).encode()
    assert b"hsmtoll_proxy_requests_total" in shown
    assertion = raw.grants[0].partition(b"assertion=")[2].partition(b"&")[0]
    assert len(assertion) > 100
    for secret in (b"s3cret", BEARER.encode(), assertion):
        assert secret not in shown


def test_a_sigterm_ends_it_at_once_while_connections_are_idle(proxy: LocalProxy) -> None:
    idle = [proxy.connection() for _ in range(3)]
    for connection in idle[1:]:
        connection.request("GET", "/live")
        connection.getresponse().read()
    idle[0].connect()
    # Within the time that requests get, the deadline of a minute; it would take all of it.
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(30) == 0
    for connection in idle:
        connection.close()
    assert "Traceback" not in "".join(proxy.stderr)


def test_a_proxy_that_ends_leaves_the_socket_of_its_successor(
    raw: RawServices, tmp_path: Path
) -> None:
    there, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> bytes:
        there.set()
        assert go_on.wait(PATIENCE)
        return http_reply(b"{}")

    raw.api = slow
    where = socket_below(tmp_path / "run")
    path = Path(where.removeprefix("unix:"))
    with LocalProxy.started(where) as first:
        statuses: list[int] = []
        caller = threading.Thread(target=lambda: statuses.append(first.ask()[0].status))
        caller.start()
        assert there.wait(PATIENCE)
        first.process.send_signal(signal.SIGTERM)
        for _ in range(600):
            if not path.exists():
                break
            threading.Event().wait(0.1)
        with LocalProxy.started(where) as second:
            go_on.set()
            caller.join(PATIENCE)
            assert statuses == [200]
            assert first.process.wait(PATIENCE) == 0
            assert second.ask("GET", "/live")[0].status == 200
            assert second.end() == 0
        assert not path.exists()


def test_it_takes_a_socket_from_the_service_manager_and_leaves_it(
    raw: RawServices, tmp_path: Path
) -> None:
    del raw
    path = tmp_path / "given.sock"
    starter = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ['LISTEN_PID'] = str(os.getpid()); "
        "os.execv(sys.executable, [sys.executable, '-m', 'hsmtoll', 'proxy'])"
    )
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(path))
        given.listen()
        process = subprocess.Popen(
            [sys.executable, "-c", starter, str(given.fileno())], stderr=subprocess.PIPE, text=True,
            pass_fds=[given.fileno()], env={**os.environ, "LISTEN_FDS": "1"},
        )  # fmt: skip
        with process:
            # Who connects before it is ready waits.
            asked = LocalProxy(f"unix:{path}", process).ask()
            assert asked[0].status == 200
            process.terminate()
            assert process.wait(PATIENCE) == 0
    assert path.exists()
