"""The JWS floor, judged by an independent JOSE library."""

from __future__ import annotations

import json

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from joserfc import jws as jose
from joserfc.jwk import RSAKey

from hsmtoll import jws
from hsmtoll.jws import RsaPublicKey

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "RS256": hashes.SHA256(),
    "RS384": hashes.SHA384(),
    "RS512": hashes.SHA512(),
}


@pytest.fixture(scope="module")
def private() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def public(private: rsa.RSAPrivateKey) -> RsaPublicKey:
    numbers = private.public_key().public_numbers()
    return RsaPublicKey(numbers.n, numbers.e)


def _pem(private: rsa.RSAPrivateKey) -> str:
    return (
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


@pytest.mark.parametrize("alg", jws.ALGS)
def test_a_jose_library_takes_what_is_assembled_here(alg: str, private: rsa.RSAPrivateKey) -> None:
    unsigned = jws.signing_input({"alg": alg}, {"aud": "https://x/", "iat": 1})
    signature = private.sign(unsigned, padding.PKCS1v15(), _HASHES[alg])
    compact = jws.compact(unsigned, signature)

    taken = jose.deserialize_compact(compact, RSAKey.import_key(_pem(private)), algorithms=[alg])

    assert json.loads(taken.payload) == {"aud": "https://x/", "iat": 1}
    header, claims = jws.read_unverified(compact)
    assert (header, claims) == ({"alg": alg}, {"aud": "https://x/", "iat": 1})


@pytest.mark.parametrize("alg", jws.ALGS)
def test_a_signature_is_accepted_and_a_changed_bit_is_not(
    alg: str, private: rsa.RSAPrivateKey, public: RsaPublicKey
) -> None:
    unsigned = jws.signing_input({"alg": alg}, {})
    signature = private.sign(unsigned, padding.PKCS1v15(), _HASHES[alg])

    assert public.verify(alg, unsigned, signature)
    assert not public.verify(alg, unsigned, bytes([signature[0] ^ 1]) + signature[1:])
    assert not public.verify(alg, unsigned + b"x", signature)
    assert not public.verify(alg, unsigned, b"")
    other = jws.ALGS[(jws.ALGS.index(alg) + 1) % 3]
    assert not public.verify(other, unsigned, signature)


@pytest.mark.parametrize("alg", jws.ALGS)
def test_the_digest_info_is_what_the_device_would_have_made(
    alg: str, private: rsa.RSAPrivateKey
) -> None:
    data = b"some signing input"
    info = jws.digest_info(alg, data)
    signature = private.sign(data, padding.PKCS1v15(), _HASHES[alg])

    # The padded block, opened with the public key alone: 00 01 ff… 00 DigestInfo.
    numbers = private.public_key().public_numbers()
    opened = pow(int.from_bytes(signature, "big"), numbers.e, numbers.n).to_bytes(256, "big")
    assert opened.endswith(b"\xff\x00" + info)
    digest = info[-_HASHES[alg].digest_size :]
    hashed = Prehashed(_HASHES[alg])
    private.public_key().verify(signature, digest, padding.PKCS1v15(), hashed)


def test_the_thumbprint_is_that_of_rfc_7638(
    private: rsa.RSAPrivateKey, public: RsaPublicKey
) -> None:
    assert public.thumbprint() == RSAKey.import_key(_pem(private)).thumbprint()
    assert len(public.thumbprint()) == 43


def test_a_key_is_read_from_pem_and_back(private: rsa.RSAPrivateKey, public: RsaPublicKey) -> None:
    assert RsaPublicKey.from_pem(_pem(private)) == public
    loaded = serialization.load_der_public_key(public.spki())
    assert isinstance(loaded, rsa.RSAPublicKey)
    assert loaded.public_numbers() == private.public_key().public_numbers()


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----"]
)
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="PEM"):
        RsaPublicKey.from_pem(text)


@pytest.mark.parametrize(
    "assertion",
    ["", "a.b", "a.b.c.d", "!.e30.x", "e30.!!.x", "W10.e30.x", "e30.W10.x", "e30.eyJhIjo.x"],
)
def test_what_is_no_assertion_is_refused_without_showing_it(assertion: str) -> None:
    with pytest.raises(ValueError, match=r"segments|base64url|object"):
        jws.read_unverified(assertion)
