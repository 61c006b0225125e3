"""
A Maskinporten and a Customs over TLS that say, byte for byte, what a test tells them to.

The sandbox is strict and correct; these are for what no correct server would say. Connections are
kept, as a real server keeps them, until an answer ends one.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Self

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsmtoll.sandbox import pki

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hsmtoll.sandbox.pki import Authority

    # Given the connection and the request; what it returns is sent, None ends the connection.
    Answering = Callable[[ssl.SSLSocket, bytes], bytes | None]

#: Opaque, so that nothing recognises them but who knows them.
SUBJECT = "0paque.subject.Zq9Xw7Vb5Nm3Lk1Jh8Gf6Ds4"
BEARER = "0paque.bearer.Po2Iu4Yt6Re8Wq1Az3Sx5Dc7"

CALL = "/api/movement/road/v2/test-auth"


def http_reply(body: object = b"", status: str = "200 OK", *headers: str) -> bytes:
    """A whole answer; *body* is bytes, or a value for JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"HTTP/1.1 {status}", f"content-length: {len(raw)}", *headers, "", "")
    return "\r\n".join(lines).encode("latin-1") + raw


def dripping(head: bytes, drop: bytes) -> Callable[..., None]:
    """Who answers with *head*, then a *drop* each twentieth of a second, until nobody listens."""

    def answer(connection: socket.socket, *_: object) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(drop)
            time.sleep(0.05)

    return answer


def granting(connection: ssl.SSLSocket, asked: bytes) -> bytes:
    """What a good Maskinporten says."""
    del connection, asked
    return http_reply({"access_token": SUBJECT, "token_type": "Bearer", "expires_in": 600})


def exchanging(connection: ssl.SSLSocket, asked: bytes) -> bytes:
    """What a good Customs says to an exchange."""
    del connection, asked
    return http_reply({"access_token": BEARER, "token_type": "Bearer", "expires_in": 600})


class _Listening:
    """One port, one thread a connection."""

    def __init__(self, context: ssl.SSLContext, answer: Answering) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._context = context
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.origin = f"https://localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            plain.settimeout(30)
            with self._context.wrap_socket(plain, server_side=True) as connection:
                self.connections += 1
                while asked := _read(connection):
                    self.requests.append(asked)
                    answer = self._answer(connection, asked)
                    if answer is None:
                        return
                    connection.sendall(answer)
        except OSError:
            # The client ends what lasts too long, which is what is looked at.
            plain.close()

    def close(self) -> None:
        # Closing alone does not wake who waits in accept; a second time there is nothing to wake.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _read(connection: ssl.SSLSocket) -> bytes:
    """One request, whole; nothing at the end of the connection."""
    got = b""
    while b"\r\n\r\n" not in got:
        part = connection.recv(65536)
        if not part:
            return b""
        got += part
    length = re.search(rb"(?i)content-length: *(\d+)", got)
    missing = int(length[1]) - len(got.partition(b"\r\n\r\n")[2]) if length else 0
    while missing > 0:
        part = connection.recv(65536)
        if not part:
            return b""
        got, missing = got + part, missing - len(part)
    return got


class RawServices:
    """
    Both services; *token*, *exchange* and *api* may be replaced at any time.

    *calls*, *exchanges* and *grants* are the requests that came.
    """

    def __init__(self, folder: Path) -> None:
        self.token: Answering = granting
        self.exchange: Answering = exchanging
        self.api: Answering = lambda connection, asked: http_reply(b"{}")  # noqa: ARG005 - the usual
        root, _ = pki.tls_authority()
        certificate, key = pki.issue_tls()
        self.ca_file = folder / "raw-ca.pem"
        self.ca_file.write_bytes(pki.pem(root))
        file = folder / "raw.pem"
        file.write_bytes(
            pki.pem(certificate)
            + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(file)
        self.calls: list[bytes] = []
        self.exchanges: list[bytes] = []
        self._maskinporten = _Listening(self.context, self._at_maskinporten)
        self._customs = _Listening(self.context, self._at_customs)

    def _at_maskinporten(self, connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        return self.token(connection, asked)

    def _at_customs(self, connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        if b"/oauth/token" in asked.split(b"\r\n")[0]:
            self.exchanges.append(asked)
            return self.exchange(connection, asked)
        self.calls.append(asked)
        return self.api(connection, asked)

    @property
    def grants(self) -> list[bytes]:
        return self._maskinporten.requests

    @property
    def connections(self) -> int:
        """How often somebody connected to Customs."""
        return self._customs.connections

    @property
    def issuer(self) -> str:
        return f"{self._maskinporten.origin}/"

    @property
    def token_endpoint(self) -> str:
        return f"{self._maskinporten.origin}/token"

    @property
    def customs(self) -> str:
        return self._customs.origin

    def trust(self, authority: Authority, /) -> None:
        """It believes everybody."""

    def environ(self) -> dict[str, str]:
        """The variables that lead a client here."""
        return {
            "HSMTOLL_ENVIRONMENT": "sandbox",
            "HSMTOLL_CA_FILE": str(self.ca_file),
            "HSMTOLL_ENDPOINTS__ISSUER": self.issuer,
            "HSMTOLL_ENDPOINTS__TOKEN": self.token_endpoint,
            "HSMTOLL_ENDPOINTS__CUSTOMS": self.customs,
        }

    def hang_up(self) -> None:
        """Nobody listens at Customs any more."""
        self._customs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._maskinporten.close()
        self._customs.close()


class TlsProxy:
    """
    A proxy that is met over TLS and tunnels to wherever it is asked to, once to each.

    *asked* are the requests for a tunnel; *refusal*, if set, is the answer to them.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.asked: list[bytes] = []
        self.refusal: Callable[[bytes], bytes] | None = None
        self._listening = _Listening(context, self._tunnel)
        self.url = self._listening.origin

    def _tunnel(self, connection: ssl.SSLSocket, asked: bytes) -> bytes | None:
        self.asked.append(asked)
        if self.refusal is not None:
            return self.refusal(asked)
        host, _, port = asked.split()[1].decode().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as there:
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            back = threading.Thread(target=_pump, args=(there, connection), daemon=True)
            back.start()
            _pump(connection, there)
            back.join(10)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listening.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            sink.sendall(part)
        sink.shutdown(socket.SHUT_WR)
