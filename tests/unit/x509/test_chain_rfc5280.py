"""What RFC 5280 refuses and openssl with it; and what it leaves to be preferred."""

from __future__ import annotations

import re

import pytest
from cryptography import x509
from cryptography.x509.oid import ObjectIdentifier

from hsmtoll.errors import CertificateError, ConfigurationError
from hsmtoll.x509.certificate import Certificate
from hsmtoll.x509.certificate_files import bundle_in
from hsmtoll.x509.path_building import build
from tests.kit import pki
from tests.kit.pki import DAY, NOW, authority, ec_key, leaf, name

LATE = NOW + 1000 * DAY
ODD = (x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)


def _not(country: str) -> tuple[x509.NameConstraints, bool]:
    """A critical extension: no name of this country."""
    return x509.NameConstraints(None, [x509.DirectoryName(name(country=country))]), True


@pytest.mark.parametrize("extension", [ODD, _not("SE")])
def test_a_ca_that_rfc_5280_refuses_gives_way(extension: tuple[x509.ExtensionType, bool]) -> None:
    first = leaf(end=LATE)
    bad = authority("Inter", ec_key(1), "Root", ec_key(0), extensions=[extension], end=LATE)
    good = authority("Inter", ec_key(1), "Other", ec_key(2))
    roots = authority("Root", ec_key(0), end=LATE), authority("Other", ec_key(2))
    assert build(first, [bad, good, *roots], now=NOW).certificates == (first, good, roots[1])
    assert build(first, [bad, *roots], now=NOW).certificates == (first,)
    # The control: the same constraint for another country is none.
    if extension is not ODD:
        fine = authority("Inter", ec_key(1), "Root", ec_key(0), extensions=[_not("DK")], end=LATE)
        assert build(first, [fine, good, *roots], now=NOW).certificates[1] == fine


def test_the_leaf_cannot_be_pinned_as_its_own_root() -> None:
    first, inter, root = pki.good()
    with pytest.raises(CertificateError) as caught:
        build(first, [inter, root], now=NOW, root_sha256=first.sha256)
    assert caught.value.code == "chain-pin"


@pytest.mark.parametrize("given", ["key identifiers", "a file"])
def test_the_bound_is_not_spent_on_those_that_lead_nowhere(given: str) -> None:
    """3,600 pairs bear the right names; what hints or a person say is looked at first."""
    ids = given == "key identifiers"
    root = authority("Root", ec_key(0))
    inter = authority("Inter", ec_key(1), "Root", ec_key(0), key_ids=ids)
    pool = [authority("Root", ec_key(100 + n)) for n in range(59)]
    pool += [authority("Inter", ec_key(1), "Root", ec_key(300 + n), key_ids=ids) for n in range(59)]
    named = frozenset(each.sha256 for each in (inter, root) if not ids)
    first = leaf()
    chain = build(first, [*pool, inter, root], now=NOW, preferred=named)
    assert chain.certificates == (first, inter, root)


def _sequence(content: bytes) -> bytes:
    return b"\x30\x82" + len(content).to_bytes(2, "big") + content


_DER = pki.leaf().der
_BODY = _DER[4:]
_UTC = re.compile(rb"\x17\x0d[0-9]{12}Z")


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(_sequence(_BODY + b"\x04\x01x"), id="a fourth field"),
        pytest.param(b"\x30\x83\0" + _DER[2:], id="a length in a longer form"),
        pytest.param(b"\x30\x80" + _BODY + b"\0\0", id="no length"),
        pytest.param(_sequence(b"\x30\x83\0" + _BODY[2:]), id="a longer form inside"),
        pytest.param(_UTC.sub(b"\x17\x0d2501010000+01", _DER, count=1), id="a time with an offset"),
        pytest.param(_DER[:1], id="a tag alone"),
    ],
)
def test_what_is_not_der_is_refused(changed: bytes) -> None:
    assert Certificate.load(_sequence(_BODY)).der == _DER
    with pytest.raises(ValueError, match="not a certificate"):
        Certificate.load(changed)


def test_a_pem_file_that_ends_too_early_is_named_and_long_ones_are_linear() -> None:
    first, inter, _ = pki.good()
    found = bundle_in((first.pem() + inter.pem()[:-40]).encode(), "F")
    assert found.certificates == (first,)
    assert [(each.where, each.why) for each in found.unreadable] == [
        ("certificate 2 in F", "cut off: it has no end")
    ]
    with pytest.raises(ConfigurationError, match="more than 2000 certificates"):
        bundle_in(b"-----BEGIN CERTIFICATE-----\n" * 200_000, "F")
