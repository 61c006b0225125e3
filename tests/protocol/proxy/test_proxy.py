"""`hsmtoll proxy` between programs that only speak HTTP and Customs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kit.accounts import OTHER
from tests.kit.commands import hsmtoll
from tests.kit.local_proxy import PATIENCE, TEST_AUTH, LocalProxy, socket_below
from tests.kit.own_device import free_port
from tests.kit.raw_services import BEARER, SUBJECT, RawServices, http_reply

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from hsmtoll.sandbox.server import Sandbox
    from hsmtoll.settings import Settings

TRANSPORT = "/api/movement/road/v2/transport"


@pytest.fixture
def proxy(toll_settings: Settings) -> Iterator[LocalProxy]:
    del toll_settings
    with LocalProxy.started() as one:
        yield one


def calls(sandbox: Sandbox) -> list[Any]:
    return [each for each in sandbox.received if each.kind == "call"]


def error(body: bytes) -> str:
    found = json.loads(body)
    assert set(found) == {"error", "error_description", "hint"}
    return str(found["error"])


def test_curl_reaches_customs_without_a_token_of_its_own(
    proxy: LocalProxy, toll_sandbox: Sandbox
) -> None:
    argv = ["curl", "-sS", "-o", "-", "-w", "%{http_code}", f"http://{proxy.where}{TEST_AUTH}"]
    done = [subprocess.run(argv, capture_output=True, text=True, check=True) for _ in range(2)]

    assert [each.stdout for each in done] == ["200", "200"]
    assert [each.status for each in calls(toll_sandbox)] == [200, 200]
    # One token, and so one signature, for both.
    assert [each.kind for each in toll_sandbox.received].count("grant") == 1
    log = proxy.log_with(f"GET {TEST_AUTH}: 200 in", times=2)
    assert log.count(TEST_AUTH) == 2


def test_a_message_its_headers_and_the_answer_go_through_unchanged(
    proxy: LocalProxy, toll_sandbox: Sandbox
) -> None:
    body = json.dumps({"not": "valid"}).encode()
    headers = {"Content-Type": "application/json", "X-Mine": "1", "Cookie": "a=b"}
    response, answer = proxy.ask("POST", TRANSPORT, body, headers)

    seen = calls(toll_sandbox)[0]
    assert (seen.method, seen.path, seen.body) == ("POST", TRANSPORT, body)
    given = {name.lower(): value for name, value in seen.headers.items()}
    assert given["x-mine"] == "1"
    assert "cookie" not in given
    assert response.status == seen.status
    assert b"validationErrors" in answer
    assert response.getheader("X-CorrelationID") == seen.correlation_id
    assert response.getheader("Hsmtoll-Error") is None


def test_a_program_reaches_customs_over_a_unix_socket(
    toll_settings: Settings, tmp_path: Path
) -> None:
    del toll_settings
    where = socket_below(tmp_path / "run")
    path = Path(where.removeprefix("unix:"))
    with LocalProxy.started(where) as proxy:
        argv = ["curl", "-sS", "-w", "%{http_code}", "--unix-socket", str(path)]
        done = subprocess.run(
            [*argv, f"http://localhost{TEST_AUTH}"], capture_output=True, text=True, check=True
        )
        assert done.stdout == "200"
        assert f"uid {os.geteuid()}" in proxy.log_with(TEST_AUTH)
        assert proxy.end() == 0
    assert not path.exists()


def test_a_probe_asks_the_proxy_where_it_listens(toll_settings: Settings, tmp_path: Path) -> None:
    del toll_settings
    for where in (f"127.0.0.1:{free_port()}", socket_below(tmp_path / "run")):
        environ = os.environ | {"HSMTOLL_LOCAL_PROXY__LISTEN": where}
        with LocalProxy.started(where):
            for options, output in (((), "live\n"), (("--ready",), "ready\n")):
                done = hsmtoll("health", "--proxy", *options, env=environ)
                assert (done.returncode, done.stdout, done.stderr) == (0, output, "")
        done = hsmtoll("health", "--proxy", env=environ)
        assert done.returncode == 1
        assert f"{where}: nobody answers" in done.stderr


@pytest.mark.needs_root
def test_an_account_that_is_not_listed_is_not_served(
    toll_settings: Settings, toll_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    del toll_settings
    # A temporary directory of the tests lies where the other account cannot look.
    folder = Path(f"/run/hsmtoll-test-{os.getpid()}")
    where = socket_below(folder)
    os.chown(folder, 0, OTHER)
    argv = ["curl", "-sS", "-w", "\n%{http_code}", "--unix-socket", where.removeprefix("unix:")]

    def asked() -> tuple[str, str]:
        done = subprocess.run(
            [*argv, f"http://localhost{TEST_AUTH}"], user=OTHER, group=OTHER, extra_groups=(),
            cwd="/", capture_output=True, text=True, check=True,
        )  # fmt: skip
        body, _, status = done.stdout.rpartition("\n")
        return status, body

    try:
        with LocalProxy.started(where):
            status, body = asked()
            assert (status, error(body.encode())) == ("403", "caller-refused")
        assert calls(toll_sandbox) == []
        monkeypatch.setenv("HSMTOLL_LOCAL_PROXY__UIDS", str(OTHER))
        with LocalProxy.started(where):
            assert asked() == ("200", "")
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (f"GET {TEST_AUTH}", "Host: evil.example", 403),
        (f"GET {TEST_AUTH}", "Host: {where}\r\nOrigin: http://evil.example", 403),
        (f"GET {TEST_AUTH}", "Host: {where}\r\nAuthorization: Bearer x", 400),
        ("GET /api/unknown", "Host: {where}", 404),
        ("GET /api/movement/road/v2/../../x", "Host: {where}", 404),
        (f"GET http://evil.example{TEST_AUTH}", "Host: {where}", 404),
        ("CONNECT evil.example:443", "Host: {where}", 405),
        ("GET /metrics", "Host: evil.example", 403),
        ("NONSENSE", "Host: {where}", 400),
    ],
)
def test_what_may_not_pass_never_reaches_customs(
    proxy: LocalProxy, toll_sandbox: Sandbox, request_line: str, headers: str, status: int
) -> None:
    lines = [f"{request_line} HTTP/1.1", headers.format(where=proxy.where), "Connection: close"]
    head, _, body = proxy.raw("\r\n".join([*lines, "", ""]).encode()).partition(b"\r\n\r\n")

    assert int(head.split()[1]) == status
    assert b"hsmtoll-error" in head.lower()
    assert b"aiohttp" not in head
    assert error(body)
    assert toll_sandbox.received == []


def test_a_service_that_is_down_is_told_from_an_answer_of_customs(
    proxy: LocalProxy, toll_sandbox: Sandbox
) -> None:
    assert proxy.ask()[0].status == 200
    toll_sandbox.fault("reset", "api")
    response, body = proxy.ask()
    assert (response.status, response.getheader("Hsmtoll-Error")) == (502, error(body))
    response, body = proxy.ask("POST", TRANSPORT, b"{}", {"Content-Type": "application/json"})
    assert (response.status, error(body)) == (504, "outcome-unknown")
    toll_sandbox.clear_faults()
    toll_sandbox.fault("503", "api")
    response, body = proxy.ask()
    assert (response.status, response.getheader("Hsmtoll-Error")) == (503, None)


def test_readiness_follows_whether_a_token_can_be_had(
    proxy: LocalProxy, toll_sandbox: Sandbox
) -> None:
    assert proxy.ask("GET", "/live?probe=1")[0].status == 200
    assert proxy.ask("HEAD", "/ready")[0].status == 200
    toll_sandbox.fault("refuse", "token")
    response, _ = proxy.ask()
    assert (response.status, response.getheader("Hsmtoll-Error")) == (502, "refused")
    ready, why = proxy.ask("GET", "/ready")
    assert ready.status == 503
    assert json.loads(why)["why"]
    toll_sandbox.clear_faults()
    # Renewals pause after a failure, so it takes some seconds.
    until = threading.Event()
    for _ in range(60):
        if proxy.ask("GET", "/ready")[0].status == 200:
            break
        until.wait(1)
    assert proxy.ask("GET", "/ready")[0].status == 200
    assert proxy.ask()[0].status == 200


def test_metrics_count_what_was_answered(proxy: LocalProxy) -> None:
    proxy.ask()
    proxy.ask("GET", "/api/unknown")
    response, body = proxy.ask("GET", "/metrics", headers={"Accept": "text/plain"})
    assert (response.getheader("Content-Type") or "").startswith("text/plain; version=")
    text = body.decode()
    assert 'hsmtoll_proxy_requests_total{api="road",method="GET",status="200"} 1.0' in text
    assert 'hsmtoll_proxy_requests_total{api="none",method="GET",status="404"} 1.0' in text
    assert "hsmtoll_signatures_total 1.0" in text
    assert "process_resident_memory_bytes" in text


def test_an_answer_streams_through_before_it_is_whole(raw: RawServices) -> None:
    first_part_came, ended = threading.Event(), threading.Event()

    def dripping(connection: ssl.SSLSocket, _: bytes) -> bytes:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n1234")
        assert first_part_came.wait(PATIENCE)
        ended.set()
        return b"5678"

    raw.api = dripping
    with LocalProxy.started() as proxy:
        connection = proxy.connection()
        with contextlib.closing(connection):
            connection.request("GET", TEST_AUTH)
            response = connection.getresponse()
            assert response.read(4) == b"1234"
            assert not ended.is_set()
            first_part_came.set()
            assert response.read() == b"5678"


def test_a_large_body_streams_through_before_it_is_whole(raw: RawServices) -> None:
    begun = threading.Event()

    def reading(connection: ssl.SSLSocket, asked: bytes) -> bytes:
        begun.set()
        body = asked.partition(b"\r\n\r\n")[2]
        while not body.endswith(b"0\r\n\r\n"):
            body += connection.recv(65536)
        return http_reply({"sent": body.count(b"x")})

    raw.api = reading
    with LocalProxy.started() as proxy:
        connection = proxy.connection()
        with contextlib.closing(connection):
            connection.putrequest("POST", TRANSPORT)
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            half = b"%x\r\n%b\r\n" % (512 * 1024, b"x" * 512 * 1024)
            connection.send(half)
            # Customs sees the request although half of its body has not been sent.
            assert begun.wait(PATIENCE)
            connection.send(half + b"0\r\n\r\n")
            assert json.loads(connection.getresponse().read()) == {"sent": 1024 * 1024}


def test_an_answer_that_breaks_off_breaks_off_for_the_caller(raw: RawServices) -> None:
    def broken(connection: ssl.SSLSocket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n1234")

    raw.api = broken
    with LocalProxy.started() as proxy:
        connection = proxy.connection()
        with contextlib.closing(connection):
            connection.request("GET", TEST_AUTH)
            response = connection.getresponse()
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()


def test_a_request_that_has_begun_is_finished_before_the_end(raw: RawServices) -> None:
    there, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> bytes:
        there.set()
        assert go_on.wait(PATIENCE)
        return http_reply(b"{}")

    raw.api = slow
    with LocalProxy.started() as proxy:
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(proxy.ask()[0].status))
        caller.start()
        assert there.wait(PATIENCE)
        proxy.process.send_signal(signal.SIGTERM)
        host, _, port = proxy.where.rpartition(":")
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                threading.Event().wait(0.1)
                continue
            break
        go_on.set()
        caller.join(PATIENCE)
        assert answers == [200]
        assert proxy.process.wait(PATIENCE) == 0


def test_no_secret_is_in_any_output(raw: RawServices) -> None:
    raw.api = lambda _, asked: http_reply(asked, "400 Bad Request")
    with LocalProxy.started() as proxy:
        proxy.ask("GET", f"{TEST_AUTH}?{BEARER}")
        _, metrics = proxy.ask("GET", "/metrics")
    shown = "".join(proxy.stderr) + metrics.decode()
    assert BEARER not in shown
    assert SUBJECT not in shown


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("0.0.0.0:18880", "not on the loopback"),
        ("8880", "HOST:PORT"),
        ("unix:relative", "absolute path"),
    ],
)
def test_an_address_that_others_reach_is_refused(
    toll_settings: Settings, where: str, what: str
) -> None:
    del toll_settings
    done = subprocess.run(
        [sys.executable, "-m", "hsmtoll", "proxy", "--listen", where],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 10
    assert what in done.stderr
    assert "Traceback" not in done.stderr
