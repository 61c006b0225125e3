"""Files of certificates as issuers deliver them: each form gives the bytes that are in it."""

from __future__ import annotations

import base64
import contextlib
import textwrap
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs7,
    pkcs12,
)

from hsmtoll.errors import ConfigurationError
from hsmtoll.x509.certificate_files import certificates_in
from tests.kit import pki

if TYPE_CHECKING:
    from hsmtoll.x509.certificate import Certificate

LEAF, INTER, ROOT = pki.good()
ALL = (LEAF, INTER, ROOT)


def cryptographys(each: Certificate) -> x509.Certificate:
    return x509.load_der_x509_certificate(each.der)


def p7b(encoding: Encoding) -> bytes:
    return pkcs7.serialize_certificates([cryptographys(each) for each in ALL], encoding)


def armoured(label: str, der: bytes) -> bytes:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode()


def pem(*certificates: Certificate) -> bytes:
    return "".join(each.pem() for each in certificates).encode()


def value(tag: int, contents: bytes) -> bytes:
    """One DER value."""
    size = len(contents)
    long = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, *([size] if size < 0x80 else [0x80 | len(long), *long])]) + contents


def open_ended(tag: int, contents: bytes) -> bytes:
    """One BER value of indefinite length (X.690 section 8.1.3.6), as some programs write PKCS#7."""
    return bytes([tag, 0x80]) + contents + b"\0\0"


def ber_p7b(*certificates: Certificate) -> bytes:
    signed = bytes.fromhex("06092a864886f70d010702")
    data = open_ended(0x30, bytes.fromhex("06092a864886f70d010701"))
    held = open_ended(0xA0, b"".join(each.der for each in certificates))
    inner = open_ended(0x30, b"\x02\x01\x01" + b"\x31\x00" + data + held + b"\x31\x00")
    return open_ended(0x30, signed + open_ended(0xA0, inner))


#: OpenSSL's CertAux: what the certificate is trusted for (serverAuth), and an alias.
AUX = value(0x30, value(0x30, bytes.fromhex("06082b06010505070301")) + value(0x0C, b"ours"))

FORMS = {
    "der": (LEAF.der, {LEAF}),
    "der one after another": (b"".join(each.der for each in ALL), {*ALL}),
    "der with ends of lines": (b"\n".join(each.der for each in ALL) + b"\r\n", {*ALL}),
    "p7b in der": (p7b(Encoding.DER), {*ALL}),
    "p7b in pem": (p7b(Encoding.PEM), {*ALL}),
    "p7b in ber": (ber_p7b(*ALL), {*ALL}),
    "p7b as windows labels it": (armoured("CERTIFICATE", p7b(Encoding.DER)), {*ALL}),
    "cms": (armoured("CMS", p7b(Encoding.DER)), {*ALL}),
    "trusted": (armoured("TRUSTED CERTIFICATE", LEAF.der + AUX), {LEAF}),
    "trusted without words": (armoured("TRUSTED CERTIFICATE", LEAF.der), {LEAF}),
    "byte order mark": (b"\xef\xbb\xbf" + pem(*ALL), {*ALL}),
    "utf-16": (pem(*ALL).decode().encode("utf-16"), {*ALL}),
    "crlf": (pem(*ALL).replace(b"\n", b"\r\n"), {*ALL}),
    "words of s_client": (b"0 s:C = SE\n" + pem(LEAF) + b"\xe5 1 s:\n" + pem(INTER), {LEAF, INTER}),
    "mixed": (pem(LEAF) + p7b(Encoding.PEM), {*ALL}),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_certificates_byte_by_byte(form: str) -> None:
    data, expected = FORMS[form]
    found = certificates_in(data, "F")
    assert {each.der for each in found} == {each.der for each in expected}


def refusal(data: bytes) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        certificates_in(data, "chain.p12")
    assert str(caught.value).startswith("chain.p12: ")
    assert caught.value.code == "certificate-file"
    return caught.value


def test_pkcs12_is_told_how_its_certificates_are_taken_out() -> None:
    whole = pkcs12.serialize_key_and_certificates(
        b"x", pki.rsa_key(), cryptographys(pki.leaf()), None, NoEncryption()
    )
    refused = refusal(whole)
    assert "PKCS#12" in str(refused)
    assert "openssl pkcs12 -in FILE -nokeys" in str(refused.hint)
    assert "outside of the device" in str(refused.hint)


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_private_key_in_der_is_refused(form: PrivateFormat) -> None:
    key = pki.rsa_key().private_bytes(Encoding.DER, form, NoEncryption())
    assert "private key" in str(refusal(key))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no certificate"),
        (b"hello\n", "no certificate"),
        (b"\0\xff" * 40, "no certificate"),
        (LEAF.der[:-1], "certificate 1 in it is not a certificate"),
        (LEAF.der + b"more", "what follows the first certificate is cut off, or no certificate"),
        (LEAF.der + INTER.der[:-1], "what follows the first certificate is cut off"),
        (p7b(Encoding.DER)[:-9], "certificate 1 in it is not a certificate"),
        (armoured("PKCS7", p7b(Encoding.DER)[:-9]), "certificate 1 in it is not a certificate"),
        (armoured("PKCS7", b"junk"), "certificate 1 in it is not a certificate"),
        (armoured("PKCS7", b""), "certificate 1 in it is not a certificate"),
        (ber_p7b(), "no certificate"),
        (value(0x30, b""), "certificate 1 in it is not a certificate"),
        (armoured("CERTIFICATE REQUEST", LEAF.der), "only a certificate request"),
        (armoured("CERTIFICATE", LEAF.der + AUX), "certificate 1 in it is not a certificate"),
    ],
)
def test_what_is_none_of_them_is_refused_in_one_line(data: bytes, says: str) -> None:
    assert says in str(refusal(data))


@pytest.mark.parametrize(
    "form", ["der", "der one after another", "p7b in der", "p7b in ber", "trusted"]
)
def test_no_cut_and_no_changed_byte_is_anything_but_refused_or_read(form: str) -> None:
    data, _ = FORMS[form]
    for at in range(0, len(data), 7):
        for other in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
            # Whatever else was raised would fail the test.
            with contextlib.suppress(ConfigurationError):
                assert certificates_in(other, "F")


def test_a_file_of_more_certificates_than_any_is_refused_and_2000_are_read() -> None:
    leaf = pki.good()[0]
    assert len(certificates_in(leaf.der * 2000, "F")) == 2000
    with pytest.raises(ConfigurationError, match="F: it holds more than 2000 certificates"):
        certificates_in(leaf.der * 2001, "F")
