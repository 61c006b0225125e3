"""Which servers are believed with HSMTOLL_CA_FILE, and what is said of those that are not."""

from __future__ import annotations

import ssl
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from hsmtoll.errors import NetworkError
from hsmtoll.transport import HttpClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
Key = ec.EllipticCurvePrivateKey


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _issue(
    subject: str, key: Key, issuer: str, above: Key, *, ca: bool, host: str = "localhost",
    ends: datetime = NOW + 9 * DAY,
) -> x509.Certificate:  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 20 * DAY)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
    )
    if not ca:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False
        )
    return builder.sign(above, hashes.SHA256())


class Pki:
    """Root → issuing CA → a server's certificate."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.root_key, self.ca_key, self.key = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(3)
        )
        self.root = _issue("Root", self.root_key, "Root", self.root_key, ca=True)
        self.ca = _issue("Issuing", self.ca_key, "Root", self.root_key, ca=True)

    def file(self, *certificates: x509.Certificate) -> Path:
        made = self.where / f"{len(list(self.where.iterdir()))}.pem"
        made.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in certificates))
        return made

    @contextmanager
    def server(self, host: str = "localhost", ends: datetime = NOW + 9 * DAY) -> Iterator[str]:
        leaf = _issue("server", self.key, "Issuing", self.ca_key, ca=False, host=host, ends=ends)
        shown = self.file(leaf)
        shown.write_bytes(
            shown.read_bytes()
            + self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(shown)
        server = HTTPServer(("127.0.0.1", 0), _Answer)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"https://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join(30)
            server.server_close()


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_an_issuing_ca_that_is_no_root_is_enough(pki: Pki) -> None:
    with pki.server() as url:
        assert HttpClient(ca_file=pki.file(pki.ca)).get(url, server="A").status == 200
        # The control: the root alone, where the server does not show its issuer, is not.
        with pytest.raises(NetworkError, match="unable to get local issuer certificate"):
            HttpClient(ca_file=pki.file(pki.root)).get(url, server="A")
        other = Pki(pki.where)
        with pytest.raises(NetworkError, match="not trusted: ") as caught:
            HttpClient(ca_file=pki.file(other.ca)).get(url, server="A")
    assert caught.value.code == "tls-untrusted"


@pytest.mark.parametrize(
    ("host", "ends", "words", "hint"),
    [
        ("localhost", NOW - DAY, "certificate has expired", "clock"),
        ("elsewhere.example", NOW + DAY, "mismatch", "another name"),
    ],
)
def test_openssls_reason_is_told_and_the_hint_is_of_that_reason(
    pki: Pki, host: str, ends: datetime, words: str, hint: str
) -> None:
    with (
        pki.server(host, ends) as url,
        pytest.raises(NetworkError, match=words) as caught,
    ):
        HttpClient(ca_file=pki.file(pki.ca)).get(url, server="A")
    assert hint in (caught.value.hint or "")
    assert "HSMTOLL_CA_FILE" not in (caught.value.hint or "")
