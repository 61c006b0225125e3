"""
A certificate is the bytes that it came in: whatever their number and their form, what was signed
is proven over the slice that stands there, and openssl says the same.
"""

from __future__ import annotations

import re
import time

import pytest
from asn1crypto import core
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from hsmtoll import der
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.names import MAX_NAME
from hsmtoll.x509.path_building import build
from tests.kit import pki
from tests.kit.hostile import certificate_of, rsa_spki
from tests.kit.pki import NOW

#: As EU issuers write it: not a URI, and encoded otherwise by those who encode it anew.
LDAP = "ldap://ldap.tillit.example/CN=Tillit CA,O=Tillit AB?certificateRevocationList"


def _points() -> x509.CRLDistributionPoints:
    return x509.CRLDistributionPoints(
        [x509.DistributionPoint([x509.UniformResourceIdentifier(LDAP)], None, None, None)]
    )


def _padded(filler: int) -> Certificate:
    """A leaf with an extension of *filler* bytes, whose keyUsage has more bits than it needs."""
    more = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), bytes(filler))
    usage = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.15"), b"\x03\x02\x00\x80")
    return pki.leaf(extensions=[(_points(), False), (usage, True), (more, False)], key_usage=None)


def _of_length(size: int) -> Certificate:
    """A leaf whose tbsCertificate has *size* bytes of content."""
    made = _padded(0)
    for _ in range(4):
        missing = size - len(der.content(made.tbs, der.SEQUENCE))
        if not missing:
            break
        filler = len(_filler(made)) + missing
        made = _padded(filler)
    return made


def _filler(certificate: Certificate) -> bytes:
    judge = x509.load_der_x509_certificate(certificate.der)
    found = judge.extensions.get_extension_for_oid(ObjectIdentifier("1.2.3.4")).value
    assert isinstance(found, x509.UnrecognizedExtension)
    return found.value


def test_one_changed_byte_of_a_certificate_of_such_a_length_is_seen() -> None:
    leaf = _of_length(0x380)
    _, inter, root = pki.good()
    raw = bytearray(leaf.der)
    raw[leaf.der.index(b"tillit.example") + 2] ^= 1
    forged = Certificate.load(bytes(raw))
    assert build(forged, [root, inter], now=NOW).certificates == (forged,)


