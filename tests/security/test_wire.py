"""The way to a token endpoint: one deadline, one size, no redirects, no cookies, no surprises."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

import hsmtoll
from hsmtoll import TollClient, tls
from hsmtoll.errors import ConfigurationError, NetworkError
from hsmtoll.http_messages import Post
from hsmtoll.tokens.exchange import read_subject
from hsmtoll.transport import HttpClient
from tests.kit.own_device import free_port
from tests.kit.raw_services import RawServices, TlsProxy, dripping
from tests.kit.soft_client import token_service_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hsmtoll.sandbox.server import Sandbox

ASSERTION = "eyJhbGciOiJSUzI1NiJ9.eyJqdGkiOiIxIn0.c2lnbmF0dXJl"


def post_to(url: str) -> Post:
    return Post("Maskinporten", url, {"assertion": ASSERTION}, ASSERTION)


def read(connection: socket.socket) -> bytes:
    """A request, whole: who closes before it is read cuts the line instead of ending it."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += more(connection)
    head, _, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length and len(body) < int(length[1]):
        body += more(connection)
    return head + body


def more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise ConnectionError
    return part


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Plain HTTP on this machine: *answer* gets each connection once the request is read."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                try:
                    read(connection)
                    answer(connection)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/token"
    finally:
        ended.set()
        thread.join(10)
        listener.close()


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\nx-a: ", b"a"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["status", "header", "body", "body without a length", "chunks", "interim answers"],
)
def test_a_server_that_sends_a_little_now_and_then_meets_the_deadline(
    head: bytes, drop: bytes
) -> None:
    # Nothing else ends it: the server goes on for as long as the connection stands.
    with server(dripping(head, drop)) as url, pytest.raises(NetworkError) as caught:
        HttpClient(timeout=60, deadline=0.6).post(post_to(url))
    # A line that is cut while the status drips is no HTTP: the words may differ, the end not.
    assert caught.value.code in ("deadline", "broken")


@pytest.mark.parametrize("timeout", [600.0, 1.0])
def test_the_deadline_holds_while_tls_is_agreed_on(timeout: float) -> None:
    # Connections wait in its queue, and nobody ever answers them.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://localhost:{mute.getsockname()[1]}/token"
        with pytest.raises(NetworkError) as caught:
            HttpClient(timeout=timeout, deadline=1.0).post(post_to(url))
        assert caught.value.code == "deadline"
        # The control: a time-out that ends before it is told as what it is.
        with pytest.raises(NetworkError) as caught:
            HttpClient(timeout=0.3, deadline=60.0).post(post_to(url))
    assert caught.value.code == "timeout"


def test_a_server_that_says_nothing_meets_the_time_out() -> None:
    with (
        server(lambda _: time.sleep(2)) as url,
        pytest.raises(NetworkError, match="no answer within") as caught,
    ):
        HttpClient(timeout=0.3, deadline=30).post(post_to(url))
    assert (caught.value.code, caught.value.retryable) == ("timeout", True)


