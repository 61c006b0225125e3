"""
A request ends at its deadline wherever it is kept waiting, and lets go of the connection.

Every peer here goes on for as long as the connection stands, and time-outs of one wait are far
longer than the deadline: nothing else ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import hsmtoll
from hsmtoll import NetworkError, OutcomeUnknown, deadline
from hsmtoll.http_messages import Post
from hsmtoll.transport import ConnectionOptions, HttpClient
from tests.kit.raw_services import RawServices

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Serving = Callable[[socket.socket], None]

SUBMIT = "/api/movement/road/v2/transport"
PATIENT: dict[str, Any] = {"timeout": 60.0, "deadline": 1.0}

#: The beginning of a TLS record with a handshake message of 16 KiB, of which the rest drips.
HANDSHAKE = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"


class Peer:
    """Who *serves* each connection in a thread; *left* is set once a client has closed one."""

    def __init__(self, serves: Serving, listener: socket.socket) -> None:
        self.left = threading.Event()
        self._serves = serves
        self._listener = listener
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def at(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60)
            with contextlib.suppress(OSError):
                self._serves(connection)
        self.left.set()

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def peer(serves: Serving, listener: socket.socket | None = None) -> Iterator[Peer]:
    made = Peer(serves, listener or socket.create_server(("127.0.0.1", 0)))
    try:
        yield made
    finally:
        made.close()


def head(connection: socket.socket) -> bytes:
    """What came up to the end of a request's headers, or of a first record."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = connection.recv(1)
        if not part:
            raise ConnectionError
        got += part
    return got


def drip(connection: socket.socket, begin: bytes, drop: bytes = b"\0") -> None:
    """*begin*, and then a *drop* each twentieth of a second, until the peer leaves."""
    connection.sendall(begin)
    pause = threading.Event()
    while True:
        connection.sendall(drop)
        pause.wait(0.05)


def agrees_on_tls_slowly(connection: socket.socket) -> None:
    connection.recv(65536)
    drip(connection, HANDSHAKE)


def answers_slowly(connection: socket.socket) -> None:
    head(connection)
    drip(connection, b"HTTP/1.1 200 OK\r\nx-a: ", b"a")


def tunnels_to_nobody(connection: socket.socket) -> None:
    head(connection)
    connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
    agrees_on_tls_slowly(connection)


def takes_slowly(connection: socket.socket, until: threading.Event) -> None:
    """A byte now and then; *until* it is looked at whether the other end has left."""
    while connection.recv(65536 if until.is_set() else 1):
        until.wait(0.05)


def over_tls(context: ssl.SSLContext, serves: Serving) -> Serving:
    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            serves(secured)

    return serve


def post(url: str, **http_client: Any) -> NetworkError:
    """The error of one token request to *url*."""
    with pytest.raises(NetworkError) as caught:
        HttpClient(**PATIENT, **http_client).post(
            Post("Maskinporten", url, {"assertion": "a" * 200}, "a" * 200)
        )
    return caught.value


SLOW_PROXIES = {
    "its answer": (False, answers_slowly),
    "its answer, over TLS": (True, answers_slowly),
    "the tunnel": (False, tunnels_to_nobody),
    "the tunnel, over TLS": (True, tunnels_to_nobody),
}


def proxy(services: RawServices, how: str) -> tuple[str, Serving]:
    secured, serves = SLOW_PROXIES[how]
    scheme = "https" if secured else "http"
    return scheme, over_tls(services.context, serves) if secured else serves


@pytest.mark.parametrize(
    ("scheme", "serves"), [("https", agrees_on_tls_slowly), ("http", answers_slowly)]
)
def test_a_leg_ends_where_tls_or_headers_drip(scheme: str, serves: Serving) -> None:
    with peer(serves) as there:
        assert post(f"{scheme}://{there.at}/token").code == "deadline"
        assert there.left.wait(30)


@pytest.mark.parametrize("how", SLOW_PROXIES)
def test_a_leg_ends_where_a_proxy_drips(tmp_path: Path, how: str) -> None:
    with RawServices(tmp_path) as services:
        scheme, serves = proxy(services, how)
        with peer(serves) as between:
            at = between.at.replace("127.0.0.1", "localhost")
            way = {"proxy": f"{scheme}://{at}", "ca_file": services.ca_file}
            assert post("https://test.maskinporten.invalid/token", **way).code == "deadline"
            assert between.left.wait(30)


