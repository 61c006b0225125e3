"""Whether a certificate was signed by the key of another one (RFC 5280 section 6.1.3 (a) (1))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

if TYPE_CHECKING:
    from hsmtoll.x509.algorithms import Signature
    from hsmtoll.x509.certificate import Certificate

__all__ = ["is_signed_by"]


def is_signed_by(subject: Certificate, issuer: Certificate, keys: dict[bytes, Any]) -> bool:
    """
    Whether *subject*'s signature verifies with *issuer*'s key, without a broken algorithm.

    *keys*: a cache of loaded keys, by SubjectPublicKeyInfo.
    """
    how = subject.signature
    digests: dict[str, hashes.HashAlgorithm] = {
        "sha224": hashes.SHA224(),
        "sha256": hashes.SHA256(),
        "sha384": hashes.SHA384(),
        "sha512": hashes.SHA512(),
    }
    if issuer == subject:
        # A root's signature over itself adds no trust, and old roots have MD5 or SHA-1.
        digests.update(sha1=hashes.SHA1(), md5=hashes.MD5())  # noqa: S303 - adds no trust
    try:
        if issuer.spki_der not in keys:
            # An RSA key from its numbers, because some SPKIs lack the leading zero of the modulus.
            keys[issuer.spki_der] = (
                rsa.RSAPublicNumbers(
                    issuer.public_key.exponent, issuer.public_key.modulus
                ).public_key()
                if issuer.public_key is not None
                else load_der_public_key(issuer.spki_der)
            )
        match keys[issuer.spki_der], how.scheme:
            case ed25519.Ed25519PublicKey() as key, "ed25519":
                key.verify(how.value, subject.tbs)
            case ed448.Ed448PublicKey() as key, "ed448":
                key.verify(how.value, subject.tbs)
            case ec.EllipticCurvePublicKey() as key, "ecdsa":
                key.verify(how.value, subject.tbs, ec.ECDSA(digests[how.digest]))
            case rsa.RSAPublicKey() as key, "pkcs1v15" if issuer.key_type == "rsa":
                key.verify(how.value, subject.tbs, padding.PKCS1v15(), digests[how.digest])
            case rsa.RSAPublicKey() as key, "pss" if _pss_allowed(issuer, how):
                pss = padding.PSS(padding.MGF1(digests[how.mask_digest]), how.salt)
                key.verify(how.value, subject.tbs, pss, digests[how.digest])
            case _:
                return False
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError, OverflowError):
        return False
    return True


def _pss_allowed(issuer: Certificate, how: Signature) -> bool:
    # RFC 4055 section 3.3: a signature must have the key's digests, and at least its salt length.
    key = issuer.pss
    return key is None or (
        (key.digest, key.mask_digest) == (how.digest, how.mask_digest) and how.salt >= key.salt
    )
