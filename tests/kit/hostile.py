"""
Bytes that cost their reader more than others of the same length, and all who read foreign bytes.

Shapes are functions of a size in bytes; readers take the bytes and raise what they raise. Tests
count what a reader does with them, and a benchmark takes the time.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from hsmtoll import apis, der, jws
from hsmtoll.clock import offset_of, retry_after
from hsmtoll.customs import errors as customs_errors
from hsmtoll.customs import routing, submissions
from hsmtoll.errors import HsmTollError, sanitized
from hsmtoll.host.audit_log import FIRST, MEMBERS, stamp, verify
from hsmtoll.host.messages import RequestRejected, parse_body
from hsmtoll.hsm.pin import PinFile
from hsmtoll.http_messages import HttpResponse
from hsmtoll.jsonio import read_lenient
from hsmtoll.signing.verification import Expected, verify_grant
from hsmtoll.token import ClockReading, TokenRequest
from hsmtoll.tokens import exchange, records
from hsmtoll.tokens.exchange import TEST, Issued, exchange_post, grant_post
from hsmtoll.tokens.stores import StoredValue
from hsmtoll.x509 import certificate, certificate_checks, path_building, revocation
from hsmtoll.x509.certificate import MAX_DER, Certificate
from hsmtoll.x509.certificate_files import bundle_in
from tests.kit import pki

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KIB: Final = 1024
MIB: Final = 1024 * KIB

_TOKEN: Final = "eyJhbGciOiJSUzI1NiJ9." + "A1b2" * 2000
_ISSUED: Final = Issued(_TOKEN, 60)
_NOW: Final = ClockReading(wall=1e9, boot=1e3, boot_id="b")
_HEADERS: Final = {"x-correlationid": "a1" * 4000, "retry-after": "1" * 8000}


def filled(head: bytes, unit: bytes, tail: bytes) -> Callable[[int], bytes]:
    """*unit* as often as it has room between *head* and *tail*."""
    return lambda size: head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail


def _text(unit: bytes, name: bytes = b"error_description") -> Callable[[int], bytes]:
    return filled(b'{"' + name + b'": "', unit, b'"}')


def _members(size: int) -> bytes:
    return json.dumps({f"{number:x}": 0 for number in range(size // 11)}).encode()


def _nested(unit: bytes, end: bytes) -> Callable[[int], bytes]:
    return lambda size: unit * (size // len(unit + end)) + end * (size // len(unit + end))


#: Answers: JSON in many forms, and what is none.
ANSWERS: Final[dict[str, Callable[[int], bytes]]] = {
    "lists within lists": _nested(b"[", b"]"),
    "lists that do not end": filled(b"", b"[", b""),
    "objects within objects": filled(b"", b'{"a":', b""),
    "deep lists, many of them": filled(b"[", b"[" * 900 + b"]" * 900 + b",", b"0]"),
    "empty lists": filled(b"[", b"[],", b"0]"),
    "empty objects": filled(b"[", b"{},", b"0]"),
    "empty findings": filled(b'{"validationErrors":[', b"{},", b"{}]}"),
    "findings of a result": filled(
        b'{"status":"FAILURE","validationErrorList":[', b'{"field":"a"},', b"{}]}"
    ),
    "findings with a token": filled(
        b'{"validationErrors":[',
        b'{"field":"a","description":"' + _TOKEN.encode() + b'"},',
        b"{}]}",
    ),
    "members": _members,
    "one member again and again": filled(b"{", b'"a":0,', b'"a":0}'),
    "long text": _text(b"a"),
    "text of escapes": _text(b"\\u0001"),
    "text of backslashes": _text(b"\\\\"),
    "text of surrogates": _text(b"\\ud83d\\ude00"),
    "text of combining marks": _text("\u0315\u0327".encode()),
    "text of blanks": _text(b" "),
    "text of beginnings of ids": _text(b" (trace_id: "),
    "text of beginnings of tokens": _text(b"eyJ"),
    "text of tokens": _text(b"eyJaaaaaaaa."),
    "error_uri of codes": _text(b"MP-01", b"error_uri"),
    "error_uri of slashes": _text(b"/", b"error_uri"),
    "an endless number": filled(b'{"expires_in":', b"9", b"}"),
    "long numbers": filled(b"[", b"9" * 4300 + b",", b"0]"),
    "long fractions": filled(b"[", b"0." + b"1234567890" * 70 + b"e-320,", b"0]"),
    "numbers that are hard to round": filled(b"[", b"2.2250738585072011e-308,", b"0]"),
    "a huge exponent": filled(b'{"expires_in":1e', b"9", b"}"),
    "no numbers": filled(b"[", b"NaN,", b"0]"),
    "UTF-16": lambda size: '{"error": "'.encode("utf-16") + b"a\0" * (size // 2) + b'"\0}\0',
    "a page": filled(b"<html>", b"<a>", b""),
    "blanks": filled(b"{", b" ", b"}"),
    "any bytes": lambda size: bytes(range(256)) * (size // 256),
    "a token": lambda size: (
        b'{"token_type":"Bearer","expires_in":0,"access_token":"'
        + b"".join(b"%x" % number for number in range(size // 6))
        + b'"}'
    ),
    "a list for a token": filled(b'{"expires_in":60,"access_token":[', b'"a",', b"0]}"),
    "scopes": filled(
        b'{"token_type":"Bearer","expires_in":60,"access_token":"a","scope":"', b"a ", b'"}'
    ),
    "three segments of dots": filled(b"a.", b".", b".c"),
}


# ---------------------------------------------------------------------- certificates


def _tlv(tag: int, *content: bytes) -> bytes:
    body = b"".join(content)
    if len(body) < 0x80:
        return bytes([tag, len(body)]) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(size)]) + size + body


_seq = partial(_tlv, 0x30)
_set = partial(_tlv, 0x31)


def _oid(dotted: str) -> bytes:
    first, second, *others = map(int, dotted.split("."))
    raw = bytearray()
    for arc in (40 * first + second, *others):
        bits = [arc >> shift & 0x7F for shift in range(0, max(arc.bit_length(), 1), 7)]
        raw += bytes(0x80 | part for part in bits[:0:-1]) + bytes(bits[:1])
    return _tlv(6, bytes(raw))


#: An object identifier that is as short as one can be.
_SHORT: Final = b"\x06\x01\x2a"
_CN: Final = "2.5.4.3"


@cache
def _fields() -> Any:
    return der.certificate_fields(pki.good()[0].der)


def certificate_of(
    *extensions: tuple[str, bytes], subject: bytes | None = None, **fields: bytes
) -> bytes:
    """A certificate with these parts in place of ordinary ones; its signature fits nothing."""
    usual = _fields()
    written = [_seq(_oid(oid), _tlv(4, value)) for oid, value in extensions]
    algorithm = fields.get("algorithm", usual.algorithm)
    tbs = _seq(
        _tlv(0xA0, b"\x02\x01\x02"),
        fields.get("serial", usual.serial),
        algorithm,
        fields.get("issuer", usual.issuer),
        usual.validity,
        usual.subject if subject is None else subject,
        fields.get("spki", usual.spki),
        _tlv(0xA3, _seq(*written)),
    )
    return _seq(tbs, algorithm, fields.get("signature", usual.signature))


def _rdn(value: bytes, tag: int = 12, oid: bytes | None = None) -> bytes:
    return _set(_seq(oid or _oid(_CN), _tlv(tag, value)))


def _listed(oid: str, unit: bytes) -> Callable[[int], bytes]:
    """An extension that is a list of many *unit*."""
    return lambda size: certificate_of((oid, _seq(unit * ((size - 2 * KIB) // len(unit)))))


def _named(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: certificate_of(subject=_seq(unit * ((size - 2 * KIB) // len(unit))))


def rsa_spki(modulus: bytes, exponent: bytes) -> bytes:
    """SubjectPublicKeyInfo of these two numbers, DER without tag and length."""
    numbers = _seq(_tlv(2, modulus), _tlv(2, exponent))
    return _seq(_seq(_oid("1.2.840.113549.1.1.1"), b"\x05\x00"), _tlv(3, b"\0", numbers))


def _nest(size: int, depth: int) -> bytes:
    inner = b"\x30\x00" * ((size - 4 * KIB - 4 * depth) // 2)
    for _ in range(depth):
        inner = _seq(inner)
    return inner


def _directory(rdn: bytes) -> bytes:
    return _tlv(0xA4, _seq(rdn))


_MARKS: Final = ("\u0315\u0327" * 128).encode("utf-16-be")
_SEAL: Final = "1.3.6.1.5.5.7.1.3"

#: Certificates of a size.
CERTIFICATES: Final[dict[str, Callable[[int], bytes]]] = {
    "parts of a name": _named(_set(_seq(_SHORT, b"\x0c\x00"))),
    "empty parts of a name": _named(b"\x31\x00"),
    "parts of combining marks": _named(_rdn(_MARKS, 30)),
    "parts that grow": _named(_rdn(("\ufdfa" * 256).encode("utf-16-be"), 30)),
    "one part of many": lambda size: certificate_of(
        subject=_seq(_set(_seq(_oid(_CN), b"\x0c\x02aa") * ((size - 2 * KIB) // 11)))
    ),
    "alternative names": _listed("2.5.29.17", b"\x82\x00"),
    "alternative names of a directory": _listed(
        "2.5.29.17", _directory(_set(_seq(_SHORT, b"\x0c\x00")))
    ),
    "alternative names of marks": _listed("2.5.29.17", _directory(_rdn(_MARKS, 30))),
    "alternative names that are none": _listed("2.5.29.17", b"\xa4\x00"),
    "policies": _listed("2.5.29.32", _seq(_SHORT)),
    "policies of long arcs": _listed("2.5.29.32", _seq(_tlv(6, b"\x81" * 126 + b"\x01"))),
    "policies that are none": _listed("2.5.29.32", b"\x30\x00"),
    "purposes": _listed("2.5.29.37", _SHORT),
    "statements": _listed(_SEAL, _seq(_SHORT)),
    "types of a seal": lambda size: certificate_of(
        (_SEAL, _seq(_seq(_oid("0.4.0.1862.1.6"), _seq(_SHORT * ((size - 2 * KIB) // 3)))))
    ),
    "addresses of responders": _listed(
        "1.3.6.1.5.5.7.1.1", _seq(_oid("1.3.6.1.5.5.7.48.1"), b"\x86\x00")
    ),
    "addresses of lists": _listed("2.5.29.31", _seq(_tlv(0xA0, _tlv(0xA0, b"\x86\x00")))),
    "key identifiers": _listed("2.5.29.35", b"\x80\x00"),
    "basic constraints": _listed("2.5.29.19", b"\x01\x01\xff"),
    "permitted names": lambda size: certificate_of(
        ("2.5.29.30", _seq(_tlv(0xA0, _seq(_directory(_rdn(b"a"))) * ((size - 2 * KIB) // 20))))
    ),
    "a path length": lambda size: certificate_of(
        ("2.5.29.19", _seq(b"\x01\x01\xff", _tlv(2, b"\x7f" * (size - 2 * KIB))))
    ),
    "extensions": lambda size: certificate_of(
        *((f"1.2.3.{number}", b"") for number in range((size - 2 * KIB) // 16))
    ),
    "a serial number": lambda size: certificate_of(serial=_tlv(2, b"\x7f" * (size - 2 * KIB))),
    "a modulus": lambda size: certificate_of(spki=rsa_spki(b"\x7f" * (size - 2 * KIB), b"\x03")),
    "an exponent": lambda size: certificate_of(
        spki=rsa_spki(b"\x7f" * 256, b"\x7f" * (size - 2 * KIB))
    ),
    "a signature": lambda size: certificate_of(signature=_tlv(3, bytes(size - 2 * KIB))),
    "a salt": lambda size: certificate_of(
        algorithm=_seq(
            _oid("1.2.840.113549.1.1.10"), _seq(_tlv(0xA2, _tlv(2, b"\x7f" * (size // 2 - KIB))))
        )
    ),
    "values within values": lambda size: certificate_of(issuer=_nest(size, 58)),
    "values deeper than any": lambda size: certificate_of(issuer=_nest(size, size // 8)),
}


# ---------------------------------------------------------------------- files and lists

_SIGNED_DATA: Final = _oid("1.2.840.113549.1.7.2")


def _pkcs7(unit: bytes) -> Callable[[int], bytes]:
    return lambda size: _seq(
        _SIGNED_DATA,
        _tlv(0xA0, _seq(b"\x02\x01\x01", _tlv(0xA0, unit * ((size - 64) // len(unit))))),
    )


#: Files that should hold certificates.
FILES: Final[dict[str, Callable[[int], bytes]]] = {
    "empty values": filled(b"", b"\x30\x00", b""),
    "empty values on lines": filled(b"", b"\x30\x00\r\n", b""),
    "ends of lines": filled(b"\x30\x00", b"\r\n", b""),
    "open lengths": filled(b"", b"\x30\x80", b""),
    "open lengths that are closed": _nested(b"\x30\x80", b"\0\0"),
    "open lengths side by side": filled(b"\x30\x80", b"\x30\x80\0\0", b"\0\0"),
    "PKCS#7 of empty values": _pkcs7(b"\x30\x00"),
    "PKCS#7 of open lengths": _pkcs7(b"\x30\x80\0\0"),
    "PKCS#7 of other fields": lambda size: _seq(
        _SIGNED_DATA, _tlv(0xA0, _seq(b"\x02\x00" * ((size - 64) // 2)))
    ),
    "beginnings": filled(b"", b"-----BEGIN CERTIFICATE-----\n", b""),
    "beginnings of labels": filled(b"", b"-----BEGIN ", b""),
    "a long label": filled(b"-----BEGIN ", b"PRIVATE ", b""),
    "empty blocks": filled(b"", b"-----BEGIN PKCS7-----\n-----END PKCS7-----\n", b""),
    "blocks of empty values": filled(
        b"", b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", b""
    ),
    "a block of lines": filled(
        b"-----BEGIN CERTIFICATE-----\n", b" A\n", b"-----END CERTIFICATE-----\n"
    ),
    "halves of characters": filled(b"\xff\xfe", b"\x00\xd8", b""),
}


@cache
def _revocable() -> tuple[Certificate, Certificate]:
    return pki.leaf("Root", pki.ec_key(0)), pki.authority("Root", pki.ec_key(0))


def _x509(one: Certificate) -> x509.Certificate:
    return x509.load_der_x509_certificate(one.der)


def _responded(size: int) -> bytes:
    """Signed by nobody that is asked, with many certificates by whom it could be."""
    leaf, root = _revocable()
    delegate = pki.issue(pki.name("Delegate"), pki.ec_key(3), pki.name("Root"), pki.ec_key(0))
    many = [_x509(delegate)] * max(1, size // len(delegate.der) - 2)
    builder = ocsp.OCSPResponseBuilder().add_response(
        _x509(leaf), _x509(root), hashes.SHA256(), ocsp.OCSPCertStatus.GOOD,
        pki.NOW, None, None, None,
    )  # fmt: skip
    stranger = _x509(pki.authority("Stranger", pki.ec_key(9)))
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.NAME, stranger).certificates(many)
    return builder.sign(pki.ec_key(9), hashes.SHA256()).public_bytes(Encoding.DER)


def _revoked(size: int) -> bytes:
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=_x509(_revocable()[1]).subject,
        last_update=pki.NOW,
        next_update=pki.NOW + pki.DAY,
        revoked_certificates=[
            x509.RevokedCertificateBuilder()
            .serial_number(number + 1)
            .revocation_date(pki.NOW)
            .build()
            for number in range(size // 24)
        ],
    )
    return builder.sign(pki.ec_key(0), hashes.SHA256()).public_bytes(Encoding.DER)


#: What revocation is read from.
LISTS: Final[dict[str, Callable[[int], bytes]]] = {
    "certificates of a responder": _responded,
    "revoked certificates": _revoked,
    "open lengths": filled(b"", b"\x30\x80", b""),
    "beginnings": filled(b"", b"-----BEGIN X509 CRL-----\n", b""),
}

#: Headers of an answer.
HEADERS: Final[dict[str, Callable[[int], bytes]]] = {
    unit: filled(head, unit.encode(), tail)
    for head, unit, tail in (
        (b"", "9", b""), (b"Tue, ", "9", b" Dec 2026 12:00:00 GMT"), (b"", "Tue, ", b""),
        (b"Tue, 01 Dec 2026 12:00:00 +", "8", b""), (b"", ":", b""), (b"1 Jan 2026 ", "1:", b""),
        (b"", "a ", b""), (b"", "eyJ", b""), (b"eyJaaaaaaaa", ".", b""), (b"", "\x01", b""),
    )
}  # fmt: skip


@cache
def record() -> bytes:
    """A line of an audit log, and no more than that."""
    members = dict.fromkeys(MEMBERS) | {
        "seq": 1, "time": stamp(1e9), "prev": FIRST, "event": "intent", "jti": "a",
    }  # fmt: skip
    return json.dumps(members).encode()


def _line(old: bytes, head: bytes, unit: bytes, tail: bytes) -> Callable[[int], bytes]:
    def made(size: int) -> bytes:
        assert old in record()
        inside = filled(head, unit, tail)(size - len(record()))
        return record().replace(old, inside, 1) + b"\n"

    return made


#: Lines of an audit log.
LINES: Final[dict[str, Callable[[int], bytes]]] = {
    "a long caller": _line(b'"caller": null', b'"caller": "', b"a", b'"'),
    "options": _line(b'"options": null', b'"options": {"a": [', b'"",', b'""]}'),
    "options within options": _line(b'"options": null', b'"options": ', b"[", b""),
    "a long number": _line(b'"iat": null', b'"iat": 1', b"9", b""),
    "blanks": _line(b'"iat": null', b'"iat": ', b" ", b"1"),
    "empty lines": filled(b"", b"\n", b""),
    "no line": filled(b"", b"a", b""),
}

#: What a command or a file gives for a PIN.
PINS: Final[dict[str, Callable[[int], bytes]]] = {
    unit: filled(b"", unit.encode(), b"") for unit in ("PIN", "export ", "a #", "\u0327", "9")
}


# ---------------------------------------------------------------------- readers


@dataclass(frozen=True)
class Reader:
    """
    Who reads foreign bytes: how many at most, and shapes for it.
    """

    read: Callable[[bytes], object]
    most: int
    shapes: dict[str, Callable[[int], bytes]]

    def __call__(self, raw: bytes) -> None:
        """Read, whatever comes of it but a mistake of ours."""
        with contextlib.suppress(HsmTollError, ValueError, RequestRejected):
            self.read(raw)


def _response(status: int, body: bytes, method: str = "POST") -> httpx.Response:
    sent = httpx.Request(method, "https://x/", headers={"authorization": f"Bearer {_TOKEN}"})
    return httpx.Response(status, headers=_HEADERS, content=body, request=sent)


_ROAD: Final = apis.named("road")
_SCOPE: Final = "toll:movement/road"


def _result(body: bytes) -> None:
    answer = _response(200, body)
    result = submissions._result(answer, _ROAD, "id")
    if result is not None:
        submissions._receipt(result, "id", customs_errors.bearer_of(answer))


def _whole_certificate(raw: bytes) -> None:
    """What a doctor and a signer do with one."""
    certificate._read.cache_clear()
    one = Certificate.load(raw)
    for identity in ("eseal", "norwegian"):
        certificate_checks.leaf_faults(one, identity=identity, now=pki.NOW)
        one.consumer_id(identity)
    built = path_building.build(one, [one, *pki.good()], now=pki.NOW)
    assert built.explain()
    assert one.serial_hex


@cache
def _constrained() -> tuple[Certificate, Certificate]:
    """Two CAs with thousands of names: one permits a name at last, one excludes all the others."""

    def name(oid: bytes) -> bytes:
        return _seq(_directory(_set(_seq(oid, b"\x0c\x00"))))

    others = name(b"\x06\x01\x2b") * 3000
    named = ((0xA0, others + name(_SHORT)), (0xA1, others))
    permitting, excluding = (
        Certificate.load(certificate_of(("2.5.29.30", _seq(_tlv(kind, names)))))
        for kind, names in named
    )
    return permitting, excluding


def _allowed(raw: bytes) -> None:
    certificate._read.cache_clear()
    for above in _constrained():
        above.allows(Certificate.load(raw))


def _proven(raw: bytes) -> None:
    request = TokenRequest(_SCOPE)
    expected = Expected(audience=TEST.issuer, family="eseal")
    verify_grant(raw.decode("latin-1"), request, expected, sent=1e9, received=1e9)


def _grant(header: Callable[[int], bytes], claims: Callable[[int], bytes]) -> Any:
    def made(size: int) -> bytes:
        parts = [
            base64.urlsafe_b64encode(part(3 * size // 8 - 16)).rstrip(b"=")
            for part in (header, claims)
        ]
        return b".".join((*parts, b"AAAA"))

    return made


def _chain(of: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """A header with a certificate of that form, ten times."""

    def made(size: int) -> bytes:
        one = base64.b64encode(of(3 * (size - 200) // 40)).decode("ascii")
        return json.dumps({"alg": "RS256", "x5c": [one] * 10}).encode()

    return made


def _small(size: int) -> bytes:
    del size
    return b"{}"


_GRANTS: Final[dict[str, Callable[[int], bytes]]] = {
    **{name: _grant(_small, shape) for name, shape in ANSWERS.items()},
    **{f"{name} in ten certificates": _grant(_chain(CERTIFICATES[name]), _small)
       for name in ("parts of a name", "purposes", "permitted names")},
    "dots": filled(b"", b".", b""),
}  # fmt: skip


def _verified(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "audit-000000000001.jsonl").write_bytes(raw)
        verify(Path(place), _AUDITOR.public_key())


_AUDITOR: Final = Ed25519PrivateKey.generate()


def _checkpoints(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "audit-000000000001.jsonl").write_bytes(record() + b"\n")
        (Path(place) / "checkpoints.jsonl").write_bytes(raw + b"\n")
        verify(Path(place), _AUDITOR.public_key())


def _pin(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "pin"
        file.touch(0o600)
        file.write_bytes(raw)
        PinFile(file).read(device="lab")


def _header(raw: bytes) -> None:
    text = raw.decode("latin-1")
    retry_after({"retry-after": text}, now=0.0)
    offset_of({"date": text}, sent=_NOW, received=_NOW)
    sanitized(text, _TOKEN)


def _stored(raw: bytes) -> None:
    for left in (None, 10.0):
        records.read("key", StoredValue(raw, left), now=_NOW, longest=100.0)


def _revocation(read: Callable[..., object]) -> Callable[[bytes], object]:
    return lambda raw: read(raw, *_revocable(), now=pki.NOW)


def _of_maskinporten(status: int) -> Callable[[bytes], object]:
    def read(body: bytes) -> object:
        post = grant_post(TEST, _TOKEN)
        return exchange.read_subject(HttpResponse(status, _HEADERS, body), post, scope=_SCOPE)

    return read


def _of_customs(status: int) -> Callable[[bytes], object]:
    post = exchange_post(TEST, _ISSUED)
    return lambda body: exchange.read_issued(HttpResponse(status, _HEADERS, body), post)


#: Everybody who reads what others wrote.
READERS: Final[dict[str, Reader]] = {
    **{f"Maskinporten, {status}": Reader(_of_maskinporten(status), MIB, ANSWERS)
       for status in (200, 400, 429, 503)},
    **{f"Customs' exchange, {status}": Reader(_of_customs(status), MIB, ANSWERS)
       for status in (200, 400, 503)},
    "an error of Customs": Reader(
        lambda body: customs_errors.check(_response(400, body), _ROAD, now=0.0), MIB, ANSWERS),
    "a result of Customs": Reader(_result, MIB, ANSWERS),
    "a receipt of Customs": Reader(
        lambda body: submissions._request_id(_response(200, body), _ROAD, "transport", {}),
        MIB, ANSWERS),
    "a batch of the feed": Reader(
        lambda body: routing._batch(_response(200, body, "GET"), _ROAD, None, 0.0), MIB, ANSWERS),
    "any other answer": Reader(read_lenient, MIB, ANSWERS),
    "headers": Reader(_header, 100 * KIB, HEADERS),
    "an assertion": Reader(
        lambda raw: jws.read_unverified(raw.decode("latin-1")), 64 * KIB, _GRANTS),
    "a grant of a host": Reader(_proven, 64 * KIB, _GRANTS),
    "a request to a host": Reader(parse_body, 16 * KIB, ANSWERS),
    "a stored token": Reader(_stored, 256 * KIB, ANSWERS),
    "a certificate": Reader(_whole_certificate, MAX_DER, CERTIFICATES),
    "a certificate below a CA": Reader(_allowed, MAX_DER, CERTIFICATES),
    "a file of certificates": Reader(lambda raw: bundle_in(raw, "F"), MIB, FILES | LISTS),
    "a revocation list": Reader(_revocation(revocation.by_crl), MIB, LISTS | FILES),
    "an answer of a responder": Reader(_revocation(revocation.by_ocsp), MIB, LISTS | FILES),
    "a line of an audit log": Reader(_verified, MIB, LINES | ANSWERS),
    "a checkpoint": Reader(_checkpoints, MIB, ANSWERS),
    "a PIN": Reader(_pin, MIB, PINS),
}  # fmt: skip


def cases(size: Callable[[Reader], int]) -> Iterator[tuple[str, str, Reader, bytes]]:
    """Each reader with each of its shapes: two names, the reader, and the bytes of that *size*."""
    for who, reader in READERS.items():
        for what, shape in reader.shapes.items():
            yield who, what, reader, shape(size(reader))