def fixed(raw: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(raw)


def test_an_answer_is_read_whole() -> None:
    """The control of everything here."""
    raw = b"HTTP/1.1 400 Bad\r\nX-Correlationid: c\r\ncontent-length: 2\r\n\r\n{}"
    with server(fixed(raw)) as url:
        answer = HttpClient().post(post_to(url))
    assert (answer.status, answer.body, answer.headers["x-correlationid"]) == (400, b"{}", "c")


@pytest.mark.parametrize("length", [b"", b"content-length: 99999999\r\n"])
def test_more_than_a_mebibyte_is_not_an_answer(length: bytes) -> None:
    raw = b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + b"x" * (2 * 1024 * 1024)
    with (
        server(fixed(raw)) as url,
        pytest.raises(NetworkError, match="larger than 1024 KiB") as caught,
    ):
        HttpClient().post(post_to(url))
    assert not caught.value.retryable


def test_a_mebibyte_is() -> None:
    body = b"x" * (1024 * 1024)
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: 1048576\r\n\r\n" + body
    with server(fixed(raw)) as url:
        assert HttpClient().post(post_to(url)).body == body


def test_a_bomb_is_not_unpacked() -> None:
    raw = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nxxxx"
    with server(fixed(raw)) as url, pytest.raises(NetworkError, match="compressed"):
        HttpClient().post(post_to(url))


def test_a_redirect_is_an_answer_and_nobody_follows_it() -> None:
    asked: list[str] = []
    target = fixed(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    def note(connection: socket.socket) -> None:
        asked.append("followed")
        target(connection)

    with server(note) as elsewhere:
        head = f"HTTP/1.1 307 Over there\r\nlocation: {elsewhere}\r\ncontent-length: 0\r\n\r\n"
        with server(fixed(head.encode())) as url:
            assert HttpClient().post(post_to(url)).status == 307
    assert asked == []


@pytest.mark.parametrize(
    "where", [b"mailto:a", b"https://xn--/", b"http://[::1", b"\xff", b"https://good.invalid/"]
)
def test_a_redirect_to_what_is_no_address_is_a_redirect_like_any_other(where: bytes) -> None:
    raw = b"HTTP/1.1 302 F\r\ncontent-length: 0\r\nlocation: " + where + b"\r\n\r\n"
    with server(fixed(raw)) as url:
        answer = HttpClient().post(post_to(url))
        with pytest.raises(NetworkError) as caught:
            read_subject(answer, post_to(url))
    assert caught.value.code == "redirect"


def test_a_cookie_is_not_sent_back() -> None:
    seen: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nconnection: close\r\n"
            b"set-cookie: a=b; path=/\r\ncontent-length: 2\r\n\r\n{}"
        )

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        for _ in range(4):
            connection, _ = listener.accept()
            with connection:
                seen.append(read(connection))
                answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    http_client = HttpClient()
    url = f"http://127.0.0.1:{port}/token"
    http_client.post(post_to(url))
    http_client.post(post_to(url))
    with httpx.Client(**http_client.options()) as client:
        client.get(url)
        client.get(url)
    thread.join(10)
    listener.close()
    assert len(seen) == 4
    assert not any(b"cookie" in each.lower() for each in seen)


def test_nobody_listens() -> None:
    port = free_port()
    with pytest.raises(NetworkError, match="connection refused") as caught:
        HttpClient().post(post_to(f"http://127.0.0.1:{port}/token"))
    assert (caught.value.code, caught.value.retryable) == ("refused", True)


def test_a_host_that_does_not_exist_is_not_tried_again() -> None:
    with pytest.raises(NetworkError, match=r"maskinporten\.invalid") as caught:
        HttpClient().post(post_to("https://maskinporten.invalid/token"))
    assert caught.value.code in ("unknown-host", "unreachable")
    assert caught.value.hint is not None


def test_a_certificate_that_is_not_trusted_is_told_with_the_setting_that_helps(
    toll_sandbox: Sandbox,
) -> None:
    with pytest.raises(NetworkError, match="not trusted") as caught:
        HttpClient().post(post_to(toll_sandbox.token_endpoint))
    assert caught.value.code == "tls-untrusted"
    assert "HSMTOLL_CA_FILE" in (caught.value.hint or "")
    # The control: with its CA it answers.
    assert (
        HttpClient(ca_file=toll_sandbox.ca_file).post(post_to(toll_sandbox.token_endpoint)).status
    )


def test_a_certificate_of_another_name_is_not_trusted(toll_sandbox: Sandbox) -> None:
    url = toll_sandbox.token_endpoint.replace("localhost", "127.0.0.2")
    with pytest.raises(NetworkError):
        HttpClient(ca_file=toll_sandbox.ca_file).post(post_to(url))


def test_no_error_repeats_the_assertion(toll_sandbox: Sandbox) -> None:
    with pytest.raises(NetworkError) as caught:
        HttpClient().post(post_to(toll_sandbox.token_endpoint))
    assert ASSERTION not in f"{caught.value} {caught.value.hint} {post_to('http://x/')!r}"


def test_a_file_without_certificates_is_a_setting_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigurationError, match="HSMTOLL_CA_FILE"):
        tls.client_context(tmp_path / "ca.pem")


