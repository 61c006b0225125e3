"""
Public keys and signatures of certificates: their algorithms and parameters. Nothing is verified.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hsmtoll import der
from hsmtoll.jws import RsaPublicKey

__all__ = ["MAX_EXPONENT", "MAX_MODULUS", "Pss", "Signature", "public_key", "signature"]

#: Bits of an RSA key's modulus and exponent; verifying takes time in proportion to the exponent's
#: and to the square of the modulus'.
MAX_MODULUS: Final = 8192
MAX_EXPONENT: Final = 64

_CURVE: Final = {
    "1.2.840.10045.3.1.1": ("P-192", 192),
    "1.3.132.0.33": ("P-224", 224),
    "1.2.840.10045.3.1.7": ("P-256", 256),
    "1.3.132.0.34": ("P-384", 384),
    "1.3.132.0.35": ("P-521", 521),
    "1.3.132.0.10": ("secp256k1", 256),
    "1.3.36.3.3.2.8.1.1.7": ("brainpoolP256r1", 256),
    "1.3.36.3.3.2.8.1.1.11": ("brainpoolP384r1", 384),
    "1.3.36.3.3.2.8.1.1.13": ("brainpoolP512r1", 512),
}
_EDWARDS: Final = {"1.3.101.112": ("ed25519", 256), "1.3.101.113": ("ed448", 456)}
_RSA: Final = {"1.2.840.113549.1.1.1": "rsa", "1.2.840.113549.1.1.10": "rsa-pss"}
_EC: Final = "1.2.840.10045.2.1"

_SCHEME: Final = {
    "1.2.840.113549.1.1.4": ("pkcs1v15", "md5"),
    "1.2.840.113549.1.1.5": ("pkcs1v15", "sha1"),
    "1.2.840.113549.1.1.11": ("pkcs1v15", "sha256"),
    "1.2.840.113549.1.1.12": ("pkcs1v15", "sha384"),
    "1.2.840.113549.1.1.13": ("pkcs1v15", "sha512"),
    "1.2.840.113549.1.1.14": ("pkcs1v15", "sha224"),
    "1.2.840.10045.4.1": ("ecdsa", "sha1"),
    "1.2.840.10045.4.3.1": ("ecdsa", "sha224"),
    "1.2.840.10045.4.3.2": ("ecdsa", "sha256"),
    "1.2.840.10045.4.3.3": ("ecdsa", "sha384"),
    "1.2.840.10045.4.3.4": ("ecdsa", "sha512"),
    "1.3.101.112": ("ed25519", ""),
    "1.3.101.113": ("ed448", ""),
}
_PSS: Final = "1.2.840.113549.1.1.10"
_MGF1: Final = "1.2.840.113549.1.1.8"
_DIGEST: Final = {
    "1.3.14.3.2.26": "sha1",
    "2.16.840.1.101.3.4.2.4": "sha224",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}


class Signature(NamedTuple):
    """
    How a certificate was signed. *Not verified* here.

    *scheme*: ``pkcs1v15 pss ecdsa ed25519 ed448``, or ``unknown``, also
    when the two places that name the algorithm disagree (RFC 5280 section 4.1.1.2).
    *digest*: ``sha256`` …, empty where the scheme has its own. *salt* is in bytes.
    """

    scheme: str
    digest: str
    mask_digest: str
    salt: int
    value: bytes


class Pss(NamedTuple):
    """
    RSASSA-PSS parameters (RFC 4055 section 3.1). A digest is empty where it is not known here;
    for a key, *salt* is the least number of bytes.
    """

    digest: str
    mask_digest: str
    salt: int


def public_key(spki: bytes) -> tuple[str, int, RsaPublicKey | None, Pss | None]:
    """Type, bits, the RSA key if it is one, and what an RSASSA-PSS key is restricted to."""
    algorithm, key = der.parts(spki)
    name, *parameters = der.parts(algorithm)
    oid, raw = der.oid(name), der.content(key, der.BIT_STRING)[1:]
    if oid in _RSA:
        # A modulus without its leading zero is read as everybody else reads it: as positive.
        modulus, exponent = (
            int.from_bytes(der.content(each, der.INTEGER), "big") for each in der.parts(raw)
        )
        if not (modulus and exponent):
            raise ValueError("its RSA key is not made of positive numbers")
        for what, value, most in (
            ("its RSA key", modulus, MAX_MODULUS),
            ("the exponent of its RSA key", exponent, MAX_EXPONENT),
        ):
            if value.bit_length() > most:
                raise ValueError(f"{what} has {value.bit_length()} bits, more than {most}")
        restricted = _RSA[oid] == "rsa-pss" and parameters
        pss = _pss(parameters[0]) if restricted else None
        return _RSA[oid], modulus.bit_length(), RsaPublicKey(modulus, exponent), pss
    if oid == _EC:
        curve = parameters[0] if parameters else b""
        if curve[:1] != bytes([der.OID]):
            return "ec", 8 * (len(raw) // 2), None, None
        named = der.oid(curve)
        known, bits = _CURVE.get(named, (named, 8 * (len(raw) // 2)))
        return f"ec:{known}", bits, None, None
    known, bits = _EDWARDS.get(oid, (oid, 8 * len(raw)))
    return known, bits, None, None


def signature(fields: der.CertificateFields) -> Signature:
    """How the certificate was signed, and the signature itself; not verified."""
    value = der.content(fields.signature, der.BIT_STRING)[1:]
    unknown = Signature("unknown", "", "", 0, value)
    if fields.signature_algorithm != fields.algorithm:
        return unknown
    name, *parameters = der.parts(fields.algorithm)
    oid = der.oid(name)
    if oid != _PSS:
        scheme, digest = _SCHEME.get(oid, ("unknown", ""))
        return Signature(scheme, digest, digest, 0, value)
    # RFC 4055 section 3.1: in a signature they must be present.
    pss = _pss(parameters[0]) if parameters else None
    if pss is None or not (pss.digest and pss.mask_digest):
        return unknown
    return Signature("pss", pss.digest, pss.mask_digest, pss.salt, value)


def _pss(parameters: bytes) -> Pss:
    """RFC 4055 section 3.1; a digest is empty where the algorithm is not known here."""
    try:
        given = {each[0]: der.content(each, each[0]) for each in der.parts(parameters)}
        digest = mask_digest = "sha1"
        if 0xA0 in given:
            digest = _DIGEST.get(der.oid(der.parts(given[0xA0])[0]), "")
        if 0xA1 in given:
            function, inner = der.parts(given[0xA1])
            known = der.oid(function) == _MGF1
            mask_digest = _DIGEST.get(der.oid(der.parts(inner)[0]), "") if known else ""
        salt = der.number(given[0xA2]) if 0xA2 in given else 20
        # The trailer field has one value, and its DER encoding is to be absent.
        odd = 0xA3 in given and der.number(given[0xA3]) != 1
    except (ValueError, IndexError):
        return Pss("", "", 0)
    if odd or salt < 0 or given.keys() - {0xA0, 0xA1, 0xA2, 0xA3}:
        return Pss("", "", 0)
    return Pss(digest, mask_digest, salt)
