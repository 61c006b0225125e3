"""What one certificate says."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_public_key,
)
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID, ObjectIdentifier

from hsmtoll.errors import ConfigurationError
from hsmtoll.x509.certificate import MAX_DER, Certificate
from hsmtoll.x509.certificate_files import certificates_in
from tests.kit import pki


def _der(*parts: bytes, tag: int = 0x30) -> bytes:
    body = b"".join(parts)
    size = bytes([len(body)]) if len(body) < 128 else bytes([0x82, *len(body).to_bytes(2, "big")])
    return bytes([tag]) + size + body


def _oid(dotted: str) -> bytes:
    # X.690 section 8.19: base 128, the first two arcs in one.
    first, second, *rest = map(int, dotted.split("."))
    content = b""
    for arc in (40 * first + second, *rest):
        groups = [arc & 0x7F]
        above = arc >> 7
        while above:
            groups.insert(0, above & 0x7F | 0x80)
            above >>= 7
        content += bytes(groups)
    return _der(content, tag=6)


def _qc(*statements: bytes) -> tuple[x509.ExtensionType, bool]:
    value = _der(*statements)
    return x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.5.5.7.1.3"), value), False


COMPLIANCE = _der(_oid("0.4.0.1862.1.1"))
QSCD = _der(_oid("0.4.0.1862.1.4"))
ESEAL = _der(_oid("0.4.0.1862.1.6"), _der(_oid("0.4.0.1862.1.6.2")))
ESIGN = _der(_oid("0.4.0.1862.1.6"), _der(_oid("0.4.0.1862.1.6.1")))
LEGAL = _der(_oid("1.3.6.1.5.5.7.11.2"), _der(_oid("0.4.0.194121.1.2")))


def test_it_says_what_cryptography_says() -> None:
    certificate = pki.good()[1]
    judge = x509.load_der_x509_certificate(certificate.der)
    assert certificate.serial == judge.serial_number
    assert certificate.not_before == judge.not_valid_before_utc
    assert certificate.not_after == judge.not_valid_after_utc
    assert certificate.sha256 == judge.fingerprint(hashes.SHA256()).hex()
    assert certificate.tbs == judge.tbs_certificate_bytes
    assert certificate.signature.value == judge.signature
    assert certificate.spki_der == pki.spki(pki.ec_key(1))
    assert (certificate.is_ca, certificate.path_length) == (True, 0)
    assert certificate.key_usage == frozenset({"keyCertSign", "cRLSign"})
    ski = judge.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert certificate.subject_key_id == ski.digest
    aki = judge.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert certificate.authority_key_id == aki.key_identifier
    assert certificate.critical == {"2.5.29.15", "2.5.29.19"}


def test_pss_without_mgf1_or_without_parameters_is_not_known() -> None:
    good = pki.authority("CA", pki.rsa_key(), pss=True)
    assert good.signature[:4] == ("pss", "sha256", "sha256", 32)
    mgf1 = _oid("1.2.840.113549.1.1.8")
    other = Certificate.load(_changed(good.der, mgf1, _oid("1.2.840.113549.1.1.99")))
    assert other.signature.scheme == "unknown"
    made: Any = asn1.Certificate
    bare = made.load(good.der)
    bare["signature_algorithm"] = bare["tbs_certificate"]["signature"] = {"algorithm": "rsassa_pss"}
    assert Certificate.load(bare.dump(force=True)).signature.scheme == "unknown"


def test_every_root_of_this_system_is_read_as_cryptography_reads_it() -> None:
    bundle = Path("/etc/ssl/certs/ca-certificates.crt").read_text(encoding="utf-8")
    found = certificates_in(bundle.encode(), "the bundle")
    assert len(found) == bundle.count("BEGIN CERTIFICATE")
    for certificate in found:
        if certificate.serial <= 0:
            continue  # cryptography warns about these, and warnings are errors here
        judge = x509.load_der_x509_certificate(certificate.der)
        assert certificate.tbs == judge.tbs_certificate_bytes
        assert certificate.not_after == judge.not_valid_after_utc
        assert certificate.self_issued
        assert certificate.spki_der
        assert load_der_public_key(certificate.spki_der) == judge.public_key()


def test_the_rsa_key_is_the_one_that_was_certified() -> None:
    certificate = pki.leaf()
    numbers = pki.rsa_key().public_key().public_numbers()
    assert certificate.public_key is not None
    assert (certificate.public_key.modulus, certificate.public_key.exponent) == (
        numbers.n,
        numbers.e,
    )
    assert (certificate.key_type, certificate.key_bits) == ("rsa", 2048)


@pytest.mark.parametrize(
    ("key", "kind", "bits"),
    [
        (pki.ec_key(), "ec:P-256", 256),
        (ec.generate_private_key(ec.SECP384R1()), "ec:P-384", 384),
        (ec.generate_private_key(ec.SECP521R1()), "ec:P-521", 521),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519", 256),
    ],
)
def test_other_keys_are_named_and_are_no_rsa_key(key: pki.Key, kind: str, bits: int) -> None:
    certificate = pki.leaf(key=key)
    assert (certificate.key_type, certificate.key_bits) == (kind, bits)
    assert certificate.public_key is None


@pytest.mark.parametrize("kind", [_ASN1Type.UTF8String, _ASN1Type.PrintableString])
def test_names_are_equal_though_their_bytes_are_not(kind: _ASN1Type) -> None:
    plain = pki.leaf(subject=pki.name("Example Seal", org="Example AB"))
    other = pki.leaf(subject=pki.name("EXAMPLE   seal", org="example AB ", kind=kind))
    assert other.subject != plain.subject
    assert other.subject_key == plain.subject_key
    different = pki.leaf(subject=pki.name("ExampleSeal", org="Example AB", kind=kind))
    assert different.subject_key != plain.subject_key
    swapped = pki.leaf(subject=pki.name("Example AB", org="Example Seal"))
    assert swapped.subject_key != plain.subject_key


def test_the_parts_of_one_relative_name_have_no_order() -> None:
    one = x509.NameAttribute(NameOID.COMMON_NAME, "A")
    two = x509.NameAttribute(NameOID.USER_ID, "B")
    single = pki.leaf(subject=x509.Name([x509.RelativeDistinguishedName([one, two])]))
    double = pki.leaf(subject=x509.Name([x509.RelativeDistinguishedName([two, one])]))
    apart = pki.leaf(subject=x509.Name([one, two]))
    assert single.subject_key == double.subject_key != apart.subject_key


def test_a_name_is_shown_in_the_order_of_rfc_4514_and_escaped() -> None:
    shown = pki.leaf(subject=pki.name('A, "B"', org="#C", orgids=["VATDE-1"], country="DE"))
    assert shown.subject == 'CN=A\\, \\"B\\",organizationIdentifier=VATDE-1,O=\\#C,C=DE'


def test_terminal_escapes_in_a_name_are_not_shown() -> None:
    hostile = pki.leaf(subject=pki.name("\x1b[31mred\x07\r\nhsmtoll: fine", org="x" * 60))
    assert "\x1b" not in hostile.subject
    assert "\n" not in hostile.subject
    assert "\\x1b[31mred" in hostile.subject
    assert hostile.common_name == "\x1b[31mred\x07\r\nhsmtoll: fine"
    long = pki.leaf(subject=x509.Name([pki.name(f"{n:064}").rdns[0] for n in "1234567"]))
    assert len(long.subject) == 300


def test_both_ends_of_the_validity_belong_to_it() -> None:
    certificate = pki.leaf(start=pki.NOW, end=pki.NOW + 10 * pki.DAY)
    second = timedelta(seconds=1)
    assert certificate.valid_at(pki.NOW)
    assert not certificate.valid_at(pki.NOW - second)
    assert certificate.valid_at(pki.NOW + 10 * pki.DAY)
    assert not certificate.valid_at(pki.NOW + 10 * pki.DAY + second)
    assert certificate.days_left(pki.NOW) == 10
    assert certificate.days_left(pki.NOW + second) == 9
    assert certificate.days_left(pki.NOW + 11 * pki.DAY) == -1


def test_the_end_of_time_can_be_read() -> None:
    certificate = pki.leaf(end=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
    assert certificate.not_after.year == 9999


@pytest.mark.parametrize(("serial", "text"), [(1, "01"), (0xABC, "0abc"), (0xFF00, "ff00")])
def test_the_serial_number_is_shown_as_tools_do(serial: int, text: str) -> None:
    assert pki.leaf(serial=serial).serial_hex == text


@pytest.mark.parametrize(
    ("subject", "number"),
    [
        (pki.name("A", serial="991825827"), "991825827"),
        (pki.name("A", serial="99182582"), None),
        (pki.name("A", serial="991825827", org="B - 123456789"), "991825827"),
        (pki.name("A", org="B AS - 123456789"), "123456789"),
        (pki.name("A", org="B AS -123456789"), None),
        (pki.name("A", org="B AS - 1234567890"), None),
        (pki.name("A", org="B - 123456789", orgids=["NTRNO-991825827"]), "123456789"),
        (pki.name("A", org="B", orgids=["NTRNO-991825827"]), "991825827"),
        (pki.name("A", org="B", orgids=["PSDNO-FSA-991825827"]), "991825827"),
        (pki.name("A", org="B", orgids=["991825827"]), "991825827"),
        (pki.name("A", org="B", orgids=["NTRSE-5566778899"]), None),
        (pki.name("A", org="B", orgids=["ntrno-991825827"]), None),
        (pki.name("A", serial="٩٩١٨٢٥٨٢٧"), None),
        (pki.name("A"), None),
    ],
)
def test_the_organisation_number_is_found_in_digdirs_order(
    subject: x509.Name, number: str | None
) -> None:
    certificate = pki.leaf(subject=subject)
    assert certificate.orgno() == number
    assert certificate.consumer_id("norwegian") == (None if number is None else f"0192:{number}")


@pytest.mark.parametrize(
    "identifier",
    [
        "NTRSE-5566778899",
        "NTRNO-NOFOR.991825827",
        "VATEL-123456789",
        "PSDNO-FSA-991825827",
        "LEIXG-529900T8BM49AURSDO55",
        "EI:SE-5567",
        "not any form  of ETSI",
        " spaces Count ",
    ],
)
def test_an_organization_identifier_is_verbatim_and_no_pattern_is_wanted(identifier: str) -> None:
    certificate = pki.leaf(subject=pki.name("A", orgids=[identifier]))
    assert certificate.organization_identifiers == (identifier,)
    assert certificate.consumer_id("eseal") == identifier


@pytest.mark.parametrize("identifiers", [[], ["NTRSE-1", "NTRSE-2"]])
def test_none_or_two_organization_identifiers_make_no_consumer(identifiers: list[str]) -> None:
    certificate = pki.leaf(subject=pki.name("A", orgids=identifiers))
    assert certificate.organization_identifiers == tuple(identifiers)
    assert certificate.consumer_id("eseal") is None


@pytest.mark.parametrize(
    ("statements", "qualified", "types", "semantics"),
    [
        ([COMPLIANCE, ESEAL, QSCD, LEGAL], True, ("eseal",), "legal person"),
        ([COMPLIANCE, ESIGN], False, ("esign",), None),
        ([ESEAL], False, ("eseal",), None),
        ([LEGAL], False, (), "legal person"),
        ([_der(_oid("0.4.0.194121.1.1"))], False, (), "natural person"),
    ],
)
def test_qualified_means_compliance_and_the_type_eseal(
    statements: list[bytes], qualified: bool, types: tuple[str, ...], semantics: str | None
) -> None:
    certificate = pki.leaf(extensions=[_qc(*statements)])
    assert certificate.qualified_eseal is qualified
    assert certificate.qc.types == types
    assert certificate.qc.semantics == semantics
    assert certificate.qc.qscd is (QSCD in statements)
    assert certificate.client_amr("eseal") == ("QCForESeal" if qualified else "CForESeal")
    assert certificate.client_amr("norwegian") == "virksomhetssertifikat"


def test_without_extensions_everything_is_absent() -> None:
    bare = pki.issue(
        pki.name("A"), pki.rsa_key(), pki.name("B"), pki.ec_key(), ca=None, key_ids=False
    )
    assert (bare.is_ca, bare.path_length, bare.key_usage, bare.ext_key_usage) == (
        False,
        None,
        None,
        None,
    )
    assert (bare.policies, bare.ocsp_urls, bare.crl_urls) == ((), (), ())
    assert (bare.subject_key_id, bare.authority_key_id) == (None, None)
    assert bare.qc.types == ()
    assert bare.critical == frozenset()


def test_policies_purposes_and_addresses_are_read() -> None:
    policy = x509.CertificatePolicies(
        [x509.PolicyInformation(ObjectIdentifier("0.4.0.194112.1.1"), ["https://cps.example/"])]
    )
    purposes = x509.ExtendedKeyUsage([ObjectIdentifier("1.3.6.1.5.5.7.3.2")])
    access = x509.AuthorityInformationAccess(
        [
            x509.AccessDescription(
                ObjectIdentifier(oid),
                x509.UniformResourceIdentifier(f"http://{host}.example/a%20b"),
            )
            for oid, host in (("1.3.6.1.5.5.7.48.2", "ca"), ("1.3.6.1.5.5.7.48.1", "ocsp"))
        ]
    )
    points = x509.CRLDistributionPoints(
        [
            x509.DistributionPoint(
                [x509.UniformResourceIdentifier("http://crl.example/1.crl"), x509.DNSName("crl")],
                None,
                None,
                None,
            ),
            x509.DistributionPoint(None, None, None, [x509.DirectoryName(pki.name("CRL"))]),
        ]
    )
    certificate = pki.leaf(
        extensions=[(policy, False), (purposes, False), (access, False), (points, False)]
    )
    assert certificate.policies == ("0.4.0.194112.1.1",)
    assert certificate.ext_key_usage == ("1.3.6.1.5.5.7.3.2",)
    assert certificate.ocsp_urls == ("http://ocsp.example/a%20b",)
    assert certificate.crl_urls == ("http://crl.example/1.crl",)


def test_a_critical_extension_nobody_knows_is_named() -> None:
    strange = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    assert pki.leaf(extensions=[(strange, True)]).unknown_critical == ("1.2.3.4",)
    assert pki.leaf(extensions=[(strange, False)]).unknown_critical == ()


def test_two_places_that_name_different_algorithms_are_not_believed() -> None:
    good = pki.leaf()
    assert good.signature[:3] == ("ecdsa", "sha256", "sha256")
    sha256, sha512 = _oid("1.2.840.10045.4.3.2"), _oid("1.2.840.10045.4.3.4")
    at = good.der.rindex(sha256)
    changed = Certificate.load(good.der[:at] + sha512 + good.der[at + len(sha512) :])
    assert changed.signature.scheme == "unknown"


def _changed(der: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert old in der
    return der.replace(old, new)


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "only a tag",
        "cut",
        "one byte more",
        "twice",
        "indefinite length",
        "base64",
        "zeros",
        "no time",
        "an extension twice",
        "an extension of another form",
        "a year 0",
        "an RSA key of zeros",
        "too long",
    ],
)
def test_what_is_not_one_whole_certificate_is_a_value_error(kind: str) -> None:
    good = pki.leaf().der
    strange = (
        x509.UnrecognizedExtension(ObjectIdentifier(oid), b"") for oid in ("1.2.3.4", "1.2.3.5")
    )
    two = pki.leaf(extensions=[(extension, False) for extension in strange]).der
    late = pki.leaf(end=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)).der
    size = pki.rsa_key().public_key().public_numbers().n
    modulus = b"\x00" + size.to_bytes(256, "big")
    bad = {
        "empty": b"",
        "only a tag": b"\x30",
        "cut": good[:-1],
        "one byte more": good + b"\x00",
        "twice": good + good,
        "indefinite length": b"\x30\x80" + good[4:] + b"\x00\x00",
        "base64": base64.b64encode(good),
        "zeros": bytes(len(good)),
        "no time": _changed(good, b"\x17\x0d", b"\x04\x0d"),
        "an extension twice": _changed(two, _oid("1.2.3.4"), _oid("1.2.3.5")),
        "an extension of another form": _changed(good, _oid("2.5.29.14"), _oid("2.5.29.35")),
        "a year 0": _changed(late, b"99991231235959Z", b"00000101000000Z"),
        "an RSA key of zeros": _changed(good, modulus, bytes(257)),
        "too long": good + bytes(MAX_DER),
    }[kind]
    assert Certificate.load(good).der == good
    with pytest.raises(ValueError, match=r"^(not a certificate|not read): "):
        Certificate.load(bad)


def test_bytes_changed_anywhere_are_read_or_refused_and_nothing_else() -> None:
    good = pki.good()[0].der
    outcomes = set()
    for place in range(0, len(good), 3):
        for flip in (0x01, 0x80):
            changed = bytearray(good)
            changed[place] ^= flip
            try:
                outcomes.add(bool(repr(Certificate.load(bytes(changed)))))
            except ValueError:
                outcomes.add(False)
    assert outcomes == {True, False}


def test_two_are_equal_when_their_bytes_are() -> None:
    leaf, other = pki.leaf(), pki.leaf()
    assert Certificate.load(bytes(bytearray(leaf.der))) == leaf
    assert len({leaf, Certificate.load(leaf.der), other}) == 2
    assert leaf != leaf.der


def test_pem_goes_in_and_out_in_any_order_with_other_words_between() -> None:
    leaf, inter, root = pki.good()
    text = f"subject=Inter\n{inter.pem()}\r\n# ours\n{root.pem()}{leaf.pem()}"
    csr = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    assert certificates_in((csr + text.replace("\n", "\r\n")).encode(), "F") == (inter, root, leaf)
    judged = x509.load_pem_x509_certificates(text.encode())
    assert [item.public_bytes(Encoding.DER) for item in judged] == [inter.der, root.der, leaf.der]


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_pem_file_with_a_private_key_is_refused_without_showing_it(form: PrivateFormat) -> None:
    key = pki.rsa_key().private_bytes(Encoding.PEM, form, NoEncryption()).decode()
    with pytest.raises(ConfigurationError, match="private key") as caught:
        certificates_in((pki.leaf().pem() + key).encode(), "F")
    assert all(line not in str(caught.value) for line in key.splitlines()[1:-1])
    with pytest.raises(ConfigurationError, match="private key"):
        certificates_in(key[:200].encode(), "F")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no certificate"),
        ("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "no certificate"),
        ("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n", "1 in it is not base64"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "1 in it is not a cert"),
    ],
)
def test_a_pem_file_that_is_broken_is_named_by_the_place(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        certificates_in(text.encode(), "F")


def test_the_repr_is_short_and_says_whose_it_is() -> None:
    leaf = pki.leaf()
    assert repr(leaf) == f"<Certificate {leaf.subject!r} sha256={leaf.sha256[:16]}…>"
