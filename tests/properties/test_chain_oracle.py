"""
PKIs as data; the chain compared with an enumeration of every path.

The oracle is written from the rules with `cryptography.x509` and shares no code with
`hsmtoll.x509.path_building`. Then openssl and pyhanko-certvalidator get our path, and nothing else.
"""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from asn1crypto import x509 as asn1
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.name import _ASN1Type
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pyhanko_certvalidator import ValidationContext
from pyhanko_certvalidator.authority import CertTrustAnchor
from pyhanko_certvalidator.path import ValidationPath
from pyhanko_certvalidator.validate import async_validate_path

from hsmtoll.errors import CertificateError
from hsmtoll.x509.path_building import MAX_DEPTH, build
from tests.kit import pki
from tests.kit.pki import DAY, NOW, ec_key, name, rsa_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from hsmtoll.x509.certificate import Certificate

# ----- PKIs as data -----------------------------------------------------------------------

NAMES = 4
SPELLINGS = (
    ("CA {}", _ASN1Type.UTF8String),
    ("ca  {}", _ASN1Type.PrintableString),
    ("CA {} ", _ASN1Type.UTF8String),
)


@dataclass(frozen=True)
class Made:
    """One certificate as data; *key* and *signer* are numbers of keys, the rest of names."""

    subject: int
    key: int
    issuer: int
    signer: int
    spelling: int = 0
    ca: bool = True
    sign: bool = True
    path_length: int | None = None
    life: int = 2
    pss: bool = False


@lru_cache
def _key(number: int) -> pki.Key:
    if number == NAMES:
        return ed25519.Ed25519PrivateKey.generate()
    return rsa_key(7) if number == 3 else ec_key(number)


def _name(number: int, spelling: int) -> x509.Name:
    pattern, kind = SPELLINGS[spelling]
    return name(pattern.format(number), kind=kind)


@cache
def _made(made: Made) -> Certificate:
    end = {0: NOW - DAY, 1: NOW + DAY}.get(made.life, NOW + made.life * 10 * DAY)
    return pki.issue(
        _name(made.subject, made.spelling),
        _key(made.key),
        _name(made.issuer, (made.spelling + made.subject) % len(SPELLINGS)),
        _key(made.signer),
        ca=made.ca,
        path_length=made.path_length if made.ca else None,
        key_usage=pki.usage("key_cert_sign") if made.sign else pki.usage("crl_sign"),
        end=end,
        pss=made.pss and isinstance(_key(made.signer), rsa.RSAPrivateKey),
    )


@lru_cache
def _leaf(issuer: int) -> Certificate:
    return pki.issue(name("Leaf"), rsa_key(), _name(issuer, 0), _key(issuer))


rarely = st.integers(0, 11).map(lambda drawn: drawn == 0)


@st.composite
def _certificates(draw: st.DrawFn) -> Made:
    subject = draw(st.integers(0, NAMES - 1))
    issuer = draw(st.integers(0, NAMES - 1))
    return Made(
        subject=subject,
        key=NAMES if draw(rarely) else subject,
        issuer=issuer,
        signer=draw(st.integers(0, NAMES)) if draw(rarely) else issuer,
        spelling=draw(st.integers(0, len(SPELLINGS) - 1)),
        ca=not draw(rarely),
        sign=not draw(rarely),
        path_length=draw(st.sampled_from([None, None, None, 0, 1, 2])),
        life=draw(st.sampled_from([0, 1, 2, 2, 2, 3])),
        pss=draw(rarely),
    )


# ----- the oracle -------------------------------------------------------------------------


def _canonical(certificate_name: x509.Name) -> tuple[tuple[str, str], ...]:
    return tuple(
        (item.oid.dotted_string, " ".join(str(item.value).split()).casefold())
        for item in certificate_name
    )