def test_names_and_keys_of_128_bytes_are_the_slices_that_stand_there() -> None:
    for size in range(90, 140):
        leaf = pki.issue(
            x509.Name(
                [
                    x509.NameAttribute(NameOID.LOCALITY_NAME, "Ø" * (size // 4)),
                    x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "x" * (size - size // 2)),
                ]
            ),
            pki.rsa_key(),
            pki.name("Inter"),
            pki.ec_key(1),
        )
        fields = der.certificate_fields(leaf.der)
        judge = x509.load_der_x509_certificate(leaf.der)
        assert fields.subject == judge.subject.public_bytes()
        assert fields.issuer == judge.issuer.public_bytes()
        assert leaf.spki_der == fields.spki == pki.spki(pki.rsa_key())


def _resigned(of: Certificate, old: bytes, new: bytes, key: rsa.RSAPrivateKey) -> Certificate:
    """*of* with *old* replaced by *new*, all lengths made right, and signed by *key* again."""
    fields = der.certificate_fields(of.der)
    assert old in fields.tbs
    parts = [_replaced(each, old, new) for each in der.parts(fields.tbs)]
    tbs = _value(0x30, b"".join(parts))
    signature = key.sign(tbs, padding.PKCS1v15(), hashes.SHA256())
    return Certificate.load(
        _value(0x30, tbs + fields.signature_algorithm + _value(3, b"\0" + signature))
    )


def _replaced(value: bytes, old: bytes, new: bytes) -> bytes:
    if value == old or old not in value:
        return new if value == old else value
    body = der.content(value, value[0])
    if value[0] == der.INTEGER:
        return _value(der.INTEGER, body.replace(old, new))
    if value[0] == der.BIT_STRING:
        return _value(value[0], body[:1] + _replaced(body[1:], old, new))
    return _value(value[0], b"".join(_replaced(each, old, new) for each in der.values(body)))


def _value(tag: int, body: bytes) -> bytes:
    if len(body) < 0x80:
        return bytes((tag, len(body))) + body
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + body


def test_a_certificate_for_a_key_nobody_knows_is_read() -> None:
    spki, strange = "1.2.840.113549.1.1.1", "1.2.840.113549.1.1.99"
    leaf = _resigned(pki.leaf(), _oid(spki), _oid(strange), pki.rsa_key(1))
    assert (leaf.key_type, leaf.public_key) == (strange, None)


def _oid(dotted: str) -> bytes:
    value: bytes = core.ObjectIdentifier(dotted).dump()  # type: ignore[no-untyped-call]  # asn1crypto has no types
    assert der.oid(value) == dotted
    return value


@pytest.mark.parametrize(
    "dotted", ["2.5.4.97", "1.3.6.1.5.5.7.48.1", "0.9.2342.19200300.100.1.25", "2.999.3", "1.39"]
)
def test_object_identifiers_are_read_as_others_read_them(dotted: str) -> None:
    assert der.oid(_oid(dotted)) == dotted


@pytest.mark.parametrize(
    "raw", [b"\x06\x00", b"\x06\x01\x80", b"\x06\x81\x82" + b"\x81" * 129 + b"\x01", b"\x05\x00"]
)
def test_what_is_no_object_identifier_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"identifier|kind"):
        der.oid(raw)


# ----- extensions that inform


@pytest.mark.parametrize(
    ("oid", "raw"),
    [
        pytest.param("1.3.6.1.5.5.7.1.3", b"\x30\x06\x06\x04\x00\x8e\x46\x01", id="one statement"),
        pytest.param("1.3.6.1.5.5.7.1.3", b"\x04\x00", id="statements of another form"),
        pytest.param("1.3.6.1.5.5.7.1.1", b"\x30\x03\x30\x01\x06", id="AIA"),
        pytest.param("2.5.29.31", b"\x30\x02\x0c\x00", id="CRL points"),
        pytest.param("2.5.29.32", b"\x30\x80\x00\x00", id="policies without a length"),
        pytest.param("2.5.29.35", b"\x0c\x00", id="authority key identifier"),
        pytest.param("2.5.29.14", b"", id="subject key identifier"),
    ],
)
def test_a_malformed_extension_that_informs_leaves_the_certificate_readable(
    oid: str, raw: bytes
) -> None:
    bad = x509.UnrecognizedExtension(ObjectIdentifier(oid), raw)
    leaf = pki.leaf(extensions=[(bad, False)], key_ids=False)
    assert leaf.unreadable == {oid}
    assert leaf.unknown_critical == ()
    _, inter, root = pki.good()
    assert build(leaf, [inter, root], now=NOW).complete
    # Critical, and not understood: whoever must obey it cannot.
    assert pki.leaf(extensions=[(bad, True)], key_ids=False).unknown_critical == (oid,)
    assert pki.leaf().unreadable == frozenset()


def test_a_bad_member_hides_no_other() -> None:
    good = _points().public_bytes()
    both = _value(0x30, b"\x0c\x00" + der.content(good, 0x30))
    bad = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.31"), both)
    leaf = pki.leaf(extensions=[(bad, False)])
    assert leaf.crl_urls == (LDAP,)
    assert leaf.unreadable == {"2.5.29.31"}


@pytest.mark.parametrize("oid", ["2.5.29.15", "2.5.29.19", "2.5.29.30"])
def test_a_malformed_extension_that_decides_makes_it_unreadable_in_words_of_ours(oid: str) -> None:
    bad = x509.UnrecognizedExtension(ObjectIdentifier(oid), b"\x0c\x01x")
    with pytest.raises(ValueError, match=r"^not a certificate: ") as caught:
        pki.leaf(extensions=[(bad, False)], ca=None, key_usage=None)
    assert not re.search(r"hsmtoll|asn1crypto|_[A-Z]|method", str(caught.value))


def test_a_name_that_is_no_text_is_compared_as_bytes() -> None:
    leaf = pki.leaf()
    at = leaf.der.rindex(b"\x0c", 0, leaf.der.index(b"Example AB"))
    odd = Certificate.load(leaf.der[: at + 2] + b"\xff" + leaf.der[at + 3 :])
    assert odd.organization_name is None
    assert "O=#0c" in odd.subject


# ----- what costs


def test_names_are_bounded_and_the_bound_is_above_what_issuers_write() -> None:
    def named(size: int) -> Certificate:
        return pki.leaf(subject=pki.name("A", org="\u0316" * size))

    assert named(MAX_NAME).organization_name is not None
    with pytest.raises(ValueError, match=f"O in a name has 257 characters, more than {MAX_NAME}"):
        named(MAX_NAME + 1)


def test_sixty_kilobytes_of_combining_marks_cost_next_to_nothing() -> None:
    marks = "".join("\u0316\u0300"[n % 2] for n in range(30_000))
    tbs = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, marks, _validate=False)])
    began = time.process_time()
    with pytest.raises(ValueError, match="30000 characters"):
        pki.issue(tbs, pki.rsa_key(), pki.name("B"), pki.ec_key())
    # The square of its length would be seconds; this is no measurement, the bound is far away.
    assert time.process_time() - began < 60