def test_the_context_verifies_and_is_not_old() -> None:
    context = tls.client_context(None)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_session_keys_are_written_nowhere(
    toll_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    HttpClient(ca_file=toll_sandbox.ca_file).post(post_to(toll_sandbox.token_endpoint))
    assert not log.exists()
    # The control: the library's default context does as the variable says.
    context = ssl.create_default_context(cafile=toll_sandbox.ca_file)
    httpx.post(toll_sandbox.token_endpoint, verify=context, data={})
    assert log.read_text()


@pytest.mark.parametrize(("proxy", "passes"), [(None, False), ("environment", True)])
def test_a_proxy_of_the_environment_is_used_only_when_told(
    monkeypatch: pytest.MonkeyPatch,
    proxy: str | None,
    passes: bool,
) -> None:
    asked: list[bool] = []

    def note(connection: socket.socket) -> None:
        asked.append(True)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    direct = fixed(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
    with server(note) as between, server(direct) as url:
        monkeypatch.setenv("HTTP_PROXY", between.removesuffix("/token"))
        monkeypatch.setenv("NO_PROXY", "")
        assert HttpClient(proxy=proxy).post(post_to(url)).status == 200
    assert bool(asked) is passes


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("source", ["named", "environment"])
def test_a_proxy_over_tls_is_met_as_every_other_server_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, known: bool
) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    with RawServices(tmp_path) as services, TlsProxy(services.context) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "elsewhere.invalid")
        way = proxy.url if source == "named" else source
        http_client = HttpClient(
            ca_file=services.ca_file if known else None, proxy=way, deadline=20.0
        )
        if known:
            assert http_client.post(post_to(services.token_endpoint)).status == 200
            assert len(proxy.asked) == 1

            async def call() -> int:
                async with httpx.AsyncClient(**http_client.options(services.customs)) as client:
                    return (await client.get(services.customs)).status_code

            assert asyncio.run(call()) == 200
            assert len(proxy.asked) == 2
        else:
            # The control: a CA that nobody named is not trusted, the proxy's neither.
            with pytest.raises(NetworkError, match="not trusted"):
                http_client.post(post_to(services.token_endpoint))
            assert proxy.asked == []
    assert not log.exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "ftp://me:hunter2hunter2@127.0.0.1:1"),
        ("ALL_PROXY", "socks5://me:hunter2hunter2@127.0.0.1:1"),
        ("ALL_PROXY", "http://[::1"),
        ("NO_PROXY", "localhost, [::1"),
        ("NO_PROXY", "http://["),
    ],
)
def test_variables_that_lead_nowhere_are_told_before_anything_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    with RawServices(tmp_path) as services:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
        if variable == "ALL_PROXY":
            monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.setenv(variable, value)
        token_service, signer = token_service_of(services, proxy="environment")
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=variable) as caught:
                TollClient(token_service).token("road")
        assert caught.value.code == "proxy-environment"
        assert "hunter2" not in f"{caught.value} {caught.value.hint}"
        assert (signer.signed, services.grants) == ([], [])
        # The control: where they are not read, and where they are as they should be.
        assert TollClient(token_service_of(services)[0]).token("road").value
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,.invalid, localhost,[::1]:8080,10.0.0.0/8")
        assert TollClient(token_service_of(services, proxy="environment")[0]).token("road").value


@pytest.mark.parametrize(
    ("excepted", "passes"),
    [
        ("", True),
        ("elsewhere.invalid", True),
        ("host", True),
        ("localhost", False),
        (" .LocalHost ,b", False),
        ("a,*", False),
    ],
)
def test_hosts_that_the_variables_except_are_met_without_the_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excepted: str, passes: bool
) -> None:
    with RawServices(tmp_path) as services, TlsProxy(services.context) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", excepted)
        http_client = HttpClient(ca_file=services.ca_file, proxy="environment")
        assert http_client.post(post_to(services.token_endpoint)).status == 200
        assert bool(proxy.asked) is passes