def test_a_leg_ends_where_a_signing_host_drips(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    http_client = HttpClient(connection_options=ConnectionOptions(uds=tmp_path / "sock"), **PATIENT)
    with peer(answers_slowly, listener) as there:
        url = "http://localhost/v1/grant"
        with pytest.raises(NetworkError) as caught:
            http_client.post_json(url, {}, server="signing host", headers={})
        assert (caught.value.code, caught.value.signed) == ("deadline", True)
        assert there.left.wait(30)


@contextlib.contextmanager
def nobody() -> Iterator[int]:
    """A port whose connections are never taken: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield port


def test_a_leg_ends_where_none_of_many_addresses_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody() as port, peer(lambda connection: connection.sendall(ANSWER)) as there:
        mute = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        monkeypatch.setattr(deadline, "getaddrinfo", lambda *_, **__: [mute] * 100)
        error = post(f"http://many.invalid:{port}/token")
        assert (error.code, error.signed) == ("deadline", False)
        # The control: the time-out of each wait goes on to the next address, which answers.
        at = there.at.rpartition(":")[2]
        monkeypatch.setattr(socket, "create_connection", elsewhere(port, int(at)))
        monkeypatch.setattr(deadline, "getaddrinfo", lambda *_, **__: [mute, MUTE_NO_MORE])
        http_client = HttpClient(timeout=0.2, deadline=30.0)
        assert http_client.get(f"http://many.invalid:{port}/", server="x").status == 204


ANSWER = b"HTTP/1.1 204 Here\r\n\r\n"
MUTE_NO_MORE = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0))


def elsewhere(mute: int, good: int) -> Callable[..., socket.socket]:
    """create_connection, with 127.0.0.2 at the port *good* of this machine."""
    real = socket.create_connection

    def connect(address: tuple[str, int], *args: Any, **more: Any) -> socket.socket:
        assert address[1] == mute
        where = ("127.0.0.1", good) if address[0] == "127.0.0.2" else address
        return real(where, *args, **more)

    return connect


def call(colour: str, content: bytes, **settings: Any) -> hsmtoll.HsmTollError:
    """The error of one submission."""

    async def task() -> None:
        async with hsmtoll.aconnect(**settings) as toll:
            await toll.call("POST", SUBMIT, content=content)

    try:
        if colour == "tasks":
            asyncio.run(task())
        else:
            with hsmtoll.connect(**settings) as toll:
                toll.call("POST", SUBMIT, content=content)
    except (NetworkError, OutcomeUnknown) as exc:
        return exc
    raise AssertionError


@pytest.fixture
def held(toll_settings: object) -> str:
    """A token in the file cache: only the call itself meets what is in its way."""
    del toll_settings
    with hsmtoll.connect(cache="file:") as toll:
        return toll.token("road").value


@pytest.mark.parametrize("colour", ["threads", "tasks"])
@pytest.mark.parametrize("how", SLOW_PROXIES)
def test_a_call_ends_where_a_proxy_drips_and_says_that_nothing_was_sent(
    tmp_path: Path, held: str, how: str, colour: str
) -> None:
    del held
    with RawServices(tmp_path) as services:
        scheme, serves = proxy(services, how)
        with peer(serves) as between:
            at = between.at.replace("127.0.0.1", "localhost")
            error = call(colour, b"{}", cache="file:", proxy=f"{scheme}://{at}", **PATIENT)
            assert (type(error), error.code) == (NetworkError, "deadline")
            assert between.left.wait(30)


@pytest.mark.parametrize("colour", ["threads", "tasks"])
def test_a_call_ends_where_its_body_is_taken_slowly_and_its_fate_is_unknown(
    held: str, colour: str
) -> None:
    del held
    given_up = threading.Event()

    def tunnels(connection: socket.socket) -> None:
        where, _, port = head(connection).split()[1].decode().rpartition(":")
        with socket.create_connection((where, int(port)), timeout=60) as there:
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            back = threading.Thread(target=pump, args=(there, connection), daemon=True)
            back.start()
            # Agreeing on TLS is quick; what is sent then is taken by the byte.
            there.sendall(connection.recv(65536))
            takes_slowly(connection, given_up)

    with peer(tunnels, listener_with_little_room()) as between:
        way = {"cache": "file:", "proxy": f"http://{between.at}"}
        error = call(colour, bytes(32 << 20), **way, **PATIENT)
        assert (type(error), error.code) == (OutcomeUnknown, "outcome-unknown")
        assert "not whole within 1 s" in str(error)
        given_up.set()
        assert between.left.wait(30)


def listener_with_little_room() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
