"""
Certificate files in the formats that issuers deliver: PEM, DER and PKCS#7.

Parses bytes; each certificate keeps its original encoding. *No signature is verified.*
"""

from __future__ import annotations

import base64
import binascii
import re
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from hsmtoll.der import ber_values, value_at
from hsmtoll.errors import ConfigurationError
from hsmtoll.x509.certificate import Certificate

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_CERTIFICATES", "Bundle", "Unreadable", "bundle_in", "certificates_in"]

#: PEM labels. In the third, OpenSSL appends its own trust settings to the certificate.
_CERTIFICATE: Final = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")
_PKCS7: Final = ("PKCS7", "CMS", "PKCS #7 SIGNED DATA")

#: RFC 5652 section 5.1: id-signedData (1.2.840.113549.1.7.2), and the number of SignedData's
#: fields.
_SIGNED_DATA: Final = bytes.fromhex("2a864886f70d010702")
_FIELDS: Final = 6
_SEQUENCE, _INTEGER, _OID, _CERTIFICATES = 0x30, 0x02, 0x06, 0xA0
#: RFC 7292 section 4: the version of every PKCS#12 file.
_PKCS12_VERSION: Final = b"\x03"

#: Maximum certificates of one file. An operating system's set of trusted roots has about 150.
MAX_CERTIFICATES: Final = 2_000
_LINE_ENDS: Final = re.compile(rb"[\r\n]*")


class Unreadable(NamedTuple):
    """A certificate of a file that cannot be parsed: its position, its bytes, the reason."""

    where: str
    der: bytes
    why: str


class Bundle(NamedTuple):
    """The certificates of a file, in its order, and those that cannot be parsed."""

    certificates: tuple[Certificate, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()


def bundle_in(data: bytes, name: str) -> Bundle:
    """
    The certificates in *data*, the bytes of the file *name*. One that cannot be parsed does not
    hide the others.

    Formats: PEM (RFC 7468) with any text between, concatenated DER, and PKCS#7 in PEM or DER; other
    PEM blocks are skipped. Raises ConfigurationError (``certificate-file``) if no certificate can
    be parsed, for more than `MAX_CERTIFICATES`, for PKCS#12, and for a private key, because more
    people may read a certificate file than a key.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data.decode("utf-16", "replace").encode()
    if b"-----BEGIN " in data:
        ders = _from_pem(data, name)
    else:
        ders = (each for one in _concatenated(data, name) for each in _unwrapped(one, name))
    found: list[Certificate] = []
    unreadable: list[Unreadable] = []
    for number, der in enumerate(ders, 1):
        if number > MAX_CERTIFICATES:
            raise _unusable(
                name,
                f"it holds more than {MAX_CERTIFICATES} certificates",
                hint="give a file with the certificates of your chain alone",
            )
        where = f"certificate {number} in {name}"
        if isinstance(der, str):
            unreadable.append(Unreadable(where, b"", der))
            continue
        try:
            found.append(Certificate.load(der))
        except ValueError as exc:
            unreadable.append(Unreadable(where, der, str(exc)))
    if not found:
        if unreadable:
            why = unreadable[0].why
            raise _unusable(name, f"certificate 1 in it is {why}")
        raise _unusable(
            name,
            "it holds no certificate"
            + (", only a certificate request" if b"CERTIFICATE REQUEST-----" in data else ""),
            hint="PEM, DER (.cer, .crt) or PKCS#7 (.p7b) is expected, as the certificate's "
            "issuer delivers it",
        )
    return Bundle(tuple(found), tuple(unreadable))


def certificates_in(data: bytes, name: str) -> tuple[Certificate, ...]:
    """The certificates of `bundle_in`, with its errors."""
    return bundle_in(data, name).certificates


def _concatenated(data: bytes, name: str) -> Iterator[bytes]:
    """The concatenated DER values of a file; line ends between them are skipped."""
    at = 0
    while data[:1] == bytes([_SEQUENCE]) and at < len(data):
        try:
            value = value_at(data, at)
        except ValueError:
            if at:
                what = "what follows the first certificate is cut off, or no certificate"
                raise _unusable(name, what) from None
            # It may be BER, which PKCS#7 permits.
            value = data
        yield value
        between = _LINE_ENDS.match(data, at + len(value))
        at = between.end() if between else len(data)


def _from_pem(data: bytes, name: str) -> Iterator[bytes | str]:
    """The DER of each certificate, or the reason (str) why a block cannot be decoded."""
    # The text between the blocks may have any encoding (RFC 7468 section 2).
    text = data.decode("utf-8", "replace")
    if re.search(r"-----BEGIN [^-\r\n]*PRIVATE KEY", text):
        raise _private_key(name)
    # Not one regular expression for a whole block: with many BEGIN lines it takes quadratic time.
    begun = (part.partition("-----") for part in text.split("-----BEGIN ")[1:])
    blocks = [
        (label, *rest.partition(f"-----END {label}-----"))
        for label, _, rest in begun
        if label in (*_CERTIFICATE, *_PKCS7)
    ]
    for label, body, end, _ in blocks:
        if not end:
            yield "cut off: it has no end"
            continue
        try:
            der = base64.b64decode("".join(body.split()), validate=True)
        except binascii.Error:
            yield "not base64"
            continue
        # Windows writes PKCS#7 with the label CERTIFICATE: the content decides.
        yield from _unwrapped(der, name, trusted=label == "TRUSTED CERTIFICATE")


def _unwrapped(der: bytes, name: str, *, trusted: bool = False) -> Iterator[bytes]:
    """The certificates of one value: itself, or those of a PKCS#7 file."""
    try:
        # islice: only the first value is needed, and the file may have any size.
        [(tag, contents, whole)] = islice(ber_values(der), 1)
        inner = ber_values(contents if tag == _SEQUENCE else b"")
        first, value, _ = next(inner, (0, b"", b""))
        if first == _OID and value == _SIGNED_DATA:
            [(_, wrapped, _)] = islice(inner, 1)
            [(_, signed, _)] = islice(ber_values(wrapped), 1)
            for kind, content, _ in islice(ber_values(signed), _FIELDS):
                if kind == _CERTIFICATES:
                    yield from (each for form, _, each in ber_values(content) if form == _SEQUENCE)
            return
    except ValueError:
        # Truncated, or not ASN.1: Certificate.load raises the error for it.
        yield der
        return
    if first == _INTEGER and value == _PKCS12_VERSION:
        raise _unusable(
            name,
            "it is a PKCS#12 file, which may hold a private key",
            hint="take the certificates out: openssl pkcs12 -in FILE -nokeys -out chain.pem\n"
            "a private key in it has been outside of the device: use one that the device generated "
            "(hsmtoll key generate)",
        )
    if first == _INTEGER:
        raise _private_key(name)
    yield whole if trusted else der


def _private_key(name: str) -> ConfigurationError:
    return _unusable(name, "it holds a private key; give a file with certificates only")


def _unusable(name: str, what: str, *, hint: str | None = None) -> ConfigurationError:
    return ConfigurationError(f"{name}: {what}", hint=hint, code="certificate-file")
