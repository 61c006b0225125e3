"""
A signing host that says what a test tells it to, over a Unix socket or TLS, and grants to say.

It knows nothing of `hsmtoll.host`: sockets and threads alone. Its signer is in software, and
belongs to the tests.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hsmtoll.sandbox import pki

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

ISSUER: Final = "https://test.maskinporten.no/"

#: What goes back: whole, or one by one.
RawReply: TypeAlias = "bytes | Iterable[bytes]"


def b64url(data: bytes) -> str:
    """As RFC 7515 has it."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@lru_cache
def authority() -> pki.Authority:
    """The one that certifies the signers of this run."""
    return pki.eseal_authority()


@lru_cache
def a_key(number: int = 0) -> rsa.RSAPrivateKey:
    """Key *number* of this run."""
    del number
    return rsa.generate_private_key(65537, 2048)


@dataclass
class Notary:
    """
    Makes grants in memory. What a test changes stays changed: *claims* and *header* are laid
    over the honest ones (None takes a member out), *key* signs whatever the certificate says.
    """

    key: rsa.RSAPrivateKey = field(default_factory=a_key)
    leaf: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    ahead: float = 0.0
    now: Callable[[], float] = time.time

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """Leaf, intermediate, root."""
        return (authority().issue(a_key().public_key(), **self.leaf), *authority().chain)

    @property
    def x5c(self) -> list[str]:
        """As the header carries it."""
        return [base64.b64encode(each.public_bytes(Encoding.DER)).decode() for each in self.chain]

    def grant(self, ask: dict[str, Any]) -> str:
        """A grant for what was asked."""
        header = {"alg": "RS256", "x5c": self.x5c, **self.header}
        now = int(self.now() + self.ahead)
        claims = {
            "aud": ISSUER, "iss": "acme", "scope": ask["scope"], "iat": now, "exp": now + 120,
            "jti": str(uuid.uuid4()), "resource": ask["resource"],
            "consumer_org": ask["consumer_org"], **self.claims,
        }  # fmt: skip
        return self.sealed(_without_none(header), _without_none(claims))

    def sealed(self, header: dict[str, Any] | str, claims: dict[str, Any] | str) -> str:
        """The compact form; text is taken as it is."""
        parts = (each if isinstance(each, str) else json.dumps(each) for each in (header, claims))
        unsigned = ".".join(b64url(part.encode()) for part in parts)
        signature = self.key.sign(unsigned.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{unsigned}.{b64url(signature)}"


def _without_none(members: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def http(status: int, body: object, **headers: str) -> bytes:
    """A whole answer; *body* as JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Content-Type": "application/json",
        "Content-Length": str(len(raw)),
        "Hsmtoll-Version": "1",
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + raw


def error_reply(status: int, word: str, why: str = "so it is", **headers: str) -> bytes:
    """An error as the wire has it."""
    return http(status, {"error": word, "error_description": why, "hint": "see there"}, **headers)


def granted(assertion: str, **more: Any) -> bytes:
    """A grant, with an audit as the wire has it."""
    body = {"assertion": assertion, "expires_in": 118, "audit": {"seq": 7, "head": "9f3c"}, **more}
    return http(200, body)


def honest(notary: Notary) -> Callable[[str, dict[str, Any]], RawReply]:
    """Grants, and tokens."""

    def answer(path: str, ask: dict[str, Any]) -> RawReply:
        if path == "/v1/grant":
            return granted(notary.grant(ask))
        token = {"access_token": "host-token", "token_type": "Bearer", "expires_in": 512}
        return http(200, {**token, "scope": ask["scope"], "audit": {"seq": 8, "head": "a1"}})

    return answer


class LyingHost:
    """
    Listens at *place* (a Unix socket), or on a port of its own with *tls*.

    *answer* is given the path and the JSON that came, and gives the bytes that go back: whole,
    or one by one. *asked* are the bodies in their order.
    """

    def __init__(
        self,
        place: Path | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        answer: Callable[[str, dict[str, Any]], RawReply] | None = None,
    ) -> None:
        self.place = place
        self.answer = answer or honest(Notary())
        self.asked: list[dict[str, Any]] = []
        self.connections = 0
        self._tls = tls
        self._server: socket.socket | None = None
        self._ended = threading.Event()
        self._port = 0

    @property
    def url(self) -> str:
        """As HSMTOLL_SIGNER__URL takes it."""
        return f"unix://{self.place}" if self.place else f"https://localhost:{self._port}"

    def start(self) -> Self:
        """Listen from now on."""
        if self.place is not None:
            self.place.unlink(missing_ok=True)
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(self.place))
        else:
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", self._port))
            self._port = server.getsockname()[1]
        server.listen(64)
        self._server = server
        threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Listen no more: whoever comes is refused."""
        server, self._server = self._server, None
        if server is not None:
            # Closing alone does not wake who waits in accept.
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self.stop()

    def rest(self, seconds: float) -> None:
        """Wait, unless the test is over."""
        self._ended.wait(seconds)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._visited, args=(connection,), daemon=True).start()

    def _visited(self, raw: socket.socket) -> None:
        # Whoever hears a lie may hang up in the middle of it.
        with contextlib.suppress(OSError), raw:
            connection = self._tls.wrap_socket(raw, server_side=True) if self._tls else raw
            with connection:
                path, ask = _read(connection)
                if ask is not None:
                    self.asked.append(ask)
                answer = self.answer(path, ask or {})
                for part in [answer] if isinstance(answer, bytes) else answer:
                    connection.sendall(part)


def _read(connection: socket.socket) -> tuple[str, dict[str, Any] | None]:
    raw = b""
    while b"\r\n\r\n" not in raw:
        part = connection.recv(65536)
        if not part:
            raise ConnectionError
        raw += part
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(fields.get("content-length", 0)):
        body += connection.recv(65536)
    return lines[0].split()[1], json.loads(body) if body else None


@dataclass(frozen=True)
class Ca:
    """A CA in *folder* as a file, and what it certifies: hosts and their callers."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {self.folder.name}")])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        made = _certificate(name, name, self.key, self.key, basic)
        self.file.write_bytes(made.public_bytes(Encoding.PEM))

    @property
    def file(self) -> Path:
        """Its certificate, PEM."""
        return self.folder / "ca.pem"

    def issue(self, *names: str, uri: str | None = None) -> tuple[Path, Path]:
        """Certificate and key for *names* (DNS) and *uri*, as files."""
        issuer = x509.load_pem_x509_certificate(self.file.read_bytes()).subject
        key = ec.generate_private_key(ec.SECP256R1())
        sans: list[x509.GeneralName] = [x509.DNSName(each) for each in names]
        sans += [x509.UniformResourceIdentifier(uri)] if uri else []
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        made = _certificate(
            subject, issuer, key, self.key, x509.BasicConstraints(ca=False, path_length=None),
            x509.SubjectAlternativeName(sans), x509.ExtendedKeyUsage(both),
        )  # fmt: skip
        name = uuid.uuid4().hex
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(made.public_bytes(Encoding.PEM))
        paths[1].touch(mode=0o600)
        raw = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        paths[1].write_bytes(raw)
        return paths

    def server(
        self, *names: str, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> ssl.SSLContext:
        """For a host of these names, that wants certificates of this CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.file)
        context.maximum_version = newest
        return context


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(),
        now - timedelta(days=1), now + timedelta(days=365),
    )  # fmt: skip
    more = (
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()),
    )
    for each in (*extensions, *more):
        critical = isinstance(each, x509.BasicConstraints)
        builder = builder.add_extension(each, critical=critical)
    return builder.sign(by, hashes.SHA256())