def _made_the_signature(issuer: x509.Certificate, subject: x509.Certificate) -> bool:
    key = issuer.public_key()
    how: Any = subject.signature_algorithm_parameters
    signature, signed = subject.signature, subject.tbs_certificate_bytes
    try:
        if isinstance(key, rsa.RSAPublicKey) and how is not None:
            digest = subject.signature_hash_algorithm
            assert digest is not None
            key.verify(signature, signed, how, digest)
        elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(how, ec.ECDSA):
            key.verify(signature, signed, how)
        elif isinstance(key, ed25519.Ed25519PublicKey) and how is None:
            key.verify(signature, signed)
        else:
            return False
    except (InvalidSignature, TypeError):
        return False
    return True


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _sha256(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import hashes

    return certificate.fingerprint(hashes.SHA256()).hex()


class Oracle:
    """Every path, by the rules, one after the other."""

    def __init__(self, pool: Sequence[x509.Certificate], pin: str | None) -> None:
        self.pool, self.pin = pool, pin

    def is_root(self, certificate: x509.Certificate) -> bool:
        if _sha256(certificate) == self.pin:
            return True
        same = _canonical(certificate.subject) == _canonical(certificate.issuer)
        return same and _made_the_signature(certificate, certificate)

    def may_follow(self, issuer: x509.Certificate, path: Sequence[x509.Certificate]) -> bool:
        last = path[-1]
        if _canonical(issuer.subject) != _canonical(last.issuer):
            return False
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        if not constraints.ca or not usage.key_cert_sign:
            return False
        for passed in path:
            if _canonical(passed.subject) == _canonical(issuer.subject) and (
                _public(passed) == _public(issuer)
            ):
                return False
        between = [c for c in path[1:] if _canonical(c.subject) != _canonical(c.issuer)]
        if constraints.path_length is not None and len(between) > constraints.path_length:
            return False
        return _made_the_signature(issuer, last)

    def paths(self, path: tuple[x509.Certificate, ...]) -> Iterator[tuple[x509.Certificate, ...]]:
        further = []
        if not self.is_root(path[-1]) and len(path) < MAX_DEPTH:
            further = [issuer for issuer in self.pool if self.may_follow(issuer, path)]
        if not further:
            yield path
        for issuer in further:
            yield from self.paths((*path, issuer))

    def best(
        self, leaf: x509.Certificate, now: datetime, preferred: frozenset[str]
    ) -> tuple[x509.Certificate, ...]:
        paths = list(self.paths((leaf,)))
        event(f"paths: {min(len(paths), 5)}{'+' * (len(paths) > 4)}")
        for wanted in (
            lambda path: _sha256(path[-1]) == self.pin,
            lambda path: all(c.not_valid_before_utc <= now <= c.not_valid_after_utc for c in path),
            lambda path: self.is_root(path[-1]),
            lambda path: len([c for c in path if _sha256(c) in preferred]),
            lambda path: min(c.not_valid_after_utc for c in path),
            lambda path: -len(path),
        ):
            most: Any = max(map(wanted, paths))
            paths = [path for path in paths if wanted(path) == most]
        return min(paths, key=lambda path: [_sha256(c) for c in path])


# ----- the claims -------------------------------------------------------------------------


@given(
    made=st.lists(_certificates(), min_size=4, max_size=9, unique=True),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_chain_is_the_one_that_an_enumeration_of_every_path_picks(
    made: list[Made], data: st.DataObject
) -> None:
    leaf, pool = _leaf(0), [_made(item) for item in made]
    prints = [certificate.sha256 for certificate in pool]
    preferred = data.draw(st.frozensets(st.sampled_from(prints)))
    pin = data.draw(st.sampled_from([*([None] * 9), *prints]))
    oracle = Oracle([x509.load_der_x509_certificate(c.der) for c in pool], pin)
    wanted = oracle.best(x509.load_der_x509_certificate(leaf.der), NOW, preferred)
    shuffled = data.draw(st.permutations(pool))
    if pin is not None and _sha256(wanted[-1]) != pin:
        event("the pinned root is not reached")
        with pytest.raises(CertificateError) as caught:
            build(leaf, shuffled, now=NOW, root_sha256=pin, preferred=preferred)
        assert caught.value.code == "chain-pin"
        return
    chain = build(leaf, shuffled, now=NOW, root_sha256=pin, preferred=preferred)
    assert [c.sha256 for c in chain.certificates] == [_sha256(c) for c in wanted]
    assert chain.complete == oracle.is_root(wanted[-1])
    assert not chain.cut_short
    if chain.complete and len(wanted) > 1 and all(c.valid_at(NOW) for c in chain.certificates):
        event(f"judged with {len(wanted)} certificates")
        assert _openssl_accepts(chain.certificates)
        assert _certvalidator_accepts(chain.certificates)


def test_the_judges_refuse_what_is_no_path() -> None:
    """The control: without it, judges that accept everything would prove nothing."""
    leaf, inter, root = pki.good()
    other = pki.authority("Root", ec_key(3))
    alike = pki.authority("Inter", ec_key(1), "Root", ec_key(0), ca=False)
    assert _openssl_accepts((leaf, inter, root))
    assert _certvalidator_accepts((leaf, inter, root))
    for path in ((leaf, root), (leaf, inter, other), (leaf, alike, root)):
        assert not _openssl_accepts(path)
        assert not _certvalidator_accepts(path)


def _openssl_accepts(path: Sequence[Certificate]) -> bool:
    leaf, *between, root = path
    with TemporaryDirectory() as where:
        files = {"leaf": [leaf], "between": between, "root": [root]}
        for stem, certificates in files.items():
            Path(where, stem).write_text("".join(c.pem() for c in certificates), encoding="ascii")
        command = ["openssl", "verify", "-partial_chain", "-no-CApath", "-no-CAstore"]
        command += ["-x509_strict", "-attime", f"{NOW.timestamp():.0f}", "-CAfile", "root"]
        command += ["-untrusted", "between"] if between else []
        done = subprocess.run([*command, "leaf"], cwd=where, check=False, capture_output=True)
        return done.returncode == 0


def _certvalidator_accepts(path: Sequence[Certificate]) -> bool:
    leaf, *between, root = [_asn1(c.der) for c in path]
    context = ValidationContext(
        trust_roots=[root], other_certs=between, moment=NOW, allow_fetching=False
    )
    # It wants the way down: from below the anchor to above the leaf.
    whole = ValidationPath(CertTrustAnchor(root), between[::-1], leaf)
    try:
        asyncio.run(async_validate_path(context, whole))
    except Exception as exc:
        if type(exc).__module__.startswith("pyhanko_certvalidator"):
            return False
        raise
    return True


def _asn1(der: bytes) -> asn1.Certificate:
    loader: Any = asn1.Certificate
    loaded: asn1.Certificate = loader.load(der)
    return loaded