def test_an_exponent_of_more_than_64_bits_is_refused() -> None:
    public = pki.rsa_key().public_key().public_numbers()
    leaf = pki.leaf()
    old = b"\x01\x00\x01"
    for exponent, refused in ((b"\x00" + b"\xff" * 8, False), (b"\x01" + b"\xff" * 8, True)):
        modulus = public.n.to_bytes(256, "big")
        numbers = _value(0x30, _value(2, b"\0" + modulus) + _value(2, old))
        changed = _value(0x30, _value(2, b"\0" + modulus) + _value(2, exponent))
        if refused:
            with pytest.raises(ValueError, match="exponent of its RSA key has 65 bits"):
                _resigned(leaf, numbers, changed, pki.rsa_key(1))
            continue
        assert _resigned(leaf, numbers, changed, pki.rsa_key(1)).public_key is not None


def test_a_modulus_of_more_than_8192_bits_is_refused() -> None:
    def with_modulus(size: int) -> bytes:
        return certificate_of(spki=rsa_spki(b"\0" + b"\xff" * size, b"\x01\0\x01"))

    assert Certificate.load(with_modulus(1024)).key_bits == 8192
    with pytest.raises(ValueError, match="its RSA key has 8200 bits, more than 8192"):
        Certificate.load(with_modulus(1025))


def test_a_certificate_nested_without_end_is_refused() -> None:
    body = b""
    for _ in range(2_000):
        body = _value(0x30, body)
    with pytest.raises(ValueError, match="nested deeper"):
        Certificate.load(body)


# ----- who may issue


def test_a_root_of_version_1_ends_a_chain_that_its_own_signature_proves() -> None:
    key = pki.rsa_key(1)
    root = _version_1(pki.authority("Root", key, key_ids=False), key)
    assert (root.version, root.is_ca) == (1, False)
    leaf = pki.issue(pki.name("A"), pki.rsa_key(), pki.name("Root"), key)
    found = build(leaf, [root], now=NOW)
    assert (found.certificates, found.complete) == ((leaf, root), True)
    # Of version 1, but issued by another, or not signed by itself: nobody says that it is a CA.
    for wrong in (
        _version_1(pki.authority("Root", key, "Above", pki.rsa_key(2), key_ids=False), key),
        _version_1(pki.authority("Root", key, key_ids=False), pki.rsa_key(2)),
    ):
        assert build(leaf, [wrong], now=NOW).certificates == (leaf,)


def _version_1(of: Certificate, key: rsa.RSAPrivateKey) -> Certificate:
    fields = der.certificate_fields(of.der)
    _, *kept, _ = der.parts(fields.tbs)
    algorithm = pki.authority("Any", pki.rsa_key(), key_ids=False).tbs
    named = der.certificate_fields(pki.authority("Any", pki.rsa_key()).der).algorithm
    assert algorithm
    kept[1] = named
    tbs = _value(0x30, b"".join(kept))
    signature = key.sign(tbs, padding.PKCS1v15(), hashes.SHA256())
    return Certificate.load(_value(0x30, tbs + named + _value(3, b"\0" + signature)))


def test_directory_names_in_the_alternative_name_are_held_to_the_constraints() -> None:
    acme = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme")]))
    other = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Other")]))
    key = pki.ec_key(1)
    for permitted, excluded, named, fine in (
        ([acme], None, acme, True),
        ([acme], None, other, False),
        (None, [other], acme, True),
        (None, [other], other, False),
    ):
        constraints = x509.NameConstraints(permitted, excluded)
        ca = pki.authority("CA", key, extensions=[(constraints, True)])
        subject = pki.name(org="Acme")
        alternative = x509.SubjectAlternativeName([x509.DNSName("a.example"), named])
        leaf = pki.issue(
            subject, pki.rsa_key(), pki.name("CA"), key, extensions=[(alternative, False)]
        )
        assert build(leaf, [ca], now=NOW).complete is fine
    # One that cannot be read may hold anything.
    bad = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\x0c\x00")
    leaf = pki.issue(subject, pki.rsa_key(), pki.name("CA"), key, extensions=[(bad, False)])
    assert not build(leaf, [ca], now=NOW).complete
    assert build(leaf, [pki.authority("CA", key)], now=NOW).complete