@pytest.mark.parametrize(("excepted", "passes"), [("::1", False), ("[::1]", False), ("::2", True)])
def test_an_address_of_ipv6_is_excepted_with_brackets_and_without(
    monkeypatch: pytest.MonkeyPatch, excepted: str, passes: bool
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", excepted)
    options = HttpClient(proxy="environment").options("https://[::1]:8443/token")
    assert bool(options["proxy"]) is passes


def test_a_proxy_that_repeats_what_it_was_told_is_shown_without_it(tmp_path: Path) -> None:
    with RawServices(tmp_path) as services, TlsProxy(services.context) as proxy:
        way = proxy.url.replace("https://", "https://somebody:hunter2hunter2@")
        http_client = HttpClient(ca_file=services.ca_file, proxy=way)

        def refused(words: Callable[[bytes], bytes]) -> str:
            proxy.refusal = lambda asked: (
                b"HTTP/1.1 407 " + words(asked) + b"\r\ncontent-length: 0\r\n\r\n"
            )
            with pytest.raises(NetworkError) as caught:
                http_client.post(post_to(services.token_endpoint))
            return "".join(traceback.format_exception_only(caught.value))

        header = re.compile(rb"(?i)proxy-authorization: basic (\S+)")
        echo = refused(lambda asked: b"who is " + header.findall(asked)[0])
        sent = header.findall(proxy.asked[-1])[0].decode()
        assert base64.b64decode(sent) == b"somebody:hunter2hunter2"
        assert not any(sent[at : at + 12] in echo for at in range(len(sent) - 11))
        assert "hunter2" not in refused(lambda _: b"not hunter2hunter2")
        # The control: its own words are shown.
        assert "407 ask the desk" in refused(lambda _: b"ask the desk")


def test_a_proxy_that_refuses_is_told_without_its_password() -> None:
    with server(fixed(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")) as between:
        proxy = between.replace("http://", "http://me:hunter2hunter2@").removesuffix("/token")
        with pytest.raises(NetworkError) as caught:
            HttpClient(proxy=proxy).post(post_to("https://test.maskinporten.invalid/token"))
    assert str(caught.value).startswith(f"proxy {between.split('/')[2]}: it refused, 407")
    assert caught.value.code == "proxy-refused"
    assert "HSMTOLL_PROXY names it; it rejects the user" in (caught.value.hint or "")
    assert "hunter2" not in whole(caught.value)


def test_a_proxy_that_wants_a_password_is_not_the_one_that_refuses_it() -> None:
    refuses = fixed(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")
    with server(refuses) as between, pytest.raises(NetworkError) as caught:
        HttpClient(proxy=between.removesuffix("/token")).post(post_to("https://a.invalid/token"))
    assert "it requires a user and a password" in (caught.value.hint or "")


def whole(exc: Exception) -> str:
    """All that a traceback shows of *exc* and of what it came from, notes included."""
    return "".join(traceback.format_exception(exc))


@pytest.mark.parametrize("variable", ["HSMTOLL_PROXY", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("proxy", "text"),
    [
        ("http://me:hunter2hunter2@no-such-proxy.invalid:3128", "unknown host"),
        ("http://me:hunter2hunter2@127.0.0.1:{free}", "connection refused"),
        ("https://me:hunter2hunter2@127.0.0.1:{plain}", "the TLS handshake failed"),
        ("http://me:hunter2hunter2@127.0.0.1:{breaks}", "the connection broke"),
    ],
)
def test_a_proxy_that_fails_is_named_and_not_the_service_behind_it(
    proxy: str, text: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(fixed(b"HTTP/1.1 200 OK\r\n\r\n")) as plain, server(fixed(b"")) as breaks:
        way = proxy.format(free=free_port(), plain=port_of(plain), breaks=port_of(breaks))
        if variable != "HSMTOLL_PROXY":
            monkeypatch.setenv(variable, way)
        http_client = HttpClient(proxy=way if variable == "HSMTOLL_PROXY" else "environment")
        with pytest.raises(NetworkError) as caught:
            http_client.post(post_to("https://test.maskinporten.invalid/token"))
        at = way.partition("@")[2]
        message = str(caught.value)
        assert message.startswith(f"proxy {at}: ")
        assert text in message or "cannot be looked up" in message
        assert message.endswith(", on the way to Maskinporten (test.maskinporten.invalid)")
        assert variable.upper() in (caught.value.hint or "")
        assert "hunter2" not in whole(caught.value)


def port_of(url: str) -> str:
    return url.split("/")[2].rpartition(":")[2]


def test_a_request_without_tls_is_refused_by_the_proxy_as_well() -> None:
    with server(fixed(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")) as between:
        proxy = between.removesuffix("/token")
        with pytest.raises(NetworkError, match=r"^proxy 127\.0\.0\.1:\d+: it refused, 407"):
            HttpClient(proxy=proxy).get("http://crl.acme.invalid/list", server="revocation")
    # The control: without a proxy it is the server's answer.
    with server(fixed(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")) as between:
        assert HttpClient().get(between, server="revocation").status == 407


def test_what_fails_behind_a_proxy_is_not_told_as_the_proxy_s(tmp_path: Path) -> None:
    with RawServices(tmp_path) as services, TlsProxy(services.context) as proxy:
        http_client = HttpClient(ca_file=services.ca_file, proxy=proxy.url)
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Speak TLS elsewhere\r\n\r\n")

            threading.Thread(target=answer, daemon=True).start()
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/token"
            with pytest.raises(NetworkError, match=r"^Maskinporten \(127\.0\.0\.1\): the TLS"):
                http_client.post(post_to(url))
        assert len(proxy.asked) == 1


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_that_is_not_used_is_said(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(each, raising=False)
    there = f"https://127.0.0.1:{free_port()}/token"
    monkeypatch.setenv(variable, "http://me:hunter2hunter2@proxy.acme.invalid:3128")

    def hint(proxy: str | None = None) -> str:
        with pytest.raises(NetworkError) as caught:
            HttpClient(proxy=proxy).post(post_to(there))
        assert "hunter2" not in whole(caught.value)
        return caught.value.hint or ""

    message = f"{variable} is set and not used: HSMTOLL_PROXY=environment uses it"
    assert message in hint().splitlines()
    # The controls: it is used, or this host is excepted, or it is not set.
    assert "not used" not in hint("environment")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert "not used" not in hint()
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv(variable)
    assert "not used" not in hint()


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_a_call_names_the_proxy_that_fails(colour: str, toll_settings: dict[str, str]) -> None:
    # The token is held: only the call itself meets the proxy.
    del toll_settings
    with hsmtoll.connect(cache="file:") as toll:
        held = toll.token("road").value
    gone = {"cache": "file:", "proxy": f"http://me:hunter2hunter2@127.0.0.1:{free_port()}"}

    def call() -> None:
        if colour == "threads":
            with hsmtoll.connect(**gone) as toll:
                assert toll.token("road").value == held
                toll.call("POST", "/api/movement/road/v2/transport", content=b"{}")
            return

        async def task() -> None:
            async with hsmtoll.aconnect(**gone) as toll:
                await toll.call("POST", "/api/movement/road/v2/transport", content=b"{}")

        asyncio.run(task())

    with pytest.raises(NetworkError, match=r"proxy 127\.0\.0\.1:\d+: connection ref") as caught:
        call()
    assert caught.value.code == "refused"
    assert "nothing was sent" in (caught.value.hint or "")
    assert "hunter2" not in whole(caught.value)


@pytest.mark.parametrize("proxy", ["ftp://me:hunter2@proxy", "::"])
def test_a_proxy_that_is_none_is_told_without_its_password(proxy: str) -> None:
    with pytest.raises(ConfigurationError, match="HSMTOLL_PROXY") as caught:
        HttpClient(proxy=proxy).post(post_to("http://127.0.0.1:9/token"))
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


def test_a_cached_token_needs_no_http() -> None:
    code = """
import sys, hsmtoll.tokens.cache, hsmtoll.tokens.token_service, hsmtoll.tokens.stores
late = "httpx asyncio cryptography pkcs11 redis filelock".split()
print(*(name for name in late if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
